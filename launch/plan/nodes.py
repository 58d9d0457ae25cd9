"""Assignment of a recipe's processes to nodes that are alike, worked out without a cluster, for
`quatuor plan`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from actors.cluster.layout import Demand, Layout, layout, nodes_needed, shares_gpus
from actors.settings import ClusterSettings


class Process(NamedTuple):
    """One process of a role: its node, its GPUs' numbers on that node, and whether it sends the
    weights in a sync.
    """

    name: str
    role: str
    node: int
    gpus: tuple[int, ...]
    sends: bool

    @property
    def kind(self) -> Kind:
        return self.role, self.sends


Kind = tuple[str, bool]
"""A role, and whether the process sends: all processes of a kind are alike."""

Device = tuple[int, int | None]
"""A node and a GPU's number on it; None: the node's CPU memory."""


@dataclass(frozen=True)
class NodePlan:
    """Assignment of all processes to nodes that are alike. What is asked of it is worked
    out once.
    """

    cluster: ClusterSettings
    need: tuple[tuple[str, Demand], ...]

    @cached_property
    def layout(self) -> Layout:
        return layout(self.cluster, dict(self.need))

    @cached_property
    def nodes(self) -> int | None:
        """The nodes it takes, as far as GPUs decide; None when no number is enough."""
        cluster = self.cluster
        return (
            nodes_needed(self.layout.bundles, cluster.gpus_per_node)
            if cluster.device == "cuda"
            else cluster.nodes
        )

    @cached_property
    def processes(self) -> list[Process]:
        """Every process. The Actor's first rank sends the weights; on shared GPUs every rank, to
        the engine beside it.
        """
        firsts = self._first_gpus()
        found = []
        shared = shares_gpus(self.cluster)
        for role, assignments in self.layout.assignments.items():
            for i, assignment in enumerate(assignments):
                node, first = firsts[assignment.bundle]
                gpus = (
                    tuple(first + g for g in assignment.gpus)
                    if self.cluster.device == "cuda"
                    else ()
                )
                sends = role == "actor" and (shared or i == 0)
                found.append(
                    Process(
                        f"{role}[{i}]" if len(assignments) > 1 else role, role, node, gpus, sends
                    )
                )
        return found

    @cached_property
    def on(self) -> dict[Device, list[Process]]:
        """The processes on every GPU in use, and in the CPU memory of every node."""
        found: dict[Device, list[Process]] = {}
        for process in self.processes:
            for gpu in (*process.gpus, None):
                found.setdefault((process.node, gpu), []).append(process)
        return dict(sorted(found.items(), key=lambda item: (item[0][1] is None, item[0])))

    @cached_property
    def alike(self) -> list[tuple[list[Device], Counter[Kind]]]:
        """Devices that hold equally many processes of every kind, and how many."""
        groups: dict[tuple[bool, tuple[Kind, ...]], list[Device]] = {}
        for (node, gpu), processes in self.on.items():
            groups.setdefault((gpu is None, tuple(p.kind for p in processes)), []).append(
                (node, gpu)
            )
        return [(devices, Counter(kinds)) for (_, kinds), devices in groups.items()]

    def _first_gpus(self) -> list[tuple[int, int]]:
        """Return node and first GPU of every bundle: the first node with room, in order; beyond the
        last if none has.

        Without GPUs, bundles are spread over the nodes.
        """
        cluster = self.cluster
        bundles = self.layout.bundles
        if cluster.device == "cpu":
            return [(i % cluster.nodes, 0) for i in range(len(bundles))]
        taken: list[int] = []
        first: dict[
            int, int
        ] = {}  # by size: the node to look at first, as those before have no room and never will
        firsts = []
        for wanted in (int(bundle.get("GPU", 0)) for bundle in bundles):
            node = first.get(wanted, 0)
            while node < len(taken) and taken[node] + wanted > cluster.gpus_per_node:
                node += 1
            taken += [0] * (node + 1 - len(taken))
            first[wanted] = node
            firsts.append((node, taken[node]))
            taken[node] += wanted
        return firsts
