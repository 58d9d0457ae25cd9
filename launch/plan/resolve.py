"""Arithmetic that decides for a run before it starts: what leaves GPUs that roles share, and how
large the KV cache of an engine there is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from actors.cluster.layout import shares_gpus
from actors.settings import Recipe, RLRecipe
from launch.doctor import nvidia_smi
from launch.plan.plan import Plan, make_plan
from launch.recipe.document import Document
from learners.errors import UserError

BY_ARITHMETIC = "by plan's arithmetic"


def resolve(recipe: Recipe, document: Document) -> tuple[Recipe, str]:
    """Return the recipe as its run follows it, without auto, and a line for whoever starts it; none
    where no GPUs are shared, since nothing ever leaves there. `document` learns where the values
    come from.

    GPUs of this machine count with the memory that they have, where that is less than the recipe
    says. Raises UserError where nothing is to leave and the model cannot be counted: vLLM would
    have to measure GPUs on which others load.
    """
    if not isinstance(recipe, RLRecipe):
        return recipe, ""
    if not shares_gpus(recipe.cluster):
        return (_decided(recipe, document, "never"), "") if _asked(recipe) else (recipe, "")
    here = smallest_gib(nvidia_smi())
    said = recipe.cluster.gpu_memory_gib
    cluster = recipe.cluster.model_copy(update={"gpu_memory_gib": min(said, here or said)})
    try:
        plan = make_plan(recipe.model_copy(update={"cluster": cluster}), document)
    except UserError as error:
        return _uncounted(recipe, document, error.problems[0])
    less = f"; GPUs here have {here:.1f} GiB, not {said:g}" if here and here < said else ""
    line = f"cluster.swap: {plan.tier}, {plan.swapped / 1e9:.1f} GB move a step{less}"
    return _decided(recipe, document, plan.tier, _cache(plan)), line


def smallest_gib(listed: Sequence[str] | None) -> float | None:
    """Return the memory of the smallest GPU in lines of nvidia-smi; None where there is none."""
    found = [re.search(r"(\d+) MiB", line) for line in listed or ()]
    return min((int(one[1]) / 1024 for one in found if one), default=None)


def _asked(recipe: RLRecipe) -> bool:
    return recipe.cluster.swap == "auto"


def _cache(plan: Plan) -> int | None:
    """Return the bytes of an engine's KV cache; None where one sequence finds no room, which vLLM
    will say.
    """
    uses = next(f.device["generate"] for kind, f in plan.footprints.items() if kind[0] == "engine")
    return uses["kv_cache"] if plan.kv_room else None


def _uncounted(recipe: RLRecipe, document: Document, why: str) -> tuple[Recipe, str]:
    if recipe.cluster.swap == "never" and recipe.generation.kv_cache_bytes is None:
        raise UserError(
            "generation.kv_cache_bytes: must be given beside cluster.swap never for a model that "
            f"cannot be counted: {why}"
        )
    decided = _decided(recipe, document, "always")
    return decided, f"cluster.swap: {decided.cluster.tier}; a model cannot be counted: {why}"


def _decided(recipe: RLRecipe, document: Document, tier: str, cache: int | None = None) -> RLRecipe:
    """Return the recipe with what it leaves open decided."""
    cluster = recipe.cluster
    generation = recipe.generation
    if _asked(recipe):
        cluster = cluster.model_copy(update={"swap": tier})
        document.origins["cluster.swap"] = BY_ARITHMETIC
    if cache is not None and generation.kv_cache_bytes is None:
        generation = generation.model_copy(update={"kv_cache_bytes": cache})
        document.origins["generation.kv_cache_bytes"] = BY_ARITHMETIC
    return recipe.model_copy(update={"cluster": cluster, "generation": generation})
