"""Which change of a recipe would make it fit: every candidate is tried on the whole plan, the cheapest first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from actors.settings import RLRecipe
from launch.checks import Recipe, combination_problems
from launch.document import Document
from launch.plan import Change, excess
from learners.settings import LearnerSettings

Step = dict[str, Any]
"""Keys and their new values."""

SHOWN = 4  # changes are a hint, not a catalogue
LEAST_TOKENS = 1024  # smaller micro-batches leave a GPU idle


def enough(recipe: Recipe) -> list[Change]:
    """Changes that are enough by themselves, the cheapest first; if there are none, one of several keys together."""
    found = []
    for ladder in _ladders(recipe):
        change = next((Change(step) for step in ladder if _excess(recipe, step) == 0), None)
        if change is not None:
            found.append(change)
        if len(found) == SHOWN:
            return found
    return found or _together(recipe)


def _together(recipe: Recipe) -> list[Change]:
    """Take the step that helps most, again and again; then leave out, or weaken, what was not needed."""
    ladders = list(_ladders(recipe))
    pile: Step = {}
    left = excess(recipe)
    while left:
        tried = [(_excess(recipe, pile | step), pile | step) for ladder in ladders for step in ladder]
        best, better = min(tried, key=lambda one: one[0])
        if best >= left:
            return []
        pile, left = better, best
    for key in list(pile):
        rest = {k: v for k, v in pile.items() if k != key}
        weaker = [rest, *(rest | step for ladder in ladders for step in ladder if list(step) == [key])]
        pile = next(one for one in [*weaker, pile] if _excess(recipe, one) == 0)
    return [Change(pile)]


def _ladders(recipe: Recipe) -> Iterator[list[Step]]:
    """Ladders of changes, each from its smallest step to its largest; those that cost least speed come first."""
    learners = {k: getattr(recipe, k) for k in ("learner", "actor", "critic") if hasattr(recipe, k)}
    rl = recipe if isinstance(recipe, RLRecipe) else None
    for key, learner in learners.items():
        yield [{f"{key}.model.gradient_checkpointing": True}]
        yield [{f"{key}.micro_batch_tokens": n} for n in _halves(learner.micro_batch_tokens)]
    if rl is not None:
        yield from _generation(rl)
        yield [{"reference.micro_batch_tokens": n} for n in _halves(rl.reference.micro_batch_tokens)]
        for i, reward in enumerate(rl.rewards):
            yield [{f"rewards.{i}.micro_batch_tokens": n} for n in _halves(reward.micro_batch_tokens)]
    for key, learner in learners.items():
        yield from _states(key, learner)
    if rl is not None and recipe.cluster.device == "cuda":
        yield [{"cluster.placement": "colocated"}]
    for key, learner in learners.items():
        more: list[Step] = [{f"{key}.ranks": learner.ranks * n} for n in (2, 4, 8)]
        yield [*more, *(step | {"cluster.nodes": recipe.cluster.nodes * n} for n in (2, 4) for step in more)]
    yield [{"cluster.nodes": recipe.cluster.nodes * n} for n in (2, 4, 8)]


def _generation(recipe: RLRecipe) -> Iterator[list[Step]]:
    settings = recipe.generation
    if recipe.cluster.device == "cpu":
        yield [{"generation.kv_cache_gib": settings.kv_cache_gib / n} for n in (2, 4, 8)]
        return
    less = [round(settings.gpu_memory_fraction - 0.05 * n, 2) for n in range(1, 20)]
    yield [{"generation.gpu_memory_fraction": share} for share in less if share >= 0.1]
    more = [round(settings.gpu_memory_fraction + 0.05 * n, 2) for n in range(1, 20)]
    yield [{"generation.gpu_memory_fraction": share} for share in more if share <= 0.95]
    yield [{"generation.tensor_parallel": settings.tensor_parallel * n} for n in (2, 4, 8)]


def _states(key: str, learner: LearnerSettings) -> Iterator[list[Step]]:
    """Cut model states over ranks, halve the weights, or move states to CPU memory."""
    stages: list[int] = [stage for stage in (1, 2, 3) if stage > learner.zero_stage]
    if learner.ranks > 1:
        yield [{f"{key}.zero_stage": stage} for stage in stages]
    if learner.model.dtype == "float32":
        stage: Step = {} if learner.zero_stage else {f"{key}.zero_stage": 2}
        yield [{f"{key}.model.dtype": "bfloat16", **stage}]
    if not learner.offload_optimizer:
        yield [{f"{key}.offload_optimizer": True}]
    if learner.zero_stage == 3 and not learner.offload_parameters:
        yield [{f"{key}.offload_parameters": True}]


def _halves(tokens: int) -> list[int]:
    found = []
    while tokens // 2 >= LEAST_TOKENS:
        tokens //= 2
        found.append(tokens)
    return found


def _excess(recipe: Recipe, values: Step) -> int:
    changed = _changed(recipe, values)
    return excess(recipe) if changed is None else excess(changed)


def _changed(recipe: Recipe, values: Step) -> Recipe | None:
    """The recipe with other values; None when they make no sense together or change nothing."""
    document = Document("", recipe.model_dump(mode="json"))
    for key, value in values.items():
        document.override(f"{key}={value}")
    try:
        changed = type(recipe).model_validate(document.values)
    except ValidationError:
        return None
    return None if changed == recipe or any(combination_problems(changed)) else changed
