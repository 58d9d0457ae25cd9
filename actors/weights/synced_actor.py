"""The Actor's ranks as the driver runs them: an ActorLearner that can send its weights to the
engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actors.weights.transfer import (
    CLIENT_SHARE,
    OBJECT_STORE,
    EngineClient,
    GpuSender,
    ObjectStoreSender,
    Receipt,
)
from learners.actor import ActorLearner


class SyncedActor(ActorLearner):
    """One rank. `connect` once, then `send_weights` after every step, each on every rank."""

    def connect(
        self,
        engines: Sequence[Any],
        deadline_s: float,
        workers_per_engine: int = 1,
        backend: str = OBJECT_STORE,
        rendezvous: tuple[str, int] = ("", 0),
        names: Sequence[str] = (),
    ) -> None:
        """Open the way to the engines (Ray actor handles, with `names` for errors). `deadline_s` is
        the whole sync's.

        At `rendezvous`, on rank 0's node, nccl's ranks meet.
        """
        self.client = EngineClient(engines, CLIENT_SHARE * deadline_s, workers_per_engine, names)
        if backend == OBJECT_STORE:
            self.sender: Any = ObjectStoreSender(self, self.client, self.rank.index)
        else:
            self.sender = GpuSender(backend, self, self.client, self.rank.index, *rendezvous)

    def send_weights(self, version: int) -> tuple[Receipt, list[Receipt], list[str]]:
        """Returns, on rank 0: what was sent, what each engine received, and the names of all
        parameters.
        """
        self.client.begin(version)
        sent = self.sender.send_weights()
        return sent, self.client.received, [name for name, _, _ in self.metadata()]
