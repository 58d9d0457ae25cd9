"""The tier by which roles that share GPUs leave them: as little as memory allows, by arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

from actors.cluster.layout import shares_gpus
from actors.settings import Recipe, RLRecipe
from launch.plan.devices import footprints, memories
from launch.plan.nodes import NodePlan
from launch.plan.shapes import Model

TIERS = {
    "never": "all fits at once",
    "kv_cache": "the KV cache is given up while others work",
    "optimizer": "so is the KV cache, and optimizer states leave while engines generate",
    "always": "every role leaves for others",
}
"""From what moves least, with what each means."""


def with_tier(recipe: Recipe, models: Mapping[str, Model], where: NodePlan, longest: int) -> Recipe:
    """Return the recipe with a tier in place of auto: the first by which no GPU ever holds more
    than it has, always where there is none, never where no GPUs are shared.
    """
    if recipe.cluster.swap != "auto":
        return recipe
    if not (isinstance(recipe, RLRecipe) and shares_gpus(recipe.cluster)):
        return _by(recipe, "never")
    for tier in TIERS:
        tried = _by(recipe, tier)
        held = footprints(tried, models, where, longest)
        if not any(m.overflows for m in memories(tried, held, where) if m.is_gpu):
            return tried
    return _by(recipe, "always")


def _by(recipe: Recipe, tier: str) -> Recipe:
    cluster = recipe.cluster.model_copy(update={"swap": tier})
    return recipe.model_copy(update={"cluster": cluster})
