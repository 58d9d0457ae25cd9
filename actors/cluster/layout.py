"""Which process of a recipe runs on which device: arithmetic alone, nothing heavy, nothing started.

`quatuor plan` prints it and `actors.cluster.placement` carries it out, so the two cannot disagree.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from actors.settings import ClusterSettings, GRPORecipe, PPORecipe, RMRecipe, SFTRecipe


@dataclass(frozen=True)
class Demand:
    """What one role needs: so many processes, each with so many CPU threads and GPUs."""

    processes: int
    threads: int
    gpus: int = 1


class Assignment(NamedTuple):
    """One process: the bundle it runs in, and which of the bundle's GPUs it uses."""

    bundle: int
    gpus: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """`bundles` are what must be reserved, each on one node: CPU threads and whole GPUs.
    `assignments[role][i]` is where process i of a role sits.
    """

    bundles: list[dict[str, float]]
    assignments: dict[str, list[Assignment]]


def demands(recipe: SFTRecipe | RMRecipe | PPORecipe | GRPORecipe) -> dict[str, Demand]:
    """Processes, threads and GPUs of every role the recipe needs, in placement order."""
    if isinstance(recipe, SFTRecipe | RMRecipe):
        return {recipe.kind: Demand(recipe.learner.ranks, recipe.learner.threads)}
    generation = recipe.generation
    actor = recipe.actor
    need = {
        "engine": Demand(generation.engines, generation.threads, generation.tensor_parallel),
        "actor": Demand(actor.ranks, actor.threads),
    }
    if isinstance(recipe, PPORecipe):
        need["critic"] = Demand(recipe.critic.ranks, recipe.critic.threads)
    if needs_reference(recipe):
        need["reference"] = Demand(recipe.reference.workers, recipe.reference.threads)
    for reward in recipe.rewards:
        need[f"reward {reward.name}"] = Demand(
            reward.workers, reward.threads, gpus=int(reward.kind == "model")
        )
    if recipe.evaluation.function is not None:
        need["evaluator"] = Demand(1, 1, gpus=0)
    return need


def needs_reference(recipe: PPORecipe | GRPORecipe) -> bool:
    """PPO's KL needs it always (it is also a metric); GRPO only with a KL in the loss."""
    return isinstance(recipe, PPORecipe) or recipe.algorithm.kl_beta > 0


def shares_gpus(cluster: ClusterSettings) -> bool:
    """Whether roles take gpu_sharing on the same GPUs. CPUs are shared anyway: there both
    placements are the same.
    """
    return cluster.device == "cuda" and cluster.placement == "colocated"


def layout(cluster: ClusterSettings, need: Mapping[str, Demand]) -> Layout:
    """Separate: every process has a bundle, and its GPUs, to itself; several CPU nodes have one
    bundle each, and the processes take the nodes in turn. Colocated: all roles share the same GPUs,
    process i of each role on the i-th, and an engine on as many neighbours as it has
    tensor-parallel ranks.
    """
    if shares_gpus(cluster):
        return _colocated(need)
    if cluster.device == "cpu" and cluster.nodes > 1:
        return _spread(need, cluster.nodes)
    return _separate(need, gpus=cluster.device == "cuda")


