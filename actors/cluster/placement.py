"""Cluster settings -> which process runs where, with what environment, and when. The driver asks;
it never decides.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from functools import partial
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster.groups import WorkerError, WorkerGroup
from actors.cluster.layout import Assignment, Demand, layout, misfit, shares_gpus
from actors.settings import ClusterSettings
from learners.errors import UserError

REACH_S = 5.0  # for a connection to a cluster
HTTP2_SETTINGS = b"\x04"  # the type of a frame, after three bytes of length
# for resources that are there, but in use: a run that has just ended gives them back in a moment
PATIENCE_S = 30.0


class GpuReservation:
    """Holds all GPUs of a bundle for the processes that share them, and knows their ids on that
    node.
    """

    def gpus(self) -> list[str]:
        return [str(i) for i in ray.get_gpu_ids()]


class Placement:
    """Resources of one run: joins or starts Ray, refuses by arithmetic what cannot fit, reserves
    the rest at once.

    Separate: Ray gives every process GPUs of its own. Colocated: one GpuReservation per bundle
    takes all its GPUs, and the processes of the roles, which ask Ray for none, are told by
    environment which of them to see. A context manager: leaving it gives the resources back, and
    stops Ray if it was started here.
    """

    def __init__(self, cluster: ClusterSettings, demands: dict[str, Demand]) -> None:
        self.cluster = cluster
        self.demands = demands
        self.layout = layout(cluster, demands)
        self.shared = shares_gpus(cluster)
        self.started_here = False
        self.group: Any = None
        self.reservations: dict[int, Any] = {}  # by bundle
        self.devices: dict[int, list[str]] = {}  # by bundle: its GPUs, as its node calls them

    def __enter__(self) -> Placement:
        cpus = sum(d.processes * d.threads for d in self.demands.values())
        if not ray.is_initialized():
            self.started_here = True
            connect(self.cluster.address, cpus)
        try:
            self._reserve()
            if self.shared:
                self._reserve_shared_gpus()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        if self.group is not None:
            remove_placement_group(self.group)  # and with it every process that runs in it
        if self.started_here:
            ray.shutdown()

    def options(self, role: str) -> list[dict[str, Any]]:
        """Ray options for each process of the role."""
        threads = self.demands[role].threads
        return [
            {
                "num_cpus": threads,
                "num_gpus": 0 if self.shared else len(assignment.gpus),
                "runtime_env": {
                    "env_vars": environment(self.cluster.device, threads)
                    | self._visible(assignment)
                },
                "scheduling_strategy": self._bundle(assignment.bundle),
            }
            for assignment in self.layout.assignments[role]
        ]

    def _visible(self, assignment: Assignment) -> dict[str, str]:
        """Which GPUs a process sees where Ray does not say so: a process that asks Ray for none
        would see them all.
        """
        if self.cluster.device == "cpu" or (assignment.gpus and not self.shared):
            return {}
        ids = [self.devices[assignment.bundle][i] for i in assignment.gpus]
        return {
            "CUDA_VISIBLE_DEVICES": ",".join(ids),
            "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        }

    def _bundle(self, index: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index)

    def _reserve(self) -> None:
        """One placement group for all. It would wait for ever for what can never be, so that is
        refused before.
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
        """Take all GPUs of every bundle that has some, and ask what they are called."""
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


