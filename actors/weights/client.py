"""The engines as the Actor's ranks reach them: over which backend, and with which calls."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from actors.cluster.groups import WorkerError, gather
from actors.engine.adapter import Adapter
from actors.weights.proof import Receipt, SyncError
from learners.errors import in_a_line
from learners.settings import DeviceType

OBJECT_STORE = "ray_object_store"  # our backend: weights travel through Ray's shared memory
SHARED_GPU = "shared_gpu"  # vLLM's "ipc" with a receiver of ours
ADAPTER = "adapter"  # alone, through Ray's object store, whatever the devices


def transfer_backend(device: DeviceType, shared: bool) -> str:
    """Return how weights travel: over Ray's object store, between GPUs, or inside a GPU that Actor
    and engine share.
    """
    if device == "cpu":
        return OBJECT_STORE
    return SHARED_GPU if shared else "nccl"


class EngineClient:
    """vLLM's weight-sync client protocol for independent engines, each a Ray actor
    (`actors.cluster.groups.Host`).

    Every call goes to all engines at once. All calls of one update end within `deadline_s`, or
    SyncError names the late engines, by their `names`. `version` is the update's;
    `received` are the engines' receipts of the last one.
    """

    def __init__(
        self,
        handles: Sequence[Any],
        deadline_s: float,
        workers_per_engine: int = 1,
        names: Sequence[str] = (),
    ) -> None:
        self.handles = list(handles)
        self.deadline_s = deadline_s
        self.workers_per_engine = workers_per_engine
        self.names = list(names) or [f"engine[{i}]" for i in range(len(self.handles))]
        self.received: list[Receipt] = []
        self.begin(0)

    def begin(self, version: int) -> None:
        """Begin an update, and with it the time it may take."""
        self.version = version
        self.began = time.monotonic()

    @property
    def world_size(self) -> int:
        """Ranks of the group that one sender and all engine workers form (nccl)."""
        return 1 + len(self.handles) * self.workers_per_engine

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [dict(init_info) for _ in self.handles]
        if "rank_offset" in init_info:  # the sender is rank 0; independent engines line up after it
            for i, info in enumerate(infos):
                info["rank_offset"] = 1 + i * self.workers_per_engine
        self._call("init_weight_transfer_engine", infos)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._call("update_weights", [update_info] * len(self.handles))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        version = weight_version or str(self.version)
        self.received = self._call("finish_weight_update", [version] * len(self.handles))

    def load_adapter(self, group: dict[str, Any], config: dict[str, Any]) -> None:
        """Give every engine the adapter: a packed group, and its adapter_config.json."""
        adapter = Adapter(group, config, self.version, self.deadline_s)
        self.received = self._call("load_adapter", [adapter] * len(self.handles))

    def _call(self, method: str, *arguments: Sequence[Any]) -> list[Any]:
        """Call `method` on every engine, each with its own of every argument; return the
        results.
        """
        pending = [
            handle.call.remote(method, *(one[i] for one in arguments))
            for i, handle in enumerate(self.handles)
        ]
        try:
            return gather(pending, self.names, f"sync: {method}", self.deadline_s, self.began)
        except WorkerError as error:  # its first line: the others are the engine's traceback
            raise SyncError(in_a_line(error)) from error
