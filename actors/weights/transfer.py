"""Actor weights -> engines, on vLLM's weight-transfer API: the trainer's side. Never imports vLLM
by itself on a CPU.

A *source* has `metadata()`, the (name, dtype, shape) of every parameter in order, and
`iter_groups()`, which yields (names, tensors) of one layer after the other, gathered by all ranks
in lockstep. A *receipt* lists, per group, what was sent or received: (group name, digest of its
bytes, parameter names). On GPUs every tensor is a group of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from learners.settings import DeviceType

OBJECT_STORE = (
    "ray_object_store"  # our transfer backend: weights travel through Ray's shared memory
)
# bytes; every tensor of a packed group starts at a multiple, so that it can be read in place
ALIGNMENT = 16

# of the buffer that weights pass through on shared GPUs, unless one tensor is larger
PACKED_BYTES = 2**30

# of the time a sync may take, so that a late engine is named before the rank that waits for it
CLIENT_SHARE = 0.9

Receipt = list[tuple[str, str, list[str]]]
Metadata = list[tuple[str, torch.dtype, tuple[int, ...]]]


class SyncError(RuntimeError):
    """Weights did not arrive, or not those that were sent; the message names engine and phase."""


class Source(Protocol):
    def metadata(self) -> Metadata: ...
    def iter_groups(self) -> Iterator[tuple[list[str], list[Tensor]]]: ...


def pack_group(
    name: str, tensors: Sequence[tuple[str, Tensor]]
) -> tuple[dict[str, Any], np.ndarray]:
    """Tensors one after the other in one array of bytes, and what is needed to unpack them: plain
    data and a digest.
    """
    meta = {
        "name": name,
        "names": [n for n, _ in tensors],
        "dtypes": [str(t.dtype).removeprefix("torch.") for _, t in tensors],
        "shapes": [list(t.shape) for _, t in tensors],
    }
    places, total = _layout(meta)
    packed = torch.zeros(total, dtype=torch.uint8)
    for (_, tensor), (start, stop) in zip(tensors, places, strict=True):
        packed[start:stop].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
    data = packed.numpy()
    return {**meta, "digest": digest(data)}, data


def unpack_group(meta: dict[str, Any], packed: Tensor) -> list[tuple[str, Tensor]]:
    """(name, tensor) pairs that look into `packed`, the uint8 tensor of a packed group."""
    places, _ = _layout(meta)
    return [
        (name, packed[start:stop].view(getattr(torch, dtype)).view(shape))
        for name, dtype, shape, (start, stop) in zip(
            meta["names"], meta["dtypes"], meta["shapes"], places, strict=True
        )
    ]


def _layout(meta: dict[str, Any]) -> tuple[list[tuple[int, int]], int]:
    """First and last byte of every tensor of a packed group, and the length of the whole."""
    places = []
    end = 0
    for dtype, shape in zip(meta["dtypes"], meta["shapes"], strict=True):
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + int(np.prod(shape, dtype=np.int64)) * getattr(torch, dtype).itemsize
        places.append((start, end))
    return places, end


def digest(data: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(data.data)


def checksum(tensor: Tensor) -> str:
    """Digest of a tensor's bits, computed where it lies: the sum of all, and of the rows by their
    place.
    """
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    rows = bits.reshape(*bits.shape[:1] or (1,), math.prod(bits.shape[1:])).sum(
        1, dtype=torch.int64
    )
    places = torch.arange(1, len(rows) + 1, device=rows.device)
    total, by_place = torch.stack([rows.sum(), (rows * places).sum()]).tolist()
    return f"{total & 2**64 - 1:016x}{by_place & 2**64 - 1:016x}"


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class EngineClient:
    """vLLM's weight-sync client protocol for independent engines, each a Ray actor
    (`actors.cluster.groups.Host`).

    Every call goes to all engines at once. All calls of one update end within `deadline_s`, or
    SyncError says which of the engines, by their `names`, is late. `version` is what the update
    will be called; `received` are the engines' receipts of the last one.
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
        """An update begins, and with it the time it may take."""
        self.version = version
        self.until = time.monotonic() + self.deadline_s

    @property
    def world_size(self) -> int:
        """Of the group that one sender and all engine workers form (nccl)."""
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
        self.received = self._call(
            "finish_weight_update", [weight_version or str(self.version)] * len(self.handles)
        )

    def _call(self, method: str, arguments: list[Any] | None = None) -> list[Any]:
        import ray
        from ray.exceptions import RayError

        each = [()] * len(self.handles) if arguments is None else [(a,) for a in arguments]
        pending = [h.call.remote(method, *a) for h, a in zip(self.handles, each, strict=True)]
        waiting = list(pending)
        while waiting:  # the first failure ends the wait, whichever engine it comes from
            done, waiting = ray.wait(
                waiting, num_returns=1, timeout=max(0.0, self.until - time.monotonic())
            )
            if not done:
                late = ", ".join(
                    name for name, ref in zip(self.names, pending, strict=True) if ref in waiting
                )
                raise SyncError(
                    f"sync: {method}: {late} did not answer within {self.deadline_s:.0f} s"
                )
            try:
                ray.get(done[0], timeout=60)
            except RayError as error:
                cause = getattr(error, "cause", None) or error
                raise SyncError(
                    f"sync: {method}: {self.names[pending.index(done[0])]} failed: {cause}"
                ) from error
        return ray.get(pending, timeout=60)


