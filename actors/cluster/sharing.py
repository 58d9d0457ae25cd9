"""GPU sharing: the roles on the GPUs now, and what leaves them for others."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from actors.cluster.groups import WorkerGroup
from learners.spans import Stopwatch


class GpuSharing:
    """The roles that work on the shared GPUs. With no shared GPUs no role waits for another.

    A group acquires the GPUs by itself before it works (`WorkerGroup.acquire_gpus`): the engines
    work alone, all other roles may work at the same time. Only `learn` and `sync` must be called,
    by the driver's step. How much of a role leaves while others work is the tier `swap`
    (`ClusterSettings.tier`): nothing, the engines' KV cache and what allocators hold in reserve,
    what the optimizers keep too, or everything, which waits in CPU memory. `stopwatch` times what a
    phase waits for here, and in a weight sync.
    """

    ENGINES = "engine"  # awake
    WEIGHTS = "engine weights"  # awake but for their KV cache, so that weights can arrive
    LEARNERS = ("actor", "critic")

    def __init__(
        self,
        groups: Mapping[str, WorkerGroup] | None = None,
        deadline_s: float = 600,
        swap: str = "always",
    ) -> None:
        """Take over the `groups` that share, as they are when all have started: the engines asleep
        (unless nothing ever leaves), all others loaded.
        """
        self.shared = bool(groups)
        self.groups = groups if groups and swap != "never" else {}
        self.deadline_s = deadline_s
        self.swap = swap
        self.stopwatch = Stopwatch()
        self.bytes = 0  # moved since they were last reported
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
        self._leave(self.present - set(self.LEARNERS))

    def sync(self) -> None:
        """Give the GPUs to the Actor and the engines' weights, for a weight sync. What leaves of
        learners that stay so long leaves while the weights travel.
        """
        if self.groups:
            staying = {"actor", self.WEIGHTS}
            staying |= set() if self.swap == "always" else {"critic"}
            self._leave(self.present - staying)
            self._enter("actor")
            self._leave(self.present & set(self.LEARNERS), wait=False)
            self._enter(self.WEIGHTS)

    def metrics(self) -> dict[str, float]:
        """Return the bytes moved since the last call; nothing where no GPUs are shared."""
        moved = float(self.bytes)
        self.bytes = 0
        return {"swap/bytes": moved} if self.shared else {}

    def _leave(self, roles: set[str], wait: bool = True) -> None:
        """Send roles off the GPUs, all at once; they finish their earlier calls first. Without
        `wait` they only begin to leave, and stay until they are sent again.
        """
        leaving = {
            role: self._group(role).submit_without_swap(*self._call_to_leave(role, wait))
            for role in sorted(roles)
            if role != self.WEIGHTS or self.swap == "always"
        }
        for role, pending in leaving.items():
            engine = self._group(role) is self.groups[self.ENGINES]
            self._gather(role, pending, "sleep" if engine else "offload", "make room")
        if wait:
            self.present -= roles

    def _enter(self, role: str) -> None:
        if role in self.present:
            return
        if self._comes_back(role):
            call = {self.ENGINES: ("wake", None), self.WEIGHTS: ("wake", ["weights"])}.get(
                role, ("reload",)
            )
            pending = self._group(role).submit_without_swap(*call)
            self._gather(role, pending, str(call[0]), "acquire GPUs")
        self.present = self.present - {self.WEIGHTS} | {role}

    def _comes_back(self, role: str) -> bool:
        """Tell whether a role has to fetch something when it gets the GPUs."""
        some = {"optimizer": self.LEARNERS}.get(self.swap, ())
        return self.swap == "always" or role in (self.ENGINES, *some)

    def _call_to_leave(self, role: str, wait: bool) -> tuple[Any, ...]:
        if role in (self.ENGINES, self.WEIGHTS):
            return "sleep", self.swap
        return ("offload", self.swap, *([wait] if role in self.LEARNERS else []))

    def _gather(self, role: str, pending: list[Any], span: str, phase: str) -> None:
        """Wait for calls that move a role, and count the bytes that they return."""
        with self.stopwatch(span):
            self.bytes += sum(self._group(role).gather(pending, phase, self.deadline_s))

    def _group(self, role: str) -> WorkerGroup:
        return self.groups[self.ENGINES if role == self.WEIGHTS else role]
