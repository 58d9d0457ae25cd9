"""The layout of a recipe's processes on devices: arithmetic alone, nothing heavy, nothing started.

`quatuor plan` prints it and `actors.cluster.placement` carries it out, so the two cannot disagree.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from actors.settings import ClusterSettings


@dataclass(frozen=True)
class Demand:
    """The needs of one role: a number of processes, and the CPU threads and GPUs of each."""

    processes: int
    threads: int
    gpus: int = 1


class Assignment(NamedTuple):
    """One process: the bundle it runs in, and the ones of the bundle's GPUs that it uses."""

    bundle: int
    gpus: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """`bundles` must be reserved, each on one node: CPU threads and whole GPUs.
    `assignments[role][i]` is the assignment of process i of a role.
    """

    bundles: list[dict[str, float]]
    assignments: dict[str, list[Assignment]]


def shares_gpus(cluster: ClusterSettings) -> bool:
    """Tell whether roles share the same GPUs. CPUs are shared anyway: there both
    placements are the same.
    """
    return cluster.device == "cuda" and cluster.placement == "colocated"


def layout(cluster: ClusterSettings, need: Mapping[str, Demand]) -> Layout:
    """Return the layout of the roles' processes.

    Separate: every process has a bundle, and its GPUs, to itself; several CPU nodes have one bundle
    each, and the processes go round the nodes. Colocated: all roles share the same GPUs, process i
    of each role on the i-th, and an engine on as many neighbours as it has tensor-parallel ranks.
    """
    if shares_gpus(cluster):
        return _colocated(need)
    if cluster.device == "cpu" and cluster.nodes > 1:
        return _spread(need, cluster.nodes)
    return _separate(need, gpus=cluster.device == "cuda")


def misfit(
    bundles: Sequence[Mapping[str, float]], nodes: Sequence[Mapping[str, float]]
) -> str | None:
    """Return the arithmetic by which these bundles can never all lie on nodes with these resources;
    None if there is none.

    A bundle lies on one node: enough GPUs in all do not help where each node has one too few for a
    bundle.
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
    """Return the number of nodes with GPUs for all bundles; None when a bundle needs more than one
    node has.
    """
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
