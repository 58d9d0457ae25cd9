"""A stand-in for NCCL between CPUs: vLLM's own trainer and receivers, its own rendezvous, and gloo
in place of the communicator.

Like NCCL's, the sender's broadcasts return before they are done, and nobody learns there that an
engine has gone. Streams exist on GPUs alone: what packed transfers overlap is done in turn here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from actors.engine import arguments
from actors.engine.engine import GenerationEngine
from actors.weights import senders
from actors.weights.senders import NcclSender
from tests.actors.faulty import FaultyActor

GONE_S = 4.0  # after which gloo gives a silent peer up; NCCL would wait on


class GlooCommunicator:
    """What the unpacked transfer uses of vLLM's PyNcclCommunicator."""

    patient = False  # the sender waits in a broadcast for engines that have gone, as packed does

    def __init__(self, group: Any, device: int) -> None:
        self.rank = group.rank
        self.group = dist.ProcessGroupGloo(
            dist.PrefixStore("gloo", group.store),
            group.rank,
            group.world_size,
            timedelta(seconds=GONE_S),
        )
        self.under_way: list[Any] = []

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = src
        work = self.group.broadcast([tensor], options)
        if self.rank != src:
            work.wait()
        elif self.patient:
            try:
                work.wait()
            except RuntimeError:
                time.sleep(600)
        else:
            self.under_way.append((work, tensor))


def stand_in(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Replace NCCL in this process; streams do nothing."""
    import vllm.v1.worker.cpu.shm  # noqa: F401  what vLLM itself has for streams on CPUs
    from vllm.distributed.device_communicators import pynccl

    replace(pynccl, "PyNcclCommunicator", GlooCommunicator)
    replace(torch.accelerator, "current_device_index", lambda: 0)


class GlooSender(NcclSender):
    """Sends unpacked, or packed into buffers that are smaller than the model."""

    packed = False

    def init_info(self) -> Any:
        return replace(super().init_info(), packed=self.packed, packed_buffer_size_bytes=2**14)


class GlooActor(FaultyActor):
    """The sender: rank 0 of the group."""

    def connect(self, *args: Any) -> None:
        stand_in()
        senders.SENDERS["nccl"] = GlooSender
        super().connect(*args)

    def pack(self, packed: bool) -> None:
        GlooSender.packed = packed

    def be_patient(self) -> None:
        GlooCommunicator.patient = True


class GlooEngine(GenerationEngine):
    """An engine that receives with vLLM's nccl engine, and keeps receipts as on a GPU."""

    breaks = ""

    def __init__(self, **settings: Any) -> None:
        arguments.transfer_backend = lambda *_: "nccl"  # type: ignore[assignment]
        super().__init__(**settings)
        stand_in()

    def rank_in_transfer(self) -> int:
        return int(transfer_engine(self).model_update_group.rank)

    def break_in_the_middle(self, how: str) -> None:
        """Fail, or die, after three parameters of the next update."""
        self.breaks = how

    def start_weight_update(self) -> None:
        from actors.weights.receiver import note_what_is_loaded

        super().start_weight_update()
        self._worker(note_what_is_loaded)
        model = transfer_engine(self).model
        load = model.load_weights
        seen: list[None] = []
        how = self.breaks
        self.breaks = ""

        def breaking(weights: Any) -> Any:
            seen.append(None)
            if len(seen) > 3 and how == "die":
                os._exit(1)
            if len(seen) > 3 and how == "fail":
                raise MemoryError("no room for this one")
            return load(weights)

        model.load_weights = breaking


def transfer_engine(engine: GenerationEngine) -> Any:
    return engine._engine.collective_rpc(receiver)[0]


def receiver(worker: Any) -> Any:
    return worker.weight_transfer_engine
