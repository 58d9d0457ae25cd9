"""The engine's side of a weight sync: our receivers of vLLM's weight-transfer API, on CPUs and on
GPUs that Actor and engine share, and functions that run in the worker of any backend. Imports vLLM.

Three facts about vLLM on a CPU shape it (and more `loading.py`): the base class synchronises an
accelerator that is not there; an update that was interrupted continues where it stood, unless it
is cleared away; and a tied `lm_head` keeps its old packed copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import (
    IPCWeightTransferEngine,
    IPCWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.packed_tensor import unpack_tensor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from actors.weights.client import OBJECT_STORE, SHARED_GPU
from actors.weights.loading import Loader
from actors.weights.packing import fetch_group, unpack_group
from actors.weights.proof import Receipt, bit_sums, checksums
from learners.spans import Span, Stopwatch


@dataclass
class ObjectStoreInit(WeightTransferInitInfo):
    timeout_s: float
    """Seconds one group may take to arrive from another node."""


@dataclass
class ObjectStoreUpdate(WeightTransferUpdateInfo):
    groups: list[dict[str, Any]]
    """The plain data of each group from `pack_group`, and its bytes as `ref`: a Ray reference, or
    the array itself.
    """


class ObjectStoreReceiver(WeightTransferEngine[ObjectStoreInit, ObjectStoreUpdate]):
    """Reads packed groups from Ray's object store and loads them. Nothing is loaded unless every
    digest agrees.
    """

    init_info_cls = ObjectStoreInit
    update_info_cls = ObjectStoreUpdate
    supports_draft_weight_update = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.stopwatch = Stopwatch()
        self.loader = Loader(self.model, self.model_config)

    def init_transfer_engine(self, init_info: ObjectStoreInit) -> None:
        self.timeout_s = init_info.timeout_s

    def start_weight_update(self) -> None:
        self.stopwatch.take()
        self.receipt: Receipt = []

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: ObjectStoreUpdate) -> None:
        groups = update_info.groups
        with self.stopwatch("receive"), ThreadPoolExecutor(torch.get_num_threads()) as pool:
            arrays = list(pool.map(partial(fetch_group, timeout_s=self.timeout_s), groups))
        with self.stopwatch("load"):
            weights: dict[str, torch.Tensor] = {}
            for group, array in zip(groups, arrays, strict=True):
                with warnings.catch_warnings(action="ignore"):
                    # The store's memory is read-only, of which torch warns; loading only reads.
                    weights |= unpack_group(group, torch.from_numpy(array))
            self.loader.load(weights)
        self.receipt += [(group["name"], group["digest"], group["names"]) for group in groups]

    def finish_weight_update(self) -> None:
        with self.stopwatch("load"):
            self.loader.finish()
            pack_heads(self.model)

    def shutdown(self) -> None:
        pass


class SharedGpuReceiver(IPCWeightTransferEngine):
    """Reads the buffers that an Actor's rank fills on the same GPU: as vLLM does, but
    in place, and with an account of what it reads.
    """

    supports_draft_weight_update = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.stopwatch = Stopwatch()
        self.loader = Loader(self.model, self.model_config)

    def start_weight_update(self) -> None:
        self.stopwatch.take()
        self.receipt: Receipt = []
        self.noted: list[tuple[str, torch.Tensor]] = []

    def update_weights(self, update_info: dict[str, Any]) -> None:
        with self.stopwatch("load"):  # until the device has done it
            super().update_weights(update_info)

    def receive_weights(self, update_info: IPCWeightTransferUpdateInfo) -> None:
        weights = dict(self._packed(update_info))
        self.noted += [(name, bit_sums(weight)) for name, weight in weights.items()]
        self.loader.load(weights, lent=True)

    def _packed(self, update_info: IPCWeightTransferUpdateInfo) -> list[tuple[str, torch.Tensor]]:
        """Return the weights where they lie: in a buffer of the Actor's rank, until this call has
        ended.
        """
        index = self.device.index
        handles = update_info.ipc_handles
        gpu = str(torch.cuda.get_device_properties(index).uuid)
        if not isinstance(handles, dict) or update_info.tensor_sizes is None:
            raise ValueError("weights on a shared GPU come packed, with one handle a buffer")
        arguments = list(handles[gpu])
        arguments[6] = index  # the device, which has another number in the sender's process
        sizes = update_info.tensor_sizes
        buffer = self._packed_importer.rebuild(arguments)[: sum(sizes)]
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]
        return unpack_tensor(buffer, update_info.names, update_info.shapes, dtypes, sizes)

    def finish_weight_update(self) -> None:
        with self.stopwatch("load"):
            self.loader.finish()
            self._packed_importer.close()


def pack_heads(model: torch.nn.Module) -> None:
    """Pack the heads of a model on a CPU anew: a tied one was not loaded, and all keep their weight
    beside the packed copy.
    """
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.cpu_linear = None  # the old one goes first: its memory is taken again
            layer.quant_method.process_weights_after_loading(layer)


def clear_interrupted_update(worker: Any) -> None:
    """Close an update that was begun and never completed, so that the next one starts from whole
    layers.

    A reload that starts over half-filled layers would add the new weights to what they have already
    counted.
    """
    # When an update failed, vLLM has ended it, but left the layers as they were.
    if not worker._weight_update_active:
        worker.start_weight_update()
    worker.finish_weight_update()


def note_what_is_loaded(worker: Any) -> None:
    """Keep a receipt of every tensor that the model is given from here on, as it arrived.

    For vLLM's own receivers: they keep none, and the names of an update are only those that its
    sender announced.
    """
    engine = worker.weight_transfer_engine
    if isinstance(engine, SharedGpuReceiver):
        return
    load = type(engine.model).load_weights
    noted: list[tuple[str, torch.Tensor]] = []

    def noting(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            noted.append((name, bit_sums(tensor)))
            yield name, tensor

    engine.model.load_weights = lambda weights: load(engine.model, noting(weights))
    engine.receipt = []
    engine.noted = noted


def take_receipt(worker: Any) -> Receipt:
    """Return the receipt of the last update. Waits once for the device that computed checksums."""
    engine = worker.weight_transfer_engine
    noted = getattr(engine, "noted", [])
    found = checksums([sums for _, sums in noted])
    named = [(name, value, [name]) for (name, _), value in zip(noted, found, strict=True)]
    return [*engine.receipt, *named]


def take_spans(worker: Any) -> list[Span]:
    """Return what the parts of the last update took in this worker: nothing with a receiver of
    vLLM's own.
    """
    stopwatch = getattr(worker.weight_transfer_engine, "stopwatch", None)
    return stopwatch.take() if stopwatch else []


WeightTransferEngineFactory.register_engine(OBJECT_STORE, ObjectStoreReceiver)
WeightTransferEngineFactory.register_engine(SHARED_GPU, SharedGpuReceiver)
