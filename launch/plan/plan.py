"""`quatuor plan`: what a recipe will do and need, by arithmetic alone; nothing starts and nothing
heavy is imported but for a model that is not in the table of shapes.

Batches come from batches.py, memory from memory.py and devices.py, times (rough) from timing.py,
nodes from nodes.py over actors/cluster/layout.py, which also assigns the real run. docs/plan.md
says what is exact and what is an estimate, and what the JSON holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from actors.roles import roles_of
from actors.settings import Recipe, RLRecipe, position_problems
from launch.plan.adapters import sync_bytes, trained
from launch.plan.batches import batch, longest_sequence
from launch.plan.devices import Memory, footprints, memories, memory_problems
from launch.plan.memory import Footprint, kv_room
from launch.plan.nodes import Device, Kind, NodePlan
from launch.plan.shapes import Model, Shape, find_shape, uneven
from launch.plan.swap import with_tier
from launch.plan.timing import step_seconds
from launch.recipe.combinations import lacking_gpus
from launch.recipe.document import Document
from launch.recipe.read import located
from learners.errors import Problem, UserError, problems_of


@dataclass(frozen=True)
class Plan:
    """`longest` sequence in tokens; `kv_room`: how many such an engine's KV cache holds, 0 without
    engines; `tier`: how much of the roles that share GPUs leaves them.
    """

    recipe: Recipe
    tier: str
    models: dict[str, Model]
    where: NodePlan
    footprints: dict[Kind, Footprint]
    memories: list[Memory]
    batch: dict[str, Any]
    sync: dict[str, int]
    longest: int
    kv_room: int
    seconds: dict[str, float]
    problems: list[str]

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def swapped(self) -> int:
        """Bytes that leave shared GPUs and come back in a step, of all processes."""
        return sum(self.footprints[process.kind].moved for process in self.where.processes)


def make_plan(recipe: Recipe, document: Document | None = None) -> Plan:
    """Return the plan. Raises UserError with every model whose shape is not known on
    this machine.
    """
    models = read_models(recipe, document)
    where = NodePlan(recipe.cluster, tuple(roles_of(recipe).items()))
    longest = longest_sequence(recipe, next(iter(models.values())).shape.positions)
    counted = with_tier(recipe, models, where, longest)
    held = footprints(counted, models, where, longest)
    found = memories(counted, held, where)
    room = 0
    if isinstance(recipe, RLRecipe):
        room = kv_room(models["engine"], longest, recipe.generation, recipe.cluster)
    lacking = lacking_gpus(recipe)
    problems = [
        *([f"cluster: {lacking}"] if lacking else []),
        *_position_problems(recipe, models),
        *_engine_problems(recipe, models, longest, room),
        *memory_problems(found),
    ]
    return Plan(
        recipe,
        counted.cluster.tier,
        models,
        where,
        held,
        found,
        batch(recipe, [m.role for m in models.values()], longest),
        _sync(recipe, models),
        longest,
        room,
        step_seconds(recipe, models, longest, room * longest),
        problems,
    )


def read_models(recipe: Recipe, document: Document | None = None) -> dict[str, Model]:
    """Return every role's model. Raises UserError with every model that cannot be planned, and
    where it is written.
    """
    found: dict[str, Model] = {}
    shapes: dict[str, Shape] = {}
    problems: list[Problem] = []
    for role in roles_of(recipe).values():
        if role.model is None:
            continue
        path = role.model.path
        like = role.model.like
        try:
            shapes[path] = shapes.get(path) or find_shape(path, like)
        except UserError as error:
            key = "like" if error.problems[0].startswith(f"{like}: ") else "path"
            problems.append(Problem((f"{role.model_key}.{key}",), error.problems[0]))
            continue
        found[role.name] = Model(role, role.model, shapes[path])
        if shapes[path].encoder and role.head != "score":
            decoder = f"{path} is an encoder; a decoder is needed"
            problems.append(Problem((f"{role.model_key}.path",), decoder))
    if problems:
        lines = [located(p, document) if document else str(p) for p in problems]
        raise UserError(list(dict.fromkeys(lines)))
    return found


def _sync(recipe: Recipe, models: dict[str, Model]) -> dict[str, int]:
    """Return what one weight sync moves."""
    if not isinstance(recipe, RLRecipe):
        return {"bytes": 0, "engines": 0, "devices": 0}
    engines = recipe.generation.engines
    size = sync_bytes(models["actor"], recipe)
    devices = engines * recipe.generation.tensor_parallel
    return {"bytes": size, "engines": engines, "devices": devices}


def _position_problems(recipe: Recipe, models: dict[str, Model]) -> Iterator[str]:
    """Yield which lengths are more than the positions of the models that read the Actor's ids."""
    if not isinstance(recipe, RLRecipe):
        return
    readers = {
        model.role.model_key: model.shape.positions
        for model in models.values()
        if model.role.head != "score"
    }
    for key, positions in readers.items():
        yield from map(str, position_problems(key, positions, recipe.generation))


