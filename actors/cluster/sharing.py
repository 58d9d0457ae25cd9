"""GPU sharing: the roles on the GPUs now, and those that leave for others."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from actors.cluster.groups import WorkerGroup
from learners.spans import Stopwatch


class GpuSharing:
    """The roles that have the shared GPUs. With no shared GPUs no role waits for another.

    A group acquires the GPUs by itself before it works (`WorkerGroup.acquire_gpus`): the engines
    have them alone, all other roles may have them at the same time. A role that leaves keeps its
    state in CPU memory. Only `learn` and `sync` must be called, by the driver's step. `stopwatch`
    times what a phase waits for here, and in a weight sync.
    """

    ENGINES = "engine"  # awake
    WEIGHTS = "engine weights"  # awake but for their KV cache, so that weights can arrive

    def __init__(
        self, groups: Mapping[str, WorkerGroup] | None = None, deadline_s: float = 600
    ) -> None:
        """Take over the `groups` that share, as they are when all have started: the engines asleep,
        all others loaded.
        """
        self.groups = groups or {}
        self.deadline_s = deadline_s
        self.stopwatch = Stopwatch()
        self.present = set(self.groups) - {self.ENGINES}
        for role, group in self.groups.items():
            group.acquire_gpus = partial(self.acquire, role)

    def acquire(self, role: str) -> None:
        """Give `role` the GPUs; the roles it cannot share them with leave."""
        if role not in self.present:
            engines = {self.ENGINES, self.WEIGHTS}
            others = self.present - engines if role == self.ENGINES else self.present & engines
            self._leave(others)
            self._enter(role)

    def learn(self) -> None:
        """Make room for gradients and activations before a step's learning: frozen models leave."""
        self._leave(self.present - {"actor", "critic"})

    def sync(self) -> None:
        """Give the GPUs to the Actor and the engines' weights alone, for a weight sync."""
        if self.groups:
            self._leave(self.present - {"actor", self.WEIGHTS})
            self._enter("actor")
            self._enter(self.WEIGHTS)

    def _leave(self, roles: set[str]) -> None:
        """Send roles off the GPUs, all at once; they finish their earlier calls first."""
        engines = {self.ENGINES, self.WEIGHTS}
        leaving = {
            role: self._group(role).submit_without_swap("sleep" if role in engines else "offload")
            for role in roles
        }
        for role, pending in leaving.items():
            self._group(role).gather(pending, "make room", self.deadline_s)
        self.present -= roles

    def _enter(self, role: str) -> None:
        if role in self.present:
            return
        call = {self.ENGINES: ("wake", None), self.WEIGHTS: ("wake", ["weights"])}.get(
            role, ("reload",)
        )
        group = self._group(role)
        group.gather(group.submit_without_swap(*call), "acquire GPUs", self.deadline_s)
        self.present = self.present - {self.WEIGHTS} | {role}

    def _group(self, role: str) -> WorkerGroup:
        return self.groups[self.ENGINES if role == self.WEIGHTS else role]
