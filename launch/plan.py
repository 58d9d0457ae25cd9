"""`quatuor plan`: what a recipe will do and need, by arithmetic alone; nothing starts and nothing heavy is imported.

Memory comes from launch/memory.py, times (rough) from launch/timing.py, places from actors/layout.py, which also places
the real run. docs/plan.md says what is exact and what is an estimate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.layout import Layout, demands, layout, misfit, needs_reference, shares_gpus, sharing_problems
from actors.settings import GRPORecipe, PPORecipe, RMRecipe, SFTRecipe
from launch import memory
from launch.checks import Recipe
from launch.memory import GIB, PHASES, Footprint, Load, Use, total
from launch.shapes import ENCODERS, Head, Shape, find_shape
from launch.timing import step_seconds
from learners.settings import LearnerSettings, ModelSettings, UserError

RL = PPORecipe | GRPORecipe


@dataclass(frozen=True)
class Model:
    """A role's model: where the recipe names it, its shape and its head."""

    key: str
    settings: ModelSettings
    shape: Shape
    head: Head

    @property
    def parameters(self) -> int:
        return self.shape.parameters(self.head)


@dataclass(frozen=True)
class Process:
    """One process of a role: its node, its GPUs' numbers on that node, and its memory."""

    name: str
    role: str
    node: int
    gpus: tuple[int, ...]
    footprint: Footprint


@dataclass(frozen=True)
class Memory:
    """One GPU, or the CPU memory of one node: its limit, and what each process holds there in each phase, in bytes."""

    node: int
    gpu: int | None
    limit: int | None
    uses: dict[str, dict[str, Use]]  # phase -> process -> component -> bytes

    @property
    def totals(self) -> dict[str, int]:
        return {phase: sum(map(total, processes.values())) for phase, processes in self.uses.items()}

    @property
    def peak(self) -> tuple[str, int]:
        """The phase that holds most, and how much."""
        return max(self.totals.items(), key=lambda item: item[1])

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
    batch: dict[str, Any]
    processes: list[Process]
    memories: list[Memory]
    sync: dict[str, Any]
    seconds: dict[str, float]
    problems: list[str]

    @property
    def fits(self) -> bool:
        return not self.problems


def make_plan(recipe: Recipe) -> Plan:
    """Raises UserError when a model's shape is not known on this machine."""
    models = dict(_models(recipe))
    where = layout(recipe.cluster, demands(recipe))
    problems = list(_model_problems(recipe, models))
    problems += [f"{keys[0]}: {message}" for keys, message in sharing_problems(recipe)]
    if lacking := _lacking(recipe, where):
        problems.insert(0, lacking)
    processes = _processes(recipe, models, where)
    memories = _memories(recipe, processes)
    problems += _memory_problems(memories)
    longest = _longest(recipe, models)
    cached = kv_room(recipe, models) * longest if isinstance(recipe, RL) else 0
    seconds = step_seconds(recipe, {role: m.shape for role, m in models.items()}, longest, cached)
    made = batch(recipe, models), processes, memories, _sync(recipe, models), seconds, problems
    return Plan(recipe, models, *made)


def excess(recipe: Recipe) -> int:
    """By how many bytes a recipe does not fit, over all devices; what is no question of memory counts as 1 TiB."""
    try:
        plan = make_plan(recipe)
    except UserError:  # a layout that is refused
        return 1024 * GIB
    over = [-m.headroom for m in plan.memories if m.headroom is not None and m.headroom < 0]
    others = len(plan.problems) - len(list(_memory_problems(plan.memories)))
    return sum(over) + others * 1024 * GIB


# --- models and batches -----------------------------------------------------------------------------------------------


