"""The engine's side of a weight sync: our CPU backend of vLLM's weight-transfer API, and functions
that run in the worker of any backend. Imports vLLM.

Five facts about vLLM on a CPU shape it: weights must be loaded inside a layerwise reload, because
most layers have packed and dropped what they were given; the base class synchronises an accelerator
that is not there; a reload that was interrupted continues where it stood, unless it is cleared
away; a tied `lm_head` keeps its old packed copy; and experts are packed only while their kernel is
built.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from actors.weights.client import OBJECT_STORE
from actors.weights.packing import fetch_group, unpack_group
from actors.weights.proof import Receipt, checksum


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

    def init_transfer_engine(self, init_info: ObjectStoreInit) -> None:
        self.timeout_s = init_info.timeout_s

    def start_weight_update(self) -> None:
        self.receipt: Receipt = []
        for layer in self.model.modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, FusedMoEMethodBase):
                method.moe_kernel = None  # built again of the new weights, and so are they packed
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: ObjectStoreUpdate) -> None:
        arrays = [fetch_group(group, self.timeout_s) for group in update_info.groups]
        for group, array in zip(update_info.groups, arrays, strict=True):
            with warnings.catch_warnings(action="ignore"):
                # The store's memory is read-only, of which torch warns; loading only reads.
                packed = torch.from_numpy(array)
            self.model.load_weights(unpack_group(group, packed))
            self.receipt.append((group["name"], group["digest"], group["names"]))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for layer in self.model.modules():
            if isinstance(layer, ParallelLMHead):
                # A tied one was not loaded: it still holds its packed copy.
                layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        pass


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
    load = type(engine.model).load_weights
    receipt = []

    def noted(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            receipt.append((name, checksum(tensor), [name]))
            yield name, tensor

    engine.model.load_weights = lambda weights: load(engine.model, noted(weights))
    engine.receipt = receipt


def take_receipt(worker: Any) -> Receipt:
    """Return the receipt of the last update."""
    return worker.weight_transfer_engine.receipt


WeightTransferEngineFactory.register_engine(OBJECT_STORE, ObjectStoreReceiver)
