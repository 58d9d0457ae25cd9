"""The roles of a recipe as the plan sees them: a model or a function, how it is cut into processes
and what it reads at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from actors.cluster.layout import Demand, demands, needs_reference
from actors.settings import PPORecipe, RLRecipe
from launch.recipe.combinations import Recipe
from learners.settings import LearnerSettings, ModelSettings

Head = Literal["lm", "score", "value"]


@dataclass(frozen=True)
class Role:
    """One role: its section of the recipe, the section's key that counts its processes, and what
    they need. Without a model it calls a function; with a learner it is trained, and else it reads
    `micro_batch_tokens` at once (an engine: nothing).
    """

    name: str
    section: str
    count: str
    demand: Demand
    model_key: str = ""
    model: ModelSettings | None = None
    head: Head = "lm"
    learner: LearnerSettings | None = None
    micro_batch_tokens: int | None = None


def roles_of(recipe: Recipe) -> Iterator[Role]:
    """Every role, in placement order."""
    need = demands(recipe)
    if not isinstance(recipe, RLRecipe):
        head: Head = "lm" if recipe.kind == "sft" else "score"
        yield _trained(recipe.kind, "learner", recipe.learner, head, need[recipe.kind])
        return
    actor = recipe.actor.model
    yield Role("engine", "generation", "engines", need["engine"], "actor.model", actor)
    yield _trained("actor", "actor", recipe.actor, "lm", need["actor"])
    if isinstance(recipe, PPORecipe):
        yield _trained("critic", "critic", recipe.critic, "value", need["critic"])
    if needs_reference(recipe):
        reference = recipe.reference
        key = "reference.model" if reference.model else "actor.model"
        yield Role(
            "reference",
            "reference",
            "workers",
            need["reference"],
            key,
            reference.model or actor,
            micro_batch_tokens=reference.micro_batch_tokens,
        )
    for i, reward in enumerate(recipe.rewards):
        yield Role(
            f"reward {reward.name}",
            f"rewards.{i}",
            "workers",
            need[f"reward {reward.name}"],
            f"rewards.{i}.model",
            reward.model,
            "score",
            micro_batch_tokens=reward.micro_batch_tokens,
        )
    if "evaluator" in need:
        yield Role("evaluator", "evaluation", "", need["evaluator"])


def _trained(name: str, section: str, learner: LearnerSettings, head: Head, demand: Demand) -> Role:
    key = f"{section}.model"
    tokens = learner.micro_batch_tokens
    return Role(name, section, "ranks", demand, key, learner.model, head, learner, tokens)