def _models(recipe: Recipe) -> Iterator[tuple[str, Model]]:
    """Every role that holds a model, in placement order."""
    if isinstance(recipe, SFTRecipe | RMRecipe):
        head: Head = "lm" if isinstance(recipe, SFTRecipe) else "score"
        yield recipe.kind, _model("learner.model", recipe.learner.model, head)
        return
    yield "engine", _model("actor.model", recipe.actor.model, "lm")
    yield "actor", _model("actor.model", recipe.actor.model, "lm")
    if isinstance(recipe, PPORecipe):
        yield "critic", _model("critic.model", recipe.critic.model, "value")
    if needs_reference(recipe):
        own = recipe.reference.model
        key = "reference.model" if own else "actor.model"
        yield "reference", _model(key, own or recipe.actor.model, "lm")
    for i, reward in enumerate(recipe.rewards):
        if reward.model is not None:
            yield f"reward {reward.name}", _model(f"rewards.{i}.model", reward.model, "score")


def _model(key: str, settings: ModelSettings, head: Head) -> Model:
    shape = find_shape(key, settings.path)
    if shape.family in ENCODERS and head != "score":
        raise UserError(f"{key}.path: {settings.path} is an encoder; a decoder is needed")
    return Model(key, settings, shape, head)


def _longest(recipe: Recipe, models: Mapping[str, Model]) -> int:
    """The longest sequence there may be, tokens."""
    if isinstance(recipe, RL):
        return memory.longest_sequence(recipe, models["actor"].shape)
    return min(recipe.data.max_tokens, models[recipe.kind].shape.positions)


def batch(recipe: Recipe, models: Mapping[str, Model]) -> dict[str, Any]:
    """The batch arithmetic: from what one step reads to optimizer steps. Micro-batches are those of longest rows."""
    longest, together = _longest(recipe, models), 1
    if isinstance(recipe, RL):
        step, learners = recipe.step, {"actor": recipe.actor}
        if isinstance(recipe, PPORecipe):
            learners["critic"] = recipe.critic
        sequences = step.prompts_per_step * step.group_size
        rows, per_step = step.mini_batch_size, step.ppo_epochs * math.ceil(sequences / step.mini_batch_size)
        head: dict[str, Any] = {
            "prompts": step.prompts_per_step, "group_size": step.group_size, "sequences": sequences,
            "mini_batches": math.ceil(sequences / rows), "mini_batch_size": rows, "epochs": step.ppo_epochs,
            "optimizer_steps_per_step": per_step, "steps": step.steps, "optimizer_steps": per_step * step.steps,
        }  # fmt: skip
    else:
        train, learners = recipe.train, {recipe.kind: recipe.learner}
        together = 2 if isinstance(recipe, RMRecipe) else 1
        rows = sequences = train.batch_size * together
        head = {
            "examples": train.batch_size, "sequences": sequences, "mini_batches": 1, "mini_batch_size": rows,
            "optimizer_steps_per_step": 1, "steps": train.steps, "optimizer_steps": train.steps,
        }  # fmt: skip
    ranks = {role: _cut(rows, learner, longest, together) for role, learner in learners.items()}
    return {**head, "longest_sequence_tokens": longest, "ranks": ranks}


