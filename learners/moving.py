"""Tensors that leave a GPU and come back, while it computes on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

PAGE = 4096  # bytes of memory that are pinned together


class Mover:
    """Moves tensors between one device and CPU memory, on a stream beside the one that computes.

    Each has one place in CPU memory for the whole run: pinned beside a GPU, and no larger than it
    is (torch's own pinned memory grows to powers of two). On a CPU the same copies are made, at
    once.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._places: dict[Tensor, Tensor] = {}
        self._leaving: list[Tensor] = []
        self._away: list[Tensor] = []

    def leave(self, tensors: Iterable[Tensor], changed: bool = True) -> int:
        """Begin to copy tensors out, those that are not yet on their way; return the bytes.

        Until `finish_leaving` they can be read where they are, and must not be written. Those that
        have not `changed` since they left before are not copied again.
        """
        under_way = {id(tensor) for tensor in (*self._leaving, *self._away)}
        here = [tensor for tensor in tensors if id(tensor) not in under_way]
        new = [tensor for tensor in here if tensor not in self._places]
        self._make_places(new)
        copied = here if changed else new
        with self._beside():
            for tensor in copied:
                self._places[tensor].copy_(tensor.data, non_blocking=True)
        self._leaving += here
        return sum(tensor.nbytes for tensor in copied)

    def finish_leaving(self) -> None:
        """Wait for the copies, and give the device's memory back: from here on the tensors lie in
        CPU memory, where they can be saved.
        """
        if self._leaving and self.stream is not None:
            self.stream.synchronize()
        for tensor in self._leaving:
            tensor.data = self._places[tensor]
        self._away += self._leaving
        self._leaving = []

    def come_back(self) -> int:
        """Begin to copy back all that is away; return the bytes. Nothing may use it before
        `await_back`.
        """
        self._leaving = []  # what had only begun to leave is still here
        for tensor in self._away:
            tensor.data = torch.empty_like(self._places[tensor], device=self.device)
        with self._beside():
            for tensor in self._away:
                tensor.data.copy_(self._places[tensor], non_blocking=True)
        moved = sum(tensor.nbytes for tensor in self._away)
        self._away = []
        return moved

    def await_back(self) -> None:
        """Let what is computed from here on wait for all copies; this call does not. What had only
        begun to leave stays: it may be changed.
        """
        self._leaving = []
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _beside(self) -> AbstractContextManager[object]:
        """Return the context in which copies are made, after what has been computed so far."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)

    def _make_places(self, tensors: list[Tensor]) -> None:
        """Give tensors their places in CPU memory: all of a type beside each other, since small
        ones by themselves would share pages, which are pinned once.
        """
        for dtype in {tensor.dtype for tensor in tensors}:
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            sizes = [tensor.numel() for tensor in alike]
            parts = self._memory(sum(sizes), dtype).split([*sizes])
            for tensor, part in zip(alike, parts, strict=True):
                self._places[tensor] = part.as_strided(
                    tensor.shape, tensor.stride(), part.storage_offset()
                )

    def _memory(self, elements: int, dtype: torch.dtype) -> Tensor:
        if self.stream is None or not elements:
            return torch.empty(elements, dtype=dtype)
        page = PAGE // dtype.itemsize
        whole = math.ceil(elements / page) * page
        memory = torch.empty(whole + page, dtype=dtype)
        first = -memory.data_ptr() % PAGE // dtype.itemsize
        memory = memory[first : first + whole]
        failed = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if failed:
            raise RuntimeError(f"{memory.nbytes} bytes cannot be pinned: CUDA error {failed}")
        return memory[:elements]
