"""Which keys help where a recipe does not fit, and what to do with them: tables, not a search. What
a recipe has done already, or cannot do, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from actors.cluster.layout import shares_gpus
from actors.roles import Role, roles_of
from actors.settings import RLRecipe
from launch.plan.batches import load
from launch.plan.memory import LIVE, kv_room
from launch.plan.plan import Plan
from launch.plan.shapes import uneven
from launch.recipe.combinations import lacking_gpus, sharing_problems
from learners.settings import LearnerSettings

LEAST_SHARE = 0.1  # of a full device: smaller components are not what fills it
MOST_OF_A_GPU = 0.95  # that an engine may take
LARGE = 4 * LIVE  # parameters: of smaller models, ZeRO-3 gathers more than it saves

Way = tuple[str, str, object]
Ways = dict[str, list[Way]]
"""Component that fills a device ("" for any) -> keys of the role's section, what to do with each
(lower, higher, or a value), and whether that is possible and helps.
"""


def hints_for(plan: Plan) -> dict[str, str]:
    """Keys of the recipe, and what to do with them; empty where all fits. What comes first holds,
    should two ask for opposite things.
    """
    found: dict[str, str] = {}
    for part in (_too_few_gpus, _engine_cannot_start, _full_devices):
        for key, what in part(plan):
            found.setdefault(key, what)
    return found


def _too_few_gpus(plan: Plan) -> Iterator[tuple[str, str]]:
    recipe = plan.recipe
    cluster = recipe.cluster
    if lacking_gpus(recipe) is None:
        return
    if plan.where.nodes is None:  # an engine must lie on one node
        yield from _parallel(plan, lambda size: True)
        return
    yield "cluster.nodes", str(plan.where.nodes)
    if _placeable(plan, "colocated"):
        yield "cluster.placement", "colocated"
    there = cluster.nodes * cluster.gpus_per_node
    roles = roles_of(recipe).values()
    missing = sum(role.processes * role.gpus for role in roles) - there
    for role in roles:  # of shared GPUs each role takes its own share
        gpus = role.processes * role.gpus
        if gpus > there if shares_gpus(cluster) else gpus - role.gpus >= missing:
            yield role.count_key, "lower"


def _engine_cannot_start(plan: Plan) -> Iterator[tuple[str, str]]:
    recipe = plan.recipe
    if not isinstance(recipe, RLRecipe):
        return
    generation = recipe.generation
    model = plan.models["engine"]
    positions = model.shape.positions
    if (generation.max_model_tokens or 0) > positions:
        yield "generation.max_model_tokens", str(positions)
    if generation.max_new_tokens >= positions:
        yield "generation.max_new_tokens", f"below {positions}"
    if uneven(model.shape, generation.tensor_parallel):
        yield from _parallel(plan, lambda size: True)
    if plan.kv_room:
        return
    if recipe.cluster.device == "cpu":
        yield "generation.kv_cache_gib", "higher"
    else:
        most = generation.model_copy(update={"gpu_memory_fraction": MOST_OF_A_GPU})
        if kv_room(model, plan.longest, most, recipe.cluster):
            yield "generation.gpu_memory_fraction", "higher"
        yield from _parallel(plan, lambda size: size > generation.tensor_parallel)
    if kv_room(model, plan.longest // 2, generation, recipe.cluster):
        yield _longest_key(plan), "lower"


def _full_devices(plan: Plan) -> Iterator[tuple[str, str]]:
    """Of every device that overflows: what fills it, the largest first, then where else processes
    may lie.
    """
    roles = roles_of(plan.recipe)
    cluster = plan.recipe.cluster
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
            ways = (_beside_gpus if beside else _on_its_device)(plan, roles[name], phase)
            for key, what, possible in [*ways.get(component, []), *ways.get("", [])]:
                if possible:
                    yield f"{roles[name].section}.{key}", what
            if component == "activations" and _single_rows(plan, roles[name], phase):
                yield _longest_key(plan), "lower"
        if cluster.device == "cpu" and len(plan.where.processes) > cluster.nodes:
            yield "cluster.nodes", "higher"
        if (beside or phase != "generate") and _placeable(plan, "separate"):
            yield "cluster.placement", "separate"


# --- the tables -----------------------------------------------------------------------------------


def _on_its_device(plan: Plan, role: Role, phase: str) -> Ways:
    """Where models lie: on GPUs, or in CPU memory where there are none."""
    cuda = plan.recipe.cluster.device == "cuda"
    ways: Ways = {"": [(role.count, "lower", not cuda and role.processes > 1)]}
    if role.model is None:
        return ways
    if role.name == "engine":
        larger = dict(_parallel(plan, lambda size: size > role.gpus)).values()
        share = ("gpu_memory_fraction", "lower", True)
        # while it is awake on a GPU, an engine takes its share, however small its weights
        awake = phase == "generate" or not shares_gpus(plan.recipe.cluster)
        parallel: list[Way] = [("tensor_parallel", what, cuda and not awake) for what in larger]
        cache: Way = share if cuda else ("kv_cache_gib", "lower", True)
        return ways | {"kv_cache": [cache], "weights": parallel}
    own = role.model_key.startswith(role.section)
    full = role.model.dtype == "float32"
    ways["activations"] = [
        ("micro_batch_tokens", "lower", not _single_rows(plan, role, phase)),
        ("model.attention", "sdpa", own and role.model.attention == "eager"),
    ]
    if role.learner is None:
        return ways | {"weights": [("model.dtype", "bfloat16", own and full)]}
    trained = _trained(role.learner, cuda, plan.models[role.name].parameters > LARGE)
    checkpointing = phase == "learn" and not role.model.gradient_checkpointing
    ways["activations"].append(("model.gradient_checkpointing", "true", checkpointing))
    return ways | trained


def _trained(learner: LearnerSettings, cuda: bool, large: bool) -> Ways:
    """What a learner's states are cut, moved or halved with."""
    stage = learner.zero_stage
    several = learner.ranks > 1
    offloaded = learner.offload_optimizer
    half = learner.model.dtype == "float32" and stage > (2 if offloaded else 1)
    cut = ("zero_stage", "3" if large else "2", several and stage < 2)
    parameters = stage == 3 and offloaded and not learner.offload_parameters
    return {
        "weights": [
            ("zero_stage", "3", several and stage < 3 and large),
            ("offload_parameters", "true", cuda and parameters),
            ("model.dtype", "bfloat16", half),
            ("ranks", "higher", cuda and stage == 3),
        ],
        "gradients": [cut, ("ranks", "higher", cuda and stage > 1)],
        "optimizer": [
            cut,
            ("offload_optimizer", "true", cuda and stage and not offloaded),
            ("ranks", "higher", cuda and stage),
        ],
    }