def _cut(rows: int, learner: LearnerSettings, longest: int, together: int) -> dict[str, int]:
    """How a mini-batch is cut for one role: rows of a rank, and its micro-batches when every row is a longest one."""
    mine = math.ceil(rows / together / learner.ranks) * together
    at_once = max(together, learner.micro_batch_tokens // longest // together * together)
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
    actor, generation = models["actor"], recipe.generation
    width = memory.BYTES[actor.settings.dtype]
    devices = generation.engines * generation.tensor_parallel
    return {"bytes": width * actor.parameters, "engines": generation.engines, "devices": devices}


# --- placement and memory ---------------------------------------------------------------------------------------------


def _lacking(recipe: Recipe, where: Layout) -> str | None:
    """Why the GPUs of the recipe's cluster are not enough."""
    cluster = recipe.cluster
    nodes = [{"GPU": float(cluster.gpus_per_node)}] * cluster.nodes
    bundles = [{"GPU": b["GPU"]} for b in where.bundles if "GPU" in b]
    reason = misfit(bundles, nodes) if bundles else None
    has = f"cluster has {cluster.nodes} x {cluster.gpus_per_node}"
    return f"cluster: {reason.split(', Ray has')[0]}, the {has}" if reason else None


def _nodes_of(recipe: Recipe, where: Layout) -> list[tuple[int, int]]:
    """Node and first GPU of every bundle: the first node with room, in order; beyond the last node if there is none.

    Without GPUs, bundles are spread over the nodes.
    """
    if recipe.cluster.device == "cpu":
        return [(i % recipe.cluster.nodes, 0) for i in range(len(where.bundles))]
    per_node = recipe.cluster.gpus_per_node
    taken: list[int] = [0] * recipe.cluster.nodes
    spots = []
    for bundle in where.bundles:
        wanted = int(bundle.get("GPU", 0))
        node = next((n for n, used in enumerate(taken) if used + wanted <= per_node), len(taken))
        if node == len(taken):
            taken.append(0)
        spots.append((node, taken[node]))
        taken[node] += wanted
    return spots


def _processes(recipe: Recipe, models: Mapping[str, Model], where: Layout) -> list[Process]:
    """Every process in its place. All of a role are alike, but that the Actor's first rank sends the weights; on shared
    GPUs every rank sends to the engine beside it."""
    spots, found = _nodes_of(recipe, where), []
    for role, seats in where.seats.items():
        first_of, others = (_footprint(recipe, models, role, sends) for sends in (True, False))
        for i, seat in enumerate(seats):
            node, first = spots[seat.bundle]
            gpus = tuple(first + g for g in seat.gpus) if recipe.cluster.device == "cuda" else ()
            name = f"{role}[{i}]" if len(seats) > 1 else role
            sends = i == 0 or shares_gpus(recipe.cluster)
            found.append(Process(name, role, node, gpus, first_of if sends else others))
    return found


def _footprint(recipe: Recipe, models: Mapping[str, Model], role: str, sends: bool) -> Footprint:
    cluster, longest = recipe.cluster, _longest(recipe, models)
    if role not in models:
        return memory.function()
    model = models[role]
    if isinstance(recipe, SFTRecipe | RMRecipe):
        load = Load.of(recipe.learner.micro_batch_tokens, longest, 2 if isinstance(recipe, RMRecipe) else 1)
        return memory.learner(role, model.shape, model.head, recipe.learner, load, cluster)
    if role == "engine":
        return memory.engine(model.shape, model.settings, recipe.generation, cluster)
    if role == "actor" or (role == "critic" and isinstance(recipe, PPORecipe)):
        settings: LearnerSettings = getattr(recipe, role)
        load = Load.of(settings.micro_batch_tokens, longest)
        found = memory.learner(role, model.shape, model.head, settings, load, cluster)
        return memory.sending(found, model.shape, model.settings, cluster) if role == "actor" and sends else found
    worker = recipe.reference if role == "reference" else next(r for r in recipe.rewards if role == f"reward {r.name}")
    return memory.frozen(model.shape, model.head, model.settings, Load.of(worker.micro_batch_tokens, longest), cluster)


def _memories(recipe: Recipe, processes: list[Process]) -> list[Memory]:
    """Every GPU in use, and every node's CPU memory."""
    cluster = recipe.cluster
    phases = PHASES if isinstance(recipe, RL) else ("start", "learn")
    gpus = sorted({(p.node, g) for p in processes for g in p.gpus})
    found = [
        Memory(
            node, gpu, int(cluster.gpu_memory_gib * GIB),
            {f: {p.name: p.footprint.device[f] for p in processes if p.node == node and gpu in p.gpus} for f in phases},
        )
        for node, gpu in gpus
    ]  # fmt: skip
    limit = None if cluster.node_memory_gib is None else int(cluster.node_memory_gib * GIB)
    for node in sorted({p.node for p in processes}):
        uses = {f: {p.name: p.footprint.host[f] for p in processes if p.node == node} for f in phases}
        found.append(Memory(node, None, limit, uses))
    return found


def _model_problems(recipe: Recipe, models: Mapping[str, Model]) -> Iterator[str]:
    """What keeps an engine from starting, whatever the memory."""
    if not isinstance(recipe, RL) or recipe.cluster.device == "cpu":
        return
    shape, parallel = models["engine"].shape, recipe.generation.tensor_parallel
    if shape.heads % parallel:
        yield f"generation.tensor_parallel: {parallel} does not divide the model's {shape.heads} attention heads"
    if kv_room(recipe, models) < 1:
        yield (
            f"generation: an engine's {recipe.generation.gpu_memory_fraction:g} of {recipe.cluster.gpu_memory_gib:g} "
            f"GiB leaves no KV cache for one sequence of {_longest(recipe, models)} tokens"
        )


def kv_room(recipe: RL, models: Mapping[str, Model]) -> float:
    """Sequences of the longest length that an engine's KV cache holds at once."""
    model, generation = models["engine"], recipe.generation
    footprint = memory.engine(model.shape, model.settings, generation, recipe.cluster)
    room = (footprint.device or footprint.host)["generate"].get("kv_cache", 0)
    parts = min(generation.tensor_parallel, model.shape.kv_heads)
    token = memory.BYTES[model.settings.dtype] * model.shape.kv_elements / parts
    return room / token / _longest(recipe, models)


def _memory_problems(memories: list[Memory]) -> Iterator[str]:
    """One line for all devices that overflow alike."""
    over: dict[tuple[str, int, bool], list[Memory]] = {}
    for one in memories:
        if one.headroom is not None and one.headroom < 0:
            over.setdefault((*one.peak, one.gpu is None), []).append(one)
    for (phase, size, _), group in over.items():
        limit = group[0].limit or 0
        heaviest = max(group[0].uses[phase].items(), key=lambda item: total(item[1]))
        yield (
            f"{places(group)}: {phase} needs {size / GIB:.1f} GiB, there are {limit / GIB:.4g}; "
            f"most of it is {heaviest[0].split('[')[0]}: {_largest_parts(heaviest[1])}"
        )


def _largest_parts(use: Use) -> str:
    parts = sorted(use.items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{component.replace('_', ' ')} {size / GIB:.1f}" for component, size in parts)


def places(memories: list[Memory]) -> str:
    """Devices in a few words: node 0 GPU 0-3, node 1 GPU 0-3."""
    if memories[0].gpu is None:
        return f"node {ranges([m.node for m in memories])} CPU memory"
    by_node: dict[int, list[int]] = {}
    for m in memories:
        by_node.setdefault(m.node, []).append(m.gpu or 0)
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


# --- output -----------------------------------------------------------------------------------------------------------


def as_json(plan: Plan, changes: list[Change]) -> dict[str, Any]:
    """Everything as plain data; sizes in bytes, times in seconds. The keys stay as they are."""
    seconds, whole = plan.seconds, sum(plan.seconds.values())
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
            {"process": p.name, "role": p.role, "node": p.node, "gpus": list(p.gpus)} for p in plan.processes
        ],
        "memory": [
            {
                "node": m.node, "gpu": m.gpu, "limit_bytes": m.limit, "largest_phase": m.peak[0],
                "peak_bytes": m.peak[1], "headroom_bytes": m.headroom, "phases": m.uses,
            }
            for m in plan.memories
        ],
        "sync": plan.sync,
        "estimated_phases": {
            phase: {"seconds": time, "share": time / whole if whole else 0.0} for phase, time in seconds.items()
        },
    }  # fmt: skip


def show_plan(recipe: Recipe, json_file: Path | None = None) -> bool:
    """Print the plan, write it as JSON if asked, and say whether the recipe fits."""
    from launch.changes import enough
    from launch.plan_table import print_plan

    plan = make_plan(recipe)
    changes = [] if plan.fits else enough(recipe)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(as_json(plan, changes), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json: {json_file} cannot be written: {error.strerror}") from None
    print_plan(plan, changes)
    return plan.fits


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
