"""Seeds: every random draw of a run is a function of the recipe's seed and of its own position in
the run.
"""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Return a 31-bit seed that depends on all parts and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()) >> 1


def rows_of_step(step: int, count: int, size: int, *seed: int | str) -> list[int]:
    """Return the `count` of `size` rows that belong to a step (from 1).

    The steps pass over the data again and again, each time in an order of its own.
    """
    import torch

    rows: list[int] = []
    order: list[int] = []
    for index in range((step - 1) * count, step * count):
        epoch, position = divmod(index, size)
        if not order or position == 0:
            shuffle = torch.Generator().manual_seed(derive_seed(*seed, "order", epoch))
            order = torch.randperm(size, generator=shuffle).tolist()
        rows.append(order[position])
    return rows
