"""The Actor's ranks as senders of their weights: one class per transfer backend, in a table.

A *source* has `metadata()`, the (name, dtype, shape) of every parameter in order, and
`iter_groups()`, which yields (names, tensors) of one layer after the other, gathered by all ranks
in lockstep.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
import torch
from torch import Tensor

from actors.weights.client import ADAPTER, OBJECT_STORE, SHARED_GPU, EngineClient
from actors.weights.packing import pack_group
from actors.weights.proof import Receipt, Sent, bit_sums, checksums
from learners.actor import ActorLearner
from learners.lora import adapter_config
from learners.spans import Stopwatch

# of the buffer that weights pass through on shared GPUs: most models fit, and go in one call
PACKED_BYTES = 2 * 2**30

# of one object in Ray's store, unless one layer is larger
GROUP_BYTES = 128 * 2**20

# of the time a sync may take, so that a late engine is named before the rank that waits for it
CLIENT_SHARE = 0.9

Metadata = list[tuple[str, torch.dtype, tuple[int, ...]]]


class SyncedActor(ActorLearner):
    """An Actor's rank that can send its weights: `connect` once, then `send_weights` after every
    step, each on every rank.
    """

    def connect(
        self,
        engines: Sequence[Any],
        deadline_s: float,
        workers_per_engine: int = 1,
        backend: str = OBJECT_STORE,
        rendezvous: tuple[str, int] = ("", 0),
        names: Sequence[str] = (),
    ) -> None:
        """Connect to the engines (Ray actor handles, with `names` for errors).

        `deadline_s` is the whole sync's. nccl's ranks meet at `rendezvous`, on rank 0's node.
        """
        self.client = EngineClient(engines, CLIENT_SHARE * deadline_s, workers_per_engine, names)
        self.sender = SENDERS[backend](self, self.client, self.rank.index, *rendezvous)

    def adapter_config(self) -> dict[str, Any]:
        """Return what adapter_config.json holds."""
        return adapter_config(self.model)

    def send_weights(self, version: int) -> Sent:
        """Send all weights; return the account of it, whole on rank 0. Raises SyncError."""
        self.client.begin(version)
        sent = self.sender.send_weights()
        spans = self.sender.stopwatch.take()
        return Sent(sent, self.client.received, self.sender.names(), spans)


class Source(Protocol):
    def metadata(self) -> Metadata: ...
    def iter_groups(self) -> Iterator[tuple[list[str], list[Tensor]]]: ...
    def adapter(self) -> dict[str, Tensor]: ...
    def adapter_config(self) -> dict[str, Any]: ...


@dataclass
class Sender(ABC):
    """One rank's side of a transfer; rank 0 sends. Ranks that must meet do so at `address`,
    `port`.
    """

    source: Source
    client: EngineClient
    rank: int
    address: str = ""
    port: int = 0
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    @abstractmethod
    def __post_init__(self) -> None:
        """Connect to the engines."""

    @abstractmethod
    def send_weights(self) -> Receipt:
        """Send everything; return what was sent (on rank 0; elsewhere nothing). Call on every
        rank.
        """

    def names(self) -> list[str]:
        """Return the names of all that is to arrive."""
        return [name for name, _, _ in self.source.metadata()]


class ObjectStoreSender(Sender):
    """Sends through Ray's object store: three calls to the engines, whatever the model's size.

    All ranks gather every group first, so that an engine's failure never leaves a rank alone in a
    collective.
    """

    def __post_init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)
        if self.rank == 0:
            self.client.init_weight_transfer_engine({"timeout_s": self.client.deadline_s})

    def send_weights(self) -> Receipt:
        groups = []
        with self.stopwatch("gather"):
            for i, tensors in enumerate(self._batches()):
                if self.rank == 0:
                    groups.append(self._put(f"group {i}", tensors))
        if self.rank == 0:
            with self.stopwatch("send"):
                self.client.start_weight_update()
                self.client.update_weights({"groups": groups})
                self.client.finish_weight_update()
        return [(group["name"], group["digest"], group["names"]) for group in groups]

    def _batches(self) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield the weights, several small layers at a time: every object has its price."""
        batch: list[tuple[str, Tensor]] = []
        for names, tensors in self.source.iter_groups():
            more = list(zip(names, tensors, strict=True))
            if batch and _bytes([*batch, *more]) > GROUP_BYTES:
                yield batch
                batch = []
            batch += more
        yield batch

    def _put(self, name: str, tensors: Sequence[tuple[str, Tensor]]) -> dict[str, Any]:
        """Put one group into the object store; return what an engine needs to read it.

        The groups are packed one after the other in the same memory: memory that is new costs more
        than the copy.
        """
        meta, data = pack_group(name, tensors, self.buffer)
        if len(tensors) > 1 and data.nbytes > len(self.buffer):
            self.buffer = torch.from_numpy(data)
        return {**meta, "ref": ray.put(data)}


