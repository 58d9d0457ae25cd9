"""GPUs that several roles share: who has them now, and who leaves for whom."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from actors.cluster.groups import WorkerGroup


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
        group.gather(group.submit_without_swap(*call), "acquire GPUs", self.deadline_s)
        self.present = self.present - {self.WEIGHTS} | {role}

    def _group(self, role: str) -> WorkerGroup:
        return self.groups[self.ENGINES if role == self.WEIGHTS else role]