def _engine_problems(
    recipe: Recipe, models: dict[str, Model], longest: int, room: int
) -> Iterator[str]:
    """Yield what keeps an engine from starting, whatever the memory."""
    if not isinstance(recipe, RLRecipe):
        return
    shape = models["engine"].shape
    generation = recipe.generation
    parallel = generation.tensor_parallel
    one = f"one sequence of {longest} tokens"
    given = generation.kv_cache_bytes
    share = f"{generation.gpu_memory_fraction:g} of {recipe.cluster.gpu_memory_gib:g} GiB"
    cuda = recipe.cluster.device == "cuda"
    rules = [
        (
            uneven(shape, parallel),
            ("generation.tensor_parallel",),
            f"{parallel} does not divide the model's {', '.join(uneven(shape, parallel))}",
        ),
        (
            room < 1 and cuda and given is not None,
            ("generation.kv_cache_bytes",),
            f"{given} bytes on each GPU do not hold {one}",
        ),
        (
            room < 1 and cuda and given is None,
            ("generation",),
            f"an engine's {share} leaves no KV cache for {one}",
        ),
        (
            room < 1 and not cuda,
            ("generation.kv_cache_gib",),
            f"{generation.kv_cache_gib:g} GiB of KV cache do not hold {one}",
        ),
    ]
    yield from map(str, problems_of(rules))


# --- output ---------------------------------------------------------------------------------------


def as_json(plan: Plan, hints: Mapping[str, str]) -> dict[str, Any]:
    """Return everything as plain data; sizes in bytes, times in seconds. docs/plan.md lists the
    keys, which stay.
    """
    whole = sum(plan.seconds.values())
    return {
        "kind": plan.recipe.kind,
        "fits": plan.fits,
        "problems": plan.problems,
        "changes": [{key: what} for key, what in hints.items()],
        "models": {
            role: {
                "path": m.settings.path,
                "dtype": m.settings.dtype,
                "parameters": m.parameters,
                "trained": trained(m.shape, m.role.head, m.settings) if m.role.learner else 0,
            }
            for role, m in plan.models.items()
        },
        "batch": plan.batch,
        "placement": [
            {"process": p.name, "role": p.role, "node": p.node, "gpus": list(p.gpus)}
            for p in plan.where.processes
        ],
        "memory": [_device(plan, m, device) for m in plan.memories for device in m.devices],
        "swap": {"tier": plan.tier, "bytes": plan.swapped},
        "sync": plan.sync,
        "estimated_phases": {
            phase: {"seconds": time, "share": time / whole if whole else 0.0}
            for phase, time in plan.seconds.items()
        },
    }


def _device(plan: Plan, memory: Memory, device: Device) -> dict[str, Any]:
    """Return one GPU or one node's CPU memory, process by process."""
    held = {p.name: plan.footprints[p.kind] for p in plan.where.on[device]}
    return {
        "node": device[0],
        "gpu": device[1],
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