def _beside_gpus(plan: Plan, role: Role, phase: str) -> Ways:
    """CPU memory of a node with GPUs: processes, what is loaded, offloaded, or waits there."""
    learner = role.learner
    if learner is None:
        half = role.model is not None and role.model.dtype == "float32"
        own = role.model_key.startswith(role.section) and role.name != "engine"
        return {
            "": [(role.count, "lower", role.count and role.processes > 1)],
            "weights": [("model.dtype", "bfloat16", half and own)],
        }
    parameters = learner.offload_parameters
    back: list[Way] = [("offload_optimizer", "false", learner.offload_optimizer and not parameters)]
    return {
        "weights": [
            ("offload_parameters", "false", parameters and not shares_gpus(plan.recipe.cluster)),
            ("zero_stage", "3", phase == "start" and learner.zero_stage < 3),
        ],
        **dict.fromkeys(("optimizer", "gradients", "buffers"), back),
    }


# --- what is possible -----------------------------------------------------------------------------


def _single_rows(plan: Plan, role: Role, phase: str) -> bool:
    """Whether micro-batches are as small as they can be."""
    return load(plan.recipe, role, plan.longest, phase == "learn").smallest


def _longest_key(plan: Plan) -> str:
    """The key that bounds the longest sequence."""
    if not isinstance(plan.recipe, RLRecipe):
        return "data.max_tokens"
    whole = plan.recipe.generation.max_model_tokens
    return "generation.max_model_tokens" if whole else "generation.max_new_tokens"


def _parallel(plan: Plan, wanted: Callable[[int], bool]) -> Iterator[tuple[str, str]]:
    """How many GPUs of one node an engine can be cut over."""
    shape = plan.models["engine"].shape
    per_node = plan.recipe.cluster.gpus_per_node
    if sizes := [str(n) for n in range(1, per_node + 1) if not uneven(shape, n) and wanted(n)]:
        yield "generation.tensor_parallel", " or ".join(sizes)


def _placeable(plan: Plan, placement: str) -> bool:
    """Whether the same processes could be placed so on the same GPUs."""
    recipe = plan.recipe
    cluster = recipe.cluster
    if (
        not isinstance(recipe, RLRecipe)
        or placement == cluster.placement
        or cluster.device == "cpu"
    ):
        return False
    moved = cluster.model_copy(update={"placement": placement})
    other = recipe.model_copy(update={"cluster": moved})
    return lacking_gpus(other) is None and not any(sharing_problems(other))
