"""Memory of every process of a recipe in every phase of a step: arithmetic on shapes, in bytes.

Weights, gradients and optimizer states are what DeepSpeed allocates
(tests/launch/test_plan_measured.py). Activations are what autograd keeps, exact for one layer and
rounded up for a micro-batch. The engine's own workspace, CUDA contexts and communication are
constants below, and estimates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from actors.cluster.layout import shares_gpus
from actors.roles import Head
from actors.settings import ClusterSettings, GenerationSettings, RLRecipe
from launch.plan.adapters import (
    adapter_parameters,
    sync_bytes,
    tensors,
    trained,
)
from launch.plan.batches import Load
from launch.plan.shapes import BYTES, Model, Shape
from learners.kernels import CAPPED, SINKS
from learners.settings import LearnerSettings, LoraSettings, ModelSettings

GIB = 2**30
PHASES = ("start", "generate", "score", "learn", "sync")

# DeepSpeed's defaults, in elements.
BUCKET = 500_000_000  # gradients reduced at once
LIVE = 1_000_000_000  # ZeRO-3: parameters gathered at once, and optimizer states stepped at once
PERSISTENT = 100_000  # ZeRO-3: smaller parameters are never cut

KV_BLOCK = {"cpu": 128, "cuda": 16}  # vLLM's, in tokens
STATE = 4  # bytes of an element of the states that layers without keys have

# Estimates, in bytes.
PACKED = 2 * GIB  # vLLM's transfer sends through two buffers of 1 GiB
CUDA_CONTEXT = int(0.8 * GIB)  # of one process on a GPU: context, libraries' workspace, NCCL
# of one engine on a GPU: CUDA graphs and activations that are not counted below
ENGINE_WORKSPACE = int(1.5 * GIB)
HOST_PROCESS = {"cpu": {"engine": 2 * GIB}, "cuda": {"engine": 4 * GIB}}
HOST_OTHERS = {"cpu": int(0.6 * GIB), "cuda": 2 * GIB}

Use = dict[str, int]
"""Bytes by component: weights, gradients, optimizer, activations, kv_cache, buffers, sync, runtime.
"""


@dataclass
class Footprint:
    """One process in every phase: `device` is what each of its GPUs holds (on CPU: nothing), `host`
    what CPU memory. `moved` are the bytes that leave shared GPUs in a step and come back.
    """

    device: dict[str, Use] = field(default_factory=dict)
    host: dict[str, Use] = field(default_factory=dict)
    moved: int = 0


# --- what is exact --------------------------------------------------------------------------------


def model_states(shape: Shape, head: Head, settings: LearnerSettings) -> Use:
    """Return bytes of weights, gradients and optimizer states on one rank when they are largest,
    wherever they lie.

    ZeRO 1-3 keep float32 master weights besides the weights even of a float32 model, and gradients
    in float32; bfloat16 under ZeRO-1 keeps both kinds of gradients whole. Of what LoRA leaves
    frozen there are weights alone.
    """
    stage = settings.zero_stage
    ranks = settings.ranks
    whole = shape.parameters(head) + adapter_parameters(shape, settings.model.lora)
    learned = trained(shape, head, settings.model)
    width = BYTES[settings.model.dtype]
    share = learned / ranks
    moments = 8 if settings.optimizer.kind == "adamw" else 0
    if stage == 0:
        states = {"gradients": width * learned, "optimizer": moments * learned}
        return {"weights": width * whole, **states}
    both = (6 if width == 2 else 4) * learned
    small = (
        sum(n * k for n, k in tensors(shape, head, settings.model).items() if n <= PERSISTENT)
        if ranks > 1
        else 0
    )
    return {
        "weights": int(width * (whole / ranks + small)) if stage == 3 else width * whole,
        "gradients": both if stage == 1 else int(4 * share),
        "optimizer": int((4 + moments) * share),
    }


def layer_activations(shape: Shape, dtype: str) -> int:
    """Return bytes per token that autograd keeps of one layer (fused attention, dropout 0): exact
    for types in the table of shapes, at least that for others.
    """
    width = BYTES[dtype]
    if shape.family == "gpt2" or shape.encoder:
        return width * (8 * shape.hidden + 5 * shape.intermediate)
    tabled = shape.own_head is None
    # RMSNorm computes in float32: bfloat16 inputs are kept twice, by some types more often
    norm = 6 if width == 2 and tabled else 8
    heads = (shape.heads + shape.kv_heads) * shape.head_dim
    # by other types more is kept of what fused weights make, by experts of what they are sent
    copies = (2 if tabled else 5) + (2 * shape.experts.active if shape.experts else 0)
    per_column = 8 if shape.family == "gpt_oss" else 4  # whose experts' inputs are clamped
    mixing = 4 * shape.mixed
    return (
        norm * shape.normed
        + width * (copies * shape.hidden + 2 * heads + per_column * shape.columns)
        + mixing
    )


# --- what is estimated ----------------------------------------------------------------------------


def training_activations(shape: Shape, head: Head, model: ModelSettings, load: Load) -> int:
    """Return bytes at the peak of forward and backward of one micro-batch, every position counted
    as a response's.
    """
    layer = layer_activations(shape, model.dtype) + _attention(shape, model, load)
    # what checkpointing keeps, besides the layer it is at
    inputs = shape.layers * BYTES[model.dtype] * shape.hidden
    kept = inputs + layer if model.gradient_checkpointing else shape.layers * layer
    return load.tokens * (kept + 8 * shape.hidden) + _logits(
        shape, head, model, load, gradient=True
    )


def reading_activations(shape: Shape, head: Head, model: ModelSettings, load: Load) -> int:
    """Return bytes at the peak of a forward pass without gradient: one layer at a time, then the
    logits.
    """
    layer = layer_activations(shape, model.dtype) + _attention(shape, model, load)
    return max(load.tokens * layer, _logits(shape, head, model, load, gradient=False))


def _reads(model: Model, load: Load) -> int:
    return reading_activations(model.shape, model.role.head, model.settings, load)


def _attention(shape: Shape, model: ModelSettings, load: Load) -> int:
    """Return bytes per token of attention weights, which only the eager kernel writes out, and
    twice where it is eager for what it does to them.
    """
    if not shape.is_eager(model.attention):
        return 0
    times = 2 if shape.family in (*CAPPED, *SINKS) else 1
    return times * shape.heads * load.longest * (4 + BYTES[model.dtype])


def _logits(shape: Shape, head: Head, model: ModelSettings, load: Load, gradient: bool) -> int:
    """Return bytes of logits, with gradient a float32 copy or a gradient of them, and two float32
    rows at work.
    """
    if head != "lm":
        return 0
    width = BYTES[model.head_dtype or model.dtype]
    per_position = (width + 4) if gradient else width
    return shape.vocabulary * (load.tokens * per_position + 2 * 4 * load.longest)


def learner(
    model: Model, settings: LearnerSettings, reads: Load, learns: Load, cluster: ClusterSettings
) -> Footprint:
    """Return one rank of a trained role. On shared GPUs its optimizer states, or all of it, wait in
    CPU memory while engines generate, by the tier; all of the Critic also during a sync.
    """
    whole = model.parameters
    width = model.width
    stage = settings.zero_stage
    states = model_states(model.shape, model.role.head, settings)
    device: Use = {k: states[k] for k in ("weights", "optimizer")}
    host: Use = {}
    if stage == 3:
        device["gradients"] = states["gradients"]
    if settings.offload_optimizer:
        device.pop("gradients", None)
        part = trained(model.shape, model.role.head, settings.model) // settings.ranks
        host |= {
            "optimizer": device.pop("optimizer"),
            "gradients": 4 * part,
            "buffers": width * part,
        }
    if settings.offload_parameters:
        host["weights"] = device.pop("weights")
    gathered = width * min(whole, LIVE) if stage == 3 else 0
    reading = {"activations": _reads(model, reads), "buffers": gathered}
    learning = _learning(
        model, settings, states, learns, gathered + _bucket(model, settings, cluster)
    )
    on_device = {
        "start": {"weights": device.get("weights", 0)},
        "generate": device,
        "score": sum_of(device, reading),
        "learn": sum_of({k: v for k, v in device.items() if k != "gradients"}, learning),
        "sync": device,
    }
    on_host = dict.fromkeys(PHASES, host)
    if cluster.device == "cuda" and stage < 3:  # a checkpoint is read whole, but under ZeRO-3
        on_host["start"] = sum_of(host, {"weights": states["weights"]})
    away = ("generate",) if model.role.name == "actor" else ("generate", "sync")
    if cluster.tier == "always":
        return _placed(on_device, on_host, cluster, "learner", dict.fromkeys(away, device))
    states = {k: v for k, v in device.items() if k == "optimizer"}
    gone = {"generate": states} if cluster.tier == "optimizer" else {}
    return _placed(on_device, on_host, cluster, "learner", gone)


def _learning(
    model: Model, settings: LearnerSettings, states: Use, learns: Load, buffers: int
) -> Use:
    """Return what learning takes besides weights and optimizer states: the last micro-batch or, if
    that is more, the optimizer step.
    """
    stage = settings.zero_stage
    learned = trained(model.shape, model.role.head, settings.model)
    # With the optimizer offloaded, ZeRO-2 in bfloat16 still sums gradients in float32 on the GPU.
    elsewhere = settings.offload_optimizer and (stage == 3 or (stage == 2 and model.width == 4))
    backward = {
        "gradients": 0 if elsewhere else states["gradients"],
        "activations": training_activations(model.shape, model.role.head, model.settings, learns),
        "buffers": buffers,
    }
    if settings.offload_optimizer:
        return backward
    last = states["gradients"] if stage in (0, 3) else 4 * learned // settings.ranks
    step = {"gradients": last, "buffers": _step(learned, settings)}
    return max(backward, step, key=total)


def _step(learned: int, settings: LearnerSettings) -> int:
    """Return bytes the optimizer step works with: AdamW's denominator, and the gradient where
    DeepSpeed flattens a copy.
    """
    stage = settings.zero_stage
    part = learned // settings.ranks
    if stage == 0:
        part = learned
    if stage == 3:
        part = min(part, LIVE)
    copied = stage == 3 or (stage > 0 and settings.model.dtype == "float32")
    return 4 * part * (int(settings.optimizer.kind == "adamw") + int(copied))


def _bucket(model: Model, settings: LearnerSettings, cluster: ClusterSettings) -> int:
    """Return bytes of the buffer gradients are reduced in, and of single gradients larger than it,
    which ZeRO-2 in bfloat16 keeps. On CPU, pages of it that are never touched take no memory.
    """
    learned = trained(model.shape, model.role.head, settings.model)
    width = model.width
    if settings.zero_stage == 0 or (settings.zero_stage == 1 and width == 2):
        return 4 * min(learned, BUCKET) if settings.ranks > 1 else 0
    kept = settings.zero_stage == 2 and width == 2 and settings.model.lora is None
    sizes = model.shape.tensors(model.role.head)
    larger = sum(n * count for n, count in sizes.items() if n > BUCKET) if kept else 0
    return width * (larger + (BUCKET if cluster.device == "cuda" else min(learned, BUCKET)))


def frozen(model: Model, reads: Load, cluster: ClusterSettings) -> Footprint:
    """Return one process of the Reference or a reward model. On shared GPUs, if everything leaves,
    it waits in CPU memory unless it scores: in a copy from which it only comes back.
    """
    weights = {"weights": model.width * model.parameters}
    on_device = dict.fromkeys(PHASES, weights)
    on_device["score"] = weights | {"activations": _reads(model, reads)}
    on_host = {"start": weights} if cluster.device == "cuda" else {}
    away = ("generate", "learn", "sync") if cluster.tier == "always" else ()
    placed = _placed(on_device, on_host, cluster, "frozen", dict.fromkeys(away, weights))
    return replace(placed, moved=placed.moved // 2)


def engine(
    model: Model, generation: GenerationSettings, cluster: ClusterSettings, longest: int
) -> Footprint:
    """Return one engine, seen from each of its devices. On a GPU it takes its share of the memory,
    and the KV cache the rest; on shared GPUs no more than it can use.

    There, unless nothing leaves, it starts before the others and its KV cache is given up while
    they work, also during a sync; with tier always its weights wait in CPU memory, but for a sync.
    """
    rank = model.role.arguments.get("adapter_rank")  # vLLM has room beside every layer
    adapter = adapter_parameters(model.shape, LoraSettings(rank=rank) if rank else None)
    whole = model.width * (model.parameters + adapter)
    weights = whole // generation.tensor_parallel
    if cluster.device == "cpu":
        always = {"weights": weights, "kv_cache": int(generation.kv_cache_gib * GIB)}
        return _placed(dict.fromkeys(PHASES, always), {}, cluster, "engine")
    # logits of one token each, twice
    work = ENGINE_WORKSPACE + 8 * generation.max_concurrent * model.shape.vocabulary
    share = int(generation.gpu_memory_fraction * cluster.gpu_memory_gib * GIB)
    room = max(0, share - weights - work - CUDA_CONTEXT)
    if shares_gpus(cluster):
        room = min(room, kv_wanted(model, longest, generation))
    resting = {"weights": weights, "activations": work}
    awake = resting | {"kv_cache": generation.kv_cache_bytes or room}
    if not shares_gpus(cluster):
        on_device = dict.fromkeys(PHASES, awake) | {"sync": awake | {"sync": min(PACKED, whole)}}
        return _placed(on_device, {}, cluster, "engine")
    if cluster.tier != "always":
        working = awake if cluster.tier == "never" else resting
        return _placed(dict.fromkeys(PHASES, working) | {"generate": awake}, {}, cluster, "engine")
    on_device = {phase: {} for phase in PHASES} | {"generate": awake, "sync": {"weights": weights}}
    # kept for the next time, also while it is awake
    asleep: dict[str, Use] = {phase: {"weights": whole} for phase in PHASES}
    return replace(_placed(on_device, asleep, cluster, "engine"), moved=2 * whole)


def kv_wanted(model: Model, longest: int, generation: GenerationSettings) -> int:
    """Return the bytes of KV cache on each of an engine's GPUs that hold as many sequences of the
    longest length as it decodes at once: the least for which `kv_room` says so.
    """
    unit, units, parts = _kv_units(model, longest, generation, "cuda")
    return math.ceil(unit * (generation.max_concurrent * units + 1) / parts)


def kv_room(
    model: Model, longest: int, generation: GenerationSettings, cluster: ClusterSettings
) -> int:
    """Return how many sequences of the longest length an engine's KV cache holds at once, counted
    in blocks as vLLM does: without one block that it keeps.
    """
    footprint = engine(model, generation, cluster, longest)
    room = (footprint.device or footprint.host)["generate"].get("kv_cache", 0)
    unit, units, parts = _kv_units(model, longest, generation, cluster.device)
    return max(0, room * parts // unit - 1) // units


def _kv_units(
    model: Model, longest: int, generation: GenerationSettings, device: str
) -> tuple[int, int, int]:
    """Return the bytes of what a KV cache is cut into, how many such parts one sequence takes, and
    over how many GPUs each is spread.
    """
    shape = model.shape
    parts = 1 if shape.compressed else min(generation.tensor_parallel, max(1, shape.kv_heads))
    block = KV_BLOCK[device]
    tokens = block * model.width * shape.kv_elements
    blocks = math.ceil(longest / block)
    if shape.state_elements:
        # in float32; where both kinds share a cache, keys fill blocks as large as a state
        states = STATE * shape.state_elements * (2 if tokens else 1)
        return states + blocks * tokens, 1, parts
    return max(1, tokens), blocks, parts


def sending(footprint: Footprint, model: Model, recipe: RLRecipe) -> Footprint:
    """Return an Actor rank that sends weights: on GPUs through packed buffers, one part of the
    model gathered and copied; on CPUs, and where it sends its adapter alone, by putting all of them
    into shared memory.
    """
    whole = sync_bytes(model, recipe)
    part = model.width * model.shape.largest_group("lm")
    if recipe.cluster.device == "cpu" or recipe.sync.lora == "adapter":
        packed = {"sync": 2 * whole}  # packed, and in the object store
        host = footprint.host | {"sync": sum_of(footprint.host["sync"], packed)}
        return replace(footprint, host=host)
    packed = {"sync": min(PACKED, whole) + 2 * part}
    device = footprint.device | {"sync": sum_of(footprint.device["sync"], packed)}
    return replace(footprint, device=device)


def keeping(footprint: Footprint) -> Footprint:
    """Return a process that nobody asks for memory: what its largest phase has taken it keeps, so
    that all largest ones lie on a device when learning ends.
    """
    largest = max(footprint.device.values(), key=total, default={})
    held = {phase: largest for phase in ("learn", "sync") if footprint.device}
    return replace(footprint, device=footprint.device | held)


def function() -> Footprint:
    """Return one process that calls a Python function."""
    return Footprint(host={phase: {"runtime": HOST_OTHERS["cpu"]} for phase in PHASES})


def _placed(
    on_device: dict[str, Use],
    on_host: dict[str, Use],
    cluster: ClusterSettings,
    kind: str,
    away: Mapping[str, Use] | None = None,
) -> Footprint:
    """Add what every process takes; without GPUs the device is the host. What is `away` in a phase,
    which only shared GPUs ask for, leaves a step and comes back; its place in CPU memory is kept
    from the first time on.
    """
    runtime = {"runtime": HOST_PROCESS[cluster.device].get(kind, HOST_OTHERS[cluster.device])}
    if cluster.device == "cpu":
        return Footprint({}, {f: sum_of(on_host.get(f, {}), runtime, on_device[f]) for f in PHASES})
    gone = dict(away or {}) if shares_gpus(cluster) else {}
    kept: Use = next(iter(gone.values()), {})
    device = {
        f: sum_of(
            {k: v - gone.get(f, {}).get(k, 0) for k, v in on_device[f].items()},
            {"runtime": CUDA_CONTEXT},
        )
        for f in PHASES
    }
    host = {f: sum_of(on_host.get(f, {}), {} if f == "start" else kept, runtime) for f in PHASES}
    return Footprint(device, host, moved=2 * total(kept))


def sum_of(*uses: Use) -> Use:
    """Add component by component; leave out what is 0."""
    found: Use = {}
    for use in uses:
        for component, size in use.items():
            if size:
                found[component] = found.get(component, 0) + size
    return found


def total(use: Use) -> int:
    return sum(use.values())
