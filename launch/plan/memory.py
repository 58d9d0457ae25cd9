"""How much memory every process of a recipe takes in every phase of a step: arithmetic on shapes,
in bytes.

Weights, gradients and optimizer states are what DeepSpeed allocates
(tests/launch/test_plan_measured.py). Activations are what autograd keeps, exact for one layer and
rounded up for a micro-batch. The engine's own workspace, CUDA contexts and communication are
constants below, and estimates.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.cluster.layout import shares_gpus
from actors.settings import ClusterSettings, GenerationSettings, RLRecipe
from launch.plan.shapes import ENCODERS, Head, Shape
from learners.settings import LearnerSettings, ModelSettings

GIB = 2**30
PHASES = ("start", "generate", "score", "learn", "sync")
BYTES = {"float32": 4, "bfloat16": 2}

# DeepSpeed's defaults, in elements.
BUCKET = 500_000_000  # gradients reduced at once
LIVE = 1_000_000_000  # ZeRO-3: parameters gathered at once, and optimizer states stepped at once
PERSISTENT = 100_000  # ZeRO-3: smaller parameters are never cut

KV_BLOCK = {"cpu": 128, "cuda": 16}  # vLLM's, in tokens

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
    what CPU memory.
    """

    device: dict[str, Use] = field(default_factory=dict)
    host: dict[str, Use] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """A forward pass at its largest: padded `tokens` in rows of `longest`."""

    tokens: int
    longest: int

    @classmethod
    def of(cls, budget: int, longest: int, rows: int, rows_per_unit: int) -> Load:
        """A process's `rows` are cut to the budget, but never below one row (or `rows_per_unit`
        rows).
        """
        return cls(min(max(budget, longest * rows_per_unit), longest * rows), longest)


# --- what is exact --------------------------------------------------------------------------------


def model_states(shape: Shape, head: Head, settings: LearnerSettings) -> Use:
    """Bytes of weights, gradients and optimizer states on one rank when they are largest, wherever
    they lie.

    ZeRO 1-3 keep float32 master weights besides the weights even of a float32 model, and gradients
    in float32; bfloat16 under ZeRO-1 keeps both kinds of gradients whole.
    """
    stage = settings.zero_stage
    ranks = settings.ranks
    whole = shape.parameters(head)
    width = BYTES[settings.model.dtype]
    share = whole / ranks
    moments = 8 if settings.optimizer.kind == "adamw" else 0
    if stage == 0:
        return {"weights": width * whole, "gradients": width * whole, "optimizer": moments * whole}
    both = (6 if width == 2 else 4) * whole
    small = (
        sum(n * count for n, count in shape.tensors(head).items() if n <= PERSISTENT)
        if ranks > 1
        else 0
    )
    return {
        "weights": int(width * (share + small)) if stage == 3 else width * whole,
        "gradients": both if stage == 1 else int(4 * share),
        "optimizer": int((4 + moments) * share),
    }


def layer_activations(shape: Shape, dtype: str) -> int:
    """Bytes per token that autograd keeps of one layer (fused attention, dropout 0)."""
    width = BYTES[dtype]
    if shape.family == "gpt2" or shape.family in ENCODERS:
        return width * (8 * shape.hidden + 5 * shape.intermediate)
    norm = 8 if width == 4 else 6  # RMSNorm computes in float32: bfloat16 inputs are kept twice
    heads = (shape.heads + shape.kv_heads) * shape.head_dim
    per_head = 2 * width + (norm if shape.family == "qwen3" else 0)
    return (2 * norm + 2 * width) * shape.hidden + per_head * heads + 4 * width * shape.intermediate


# --- what is estimated ----------------------------------------------------------------------------


def training_activations(shape: Shape, head: Head, model: ModelSettings, load: Load) -> int:
    """Bytes at the peak of forward and backward of one micro-batch, every position counted as a
    response's.
    """
    layer = layer_activations(shape, model.dtype) + _attention(shape, model, load)
    width = BYTES[model.dtype]
    # what checkpointing keeps, besides the layer it is at
    inputs = shape.layers * width * shape.hidden
    kept = inputs + layer if model.gradient_checkpointing else shape.layers * layer
    return load.tokens * (kept + 8 * shape.hidden) + _logits(
        shape, head, width, load, gradient=True
    )


def reading_activations(shape: Shape, head: Head, model: ModelSettings, load: Load) -> int:
    """Bytes at the peak of a forward pass without gradient: one layer at a time, then the
    logits.
    """
    layer = layer_activations(shape, model.dtype) + _attention(shape, model, load)
    return max(load.tokens * layer, _logits(shape, head, BYTES[model.dtype], load, gradient=False))


