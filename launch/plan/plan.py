"""`quatuor plan`: what a recipe will do and need, by arithmetic alone; nothing starts and nothing
heavy is imported.

Memory comes from launch/plan/memory.py, times (rough) from launch/plan/timing.py, places from
launch/node_plan.py over actors/cluster/layout.py, which also places the real run. docs/plan.md says
what is exact and what is an estimate, and what the JSON holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from actors.roles import roles_of
from actors.settings import Recipe, RLRecipe, RMRecipe, SFTRecipe
from launch.plan import memory
from launch.plan.memory import GIB, PHASES, Footprint, Load, Use, sum_of, total
from launch.plan.nodes import Device, Kind, NodePlan
from launch.plan.shapes import ENCODERS, Head, Shape, find_shape
from launch.plan.timing import step_seconds
from launch.recipe.combinations import lacking_gpus
from launch.recipe.document import Document
from launch.recipe.read import located
from learners.errors import Problem, UserError
from learners.settings import LearnerSettings, ModelSettings

RL = RLRecipe
NEVER = 10**6  # nodes that are missing where no number of nodes is enough
UNCOUNTED = 10**12  # rows of held-out data: nothing here opens data

node_plan = NodePlan


@dataclass(frozen=True)
class Model:
    """A role's model, its shape and its head."""

    settings: ModelSettings
    shape: Shape
    head: Head

    @property
    def parameters(self) -> int:
        return self.shape.parameters(self.head)


@dataclass(frozen=True)
class Memory:
    """GPUs, or CPU memories of nodes, that hold the same: where they are, how many bytes each has,
    and what is there: roles, what one process of it holds in each phase, and how many processes
    there are.
    """

    places: list[Device]
    limit: int | None
    held: list[tuple[str, dict[str, Use], int]]
    phases: Sequence[str]

    @property
    def is_gpu(self) -> bool:
        return self.places[0][1] is not None

    @cached_property
    def uses(self) -> dict[str, dict[str, Use]]:
        """Phase -> role -> component -> bytes in one place."""
        found: dict[str, dict[str, Use]] = {phase: {} for phase in self.phases}
        for role, use, count in self.held:
            for phase, roles in found.items():
                roles[role] = sum_of(roles.get(role, {}), *[use[phase]] * count)
        return found

    @cached_property
    def peak(self) -> tuple[str, int]:
        """The phase that holds most, and how much."""
        sizes = {
            phase: sum(total(use[phase]) * count for _, use, count in self.held)
            for phase in self.phases
        }
        return max(sizes.items(), key=lambda item: item[1])

    @property
    def headroom(self) -> int | None:
        return None if self.limit is None else self.limit - self.peak[1]


@dataclass(frozen=True)
class Change:
    """Keys that make the recipe fit, with their new values."""

    values: dict[str, Any]

    def __str__(self) -> str:
        return " ".join(f"{key}={_written(value)}" for key, value in self.values.items())


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    models: dict[str, Model]
    where: NodePlan
    footprints: dict[Kind, Footprint]
    memories: list[Memory]
    batch: dict[str, Any]
    sync: dict[str, Any]
    seconds: dict[str, float]
    problems: list[str]

    @property
    def fits(self) -> bool:
        return not self.problems


def make_plan(recipe: Recipe, document: Document | None = None) -> Plan:
    """Raises UserError with every model whose shape is not known on this machine."""
    models = _models(recipe, read_shapes(recipe, document))
    where = arranged(recipe)
    footprints = _footprints(recipe, models, where)
    memories = _memories(recipe, footprints, where)
    lacking = [f"cluster: {reason}"] if (reason := lacking_gpus(recipe)) else []
    problems = [*lacking, *_model_problems(recipe, models), *_memory_problems(memories)]
    longest = _longest(recipe, models)
    cached = kv_room(recipe, models) * longest if isinstance(recipe, RL) else 0
    seconds = step_seconds(recipe, {role: m.shape for role, m in models.items()}, longest, cached)
    numbers = batch(recipe, models), _sync(recipe, models), seconds
    return Plan(recipe, models, where, footprints, memories, *numbers, problems)


