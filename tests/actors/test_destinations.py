"""Weights go where they belong without vLLM's reload: the same model, bit by bit, and the reload
where more than copying happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from actors.weights.packing import pack_group
from actors.weights.proof import SyncError, bit_sums, checksums, verify

pytestmark = [pytest.mark.engines, pytest.mark.timeout(400)]
PROBE = [1, *range(3, 60)]


def receiver_of(served: Any) -> Any:
    return served.engine._worker(lambda worker: worker.weight_transfer_engine)


def one_group(model: Any) -> list[dict[str, Any]]:
    meta, data = pack_group("group 0", list(model.named_parameters()))
    return [{**meta, "ref": data.copy()}]


def send(served: Any, groups: list[dict[str, Any]], version: int) -> list[float]:
    """Update the engine; return its log-probs of the probe."""
    served.engine.start_weight_update()
    served.engine.update_weights({"groups": groups})
    served.engine.finish_weight_update(str(version))
    served.engine.accept(version)
    return list(served.engine.probe_logprobs(PROBE))


def test_directly_loaded_weights_are_those_of_a_reload_bit_by_bit(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both where parts of a fused weight lie one after the other, and where they come apart."""
    from actors.weights import loading
    from tests.actors.tiny_models import make_model, packed_groups

    new = make_model(seed=1, tied=served.model.config.tie_word_embeddings)
    loader = receiver_of(served).loader
    old = send(served, one_group(served.model), 1)
    with monkeypatch.context() as patch:
        patch.setattr(loader, "_refused", True)
        reloaded = send(served, one_group(new), 2)
        assert send(served, one_group(served.model), 3) == old != reloaded
    with monkeypatch.context() as patch:
        patch.delattr(loading, "initialize_layerwise_reload")
        assert send(served, one_group(new), 4) == reloaded
        assert send(served, one_group(served.model), 5) == old
        assert send(served, packed_groups(new), 6) == reloaded
    assert loader.indirect == ""
    # nothing of the update is held: the object store may free it
    assert loader.destinations.held == {}


def test_a_layer_that_was_sent_in_part_keeps_its_weights(served: Any) -> None:
    from tests.actors.tiny_models import make_model

    new = make_model(seed=1, tied=served.model.config.tie_word_embeddings)
    old = send(served, one_group(served.model), 1)
    some = [(n, p) for n, p in new.named_parameters() if "k_proj" in n or "up_proj" in n]
    meta, data = pack_group("group 0", some)
    assert send(served, [{**meta, "ref": data}], 2) == old


def test_a_model_whose_loading_computes_is_reloaded(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of experts, quantised layers, or attention that keeps products of its weights."""
    from tests.actors.tiny_models import make_model

    new = make_model(seed=1, tied=served.model.config.tie_word_embeddings)
    expected = send(served, one_group(new), 1)
    receiver = receiver_of(served)
    norm = receiver.model.model.norm
    monkeypatch.setattr(
        receiver, "loader", type(receiver.loader)(receiver.model, receiver.model_config)
    )
    with monkeypatch.context() as patch:
        patch.setattr(norm, "process_weights_after_loading", lambda dtype: None, raising=False)
        send(served, one_group(served.model), 2)
        assert receiver.loader.indirect.startswith("NotRecordable: model.norm has weights that")
        assert send(served, one_group(new), 3) == expected


class Doubling(nn.Module):
    """Loads twice what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3), requires_grad=False)

    def load_weights(self, weights: Any) -> None:
        for _, weight in weights:
            self.weight.data.copy_(weight * 2)


class Adding(Doubling):
    def load_weights(self, weights: Any) -> None:
        for _, weight in weights:
            self.weight.data.copy_(weight)
            self.weight.data.add_(1)


class Twice(Doubling):
    """Puts two weights in one place: which is left depends on their order."""

    def load_weights(self, weights: Any) -> None:
        for _, weight in weights:
            self.weight.data.copy_(weight)


class Halves(Doubling):
    """Takes a row of each, transposed and in another dtype, and fills the rest with zeros."""

    def load_weights(self, weights: Any) -> None:
        for i, (_, weight) in enumerate(weights):
            self.weight.data[i, :2].copy_(weight.t()[0])
            self.weight.data[i, 2:].fill_(0)


@pytest.mark.parametrize("model", [Doubling, Adding, Twice])
def test_what_is_more_than_a_copy_is_not_recorded(model: type[nn.Module]) -> None:
    from actors.weights.destinations import Destinations, NotRecordable

    weights = {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}
    one = model()
    with pytest.raises(NotRecordable):
        Destinations(one).record(weights)
    assert torch.equal(one.weight, torch.zeros(2, 3))  # recording changes nothing


