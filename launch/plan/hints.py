"""Which change of a recipe would make it fit: every candidate is tried on the whole plan, the
cheapest first.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import ValidationError

from actors.cluster.layout import shares_gpus
from actors.roles import roles_of
from actors.settings import Recipe, RLRecipe
from launch.plan.plan import NEVER, Change, arranged, excess, learners_of, read_shapes
from launch.plan.shapes import Shape
from launch.recipe.combinations import combination_problems
from learners.settings import LearnerSettings

Step = dict[str, Any]
"""Keys and their new values."""

SHOWN = 4  # changes are a hint, not a catalogue
LEAST_TOKENS = 1024  # smaller micro-batches leave a GPU idle
MOST_RANKS = 1024


class Ladder(NamedTuple):
    """Changes of the same keys, the smallest first. `rising`: where one is enough, so are all after
    it.
    """

    steps: list[Step]
    rising: bool = False


class Trials:
    """Tries changes of one recipe on the whole plan. If it `grows`, nodes that a change needs are
    part of it.
    """

    def __init__(self, recipe: Recipe, shapes: dict[str, Shape], grows: bool) -> None:
        self.recipe = recipe
        self.shapes = shapes
        self.grows = grows

    def changed(self, step: Step) -> Recipe | None:
        """The recipe with other values, and nodes enough; None when the values make no sense."""
        values = self.recipe.model_dump(mode="json")
        for key, value in step.items():
            *path, last = key.split(".")
            place: Any = values
            for part in path:
                place = place[int(part) if isinstance(place, list) else part]
            place[last] = value
        try:
            recipe = type(self.recipe).model_validate(values)
        except ValidationError:
            return None
        if any(combination_problems(recipe)):
            return None
        nodes = arranged(recipe).nodes or 0
        if nodes <= recipe.cluster.nodes:
            return recipe
        more = recipe.cluster.model_copy(update={"nodes": nodes})
        return recipe.model_copy(update={"cluster": more}) if self.grows else None

    def excess(self, step: Step) -> tuple[int, int]:
        recipe = self.changed(step)
        return (NEVER, 0) if recipe is None else excess(recipe, self.shapes)

    def enough(self, step: Step) -> bool:
        return self.excess(step) == (0, 0)

    def same_nodes(self, step: Step) -> bool:
        recipe = self.changed(step)
        return recipe is not None and recipe.cluster.nodes == self.recipe.cluster.nodes

    def least(self, ladder: Ladder) -> Step | None:
        """The first step that is enough."""
        if not ladder.rising:
            return next(filter(self.enough, ladder.steps), None)
        first = bisect_left(ladder.steps, True, key=self.enough)
        return ladder.steps[first] if first < len(ladder.steps) else None

    def change(self, step: Step) -> Change:
        recipe = self.changed(step)
        if recipe is not None and recipe.cluster.nodes != self.recipe.cluster.nodes:
            step = step | {"cluster.nodes": recipe.cluster.nodes}
        return Change(step)


def enough(recipe: Recipe) -> list[Change]:
    """Changes that are enough by themselves, the cheapest first; if there are none, one of several
    keys together.
    """
    shapes = read_shapes(recipe)
    growing, fixed = (Trials(recipe, shapes, grows) for grows in (True, False))
    ladders = [ladder for ladder in _ladders(growing) if ladder.steps]
    nodes = [growing.change({})] if growing.enough({}) else []
    tried = (
        (trials, ladder)
        for trials in ([fixed] if nodes else [fixed, growing])
        for ladder in ladders
    )
    found = [
        trials.change(step)
        for trials, ladder in tried
        if (step := trials.least(ladder)) is not None
    ]
    found = list({str(change): change for change in [*found, *nodes]}.values())
    needed = [c for c in found if not any(other.values.keys() < c.values.keys() for other in found)]
    return needed[:SHOWN] or _together(fixed if nodes else growing, ladders)


def _together(trials: Trials, ladders: list[Ladder]) -> list[Change]:
    """Take the step that helps most, again and again; then leave out, or weaken, what was not
    needed.
    """
    pile: Step = {}
    left = trials.excess(pile)
    while left > (0, 0):
        steps = [
            step
            for ladder in ladders
            for step in (ladder.steps[-1:] if ladder.rising else ladder.steps)
        ]
        tried = [(trials.excess(pile | step), pile | step) for step in steps]
        best, better = min(tried, key=lambda one: one[0])
        if best >= left:
            return []
        pile = better
        left = best
    for key in list(pile):
        rest = {k: v for k, v in pile.items() if k != key}
        same = (ladder for ladder in ladders if list(ladder.steps[0]) == [key])
        weaker = [
            Ladder([rest]),
            *(Ladder([rest | step for step in one.steps], one.rising) for one in same),
        ]
        pile = next((step for one in weaker if (step := trials.least(one)) is not None), pile)
    return [trials.change(pile)]


# --- what is tried --------------------------------------------------------------------------------


def _ladders(trials: Trials) -> Iterator[Ladder]:
    """Those that cost least speed come first."""
    recipe = trials.recipe
    learners = learners_of(trials.recipe)
    keys = {
        "learner" if role == recipe.kind else role: learner for role, learner in learners.items()
    }
    for key, learner in keys.items():
        yield from _activations(key, learner)
    if isinstance(recipe, RLRecipe):
        yield from _lengths(trials, recipe)
        yield from _generation(recipe, trials.shapes[recipe.actor.model.path].heads)
        yield from _frozen(recipe)
    for key, learner in keys.items():
        yield from _states(key, learner)
    yield from _places(trials, keys)


def _activations(key: str, learner: LearnerSettings) -> Iterator[Ladder]:
    if not learner.model.gradient_checkpointing:
        yield Ladder([{f"{key}.model.gradient_checkpointing": True}])
    if learner.model.attention == "eager":
        yield Ladder([{f"{key}.model.attention": "sdpa"}])
    yield _halves(f"{key}.micro_batch_tokens", learner.micro_batch_tokens)


def _lengths(trials: Trials, recipe: RLRecipe) -> Iterator[Ladder]:
    """Only where a sequence would be longer than the model's positions: lengths decide what is
    learned.
    """
    settings = recipe.generation
    positions = trials.shapes[recipe.actor.model.path].positions
    if (settings.max_model_tokens or 0) > positions:
        yield Ladder([{"generation.max_model_tokens": positions}])
    if settings.max_new_tokens >= positions:
        left = positions - recipe.prompts.max_prompt_tokens
        yield Ladder([{"generation.max_new_tokens": n} for n in (left, positions // 2) if n > 0])


def _generation(recipe: RLRecipe, heads: int) -> Iterator[Ladder]:
    settings = recipe.generation
    if recipe.cluster.device == "cpu":
        cache = settings.kv_cache_gib
        yield Ladder(
            [{"generation.kv_cache_gib": round(cache * n / 8, 3)} for n in range(7, 0, -1)]
        )
        more = (*(n / 4 for n in range(1, 17)), 8, 16, 32)
        yield Ladder([{"generation.kv_cache_gib": round(cache + n, 3)} for n in more])
        return
    share = settings.gpu_memory_fraction
    parallel = settings.tensor_parallel
    engines = settings.engines
    for sign in (-1, 1):
        shares = [round(share + sign * 0.05 * n, 2) for n in range(1, 20)]
        yield Ladder(
            [{"generation.gpu_memory_fraction": share} for share in shares if 0.1 <= share <= 0.95]
        )
    parts = [n for n in range(1, recipe.cluster.gpus_per_node + 1) if heads % n == 0]
    for sizes in ([n for n in reversed(parts) if n < parallel], [n for n in parts if n > parallel]):
        steps: list[Step] = [{"generation.tensor_parallel": n} for n in sizes]
        yield Ladder(steps)
        fewer = [max(1, engines * parallel // n) for n in sizes]
        yield Ladder(
            [
                step | {"generation.engines": n}
                for step, n in zip(steps, fewer, strict=True)
                if n != engines
            ]
        )


def _frozen(recipe: RLRecipe) -> Iterator[Ladder]:
    workers = {"reference": recipe.reference} | {
        f"rewards.{i}": reward for i, reward in enumerate(recipe.rewards)
    }
    for key, worker in workers.items():
        yield _halves(f"{key}.micro_batch_tokens", worker.micro_batch_tokens)
        if worker.model is not None and worker.model.dtype == "float32":
            yield Ladder([{f"{key}.model.dtype": "bfloat16"}])


def _states(key: str, learner: LearnerSettings) -> Iterator[Ladder]:
    """Cut model states over ranks, halve the weights, or move states to CPU memory or back."""
    stage = learner.zero_stage
    yield Ladder([{f"{key}.zero_stage": n} for n in range(stage + 1, 4)])
    yield Ladder([{f"{key}.zero_stage": n} for n in range(stage - 1, -1, -1)])
    if learner.model.dtype == "float32":
        yield Ladder(
            [{f"{key}.model.dtype": "bfloat16", **({} if stage else {f"{key}.zero_stage": 2})}]
        )
    yield Ladder([{f"{key}.offload_optimizer": not learner.offload_optimizer}])
    if stage == 3:
        yield Ladder([{f"{key}.offload_parameters": not learner.offload_parameters}])


def _places(trials: Trials, learners: dict[str, LearnerSettings]) -> Iterator[Ladder]:
    """Other GPUs: shared or not, fewer processes, more ranks."""
    recipe = trials.recipe
    cluster = trials.recipe.cluster
    if cluster.device == "cuda" and isinstance(recipe, RLRecipe):
        yield Ladder([{"cluster.placement": "separate" if shares_gpus(cluster) else "colocated"}])
    yield from _fewer(trials)
    if cluster.device == "cpu":
        yield Ladder([{"cluster.nodes": n} for n in range(cluster.nodes + 1, cluster.nodes + 17)])
    for key, learner in learners.items():
        most = min(8 * learner.ranks, MOST_RANKS)
        yield Ladder([{f"{key}.ranks": n} for n in range(learner.ranks + 1, most + 1)], rising=True)


def _fewer(trials: Trials) -> Iterator[Ladder]:
    """On CPUs any process less; on GPUs as many less as there are too many, of one role or of all
    that share them.
    """
    recipe = trials.recipe
    on_gpus = trials.recipe.cluster.device == "cuda"
    if on_gpus and trials.same_nodes({}):
        return
    counts = {
        _count_key(recipe, role): demand
        for role, demand in roles_of(recipe).items()
        if role != "evaluator"
    }
    taken = {key: d.processes * d.gpus for key, d in counts.items()}
    if shares_gpus(recipe.cluster):
        sizes = range(max(taken.values()) - 1, 0, -1)
        ladders = [[{key: n // counts[key].gpus for key in taken if taken[key] > n} for n in sizes]]
    else:
        fewer = {
            key: range(d.processes - 1, 0, -1) for key, d in counts.items() if d.gpus or not on_gpus
        }
        ladders = [[{key: n} for n in numbers] for key, numbers in fewer.items()]
    for steps in ladders:
        first = bisect_left(steps, True, key=trials.same_nodes) if on_gpus else 0
        yield Ladder(steps[first : first + 1] if on_gpus else steps, rising=True)


def _count_key(recipe: Recipe, role: str) -> str:
    """The key that says how many processes a role has."""
    if role == "engine":
        return "generation.engines"
    if role == "reference":
        return "reference.workers"
    if isinstance(recipe, RLRecipe) and role.startswith("reward "):
        return f"rewards.{[f'reward {r.name}' for r in recipe.rewards].index(role)}.workers"
    return "learner.ranks" if role == recipe.kind else f"{role}.ranks"


def _halves(key: str, tokens: int) -> Ladder:
    steps: list[Step] = []
    while tokens // 2 >= LEAST_TOKENS:
        tokens //= 2
        steps.append({key: tokens})
    return Ladder(steps, rising=True)
