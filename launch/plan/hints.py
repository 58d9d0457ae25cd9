"""Keys that help where a recipe does not fit, and what to do with them: tables, not a search. What
a recipe has done already, or cannot do, is left out.
"""

from __future__ import annotations

import sys

from actors.cluster.layout import shares_gpus
from actors.roles import Role, roles_of
from actors.settings import RLRecipe
from launch.plan.batches import load
from launch.plan.memory import LIVE, kv_room
from launch.plan.plan import Plan
from launch.plan.shapes import uneven
from launch.recipe.combinations import lacking_gpus, sharing_problems

LEAST_SHARE = 0.1  # of a full device: smaller components are not what fills it
MOST_OF_A_GPU = 0.95  # that an engine may take
LARGE = 4 * LIVE  # parameters: of smaller models, ZeRO-3 gathers more than it saves

Hint = tuple[str, str, object]
"""A key, what to do with it (lower, higher, or a value), and whether that is possible and helps."""

Row = tuple[str, str, str, object]
"""The component that fills a device ("" for any), and a hint with a key of the role's section."""


def hints_for(plan: Plan) -> dict[str, str]:
    """Return keys of the recipe, and what to do with them; nothing where all fits. What comes first
    holds, should two ask for opposite things.
    """
    found: dict[str, str] = {}
    hints = [*_too_few_gpus(plan), *_engine_cannot_start(plan), *_full_devices(plan)]
    for key, what, helps in hints:
        if helps:
            found.setdefault(key, what)
    return found


def _too_few_gpus(plan: Plan) -> list[Hint]:
    cluster = plan.recipe.cluster
    if lacking_gpus(plan.recipe) is None:
        return []
    if plan.where.nodes is None:  # an engine must lie on one node
        return [_parallel(plan)]
    roles = roles_of(plan.recipe).values()
    there = cluster.nodes * cluster.gpus_per_node
    missing = sum(role.processes * role.gpus for role in roles) - there
    shared = shares_gpus(cluster)  # then each role needs its own share of the same GPUs
    return [
        ("cluster.nodes", str(plan.where.nodes), True),
        ("cluster.placement", "colocated", _placeable(plan, "colocated")),
        *(
            (r.count_key, "lower", r.processes * r.gpus > there)
            if shared
            else (r.count_key, "lower", (r.processes - 1) * r.gpus >= missing)
            for r in roles
        ),
    ]


