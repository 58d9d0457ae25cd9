"""Placement: each process of a run gets its node, its GPUs and its environment. The driver asks for
them and never decides.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster.connection import cluster_ended, connect
from actors.cluster.groups import WorkerError
from actors.cluster.host import GpuReservation
from actors.cluster.layout import Assignment, Demand, layout, misfit, shares_gpus
from actors.run.stop import stop_requested
from actors.settings import ClusterSettings
from learners.errors import UserError

# for resources that exist but are in use: a run that has just ended gives them back in a moment
PATIENCE_S = 30.0
DYING_S = 5.0

CACHES = {  # by environment variable: the folder in `cluster.cache`
    "VLLM_CACHE_ROOT": "vllm",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}


class Placement:
    """Resources of one run: joins or starts Ray, refuses by arithmetic what cannot fit, reserves
    the rest at once.

    Separate: Ray gives every process GPUs of its own. Colocated: one GpuReservation per bundle
    takes all its GPUs; the processes of the roles ask Ray for none, and their environment lists
    those they see. A context manager: leaving it gives the resources back, and stops Ray if it was
    started here.
    """

    def __init__(self, cluster: ClusterSettings, demands: Mapping[str, Demand]) -> None:
        self.cluster = cluster
        self.demands = demands
        self.layout = layout(cluster, demands)
        self.shared = shares_gpus(cluster)
        self.started_here = False
        self.group: Any = None
        self.reservations: dict[int, Any] = {}  # by bundle
        self.devices: dict[int, list[str]] = {}  # by bundle: the ids of its GPUs on their node

    def __enter__(self) -> Placement:
        cpus = sum(d.processes * d.threads for d in self.demands.values())
        try:
            if not ray.is_initialized():
                self.started_here = True
                connect(self.cluster.address, cpus)
            self._reserve()
            if self.shared:
                self._reserve_shared_gpus()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, kind: object = None, *_: Any) -> None:
        until = time.monotonic() + DYING_S
        while kind is WorkerError and stop_requested() and time.monotonic() < until:
            if cluster_ended():  # a signal to all processes: Ray dies a moment after its workers,
                break  # and would be waited for in vain
            time.sleep(0.1)
        if self.group is not None and not cluster_ended():
            remove_placement_group(self.group)  # and with it every process that runs in it
        if self.started_here:
            ray.shutdown()

    def options(self, role: str) -> list[dict[str, Any]]:
        """Return the Ray options of each process of the role, and its `environment`."""
        threads = self.demands[role].threads
        return [
            {
                "num_cpus": threads,
                "num_gpus": 0 if self.shared else len(assignment.gpus),
                "environment": environment(self.cluster.device, threads, self.cluster.cache)
                | self._visible(assignment),
                "scheduling_strategy": self._bundle(assignment.bundle),
            }
            for assignment in self.layout.assignments[role]
        ]

    def _visible(self, assignment: Assignment) -> dict[str, str]:
        """Return the environment that limits a process to its GPUs, where Ray does not: a process
        that asks Ray for none would see them all.
        """
        if self.cluster.device == "cpu" or (assignment.gpus and not self.shared):
            return {}
        ids = [self.devices[assignment.bundle][i] for i in assignment.gpus]
        return {"CUDA_VISIBLE_DEVICES": ",".join(ids)}

    def _bundle(self, index: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index)

    def _reserve(self) -> None:
        """Reserve one placement group for all processes. Raises UserError before it is asked for
        what can never fit: it would wait for that for ever.
        """
        bundles = self.layout.bundles
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if strategy(self.cluster) == "STRICT_SPREAD" and len(bundles) > len(nodes):
            raise UserError(
                f"cluster.nodes: {self.cluster.nodes} are asked for, Ray has {len(nodes)}"
            )
        if problem := misfit(bundles, nodes):
            raise UserError(
                f"cluster: {problem} ({self._roles()}): add nodes, or ask for fewer processes "
                "or threads"
            )
        self.group = placement_group(bundles, strategy=strategy(self.cluster))
        if not self.group.wait(min(PATIENCE_S, self.cluster.start_deadline_s)):
            free = ray.available_resources()
            counts = ", ".join(
                f"{sum(b.get(kind, 0) for b in bundles):.0f} {kind}s of "
                f"{free.get(kind, 0):.0f} free"
                for kind in ("CPU", "GPU")
                if any(kind in b for b in bundles)
            )
            raise UserError(
                f"cluster: no room within {PATIENCE_S:.0f} s for {counts} ({self._roles()}); is "
                "the cluster in use?"
            )

    def _reserve_shared_gpus(self) -> None:
        """Take all GPUs of every bundle that has some, and ask for their ids."""
        for index, bundle in enumerate(self.layout.bundles):
            if gpus := bundle.get("GPU", 0):
                options = {
                    "num_cpus": 0,
                    "num_gpus": gpus,
                    "scheduling_strategy": self._bundle(index),
                }
                self.reservations[index] = ray.remote(GpuReservation).options(**options).remote()
        deadline = self.cluster.start_deadline_s
        answers = [reservation.gpus.remote() for reservation in self.reservations.values()]
        try:
            self.devices = dict(
                zip(self.reservations, ray.get(answers, timeout=deadline), strict=True)
            )
        except GetTimeoutError as error:
            raise WorkerError(f"start: GPUs were not reserved within {deadline:.0f} s") from error

    def _roles(self) -> str:
        return ", ".join(f"{name} {d.processes}" for name, d in self.demands.items())


def strategy(cluster: ClusterSettings) -> str:
    """Return Ray's placement strategy. PACK keeps neighbours on one node, where GPUs talk fastest.
    CPU nodes are used for their cores and memory, of which Ray's logical CPUs say little: each of
    several gets one bundle, and no node gets two.
    """
    return "STRICT_SPREAD" if cluster.device == "cpu" and cluster.nodes > 1 else "PACK"


def environment(device: str, threads: int, cache: str | None = None) -> dict[str, str]:
    """Return the environment of one worker process. OMP_NUM_THREADS is explicit, because Ray would
    set it to 1.

    The current folder is no part of PYTHONPATH: its modules would hide Python's own. In the folder
    `cache` lies what vLLM, Triton and Inductor compile, and what vLLM knows of models.
    """
    path = os.environ.get("PYTHONPATH")
    folder = os.path.abspath(os.path.expanduser(cache)) if cache else ""
    return {
        "OMP_NUM_THREADS": str(threads),
        "DS_ACCELERATOR": device,
        "TOKENIZERS_PARALLELISM": "false",
        **({"PYTHONPATH": path} if path else {}),
        **{name: os.path.join(folder, own) for name, own in CACHES.items() if folder},
    }