def _attention(shape: Shape, model: ModelSettings, load: Load) -> int:
    """Bytes per token of attention weights, which only the eager kernel writes out."""
    return (
        shape.heads * load.longest * (4 + BYTES[model.dtype]) if model.attention == "eager" else 0
    )


def _logits(shape: Shape, head: Head, width: int, load: Load, gradient: bool) -> int:
    """Logits, with gradient a float32 copy or a gradient of them, and two float32 rows at work."""
    if head != "lm":
        return 0
    per_position = (width + 4) if gradient else width
    return shape.vocabulary * (load.tokens * per_position + 2 * 4 * load.longest)


def learner(
    role: str,
    shape: Shape,
    head: Head,
    settings: LearnerSettings,
    to_read: Load,
    to_learn: Load,
    cluster: ClusterSettings,
) -> Footprint:
    """One rank of a trained role. On shared GPUs it waits in CPU memory while engines generate, the
    Critic also during a sync.
    """
    whole = shape.parameters(head)
    width = BYTES[settings.model.dtype]
    stage = settings.zero_stage
    states = model_states(shape, head, settings)
    device: Use = {k: states[k] for k in ("weights", "optimizer")}
    host: Use = {}
    if stage == 3:
        device["gradients"] = states["gradients"]
    if settings.offload_optimizer:
        device.pop("gradients", None)
        part = whole // settings.ranks
        host |= {
            "optimizer": device.pop("optimizer"),
            "gradients": 4 * part,
            "buffers": width * part,
        }
    if settings.offload_parameters:
        host["weights"] = device.pop("weights")
    gathered = width * min(whole, LIVE) if stage == 3 else 0
    reading = {
        "activations": reading_activations(shape, head, settings.model, to_read),
        "buffers": gathered,
    }
    # With the optimizer offloaded, ZeRO-2 in bfloat16 still sums gradients in float32 on the GPU.
    elsewhere = settings.offload_optimizer and (stage == 3 or (stage == 2 and width == 4))
    learning = {
        "gradients": 0 if elsewhere else states["gradients"],
        "activations": training_activations(shape, head, settings.model, to_learn),
        "buffers": gathered + _bucket(shape, head, settings, cluster),
    }
    if not settings.offload_optimizer:
        last = states["gradients"] if stage in (0, 3) else 4 * whole // settings.ranks
        learning = _larger(learning, {"gradients": last, "buffers": _step(whole, settings)})
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
    away = ("generate",) if role == "actor" else ("generate", "sync")
    return _placed(on_device, on_host, cluster, "learner", away)


def _step(whole: int, settings: LearnerSettings) -> int:
    """Bytes the optimizer step works with: AdamW's denominator, and the gradient where DeepSpeed
    flattens a copy.
    """
    stage = settings.zero_stage
    part = whole // settings.ranks
    if stage == 0:
        part = whole
    if stage == 3:
        part = min(part, LIVE)
    copied = stage == 3 or (stage > 0 and settings.model.dtype == "float32")
    return 4 * part * (int(settings.optimizer.kind == "adamw") + int(copied))


def _bucket(shape: Shape, head: Head, settings: LearnerSettings, cluster: ClusterSettings) -> int:
    """Bytes of the buffer gradients are reduced in, and of single gradients larger than it, which
    ZeRO-2 in bfloat16 keeps. On CPU, pages of it that are never touched take no memory.
    """
    whole = shape.parameters(head)
    width = BYTES[settings.model.dtype]
    if settings.zero_stage == 0 or (settings.zero_stage == 1 and width == 2):
        return 4 * min(whole, BUCKET) if settings.ranks > 1 else 0
    kept = settings.zero_stage == 2 and width == 2
    larger = sum(n * count for n, count in shape.tensors(head).items() if n > BUCKET) if kept else 0
    return width * (larger + (BUCKET if cluster.device == "cuda" else min(whole, BUCKET)))


def frozen(
    shape: Shape, head: Head, model: ModelSettings, load: Load, cluster: ClusterSettings
) -> Footprint:
    """One process of the Reference or a reward model. On shared GPUs it waits in CPU memory unless
    it scores.
    """
    weights = {"weights": BYTES[model.dtype] * shape.parameters(head)}
    on_device = dict.fromkeys(PHASES, weights)
    on_device["score"] = weights | {"activations": reading_activations(shape, head, model, load)}
    on_host = {"start": weights} if cluster.device == "cuda" else {}
    return _placed(on_device, on_host, cluster, "frozen", away=("generate", "learn", "sync"))