def excess(recipe: Recipe, shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """How far a recipe is from fitting: what keeps it from starting at all, and bytes too many over
    all devices.
    """
    models = _models(recipe, shapes)
    where = arranged(recipe)
    if missing := missing_nodes(where):
        return missing, 0
    memories = _memories(recipe, _footprints(recipe, models, where), where)
    over = sum(len(m.places) * max(0, -(m.headroom or 0)) for m in memories)
    return len(list(_model_problems(recipe, models))), over


# --- models and batches ---------------------------------------------------------------------------


def read_shapes(recipe: Recipe, document: Document | None = None) -> dict[str, Shape]:
    """By path, of all models. Raises UserError with every model that cannot be planned, and where
    it is written.
    """
    found: dict[str, Shape] = {}
    problems: dict[str, str] = {}
    for _, key, model, head in _roles(recipe):
        try:
            found[model.path] = find_shape(model.path)
        except UserError as error:
            problems[f"{key}.path"] = error.problems[0]
        else:
            if found[model.path].family in ENCODERS and head != "score":
                problems[f"{key}.path"] = f"{model.path} is an encoder; a decoder is needed"
    if problems:
        told = (Problem((key,), message) for key, message in problems.items())
        raise UserError(
            [located(p, document) if document else f"{p.keys[0]}: {p.message}" for p in told]
        )
    return found


def _roles(recipe: Recipe) -> Iterator[tuple[str, str, ModelSettings, Head]]:
    """Every role that holds a model, in placement order: the key that names its model, the model
    and the head.
    """
    if isinstance(recipe, SFTRecipe | RMRecipe):
        yield (
            recipe.kind,
            "learner.model",
            recipe.learner.model,
            "lm" if isinstance(recipe, SFTRecipe) else "score",
        )
        return
    yield "engine", "actor.model", recipe.actor.model, "lm"
    yield "actor", "actor.model", recipe.actor.model, "lm"
    if isinstance(recipe, RLRecipe) and recipe.critic is not None:
        yield "critic", "critic.model", recipe.critic.model, "value"
    if recipe.algorithm.needs_reference:
        own = recipe.reference.model
        yield (
            "reference",
            "reference.model" if own else "actor.model",
            own or recipe.actor.model,
            "lm",
        )
    for i, reward in enumerate(recipe.rewards):
        if reward.model is not None:
            yield f"reward {reward.name}", f"rewards.{i}.model", reward.model, "score"


def _models(recipe: Recipe, shapes: Mapping[str, Shape]) -> dict[str, Model]:
    return {role: Model(model, shapes[model.path], head) for role, _, model, head in _roles(recipe)}


def learners_of(recipe: Recipe) -> dict[str, LearnerSettings]:
    if isinstance(recipe, SFTRecipe | RMRecipe):
        return {recipe.kind: recipe.learner}
    return {"actor": recipe.actor} | (
        {"critic": recipe.critic}
        if isinstance(recipe, RLRecipe) and recipe.critic is not None
        else {}
    )


def _longest(recipe: Recipe, models: Mapping[str, Model]) -> int:
    """The longest sequence there may be, tokens."""
    if isinstance(recipe, RL):
        return memory.longest_sequence(recipe, models["actor"].shape)
    return min(recipe.data.max_tokens, models[recipe.kind].shape.positions)


def batch(recipe: Recipe, models: Mapping[str, Model]) -> dict[str, Any]:
    """The batch arithmetic: from what one step reads to optimizer steps. Micro-batches are those of
    longest rows.
    """
    sequences, rows, rows_per_unit = _rows(recipe)
    if isinstance(recipe, RL):
        step = recipe.step
        mini_batches = math.ceil(sequences / rows)
        per_step = step.ppo_epochs * mini_batches
        head: dict[str, Any] = {
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
    else:
        head = {
            "examples": recipe.train.batch_size,
            "sequences": rows,
            "mini_batches": 1,
            "mini_batch_size": rows,
            "optimizer_steps_per_step": 1,
            "steps": recipe.train.steps,
            "optimizer_steps": recipe.train.steps,
        }
    longest = _longest(recipe, models)
    ranks = {
        role: _cut(rows, learner, longest, rows_per_unit)
        for role, learner in learners_of(recipe).items()
    }
    return {**head, "longest_sequence_tokens": longest, "ranks": ranks}


def _rows(recipe: Recipe) -> tuple[int, int, int]:
    """Sequences that are read at a time, those of a mini-batch, and how many of them stay
    rows_per_unit.
    """
    if isinstance(recipe, RL):
        return recipe.step.prompts_per_step * recipe.step.group_size, recipe.step.mini_batch_size, 1
    rows_per_unit = 2 if isinstance(recipe, RMRecipe) else 1
    return UNCOUNTED, recipe.train.batch_size * rows_per_unit, rows_per_unit


def _share(rows: int, processes: int, rows_per_unit: int) -> int:
    """Rows of one of the processes, which share them evenly."""
    return math.ceil(rows / rows_per_unit / processes) * rows_per_unit


def _cut(rows: int, learner: LearnerSettings, longest: int, rows_per_unit: int) -> dict[str, int]:
    """How a mini-batch is cut for one role: rows of a rank, and its micro-batches when every row is
    a longest one.
    """
    mine = _share(rows, learner.ranks, rows_per_unit)
    at_once = max(
        rows_per_unit, learner.micro_batch_tokens // longest // rows_per_unit * rows_per_unit
    )
    return {
        "ranks": learner.ranks,
        "sequences_per_rank": mine,
        "micro_batch_tokens": learner.micro_batch_tokens,
        "micro_batches_at_most": math.ceil(mine / at_once),
    }


def _sync(recipe: Recipe, models: Mapping[str, Model]) -> dict[str, Any]:
    """What one weight sync moves."""
    if not isinstance(recipe, RL):
        return {"bytes": 0, "engines": 0, "devices": 0}
    actor = models["actor"]
    generation = recipe.generation
    width = memory.BYTES[actor.settings.dtype]
    devices = generation.engines * generation.tensor_parallel
    return {"bytes": width * actor.parameters, "engines": generation.engines, "devices": devices}


# --- placement and memory -------------------------------------------------------------------------


def arranged(recipe: Recipe) -> NodePlan:
    return node_plan(recipe.cluster, tuple(roles_of(recipe).items()))


def missing_nodes(where: NodePlan) -> int:
    return NEVER if where.nodes is None else max(0, where.nodes - where.cluster.nodes)


def _footprints(
    recipe: Recipe, models: Mapping[str, Model], where: NodePlan
) -> dict[Kind, Footprint]:
    """What one process of every kind takes."""
    found = {(role, False): _footprint(recipe, models, role) for role, _ in where.need}
    if actor := models.get("actor"):
        found["actor", True] = memory.sending(
            found["actor", False], actor.shape, actor.settings, recipe.cluster
        )
    return found


def _footprint(recipe: Recipe, models: Mapping[str, Model], role: str) -> Footprint:
    """What one process of a role takes, but for sending weights."""
    cluster = recipe.cluster
    model = models.get(role)
    if model is None:
        return memory.function()
    if isinstance(recipe, RL) and role == "engine":
        return memory.engine(model.shape, model.settings, recipe.generation, cluster)
    longest = _longest(recipe, models)
    (read, learned, rows_per_unit) = _rows(recipe)

    def load(rows: int, processes: int, budget: int) -> Load:
        return Load.of(budget, longest, _share(rows, processes, rows_per_unit), rows_per_unit)

    if learner := learners_of(recipe).get(role):
        reading, learning = (
            load(rows, learner.ranks, learner.micro_batch_tokens) for rows in (read, learned)
        )
        return memory.learner(role, model.shape, model.head, learner, reading, learning, cluster)
    assert isinstance(recipe, RL)
    worker = (
        recipe.reference
        if role == "reference"
        else next(r for r in recipe.rewards if role == f"reward {r.name}")
    )
    reading = load(read, worker.workers, worker.micro_batch_tokens)
    return memory.frozen(model.shape, model.head, model.settings, reading, cluster)


def _memories(
    recipe: Recipe, footprints: Mapping[Kind, Footprint], where: NodePlan
) -> list[Memory]:
    """Every GPU in use, and every node's CPU memory; those that hold the same rows_per_unit."""
    cluster = recipe.cluster
    gpu = int(cluster.gpu_memory_gib * GIB)
    node = cluster.node_memory_gib
    host = None if node is None else int(node * GIB)
    phases: Sequence[str] = PHASES
    if not isinstance(recipe, RL):
        phases = ("start", "score", "learn") if recipe.held_out else ("start", "learn")
    found = []
    for places, kinds in where.alike:
        on_gpu = places[0][1] is not None
        held = [
            (k[0], footprints[k].device if on_gpu else footprints[k].host, count)
            for k, count in kinds.items()
        ]
        found.append(Memory(places, gpu if on_gpu else host, held, phases))
    return found


def _model_problems(recipe: Recipe, models: Mapping[str, Model]) -> Iterator[str]:
    """What keeps an engine from starting, whatever the memory."""
    if not isinstance(recipe, RL):
        return
    shape = models["engine"].shape
    generation = recipe.generation
    parallel = recipe.generation.tensor_parallel
    wanted = generation.max_model_tokens or 0
    longest = shape.positions
    if wanted > longest:
        yield f"generation.max_model_tokens: {wanted} is more than the model's {longest} positions"
    if generation.max_new_tokens >= longest:
        wanted = generation.max_new_tokens
        yield (
            f"generation.max_new_tokens: {wanted} leaves no room for a prompt in the model's "
            f"{longest} positions"
        )
    parts = {
        "attention heads": shape.heads,
        "key-value heads": shape.kv_heads,
        "MLP columns": shape.intermediate,
    }
    doubled = parallel % shape.kv_heads == 0  # fewer key-value heads than GPUs are copied
    uneven = [
        f"{n} {what}"
        for what, n in parts.items()
        if n % parallel and not (doubled and "key" in what)
    ]
    if uneven:
        yield (
            f"generation.tensor_parallel: {parallel} does not divide the model's "
            f"{', '.join(uneven)}"
        )
    if kv_room(recipe, models) < 1:
        one = f"one sequence of {_longest(recipe, models)} tokens"
        if recipe.cluster.device == "cpu":
            yield (
                f"generation.kv_cache_gib: {generation.kv_cache_gib:g} GiB of KV cache do not "
                f"hold {one}"
            )
        else:
            share = generation.gpu_memory_fraction
            whole = recipe.cluster.gpu_memory_gib
            yield f"generation: an engine's {share:g} of {whole:g} GiB leaves no KV cache for {one}"


def kv_room(recipe: RL, models: Mapping[str, Model]) -> int:
    """Sequences of the longest length that an engine's KV cache holds at once, counted in blocks as
    vLLM does: without one block that it keeps.
    """
    model = models["engine"]
    generation = recipe.generation
    footprint = memory.engine(model.shape, model.settings, generation, recipe.cluster)
    room = (footprint.device or footprint.host)["generate"].get("kv_cache", 0)
    parts = min(generation.tensor_parallel, model.shape.kv_heads)
    block = memory.KV_BLOCK[recipe.cluster.device]
    blocks = (
        room * parts // (block * memory.BYTES[model.settings.dtype] * model.shape.kv_elements) - 1
    )
    return max(0, blocks) // math.ceil(_longest(recipe, models) / block)


def _memory_problems(memories: list[Memory]) -> Iterator[str]:
    """One line for all devices that overflow alike."""
    over: dict[tuple[str, int, bool], list[Memory]] = {}
    for one in memories:
        if one.headroom is not None and one.headroom < 0:
            over.setdefault((*one.peak, one.is_gpu), []).append(one)
    for (phase, size, _), group in over.items():
        limit = group[0].limit or 0
        role, use = max(group[0].uses[phase].items(), key=lambda item: total(item[1]))
        yield (
            f"{where_are(group)}: {phase} needs {size / GIB:.1f} GiB, there are {limit / GIB:.4g}; "
            f"most of it is {role}: {_largest_parts(use)}"
        )


def _largest_parts(use: Use) -> str:
    parts = sorted(use.items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{component.replace('_', ' ')} {size / GIB:.1f}" for component, size in parts)


def where_are(memories: list[Memory]) -> str:
    """Devices in a few words: node 0 GPU 0-3, node 1-3 GPU 0-7."""
    places = [place for m in memories for place in m.places]
    if not memories[0].is_gpu:
        return f"node {ranges([node for node, _ in places])} CPU memory"
    by_node: dict[int, list[int]] = {}
    for node, gpu in places:
        by_node.setdefault(node, []).append(gpu or 0)
    alike: dict[str, list[int]] = {}
    for node, gpus in by_node.items():
        alike.setdefault(ranges(gpus), []).append(node)
    return ", ".join(f"node {ranges(nodes)} GPU {gpus}" for gpus, nodes in alike.items())


def ranges(numbers: list[int]) -> str:
    """0-3,5 for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


# --- output ---------------------------------------------------------------------------------------


def as_json(plan: Plan, changes: list[Change]) -> dict[str, Any]:
    """Everything as plain data; sizes in bytes, times in seconds. docs/plan.md lists the keys,
    which stay.
    """
    seconds = plan.seconds
    whole = sum(plan.seconds.values())
    return {
        "kind": plan.recipe.kind,
        "fits": plan.fits,
        "problems": plan.problems,
        "changes": [change.values for change in changes],
        "models": {
            role: {"path": m.settings.path, "dtype": m.settings.dtype, "parameters": m.parameters}
            for role, m in plan.models.items()
        },
        "batch": plan.batch,
        "placement": [
            {"process": p.name, "role": p.role, "node": p.node, "gpus": list(p.gpus)}
            for p in plan.where.processes
        ],
        "memory": [_device(plan, m, place) for m in plan.memories for place in m.places],
        "sync": plan.sync,
        "estimated_phases": {
            phase: {"seconds": time, "share": time / whole if whole else 0.0}
            for phase, time in seconds.items()
        },
    }


def _device(plan: Plan, memory: Memory, place: Device) -> dict[str, Any]:
    """One GPU or one node's CPU memory, process by process."""
    held = {p.name: plan.footprints[p.kind] for p in plan.where.on[place]}
    return {
        "node": place[0],
        "gpu": place[1],
        "limit_bytes": memory.limit,
        "largest_phase": memory.peak[0],
        "peak_bytes": memory.peak[1],
        "headroom_bytes": memory.headroom,
        "phases": {
            phase: {
                name: (f.device if memory.is_gpu else f.host)[phase] for name, f in held.items()
            }
            for phase in memory.phases
        },
    }


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