def misfit(
    bundles: Sequence[Mapping[str, float]], nodes: Sequence[Mapping[str, float]]
) -> str | None:
    """Why these bundles can never all lie on nodes with these resources, as arithmetic; None if
    nothing proves it.

    A bundle lies on one node: enough GPUs in all is not enough where each node has one too few for
    a bundle.
    """
    for kind in ("CPU", "GPU"):
        have = [int(n.get(kind, 0)) for n in nodes]
        sizes = [int(b.get(kind, 0)) for b in bundles]
        if sum(sizes) > sum(have):
            return f"{sum(sizes)} {kind}s are needed, Ray has {sum(have)}"
        for size in sorted(set(sizes) - {0}, reverse=True):
            wanted = sum(s >= size for s in sizes)
            room = sum(h // size for h in have)
            if wanted > room:
                each = ", ".join(map(str, have))
                return (
                    f"{wanted} x {size} {kind}s on one node are needed, nodes with {each} have "
                    f"room for {room}"
                )
    return None


def nodes_needed(bundles: Sequence[Mapping[str, float]], gpus_per_node: int) -> int | None:
    """How many nodes have GPUs for all bundles; None when a bundle needs more than one node has."""
    sizes = Counter(int(bundle.get("GPU", 0)) for bundle in bundles)
    if max(sizes) > gpus_per_node:
        return None
    least = math.ceil(sum(size * count for size, count in sizes.items()) / gpus_per_node)
    for size in set(sizes) - {0}:
        wanted = sum(count for other, count in sizes.items() if other >= size)
        least = max(least, math.ceil(wanted / (gpus_per_node // size)))
    return max(1, least)


def _separate(need: Mapping[str, Demand], gpus: bool) -> Layout:
    bundles: list[dict[str, float]] = []
    assignments: dict[str, list[Assignment]] = {}
    for role, demand in need.items():
        wanted = demand.gpus if gpus else 0
        own = {"CPU": float(demand.threads)} | ({"GPU": float(wanted)} if wanted else {})
        assignments[role] = [
            Assignment(len(bundles) + i, tuple(range(wanted))) for i in range(demand.processes)
        ]
        bundles += [own.copy() for _ in range(demand.processes)]
    return Layout(bundles, assignments)


def _spread(need: Mapping[str, Demand], nodes: int) -> Layout:
    order = [role for role, demand in need.items() for _ in range(demand.processes)]
    bundles = [{"CPU": 0.0} for _ in range(min(nodes, len(order)))]
    assignments: dict[str, list[Assignment]] = {}
    for i, role in enumerate(order):
        bundle = i % len(bundles)
        bundles[bundle]["CPU"] += need[role].threads
        assignments.setdefault(role, []).append(Assignment(bundle, ()))
    return Layout(bundles, assignments)


def _colocated(need: Mapping[str, Demand]) -> Layout:
    size = max(d.gpus for d in need.values())  # GPUs of a bundle: an engine's must lie on one node
    count = math.ceil(max(d.processes * d.gpus for d in need.values()) / size)
    bundles: list[dict[str, float]] = [{"CPU": 0.0, "GPU": float(size)} for _ in range(count)]
    assignments: dict[str, list[Assignment]] = {}
    for role, demand in need.items():
        for i in range(demand.processes):
            if demand.gpus:
                bundle, first = divmod(i * demand.gpus % (count * size), size)
                bundles[bundle]["CPU"] += demand.threads
            else:
                bundle = len(bundles)
                first = 0
                bundles.append({"CPU": float(demand.threads)})
            assignments.setdefault(role, []).append(
                Assignment(bundle, tuple(range(first, first + demand.gpus)))
            )
    return Layout(bundles, assignments)


def sharing_problems(
    recipe: SFTRecipe | RMRecipe | PPORecipe | GRPORecipe,
) -> Iterator[tuple[tuple[str, ...], str]]:
    """What keeps a recipe's roles from sharing their GPUs: keys, and what would be right."""
    if not shares_gpus(recipe.cluster) or isinstance(recipe, SFTRecipe | RMRecipe):
        return
    engines = recipe.generation.engines * recipe.generation.tensor_parallel
    if engines > recipe.actor.ranks:  # weights pass inside the memory of a GPU
        keys = ("actor.ranks", "generation.engines", "generation.tensor_parallel")
        yield (
            keys,
            f"colocated needs an Actor rank on each of the engines' {engines} GPUs, not "
            f"{recipe.actor.ranks}",
        )
    learners = {"actor": recipe.actor} | (
        {"critic": recipe.critic} if isinstance(recipe, PPORecipe) else {}
    )
    for key, learner in learners.items():
        if learner.zero_stage == 1 and learner.model.dtype == "bfloat16":
            message = (
                "DeepSpeed cannot take ZeRO 1 in bfloat16 off the GPUs; colocated needs 2 or 3"
            )
            yield (f"{key}.zero_stage", f"{key}.model.dtype", "cluster.placement"), message
        if learner.offload_parameters and not learner.offload_optimizer:
            message = (
                "colocated needs this too: beside offloaded parameters, optimizer states would "
                "stay on the GPUs"
            )
            yield (
                (f"{key}.offload_optimizer", f"{key}.offload_parameters", "cluster.placement"),
                message,
            )
