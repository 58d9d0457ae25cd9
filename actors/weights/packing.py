"""A group of tensors as one array of bytes, the form in which Ray's object store carries it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from actors.weights.proof import SyncError, digest

# bytes; every tensor of a packed group starts at a multiple, so that it can be read in place
ALIGNMENT = 16

SHARED = Path("/dev/shm")  # where Linux has shared memory that processes know by name


class Shared(NamedTuple):
    """Shared memory of one group, by name and bytes."""

    name: str
    size: int

    def read(self) -> np.ndarray:
        """Return the bytes in place. Mapped for as long as somebody looks at them, even when
        their name has gone: a layer that waits for its other weights may do so.
        """
        return np.memmap(SHARED / self.name, np.uint8, "r")[: self.size]


def pack_group(
    name: str, tensors: Sequence[tuple[str, Tensor]], buffer: Tensor | None = None
) -> tuple[dict[str, Any], np.ndarray]:
    """Put tensors one after the other into one array of bytes: into `buffer` if they fit. A tensor
    alone is not copied where it lies in one piece.

    Returns what `unpack_group` needs, as plain data with the array's digest, and the array.
    """
    meta = {
        "name": name,
        "names": [n for n, _ in tensors],
        "dtypes": [str(t.dtype).removeprefix("torch.") for _, t in tensors],
        "shapes": [list(t.shape) for _, t in tensors],
    }
    data = _in_one_piece([tensor.detach() for _, tensor in tensors], _spans(meta), buffer).numpy()
    return {**meta, "digest": digest(data)}, data


def _in_one_piece(
    tensors: Sequence[Tensor], spans: Sequence[tuple[int, int]], buffer: Tensor | None
) -> Tensor:
    size = spans[-1][1] if spans else 0
    if len(tensors) == 1 and tensors[0].is_contiguous() and tensors[0].device.type == "cpu":
        return tensors[0].reshape(-1).view(torch.uint8)
    fits = buffer is not None and len(buffer) >= size
    packed = buffer[:size] if fits else torch.empty(size, dtype=torch.uint8)  # type: ignore[index]
    end = 0
    for tensor, (start, stop) in zip(tensors, spans, strict=True):
        packed[end:start] = 0
        packed[start:stop].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        end = stop
    return packed


def fetch_group(group: dict[str, Any], timeout_s: float) -> np.ndarray:
    """Return the bytes of a group, whose `ref` is a Ray reference (shared memory if they lie on
    this node), `Shared` or the array itself. Raises SyncError if they are not those sent.
    """
    array = group["ref"]
    if isinstance(array, Shared):
        array = array.read()
    elif not isinstance(array, np.ndarray):
        import ray

        array = ray.get(array, timeout=timeout_s)
    if (found := digest(array)) != group["digest"]:
        raise SyncError(f"{group['name']} arrived with digest {found}, sent was {group['digest']}")
    return array


def unpack_group(meta: dict[str, Any], packed: Tensor) -> list[tuple[str, Tensor]]:
    """Return (name, tensor) pairs that look into `packed`, the uint8 tensor of a packed group."""
    return [
        (name, packed[start:stop].view(getattr(torch, dtype)).view(shape))
        for name, dtype, shape, (start, stop) in zip(
            meta["names"], meta["dtypes"], meta["shapes"], _spans(meta), strict=True
        )
    ]


def _spans(meta: dict[str, Any]) -> list[tuple[int, int]]:
    """Return where every tensor of a packed group begins and ends, in bytes."""
    spans = []
    end = 0
    for dtype, shape in zip(meta["dtypes"], meta["shapes"], strict=True):
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + int(np.prod(shape, dtype=np.int64)) * getattr(torch, dtype).itemsize
        spans.append((start, end))
    return spans