def _engine_cannot_start(plan: Plan) -> list[Hint]:
    if not isinstance(plan.recipe, RLRecipe):
        return []
    cluster = plan.recipe.cluster
    generation = plan.recipe.generation
    model = plan.models["engine"]
    positions = model.shape.positions or sys.maxsize
    no_room = not plan.kv_room
    cuda = cluster.device == "cuda"
    most = generation.model_copy(update={"gpu_memory_fraction": MOST_OF_A_GPU})
    roomier = no_room and kv_room(model, plan.longest, most, cluster)
    shorter = no_room and kv_room(model, plan.longest // 2, generation, cluster)
    return [
        (
            "generation.max_model_tokens",
            str(positions),
            (generation.max_model_tokens or 0) > positions,
        ),
        (
            "generation.max_new_tokens",
            f"below {positions}",
            generation.max_new_tokens >= positions,
        ),
        _parallel(plan, wanted=bool(uneven(model.shape, generation.tensor_parallel))),
        ("generation.kv_cache_gib", "higher", no_room and not cuda),
        ("generation.gpu_memory_fraction", "higher", roomier and cuda),
        _parallel(plan, generation.tensor_parallel + 1, wanted=no_room and cuda),
        (_longest_key(plan), "lower", shorter),
    ]


def _full_devices(plan: Plan) -> list[Hint]:
    """Return, for every device that overflows, hints for what fills it, the largest first, then
    where else processes may lie.
    """
    roles = roles_of(plan.recipe)
    cluster = plan.recipe.cluster
    hints: list[Hint] = []
    for memory in (m for m in plan.memories if m.overflows):
        phase, size = memory.peak
        beside = cluster.device == "cuda" and not memory.is_gpu
        parts = [
            (part, name, component)
            for name, use in memory.uses[phase].items()
            for component, part in use.items()
            if part >= LEAST_SHARE * size
        ]
        for _, name, component in sorted(parts, reverse=True):
            role = roles[name]
            rows = (_beside_gpus if beside else _on_its_device)(plan, role, phase)
            hints += [
                (f"{role.section}.{key}", what, helps)
                for filling, key, what, helps in rows
                if filling in (component, "")
            ]
            long = component == "activations" and _single_rows(plan, role, phase)
            hints.append((_longest_key(plan), "lower", long))
        spread = cluster.device == "cpu" and len(plan.where.processes) > cluster.nodes
        moving = memory.is_gpu and _moves_too_little(plan)
        hints.append(("cluster.swap", "auto", moving))
        apart = (beside or phase != "generate") and _placeable(plan, "separate")
        hints += [("cluster.nodes", "higher", spread), ("cluster.placement", "separate", apart)]
    return hints


# --- the tables -----------------------------------------------------------------------------------


def _on_its_device(plan: Plan, role: Role, phase: str) -> list[Row]:
    """Return the rows for where models lie: on GPUs, or in CPU memory where there are none."""
    cuda = plan.recipe.cluster.device == "cuda"
    fewer: Row = ("", role.count, "lower", not cuda and role.processes > 1)
    if role.model is None:
        return [fewer]
    if role.name == "engine":
        # while it is awake on a GPU, an engine takes its share, however small its weights
        asleep = phase != "generate" and shares_gpus(plan.recipe.cluster)
        _, sizes, possible = _parallel(plan, role.gpus + 1, wanted=cuda and asleep)
        cache = _cache_key(plan)
        return [
            ("weights", "tensor_parallel", sizes, possible),
            ("kv_cache", cache, "lower", True),
            fewer,
        ]
    model = role.model
    learner = role.learner
    own = role.model_key.startswith(role.section)
    named = model.attention == "eager"
    shape = plan.models[role.name].shape
    rows: list[Row] = [
        ("activations", "micro_batch_tokens", "lower", not _single_rows(plan, role, phase)),
        ("activations", "model.attention", "sdpa", own and named and shape.auto == "sdpa"),
    ]
    full = model.dtype == "float32"
    if learner is None:
        return [*rows, ("weights", "model.dtype", "bfloat16", own and full), fewer]
    large = plan.models[role.name].parameters > LARGE
    stage = learner.zero_stage
    several = learner.ranks > 1
    offloaded = learner.offload_optimizer
    whole = phase == "learn" and not model.gradient_checkpointing
    parameters = stage == 3 and offloaded and not learner.offload_parameters
    cut = ("zero_stage", "3" if large else "2", several and stage < 2)
    return [
        *rows,
        ("activations", "model.gradient_checkpointing", "true", whole),
        ("weights", "zero_stage", "3", several and stage < 3 and large),
        ("weights", "offload_parameters", "true", cuda and parameters),
        ("weights", "model.dtype", "bfloat16", full and stage > (2 if offloaded else 1)),
        ("weights", "ranks", "higher", cuda and stage == 3),
        ("gradients", *cut),
        ("gradients", "ranks", "higher", cuda and stage > 1),
        ("optimizer", *cut),
        ("optimizer", "offload_optimizer", "true", cuda and stage and not offloaded),
        ("optimizer", "ranks", "higher", cuda and stage),
        fewer,
    ]


def _beside_gpus(plan: Plan, role: Role, phase: str) -> list[Row]:
    """Return the rows for the CPU memory of a node with GPUs: processes, and what is loaded,
    offloaded, or waits there.
    """
    learner = role.learner
    if learner is None:
        full = role.model is not None and role.model.dtype == "float32"
        own = role.model_key.startswith(role.section) and role.name != "engine"
        return [
            ("weights", "model.dtype", "bfloat16", own and full),
            ("", role.count, "lower", role.count and role.processes > 1),
        ]
    parameters = learner.offload_parameters
    moved = parameters and not shares_gpus(plan.recipe.cluster)
    back = ("offload_optimizer", "false", learner.offload_optimizer and not parameters)
    return [
        ("weights", "offload_parameters", "false", moved),
        ("weights", "zero_stage", "3", phase == "start" and learner.zero_stage < 3),
        *((component, *back) for component in ("optimizer", "gradients", "buffers")),
    ]


# --- what is possible -----------------------------------------------------------------------------


def _single_rows(plan: Plan, role: Role, phase: str) -> bool:
    """Tell whether micro-batches are as small as they can be."""
    return load(plan.recipe, role, plan.longest, phase == "learn").smallest


def _longest_key(plan: Plan) -> str:
    """Return the key that bounds the longest sequence."""
    if not isinstance(plan.recipe, RLRecipe):
        return "data.max_tokens"
    whole = plan.recipe.generation.max_model_tokens
    return "generation.max_model_tokens" if whole else "generation.max_new_tokens"


def _cache_key(plan: Plan) -> str:
    """Return the key of the generation section that bounds an engine's KV cache."""
    assert isinstance(plan.recipe, RLRecipe)
    generation = plan.recipe.generation
    if plan.recipe.cluster.device == "cpu":
        return "kv_cache_gib"
    if generation.kv_cache_bytes is not None:
        return "kv_cache_bytes"
    wanted = shares_gpus(plan.recipe.cluster) and plan.kv_room >= generation.max_concurrent
    return "max_concurrent" if wanted else "gpu_memory_fraction"


def _moves_too_little(plan: Plan) -> bool:
    """Tell whether the recipe itself keeps on shared GPUs what could leave them."""
    cluster = plan.recipe.cluster
    return shares_gpus(cluster) and cluster.swap not in ("auto", "always")


def _parallel(plan: Plan, least: int = 1, wanted: bool = True) -> Hint:
    """Return over how many GPUs of one node, from `least`, an engine can be cut."""
    shape = plan.models["engine"].shape
    most = plan.recipe.cluster.gpus_per_node
    sizes = " or ".join(str(n) for n in range(least, most + 1) if not uneven(shape, n))
    return "generation.tensor_parallel", sizes, wanted and sizes


def _placeable(plan: Plan, placement: str) -> bool:
    """Tell whether the same processes could be placed so on the same GPUs."""
    recipe = plan.recipe
    cluster = recipe.cluster
    if not isinstance(recipe, RLRecipe) or cluster.device == "cpu":
        return False
    moved = cluster.model_copy(update={"placement": placement})
    other = recipe.model_copy(update={"cluster": moved})
    possible = lacking_gpus(other) is None and not any(sharing_problems(other))
    return placement != cluster.placement and possible
