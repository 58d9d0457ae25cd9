"""Proof of a weight sync: digests of the bytes, names of the parameters, log-probs of a probe.

A *receipt* lists, per group of tensors, what was sent or received: (group name, digest of its
bytes, parameter names). On GPUs every tensor is a group of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from learners.spans import Span

Receipt = list[tuple[str, str, list[str]]]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Sent(NamedTuple):
    """Account for one sync: what was sent, what each engine received, the names of all that is
    to arrive, and how long the parts took on this rank.
    """

    sent: Receipt
    received: list[Receipt]
    names: list[str]
    spans: list[Span]


class SyncError(RuntimeError):
    """Weights did not arrive, or not those that were sent; the message names engine and phase."""


def digest(data: np.ndarray) -> str:
    """Return the XXH3-64 digest of an array of bytes."""
    return xxhash.xxh3_64_hexdigest(data.data)


def bit_sums(tensor: Tensor) -> Tensor:
    """Return two sums over a tensor's bits as int64 [2], on its own device and without waiting for
    it: of all elements, and of the rows weighted by their position.
    """
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    rows = bits.reshape(*bits.shape[:1] or (1,), math.prod(bits.shape[1:])).sum(
        1, dtype=torch.int64
    )
    positions = torch.arange(1, len(rows) + 1, device=rows.device)
    return torch.stack([rows.sum(), (rows * positions).sum()])


def checksums(sums: Sequence[Tensor]) -> list[str]:
    """Return the checksums that many `bit_sums` make. Waits for their device once."""
    if not sums:
        return []
    pairs = torch.stack(list(sums)).tolist()
    return [f"{total & 2**64 - 1:016x}{weighted & 2**64 - 1:016x}" for total, weighted in pairs]


def verify(sent: Receipt, received: Receipt, names: Sequence[str], engine: str = "engine") -> None:
    """Raise SyncError unless `engine` received the very bytes that were sent, and exactly the
    parameters `names`.
    """
    digests = {group: value for group, value, _ in sent}
    for group, value, _ in received:
        if digests.get(group) != value:
            raise SyncError(
                f"sync: {engine}: {group} arrived with digest {value}, "
                f"sent was {digests.get(group)}"
            )
    arrived = [name for _, _, group_names in received for name in group_names]
    missing = sorted(set(names) - set(arrived))
    extra = sorted(set(arrived) - set(names))
    if missing or extra or len(arrived) != len(names):
        raise SyncError(
            f"sync: {engine}: {len(arrived)} parameters arrived, {len(names)} expected; "
            f"missing {missing[:3]} ({len(missing)}), unexpected {extra[:3]} ({len(extra)})"
        )


def probe_decides(
    actor: Sequence[float], base: Sequence[float], max_logprob_diff: float, mean_logprob_diff: float
) -> bool:
    """Tell whether the probe's log-probs with the adapter and without it (`base`) lie further apart
    than engine and Actor may: then an engine without the adapter cannot pass for one with it.
    """
    gaps = [abs(a - b) for a, b in zip(actor, base, strict=True)]
    return max(gaps) > max_logprob_diff or sum(gaps) / len(gaps) > mean_logprob_diff


def check_adapter(
    actor: Sequence[float],
    base: Sequence[float],
    engine_logprobs: Sequence[float],
    engine: str = "engine",
) -> None:
    """Raise SyncError where the engine's log-probs of the probe are closer to those without the
    adapter (`base`) than to those with it, on average.
    """
    given = zip(actor, base, engine_logprobs, strict=True)
    nearer = sum(abs(without - e) - abs(with_it - e) for with_it, without, e in given)
    if nearer < 0:
        raise SyncError(
            f"sync: {engine} serves the base model without the adapter: its log-probs of the probe "
            f"are {-nearer / len(actor):.2e} nats nearer to those, on average"
        )


def check_probe(
    actor_logprobs: Sequence[float],
    engine_logprobs: Sequence[float],
    max_logprob_diff: float,
    mean_logprob_diff: float,
    engine: str = "engine",
) -> float:
    """Return the largest difference of the probe's log-probs in nats.

    Raises SyncError when it is above `max_logprob_diff`, when the mean of all differences is above
    `mean_logprob_diff`, and when one of them is not a number.
    """
    gaps = [abs(a - b) for a, b in zip(actor_logprobs, engine_logprobs, strict=True)]
    worst = math.nan if any(map(math.isnan, gaps)) else max(gaps, default=math.nan)
    mean = sum(gaps) / max(1, len(gaps))
    if not (worst <= max_logprob_diff and mean <= mean_logprob_diff):
        raise SyncError(
            f"sync: {engine} and Actor differ by {worst:.2e} nats on the probe, {mean:.2e} on "
            f"average; allowed are {max_logprob_diff:.0e}, {mean_logprob_diff:.0e} on average "
            "(sync.max_logprob_diff, sync.mean_logprob_diff)"
        )
    return worst