def _bytes(tensors: Sequence[tuple[str, Tensor]]) -> int:
    return sum(tensor.nbytes for _, tensor in tensors)


class AdapterSender(Sender):
    """Sends the adapter alone, through Ray's object store: the engines have the same base."""

    def __post_init__(self) -> None:
        self.sent: list[str] = []

    def send_weights(self) -> Receipt:
        tensors = self.source.adapter()
        self.sent = list(tensors)
        if self.rank:
            return []
        meta, data = pack_group("the adapter", list(tensors.items()))
        self.client.load_adapter({**meta, "ref": ray.put(data)}, self.source.adapter_config())
        return [(meta["name"], meta["digest"], meta["names"])]

    def names(self) -> list[str]:
        return self.sent


class GpuSender(Sender):
    """Sends with vLLM's own trainer engine, which a subclass describes."""

    @abstractmethod
    def init_info(self) -> Any:
        """Return vLLM's description of the sending rank."""

    def __post_init__(self) -> None:
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        sent: list[tuple[str, Tensor]] = []
        source = self.source
        first = self.rank == 0

        class Gathered(WeightSource):
            def metadata(self) -> list[ParamMeta]:
                return [ParamMeta(*entry) for entry in source.metadata()]

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                for names, tensors in source.iter_groups():
                    named = list(zip(names, tensors, strict=True))
                    if first:  # before vLLM copies them, on streams of its own
                        sent.extend((name, bit_sums(tensor)) for name, tensor in named)
                    for name, tensor in named:
                        if tensor.is_cuda:  # their memory must outlive that copying
                            tensor.record_stream(torch.cuda.current_stream())
                        yield name, tensor

        self.sent = sent
        self.engine = WeightTransferTrainerFactory.trainer_init(
            self.init_info(), client=self.client, source=Gathered()
        )

    def send_weights(self) -> Receipt:
        self.sent.clear()
        with self.stopwatch("send"):
            self.engine.send_weights()
        found = checksums([sums for _, sums in self.sent])
        return [(name, c, [name]) for (name, _), c in zip(self.sent, found, strict=True)]


class NcclSender(GpuSender):
    """Sends from GPU to GPU."""

    def init_info(self) -> Any:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(
            master_address=self.address,
            master_port=self.port,
            world_size=self.client.world_size,
            rank=self.rank,
        )


class SharedGpuSender(GpuSender):
    """Sends inside shared GPUs, packed: through one buffer beside the model, in one call where the
    model fits it. Every single tensor must fit.
    """

    def init_info(self) -> Any:
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        tensors = [math.prod(shape) * d.itemsize for _, d, shape in self.source.metadata()]
        # the same on every rank: they fill their buffers in lockstep
        size = max(min(PACKED_BYTES, sum(tensors)), *tensors)
        return IPCTrainerInitInfo(rank=self.rank, packed=True, packed_buffer_size_bytes=size)


SENDERS: dict[str, type[Sender]] = {
    OBJECT_STORE: ObjectStoreSender,
    ADAPTER: AdapterSender,
    "nccl": NcclSender,
    SHARED_GPU: SharedGpuSender,
}
