"""Weights that an engine's process hands on to its workers by the name of shared memory."""

from __future__ import annotations

from contextlib import closing
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import pytest
import torch

from actors.weights.packing import Shared, fetch_group, pack_group, unpack_group
from actors.weights.proof import SyncError


def test_shared_memory_is_read_in_place_and_outlives_its_name() -> None:
    """A layer may wait for its other weights when the update that brought these has ended."""
    weight = torch.arange(6.0).view(2, 3)
    meta, data = pack_group("layer 0", [("w", weight)])
    with closing(SharedMemory(create=True, size=len(data) + 9)) as block:
        np.frombuffer(block.buf, np.uint8, len(data))[:] = data
        group = {**meta, "ref": Shared(block.name, len(data))}
        array = fetch_group(group, 1.0)
        assert not array.flags.writeable
        block.buf[0] ^= 1
        assert array[0] == data[0] ^ 1, "a copy was made"
        with pytest.raises(SyncError, match="layer 0 arrived with digest"):
            fetch_group(group, 1.0)
        block.buf[0] ^= 1
        block.unlink()
    ((name, tensor),) = unpack_group(meta, torch.from_numpy(array.copy()))
    assert name == "w" and torch.equal(tensor, weight)
