"""Cluster settings -> which process runs where, with what environment. The driver asks; it never decides itself."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.settings import ClusterSettings
from learners.settings import UserError


@dataclass(frozen=True)
class Demand:
    """What one role needs: so many processes, each with so many CPU threads and GPUs."""

    processes: int
    threads: int
    gpus: int = 1


class Placement:
    """Resources of one run: joins or starts Ray, refuses by arithmetic what cannot fit, reserves the rest at once.

    A context manager: leaving it gives the resources back, and stops Ray if it was started here.
    """

    def __init__(self, cluster: ClusterSettings, demands: dict[str, Demand]) -> None:
        self.cluster, self.demands = cluster, demands
        self.started_here = False
        self.group: Any = None

    def __enter__(self) -> Placement:
        cpus = sum(d.processes * d.threads for d in self.demands.values())
        if not ray.is_initialized():
            self.started_here = True
            connect(self.cluster.address, cpus)
        try:
            self._reserve()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        if self.group is not None:
            remove_placement_group(self.group)
        if self.started_here:
            ray.shutdown()

    def options(self, role: str) -> list[dict[str, Any]]:
        """Ray options for each process of the role."""
        demand = self.demands[role]
        first = 0
        for name, other in self.demands.items():
            if name == role:
                break
            first += other.processes
        return [
            {
                "num_cpus": demand.threads,
                "num_gpus": self._gpus(demand),
                "runtime_env": {"env_vars": environment(self.cluster.device, demand.threads)},
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    self.group, placement_group_bundle_index=first + i
                ),
            }
            for i in range(demand.processes)
        ]

    def _reserve(self) -> None:
        bundles = [
            {"CPU": float(d.threads), **({"GPU": float(self._gpus(d))} if self._gpus(d) else {})}
            for d in self.demands.values()
            for _ in range(d.processes)
        ]
        have = ray.cluster_resources()
        for kind in ("CPU", "GPU"):
            need = sum(b.get(kind, 0.0) for b in bundles)
            if need > have.get(kind, 0.0):
                roles = ", ".join(f"{n} {d.processes}" for n, d in self.demands.items())
                raise UserError(
                    f"cluster: {need:.0f} {kind}s are needed ({roles}), Ray has {have.get(kind, 0.0):.0f}: add nodes, "
                    "or ask for fewer processes or threads"
                )
        self.group = placement_group(bundles, strategy="PACK")
        if not self.group.wait(min(120.0, self.cluster.start_deadline_s)):
            raise UserError(f"cluster: {len(bundles)} processes found no room within 120 s; is the cluster in use?")

    def _gpus(self, demand: Demand) -> int:
        return demand.gpus if self.cluster.device == "cuda" else 0


def connect(address: str | None, cpus: int) -> None:
    """Join the Ray cluster at `address`, or start one here with room for `cpus` threads."""
    if address:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    else:  # CPUs are logical in Ray: a dry run may have more processes than the machine has cores
        cpus = max(cpus, os.cpu_count() or 1)
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def environment(device: str, threads: int) -> dict[str, str]:
    """Environment of one worker process. Ray would set OMP_NUM_THREADS to 1, so it is said explicitly."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "DS_ACCELERATOR": device,
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(p for p in (os.getcwd(), os.environ.get("PYTHONPATH", "")) if p),
    }
