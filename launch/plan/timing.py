"""A rough guess at how long the phases of a step take: FLOPs and bytes over the speeds below,
nothing measured.

Good for "most of a step is generation", not for a schedule: kernels, networks and response lengths
differ too much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from actors.cluster.layout import shares_gpus
from actors.settings import Recipe, RLRecipe
from launch.plan.memory import BYTES
from launch.plan.shapes import Head, Shape
from learners.settings import LearnerSettings

RL = RLRecipe

RESPONSE_SHARE = 0.5  # of max_new_tokens that a response has on average; prompts likewise


@dataclass(frozen=True)
class Speed:
    """What one process reaches of its device's peak: FLOP/s, bytes/s of its memory and of a weight
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
    recipe: Recipe, shapes: Mapping[str, Shape], longest: int, cached: float = 0
) -> dict[str, float]:
    """Seconds of each phase of one step. `longest` sequence in tokens; `cached` tokens fit an
    engine's KV cache.
    """
    if not isinstance(recipe, RLRecipe):
        learner = recipe.learner
        head: Head = "lm" if recipe.kind == "sft" else "score"
        rows = recipe.train.batch_size * (2 if recipe.kind == "rm" else 1)
        tokens = rows * longest * RESPONSE_SHARE
        shape = shapes[recipe.kind]
        return {"learn": _learning(shape.parameters(head), tokens, 1, learner, recipe, shape)}
    sequences = recipe.step.prompts_per_step * recipe.step.group_size
    length = longest * RESPONSE_SHARE
    tokens = sequences * length
    return {
        "generate": _generating(recipe, shapes["engine"], sequences, length, cached),
        "score": _scoring(recipe, shapes, tokens),
        "learn": _learning_all(recipe, shapes, tokens),
        "sync": _syncing(recipe, shapes["actor"]),
    }


def _speed(recipe: Recipe, threads: int) -> Speed:
    if recipe.cluster.device == "cuda":
        return GPU
    one = CPU_THREAD
    return replace(one, flops=one.flops * threads, memory=one.memory * threads)


def _generating(recipe: RL, shape: Shape, sequences: int, length: float, cached: float) -> float:
    """Waves of concurrent sequences, and a last one that waits for the longest response. A decoding
    step reads all weights and the cache of the sequences in it.
    """
    generation = recipe.generation
    speed = _speed(recipe, recipe.generation.threads)
    width = BYTES[recipe.actor.model.dtype]
    parallel = generation.tensor_parallel
    parameters = shape.parameters("lm")
    least = shape.layers * speed.call
    mine = math.ceil(sequences / generation.engines)
    at_once = max(1, min(mine, generation.max_concurrent, int(cached / length)))
    response = min(length, generation.max_new_tokens * RESPONSE_SHARE)
    weights = width * parameters / (speed.memory * parallel)
    cache = width * at_once * shape.kv_elements * length / 2 / (speed.memory * parallel)
    computing = 2 * parameters * at_once / (speed.flops * parallel)
    decoding = mine / at_once * response * max(weights + cache, computing, least)
    waiting = max(0, generation.max_new_tokens - response) * max(weights, least)
    prefill = (
        2
        * parameters
        * mine
        / recipe.step.group_size
        * max(0.0, length - response)
        / (speed.flops * parallel)
    )
    return decoding + waiting + prefill + speed.trip


def _scoring(recipe: RL, shapes: Mapping[str, Shape], tokens: float) -> float:
    """One forward pass of every role that reads; together they take as long as the slowest, or
    turns on shared GPUs.
    """
    heads: dict[str, Head] = {"actor": "lm", "critic": "value", "reference": "lm"}
    times = []
    for role, shape in shapes.items():
        if role == "engine" or (role == "actor" and recipe.algorithm.old_logprobs == "engine"):
            continue
        processes, threads = _processes(recipe, role)
        flops = 2 * shape.parameters(heads.get(role, "score")) * tokens / processes
        times.append(flops / _speed(recipe, threads).flops)
    return (sum(times) if shares_gpus(recipe.cluster) else max(times, default=0.0)) + _speed(
        recipe, 1
    ).trip


def _processes(recipe: RL, role: str) -> tuple[int, int]:
    if role == "actor":
        return recipe.actor.ranks, recipe.actor.threads
    if role == "critic" and isinstance(recipe, RLRecipe) and recipe.critic is not None:
        return recipe.critic.ranks, recipe.critic.threads
    if role == "reference":
        return recipe.reference.workers, recipe.reference.threads
    return next((r.workers, r.threads) for r in recipe.rewards if role == f"reward {r.name}")


def _learning_all(recipe: RL, shapes: Mapping[str, Shape], tokens: float) -> float:
    """Actor and Critic learn at the same time; on shared GPUs they take turns."""
    passes = recipe.step.ppo_epochs
    step = recipe.step
    updates = passes * math.ceil(step.prompts_per_step * step.group_size / step.mini_batch_size)
    times = [
        _learning(
            shapes["actor"].parameters("lm"), tokens, passes, recipe.actor, recipe, shapes["actor"]
        )
    ]
    if isinstance(recipe, RLRecipe) and recipe.critic is not None:
        critic = shapes["critic"]
        times.append(
            _learning(critic.parameters("value"), tokens, passes, recipe.critic, recipe, critic)
        )
    waiting = updates * _speed(recipe, 1).trip
    return (sum(times) if shares_gpus(recipe.cluster) else max(times)) + waiting


def _learning(
    parameters: int,
    tokens: float,
    passes: int,
    learner: LearnerSettings,
    recipe: Recipe,
    shape: Shape,
) -> float:
    """Forward and backward: 6 FLOPs per parameter and token, 8 when activations are computed
    twice.
    """
    speed = _speed(recipe, learner.threads)
    factor = 8 if learner.model.gradient_checkpointing else 6
    micro_batches = tokens * passes / learner.ranks / learner.micro_batch_tokens
    computing = factor * parameters * tokens * passes / learner.ranks / speed.flops
    return max(computing, 3 * math.ceil(micro_batches) * shape.layers * speed.call)


def _syncing(recipe: RL, shape: Shape) -> float:
    speed = _speed(recipe, recipe.actor.threads)
    return BYTES[recipe.actor.model.dtype] * shape.parameters("lm") / speed.transfer + speed.trip