def engine(
    shape: Shape, model: ModelSettings, generation: GenerationSettings, cluster: ClusterSettings
) -> Footprint:
    """One engine, seen from each of its devices. On a GPU it takes its share of the memory, and the
    KV cache the rest.

    On shared GPUs it starts before the others and sleeps while they work: its weights wait in CPU
    memory, its KV cache is given up, also during a sync.
    """
    whole = BYTES[model.dtype] * shape.parameters("lm")
    weights = whole // generation.tensor_parallel
    if cluster.device == "cpu":
        always = {"weights": weights, "kv_cache": int(generation.kv_cache_gib * GIB)}
        return _placed(dict.fromkeys(PHASES, always), {}, cluster, "engine")
    # logits of one token each, twice
    work = ENGINE_WORKSPACE + 8 * generation.max_concurrent * shape.vocabulary
    share = int(generation.gpu_memory_fraction * cluster.gpu_memory_gib * GIB)
    awake = {
        "weights": weights,
        "kv_cache": max(0, share - weights - work - CUDA_CONTEXT),
        "activations": work,
    }
    if not shares_gpus(cluster):
        on_device = dict.fromkeys(PHASES, awake) | {"sync": awake | {"sync": min(PACKED, whole)}}
        return _placed(on_device, {}, cluster, "engine")
    on_device = {phase: {} for phase in PHASES} | {"generate": awake, "sync": {"weights": weights}}
    asleep = {"weights": whole}
    return _placed(
        on_device, {phase: asleep for phase in ("start", "score", "learn")}, cluster, "engine"
    )


def sending(
    footprint: Footprint, shape: Shape, model: ModelSettings, cluster: ClusterSettings
) -> Footprint:
    """An Actor rank that sends weights: on GPUs through packed buffers, one part of the model
    gathered and copied; on CPUs by putting all of them into shared memory.
    """
    width = BYTES[model.dtype]
    whole = width * shape.parameters("lm")
    part = width * shape.largest_group("lm")
    if cluster.device == "cpu":
        packed = {"sync": 2 * whole}  # packed, and in the object store
        return Footprint({}, footprint.host | {"sync": sum_of(footprint.host["sync"], packed)})
    packed = {"sync": min(PACKED, whole) + 2 * part}
    return Footprint(
        footprint.device | {"sync": sum_of(footprint.device["sync"], packed)}, footprint.host
    )


def function() -> Footprint:
    """One process that calls a Python function."""
    return Footprint(host={phase: {"runtime": HOST_OTHERS["cpu"]} for phase in PHASES})


def _placed(
    on_device: dict[str, Use],
    on_host: dict[str, Use],
    cluster: ClusterSettings,
    kind: str,
    away: tuple[str, ...] = (),
) -> Footprint:
    """Add what every process takes; without GPUs the device is the host. On shared GPUs, what would
    lie on the device waits in CPU memory in the phases in which the role is `away`.
    """
    runtime = {"runtime": HOST_PROCESS[cluster.device].get(kind, HOST_OTHERS[cluster.device])}
    if cluster.device == "cpu":
        return Footprint({}, {f: sum_of(on_host.get(f, {}), runtime, on_device[f]) for f in PHASES})
    gone = {f: on_device[f] for f in away} if shares_gpus(cluster) else {}
    device = {
        f: sum_of({} if f in gone else on_device[f], {"runtime": CUDA_CONTEXT}) for f in PHASES
    }
    host = {f: sum_of(on_host.get(f, {}), gone.get(f, {}), runtime) for f in PHASES}
    return Footprint(device, host)


def sum_of(*uses: Use) -> Use:
    """Component by component; what is 0 is left out."""
    found: Use = {}
    for use in uses:
        for component, size in use.items():
            if size:
                found[component] = found.get(component, 0) + size
    return found


def _larger(one: Use, other: Use) -> Use:
    return max(one, other, key=lambda use: sum(use.values()))


def total(use: Use) -> int:
    return sum(use.values())


def longest_sequence(recipe: RLRecipe, shape: Shape) -> int:
    """The longest prompt + response that may come, tokens. Prompts are as long as the model's
    positions allow.
    """
    asked = recipe.prompts.max_prompt_tokens + recipe.generation.max_new_tokens
    return min(recipe.generation.max_model_tokens or asked, shape.positions)
