"""A rough guess at how long the phases of a step take: FLOPs and bytes over the speeds below,
nothing measured.

Good for "most of a step is generation", not for a schedule: kernels, networks and response lengths
differ too much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from actors.cluster.layout import shares_gpus
from actors.settings import Recipe, RLRecipe
from launch.plan.adapters import sync_bytes
from launch.plan.batches import rows_of
from launch.plan.shapes import Model

RESPONSE_SHARE = 0.5  # of max_new_tokens that a response has on average; prompts likewise


@dataclass(frozen=True)
class Speed:
    """Reach of one process of its device's peak: FLOP/s, bytes/s of its memory and of a weight
    sync. `call` is the least time of one layer of a forward pass, `trip` of asking a role for
    something and waiting; seconds.
    """

    flops: float
    memory: float
    transfer: float
    call: float
    trip: float


# an A100, bfloat16
GPU = Speed(flops=0.4 * 312e12, memory=0.6 * 2.0e12, transfer=20e9, call=50e-6, trip=0.05)
CPU_THREAD = Speed(flops=40e9, memory=5e9, transfer=1e9, call=3e-3, trip=0.1)


def step_seconds(
    recipe: Recipe, models: Mapping[str, Model], longest: int, cached: float = 0
) -> dict[str, float]:
    """Return seconds of each phase of one step. `longest` sequence in tokens; `cached` tokens fit
    an engine's KV cache.
    """
    sequences, learned, _ = rows_of(recipe)
    length = longest * RESPONSE_SHARE
    if not isinstance(recipe, RLRecipe):
        (model,) = models.values()
        return {"learn": _learning(model, learned * length, 1, recipe)}
    tokens = (sequences or 0) * length
    return {
        "generate": _generating(recipe, models["engine"], sequences or 0, length, cached),
        "score": _scoring(recipe, models, tokens),
        "learn": _learning_all(recipe, models, tokens),
        "sync": _syncing(models["actor"], recipe),
    }


def _speed(recipe: Recipe, threads: int) -> Speed:
    if recipe.cluster.device == "cuda":
        return GPU
    one = CPU_THREAD
    return replace(one, flops=one.flops * threads, memory=one.memory * threads)


def _generating(
    recipe: RLRecipe, model: Model, sequences: int, length: float, cached: float
) -> float:
    """Count waves of concurrent sequences, and a last one that waits for the longest response. A
    decoding step reads all weights and the cache of the sequences in it.
    """
    generation = recipe.generation
    speed = _speed(recipe, generation.threads)
    width = model.width
    parallel = generation.tensor_parallel
    parameters = model.active
    least = model.shape.layers * speed.call
    mine = math.ceil(sequences / generation.engines)
    at_once = max(1, min(mine, generation.max_concurrent, int(cached / length)))
    response = min(length, generation.max_new_tokens * RESPONSE_SHARE)
    weights = width * _read(model, at_once) / (speed.memory * parallel)
    cache = width * at_once * model.shape.kv_elements * length / 2 / (speed.memory * parallel)
    computing = 2 * parameters * at_once / (speed.flops * parallel)
    decoding = mine / at_once * response * max(weights + cache, computing, least)
    waiting = max(0, generation.max_new_tokens - response) * max(weights, least)
    prompt = max(0.0, length - response)
    reading = 2 * parameters * mine / recipe.step.group_size * prompt
    prefill = reading / (speed.flops * parallel)
    return decoding + waiting + prefill + speed.trip


def _read(model: Model, sequences: int) -> int:
    """Return the parameters that one token of each sequence reads: their experts may all differ."""
    return min(model.parameters, model.active + (sequences - 1) * _sent(model))


def _sent(model: Model) -> int:
    """Return the parameters of the experts that one token passes."""
    experts = model.shape.experts
    return experts.elements - experts.idle if experts else 0


def _scoring(recipe: RLRecipe, models: Mapping[str, Model], tokens: float) -> float:
    """Count one forward pass of every role that reads: at the same time, as long as the slowest, or
    one after the other on shared GPUs.
    """
    idle = {"engine"} | ({"actor"} if recipe.algorithm.old_logprobs == "engine" else set())
    times = []
    shared = [models["actor"]] if recipe.shares_reference else []  # it reads once more
    for model in (*shared, *(model for name, model in models.items() if name not in idle)):
        flops = 2 * model.active * tokens / model.role.processes
        times.append(flops / _speed(recipe, model.role.threads).flops)
    return _in_parallel(recipe, times) + _speed(recipe, 1).trip


def _learning_all(recipe: RLRecipe, models: Mapping[str, Model], tokens: float) -> float:
    """Count Actor and Critic, which learn at the same time; on shared GPUs one after the other."""
    sequences, rows, _ = rows_of(recipe)
    passes = recipe.step.ppo_epochs
    times = [_learning(m, tokens, passes, recipe) for m in models.values() if m.role.learner]
    updates = passes * math.ceil((sequences or 0) / rows)
    return _in_parallel(recipe, times) + updates * _speed(recipe, 1).trip


def _in_parallel(recipe: Recipe, times: Sequence[float]) -> float:
    return sum(times) if shares_gpus(recipe.cluster) else max(times, default=0.0)


def _learning(model: Model, tokens: float, passes: int, recipe: Recipe) -> float:
    """Count forward and backward: 6 FLOPs per parameter and token, 8 when activations are computed
    twice; 2 less with LoRA, which takes no gradient of the weights.
    """
    ranks = model.role.processes
    speed = _speed(recipe, model.role.threads)
    factor = 8 if model.settings.gradient_checkpointing else 6
    factor -= 2 if model.settings.lora else 0
    micro_batches = tokens * passes / ranks / (model.role.micro_batch_tokens or 1)
    computing = factor * model.active * tokens * passes / ranks / speed.flops
    return max(computing, 3 * math.ceil(micro_batches) * model.shape.layers * speed.call)


def _syncing(model: Model, recipe: RLRecipe) -> float:
    speed = _speed(recipe, model.role.threads)
    return sync_bytes(model, recipe) / speed.transfer + speed.trip
