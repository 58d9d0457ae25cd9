"""Batch arithmetic: from what one step reads to the micro-batches of a rank."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from actors.settings import RLRecipe
from launch.plan.roles import Role
from launch.recipe.combinations import Recipe


class Rows(NamedTuple):
    """Sequences that are read at a time (None: of data nobody has counted), those of a mini-batch,
    and how many of them stay together.
    """

    read: int | None
    learned: int
    together: int


@dataclass(frozen=True)
class Load:
    """A forward pass at its largest: padded `tokens` in rows of `longest`, of which `together`
    cannot be parted.
    """

    tokens: int
    longest: int
    together: int = 1

    @property
    def smallest(self) -> bool:
        """Whether no budget makes it smaller."""
        return self.tokens <= self.longest * self.together


def rows_of(recipe: Recipe) -> Rows:
    if isinstance(recipe, RLRecipe):
        step = recipe.step
        return Rows(step.prompts_per_step * step.group_size, step.mini_batch_size, 1)
    together = 2 if recipe.kind == "rm" else 1
    return Rows(None, recipe.train.batch_size * together, together)


def longest_sequence(recipe: Recipe, positions: int) -> int:
    """The longest sequence that may come, tokens. Prompts are as long as the model's positions
    allow.
    """
    if not isinstance(recipe, RLRecipe):
        return min(recipe.data.max_tokens, positions)
    asked = recipe.prompts.max_prompt_tokens + recipe.generation.max_new_tokens
    return min(recipe.generation.max_model_tokens or asked, positions)


def load(recipe: Recipe, role: Role, longest: int, learning: bool = False) -> Load:
    """What one process of a role takes at once. Rows are shared evenly and cut to the budget, but
    never below one row, or those that stay together.
    """
    read, learned, together = rows_of(recipe)
    tokens = max(role.micro_batch_tokens or 0, longest * together)
    rows = learned if learning else read
    if rows is not None:
        tokens = min(tokens, longest * _share(rows, role, together))
    return Load(tokens, longest, together)


def batch(recipe: Recipe, roles: Iterable[Role], longest: int) -> dict[str, Any]:
    """From what one step reads to optimizer steps. Micro-batches are those of longest rows."""
    ranks = {role.name: _cut(recipe, role, longest) for role in roles if role.learner}
    return {**_step(recipe), "longest_sequence_tokens": longest, "ranks": ranks}


def _step(recipe: Recipe) -> dict[str, Any]:
    """How a step's sequences become optimizer steps."""
    sequences, rows, _ = rows_of(recipe)
    if not isinstance(recipe, RLRecipe):
        return {
            "examples": recipe.train.batch_size,
            "sequences": rows,
            "mini_batches": 1,
            "mini_batch_size": rows,
            "optimizer_steps_per_step": 1,
            "steps": recipe.train.steps,
            "optimizer_steps": recipe.train.steps,
        }
    step = recipe.step
    mini_batches = math.ceil((sequences or 0) / rows)
    per_step = step.ppo_epochs * mini_batches
    return {
        "prompts": step.prompts_per_step,
        "group_size": step.group_size,
        "sequences": sequences,
        "mini_batches": mini_batches,
        "mini_batch_size": rows,
        "epochs": step.ppo_epochs,
        "optimizer_steps_per_step": per_step,
        "steps": step.steps,
        "optimizer_steps": per_step * step.steps,
    }


def _share(rows: int, role: Role, together: int) -> int:
    """Rows of one of the role's processes."""
    return math.ceil(rows / together / role.demand.processes) * together


def _cut(recipe: Recipe, role: Role, longest: int) -> dict[str, int]:
    """How a mini-batch is cut for one role: rows of a rank, and its micro-batches when every row is
    a longest one.
    """
    _, rows, together = rows_of(recipe)
    budget = role.micro_batch_tokens or 0
    mine = _share(rows, role, together)
    at_once = max(together, budget // longest // together * together)
    return {
        "ranks": role.demand.processes,
        "sequences_per_rank": mine,
        "micro_batch_tokens": budget,
        "micro_batches_at_most": math.ceil(mine / at_once),
    }