class GpuSharing:
    """Who has the GPUs that roles share. With none to share nobody waits for anybody.

    A group takes its turn by itself before it works (`WorkerGroup.acquire_gpus`): the engines have
    the GPUs alone, all other roles may have them together. Who leaves keeps what it needs in CPU
    memory. Only two moments must be named, by whoever conducts the step: `learn` and `sync`.
    """

    ENGINES = "engine"  # awake; awake but for their KV cache, so that weights can arrive
    WEIGHTS = "engine weights"

    def __init__(
        self, groups: Mapping[str, WorkerGroup] | None = None, deadline_s: float = 600
    ) -> None:
        """`groups` that share, as they are when all have started: the engines asleep, everyone else
        loaded.
        """
        self.groups = groups or {}
        self.deadline_s = deadline_s
        self.present = set(self.groups) - {self.ENGINES}
        for role, group in self.groups.items():
            group.acquire_gpus = partial(self.acquire, role)

    def acquire(self, role: str) -> None:
        """`role` gets the GPUs, and whoever it cannot share them with leaves."""
        if role in self.present:
            return
        if role == self.ENGINES:
            self._leave(self.present - {self.WEIGHTS})
        else:
            self._leave(self.present & {self.ENGINES, self.WEIGHTS})
        self._enter(role)

    def learn(self) -> None:
        """Before a step's learning: frozen models leave to gradients and activations."""
        self._leave(self.present - {"actor", "critic"})

    def sync(self) -> None:
        """Before a weight sync: the Actor and the engines' weights, at the same time and without
        anyone else.
        """
        if self.groups:
            self._leave(self.present - {"actor", self.WEIGHTS})
            self._enter("actor")
            self._enter(self.WEIGHTS)

    def _leave(self, roles: set[str]) -> None:
        """All at once; what they were asked before, they finish first."""
        engines = {self.ENGINES, self.WEIGHTS}
        asked = {
            role: self._group(role).submit_without_swap("sleep" if role in engines else "offload")
            for role in roles
        }
        for role, pending in asked.items():
            self._group(role).gather(pending, "make room", self.deadline_s)
        self.present -= roles

    def _enter(self, role: str) -> None:
        if role in self.present:
            return
        call = {self.ENGINES: ("wake", None), self.WEIGHTS: ("wake", ["weights"])}.get(
            role, ("reload",)
        )
        group = self._group(role)
        group.gather(group.submit_without_swap(*call), "take gpu_sharing", self.deadline_s)
        self.present = self.present - {self.WEIGHTS} | {role}

    def _group(self, role: str) -> WorkerGroup:
        return self.groups[self.ENGINES if role == self.WEIGHTS else role]


def strategy(cluster: ClusterSettings) -> str:
    """PACK keeps neighbours on one node, where GPUs talk fastest. CPU nodes are there for their
    cores and memory, of which Ray's logical CPUs say little: each of several gets one bundle, and
    no node gets two.
    """
    return "STRICT_SPREAD" if cluster.device == "cpu" and cluster.nodes > 1 else "PACK"


def connect(address: str | None, cpus: int) -> None:
    """Join the Ray cluster at `address`, or start one here with room for `cpus` threads.

    Raises UserError within seconds when nobody answers at `address`; Ray itself would try for long.
    """
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if (
        not address
    ):  # CPUs are logical in Ray: a dry run may have more processes than the machine has cores
        ray.init("local", num_cpus=max(cpus, os.cpu_count() or 1), include_dashboard=False, **quiet)
        return
    try:
        if "://" not in address:  # `auto` may well name a cluster that has ended
            reach(canonicalize_bootstrap_address(address) or address)
        ray.init(address, **quiet)
    except (OSError, ValueError, RayError) as error:  # ConnectionError is an OSError
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cluster.address: no Ray cluster can be joined at {address}: {reason}"
        ) from error


def reach(address: str) -> None:
    """Return when Ray's head listens at host:port; else OSError or ValueError.

    Ray itself would wait for minutes at a port that is somebody else's. Its server speaks gRPC, and
    so begins with the settings of an HTTP/2 connection, without being asked (RFC 9113, 3.4), unless
    it speaks TLS.
    """
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S) as head:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        try:
            greeting = head.recv(4, socket.MSG_WAITALL)
        except TimeoutError:
            greeting = b""
    if greeting[3:] != HTTP2_SETTINGS:
        raise ConnectionError(
            "what listens there is not Ray's head, whose port is 6379 unless told otherwise"
        )


def environment(device: str, threads: int) -> dict[str, str]:
    """Environment of one worker process. Ray would set OMP_NUM_THREADS to 1, so it is said
    explicitly.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "DS_ACCELERATOR": device,
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(
            p for p in (os.getcwd(), os.environ.get("PYTHONPATH", "")) if p
        ),
    }
