"""Batch arithmetic: from what one step reads to the micro-batches of a rank."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from actors.roles import Role, roles_of
from actors.settings import Recipe, RLRecipe
from learners.settings import PairData, SFTData, sources_of


class Rows(NamedTuple):
    """Sequences that are read at a time (None: of data nobody has counted), those of a mini-batch,
    and how many of them are a unit that is never parted.
    """

    read: int | None
    learned: int
    rows_per_unit: int


@dataclass(frozen=True)
class Load:
    """A forward pass at its largest: padded `tokens` in rows of `longest`, of which `rows_per_unit`
    cannot be parted.
    """

    tokens: int
    longest: int
    rows_per_unit: int = 1

    @property
    def smallest(self) -> bool:
        """True if no budget makes it smaller."""
        return self.tokens <= self.longest * self.rows_per_unit


def rows_of(recipe: Recipe) -> Rows:
    if isinstance(recipe, RLRecipe):
        step = recipe.step
        return Rows(step.prompts_per_step * step.group_size, step.mini_batch_size, 1)
    (role,) = roles_of(recipe).values()
    rows_per_unit = role.rows_per_unit
    return Rows(None, recipe.train.batch_size * rows_per_unit, rows_per_unit)


def longest_sequence(recipe: Recipe, positions: int | None) -> int:
    """Return the longest sequence that may come, in tokens. Prompts are as long as the model's
    positions allow (None: any).
    """
    if isinstance(recipe, RLRecipe):
        prompt = max(source.max_prompt_tokens for source in sources_of(recipe.prompts))
        asked = prompt + recipe.generation.max_new_tokens
        asked = recipe.generation.max_model_tokens or asked
    else:
        data: tuple[SFTData | PairData, ...] = sources_of(recipe.data)
        asked = max(source.max_tokens for source in data)
    return min(asked, positions or asked)


def load(recipe: Recipe, role: Role, longest: int, learning: bool = False) -> Load:
    """Return what one process of a role takes at once. Rows are shared evenly and cut to the
    budget, but never below one row, or those of a unit.
    """
    read, learned, rows_per_unit = rows_of(recipe)
    tokens = max(role.micro_batch_tokens, longest * rows_per_unit)
    rows = learned if learning else read
    if rows is not None:
        tokens = min(tokens, longest * _share(rows, role, rows_per_unit))
    return Load(tokens, longest, rows_per_unit)


def batch(recipe: Recipe, roles: Iterable[Role], longest: int) -> dict[str, Any]:
    """Return the way from what one step reads to optimizer steps. Micro-batches are those of
    longest rows.
    """
    ranks = {role.name: _cut(recipe, role, longest) for role in roles if role.learner}
    return {**_step(recipe), "longest_sequence_tokens": longest, "ranks": ranks}


def _step(recipe: Recipe) -> dict[str, Any]:
    """Return how a step's sequences become optimizer steps."""
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


def _share(rows: int, role: Role, rows_per_unit: int) -> int:
    """Return the rows of one of the role's processes."""
    return math.ceil(rows / rows_per_unit / role.processes) * rows_per_unit


def _cut(recipe: Recipe, role: Role, longest: int) -> dict[str, int]:
    """Return how a mini-batch is cut for one role: rows of a rank, and its micro-batches when every
    row is a longest one.
    """
    _, rows, rows_per_unit = rows_of(recipe)
    budget = role.micro_batch_tokens
    mine = _share(rows, role, rows_per_unit)
    at_once = max(rows_per_unit, budget // longest // rows_per_unit * rows_per_unit)
    return {
        "ranks": role.processes,
        "sequences_per_rank": mine,
        "micro_batch_tokens": budget,
        "micro_batches_at_most": math.ceil(mine / at_once),
    }
