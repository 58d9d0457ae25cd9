"""Tensors that leave a device and come back: the copies on a CPU, and the order in which a GPU is
asked for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.cuda._pin_memory_utils import pin_memory

from actors.reference import FrozenModel
from learners.moving import PAGE, Mover


def some() -> list[Tensor]:
    """Of several types, one of them with other strides, one a view of the next."""
    whole = torch.arange(20.0)
    return [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(5, dtype=torch.bfloat16),
        torch.arange(3),
        whole[4:9],
        nn.Parameter(torch.tensor(7.0)),
    ]


def test_what_leaves_comes_back_as_it_was_from_a_place_made_once() -> None:
    mover = Mover("cpu")
    tensors = some()
    before = [tensor.detach().clone() for tensor in tensors]
    size = sum(tensor.nbytes for tensor in tensors)
    places: list[list[int]] = []
    for _ in range(2):
        assert mover.leave(tensors) == size
        assert mover.leave(tensors) == 0  # on their way
        here = [tensor.data_ptr() for tensor in tensors]
        mover.finish_leaving()
        assert mover.leave(tensors) == 0  # away
        places.append([tensor.data_ptr() for tensor in tensors])
        assert not set(here) & set(places[-1])
        assert mover.come_back() == size and mover.come_back() == 0
        mover.await_back()
        assert not set(places[-1]) & {tensor.data_ptr() for tensor in tensors}
    assert places[0] == places[1]
    for tensor, was in zip(tensors, before, strict=True):
        assert torch.equal(tensor, was) and tensor.stride() == was.stride()
        with torch.no_grad():
            tensor.add_(1)
    mover.leave(tensors)
    mover.finish_leaving()
    mover.come_back()
    assert all(torch.equal(t, was + 1) for t, was in zip(tensors, before, strict=True))


def test_places_of_a_type_lie_beside_each_other_and_are_no_larger_than_needed() -> None:
    """So that a checkpoint written from there holds them once, whatever it says of types."""
    mover = Mover("cpu")
    tensors = some()
    mover.leave(tensors)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in mover._places.values()}
    by_type = {tensor.dtype for tensor in tensors}
    assert len(storages) == len(by_type) == 3
    assert sum(len(one) for one in storages.values()) == sum(t.nbytes for t in tensors)


def test_what_only_began_to_leave_can_be_changed_again() -> None:
    """An optimizer step, which waits for what comes back, calls the leaving off."""
    mover = Mover("cpu")
    (tensor,) = tensors = [torch.zeros(3)]
    mover.leave(tensors)
    mover.await_back()
    tensor += 1
    assert mover.come_back() == 0 and tensor.tolist() == [1, 1, 1]
    assert mover.leave(tensors) == 12
    mover.finish_leaving()
    assert mover.come_back() == 12 and tensor.tolist() == [1, 1, 1]


def test_a_frozen_model_is_copied_out_once() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    frozen = FrozenModel(model, 16, "cpu")
    mark = frozen.fingerprint()
    assert frozen.offload("optimizer") == frozen.reload() == 0  # it stays
    assert [frozen.offload(), frozen.reload(), frozen.offload(), frozen.reload()] == [
        size,
        size,
        0,
        size,
    ]
    assert frozen.fingerprint() == mark
    frozen.offload()
    assert frozen.fingerprint() == mark  # also where it waits


# --- on a GPU -------------------------------------------------------------------------------------


class Stream:
    """Notes what it is asked, in one list for all."""

    def __init__(self, name: str, asked: list[str]) -> None:
        self.name = name
        self.asked = asked

    def wait_stream(self, other: Stream) -> None:
        self.asked.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.asked.append(f"wait for {self.name}")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All that is asked of streams, and what is pinned, on a CPU in place of a GPU."""
    found: list[Any] = []
    beside = Stream("the copies", found)
    computing = Stream("computing", found)

    def entered(stream: Stream) -> Any:
        found.append(f"in {stream.name}")
        return nullcontext()

    class Runtime:
        def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
            found.append((pointer % PAGE, size))
            return 0 if size < 9 * PAGE else 2

    stands: dict[str, Callable[..., Any]] = {
        "current_stream": lambda device: computing,
        "stream": entered,
        "cudart": Runtime,
    }
    for name, stand in stands.items():
        monkeypatch.setattr(torch.cuda, name, stand)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: beside)
    return found


def test_copies_wait_for_what_was_computed_and_only_what_uses_them_waits_for_copies(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mover = Mover("cuda:0")
    mover.device = torch.device("cpu")
    tensors = [torch.zeros(PAGE), torch.zeros(3)]
    mover.leave(tensors)
    pinned = (0, 5 * PAGE)  # whole pages of its own: 4 bytes x 4099
    assert asked == [pinned, "the copies waits for computing", "in the copies"]
    mover.finish_leaving()
    assert asked[3:] == ["wait for the copies"]
    mover.come_back()
    assert asked[4:] == ["the copies waits for computing", "in the copies"]
    mover.await_back()
    assert asked[6:] == ["computing waits for the copies"]
    mover.leave(tensors)
    assert [one for one in asked if isinstance(one, tuple)] == [pinned], "pinned once"
    with pytest.raises(RuntimeError, match="36864 bytes cannot be pinned: CUDA error 2"):
        mover.leave([torch.zeros(9 * PAGE // 4)])


def test_the_installed_torch_takes_these_calls() -> None:
    pinning = "".join(inspect.getsource(pin_memory).split())  # as torch pins memory itself
    assert "=int(cudart.cudaHostRegister(data_ptr,size,1,#" in pinning and "!=0" in pinning
    for function, *arguments in (
        [torch.cuda.Stream.wait_stream, None, None],
        [torch.cuda.Stream.synchronize, None],
        [torch.cuda.current_stream, torch.device("cpu")],
        [torch.cuda.stream, None],
    ):
        inspect.signature(function).bind(*arguments)