class ObjectStoreSender:
    """The trainer's side of our CPU backend, like vLLM's own trainer engines: one per rank, rank 0
    sends.

    All ranks gather every group first, so that an engine's failure never leaves a rank alone in a
    collective. A sync is three calls to the engines, whatever the size of the model.
    """

    def __init__(self, source: Source, client: EngineClient, rank: int) -> None:
        self.source = source
        self.client = client
        self.is_sender = rank == 0
        if self.is_sender:
            client.init_weight_transfer_engine({"timeout_s": client.deadline_s})

    def send_weights(self) -> Receipt:
        """Call on every rank. Returns what was sent (on rank 0; elsewhere nothing); raises
        SyncError.
        """
        import ray

        groups = []
        for i, (names, tensors) in enumerate(self.source.iter_groups()):
            if self.is_sender:
                meta, data = pack_group(f"group {i}", list(zip(names, tensors, strict=True)))
                groups.append({**meta, "ref": ray.put(data)})
        if self.is_sender:
            self.client.start_weight_update()
            self.client.update_weights({"groups": groups})
            self.client.finish_weight_update()
        return [(group["name"], group["digest"], group["names"]) for group in groups]


def transfer_backend(device: DeviceType, shared: bool) -> str:
    """How weights travel: over Ray's object store, between GPUs, or inside a GPU that Actor and
    engine share.
    """
    if device == "cpu":
        return OBJECT_STORE
    return "ipc" if shared else "nccl"


class GpuSender:
    """vLLM's own trainer engine over our source: "nccl" (separate GPUs; rendezvous at `address`,
    `port` of rank 0) or "ipc" (shared GPUs). One per rank, rank 0 sends.

    "ipc" packs: one buffer beside the model and a call for every buffer of weights, instead of a
    whole second copy.
    """

    def __init__(
        self,
        backend: str,
        source: Source,
        client: EngineClient,
        rank: int,
        address: str = "",
        port: int = 0,
    ) -> None:
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        self.sent: Receipt = []
        sent = self.sent

        class Gathered(WeightSource):
            def metadata(self) -> list[ParamMeta]:
                return [ParamMeta(*entry) for entry in source.metadata()]

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                for names, tensors in source.iter_groups():
                    if (
                        rank == 0
                    ):  # a checksum waits for its copy: vLLM reads the copies on streams of its own
                        sent.extend(
                            (n, checksum(t), [n]) for n, t in zip(names, tensors, strict=True)
                        )
                    for name, tensor in zip(names, tensors, strict=True):
                        if tensor.is_cuda:  # their memory must outlive that reading
                            tensor.record_stream(torch.cuda.current_stream())
                        yield name, tensor

        info = (
            NCCLTrainerInitInfo(
                master_address=address, master_port=port, world_size=client.world_size, rank=rank
            )
            if backend == "nccl"
            else IPCTrainerInitInfo(
                rank=rank, packed=True, packed_buffer_size_bytes=_buffer_bytes(source)
            )
        )
        self.engine = WeightTransferTrainerFactory.trainer_init(
            info, client=client, source=Gathered()
        )

    def send_weights(self) -> Receipt:
        """Call on every rank. Returns what was sent (on rank 0; elsewhere nothing); raises
        SyncError.
        """
        self.sent.clear()
        self.engine.send_weights()
        return list(self.sent)


def _buffer_bytes(source: Source) -> int:
    """Of the packed buffer: every single tensor must fit."""
    return max(
        [
            PACKED_BYTES,
            *(math.prod(shape) * dtype.itemsize for _, dtype, shape in source.metadata()),
        ]
    )


def verify(sent: Receipt, received: Receipt, names: Sequence[str], who: str = "engine") -> None:
    """Raise SyncError unless `who` received the very bytes that were sent, and exactly the
    parameters `names`.
    """
    digests = {group: value for group, value, _ in sent}
    for group, value, _ in received:
        if digests.get(group) != value:
            raise SyncError(
                f"sync: {who}: {group} arrived with digest {value}, sent was {digests.get(group)}"
            )
    arrived = [name for _, _, group_names in received for name in group_names]
    missing = sorted(set(names) - set(arrived))
    extra = sorted(set(arrived) - set(names))
    if missing or extra or len(arrived) != len(names):
        raise SyncError(
            f"sync: {who}: {len(arrived)} parameters arrived, {len(names)} expected; "
            f"missing {missing[:3]} ({len(missing)}), unexpected {extra[:3]} ({len(extra)})"
        )


def check_probe(
    actor_logprobs: Sequence[float],
    engine_logprobs: Sequence[float],
    max_logprob_diff: float,
    mean_logprob_diff: float,
    who: str = "engine",
) -> float:
    """Largest difference of the probe's log-probs in nats.

    SyncError if it is above `gate`, the mean of all differences above `mean_logprob_diff`, or one
    of them not a number.
    """
    differences = [abs(a - b) for a, b in zip(actor_logprobs, engine_logprobs, strict=True)]
    worst = (
        max(differences, default=math.nan) if not any(map(math.isnan, differences)) else math.nan
    )
    average = sum(differences) / max(1, len(differences))
    if not (worst <= max_logprob_diff and average <= mean_logprob_diff):
        raise SyncError(
            f"sync: {who} and Actor differ by {worst:.2e} nats on the probe, {average:.2e} on "
            "average; "
            f"the gate is {max_logprob_diff:.0e}, {mean_logprob_diff:.0e} on average "
            "(sync.max_logprob_diff, sync.mean_logprob_diff)"
        )
    return worst