def test_parts_of_weights_go_to_parts_of_parameters() -> None:
    from actors.weights.destinations import Destinations

    model = Halves()
    destinations = Destinations(model)
    buffer = torch.arange(9.0, dtype=torch.float64)
    weights = {"a": buffer[1:5].view(2, 2), "b": buffer[5:].view(2, 2)}
    destinations.record(weights)
    destinations.load(weights)
    assert model.weight.tolist() == [[1, 3, 0], [5, 7, 0]]


# --- on a GPU that Actor and engine share, rehearsed on a CPU -------------------------------------


@contextmanager
def shared_gpu(served: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The engine with the receiver of shared GPUs. CUDA's part, which gives it the sender's buffer,
    is all that is not there: `buffer` stands for that.
    """
    from actors.weights.receiver import SharedGpuReceiver

    usual = receiver_of(served)
    there = SharedGpuReceiver(usual.config, usual.vllm_config, torch.device("cpu", 0), usual.model)
    there.init_transfer_engine(there.parse_init_info({"packed": True}))
    worker = served.engine._worker(lambda wrapped: wrapped.worker)
    card = SimpleNamespace(uuid="GPU-1")
    with monkeypatch.context() as patch:
        patch.setattr(worker, "weight_transfer_engine", there)
        patch.setattr(torch.cuda, "get_device_properties", lambda index: card)
        patch.setattr(torch.accelerator, "synchronize", lambda: None)
        patch.setattr(there._packed_importer, "rebuild", lambda arguments: there.buffer)
        yield there


def buffer_of(weights: list[tuple[str, torch.Tensor]]) -> tuple[torch.Tensor, dict[str, Any]]:
    """What vLLM's sender makes of weights: the bytes, in one piece, and their description."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo

    info = IPCWeightTransferUpdateInfo(
        names=[n for n, _ in weights],
        dtype_names=[str(w.dtype).split(".")[-1] for _, w in weights],
        shapes=[list(w.shape) for _, w in weights],
        ipc_handles={"GPU-1": (None,) * 8},
        tensor_sizes=[w.nbytes for _, w in weights],
    )
    flat = [w.detach().contiguous().view(-1).view(torch.uint8) for _, w in weights]
    return torch.cat(flat), asdict(info)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("fault", ["none", "a flipped bit", "a missing name"])
def test_a_shared_gpu_hands_over_every_weight_or_the_receipt_tells(
    served: Any, monkeypatch: pytest.MonkeyPatch, fault: str, direct: bool
) -> None:
    """The buffer is only lent: it holds something else as soon as the call has ended."""
    from actors.weights.receiver import note_what_is_loaded, pack_heads
    from tests.actors.tiny_models import make_model

    new = make_model(seed=1, tied=served.model.config.tie_word_embeddings)
    expected = send(served, one_group(new), 1)
    send(served, one_group(served.model), 2)
    weights = list(new.named_parameters())
    sums = checksums([bit_sums(weight) for _, weight in weights])
    sent = [(name, value, [name]) for (name, _), value in zip(weights, sums, strict=True)]
    with shared_gpu(served, monkeypatch) as receiver:
        receiver.loader._refused = not direct
        served.engine.start_weight_update()
        served.engine._worker(note_what_is_loaded)  # nothing: this receiver does so itself
        receiver.buffer, info = buffer_of(weights[:-1] if fault == "a missing name" else weights)
        if fault == "a flipped bit":
            receiver.buffer[17] ^= 1
        served.engine.update_weights(info)
        receiver.buffer.zero_()
        receipt = served.engine.finish_weight_update("3")
    if fault == "none":
        verify(sent, receipt, [name for name, _ in weights])
        served.engine._worker(lambda worker: pack_heads(worker.get_model()))  # GPUs pack nothing
        served.engine.accept(3)
        assert served.engine.probe_logprobs(PROBE) == expected
    else:
        with pytest.raises(
            SyncError, match="embed_tokens.*digest" if "bit" in fault else "missing"
        ):
            verify(sent, receipt, [name for name, _ in weights])


def test_vllm_has_what_the_receiver_of_shared_gpus_takes_from_it() -> None:
    import inspect

    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
    from vllm.distributed.weight_transfer.packed_tensor import (
        PackedBufferImporter,
        packed_ipc_consumer,
        unpack_tensor,
    )

    inspect.signature(PackedBufferImporter.rebuild).bind(None, [])
    inspect.signature(PackedBufferImporter.close).bind(None)
    inspect.signature(unpack_tensor).bind(torch.empty(0), [], [], [], [])
    assert "self._packed_importer = " in inspect.getsource(IPCWeightTransferEngine.__init__)
    # the device's place in CUDA's handle, and the name by which a handle is found
    theirs = inspect.getsource(packed_ipc_consumer)
    assert "list_args[6] = device_index" in theirs and "str(props.uuid)" in theirs
