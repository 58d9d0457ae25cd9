"""Seeds: every random draw of a run is a function of the recipe's seed and of its own position in
the run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from math import floor

from learners.data.store import Part


def derive_seed(*parts: int | str) -> int:
    """Return a 31-bit seed that depends on all parts and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()) >> 1


def rows_of_step(step: int, count: int, size: int, *seed: int | str) -> list[int]:
    """Return the `count` of `size` rows that belong to a step (from 1).

    The steps pass over the data again and again, each time in an order of its own.
    """
    return _in_passes(range((step - 1) * count, step * count), size, seed)


def rows_of_mixture(
    step: int, count: int, parts: Sequence[Part], *seed: int | str
) -> list[list[int]]:
    """Return the `count` rows that belong to a step (from 1), by part: positions among the rows of
    all parts together.

    Each part has its share, and the steps pass over its own rows again and again, each time in an
    order of its own. A single part gives the rows of `rows_of_step`.
    """
    rows: list[list[int]] = []
    first = 0
    for i, (part, places) in enumerate(zip(parts, places_of_step(step, count, parts), strict=True)):
        own = (*seed, "source", i) if len(parts) > 1 else seed
        rows.append([first + row for row in _in_passes(places, part.size, own)])
        first += part.size
    return rows


def places_of_step(step: int, count: int, parts: Sequence[Part]) -> list[range]:
    """Return, for each part, which rows of its endless passes belong to a step (from 1)."""
    before = shares((step - 1) * count, parts)
    return [range(*ends) for ends in zip(before, shares(step * count, parts), strict=True)]


def shares(total: int, parts: Sequence[Part]) -> list[int]:
    """Return how many of the first `total` rows come from each part: by weight or, where none is
    given, by size.

    The first part has its share, rounded, and the others divide the rest among them in the same
    way: so the counts add up to `total`, and none falls when it rises.
    """
    weights = [Fraction(part.size if part.weight is None else part.weight) for part in parts]
    counts: list[int] = []
    for i, weight in enumerate(weights):
        share = floor((total - sum(counts)) * weight / sum(weights[i:]) + Fraction(1, 2))
        counts.append(share)
    return counts


def _in_passes(places: range, size: int, seed: tuple[int | str, ...]) -> list[int]:
    """Return the rows at these places of an endless series of passes over `size` rows."""
    import torch

    rows: list[int] = []
    order: list[int] = []
    for index in places:
        epoch, position = divmod(index, size)
        if not order or position == 0:
            shuffle = torch.Generator().manual_seed(derive_seed(*seed, "order", epoch))
            order = torch.randperm(size, generator=shuffle).tolist()
        rows.append(order[position])
    return rows
