"""Rows of a batch over the workers of a group and back: balanced by tokens, in the batch's own
order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from actors.cluster.groups import WorkerGroup
from learners.experience import Experience


@dataclass(frozen=True)
class PendingRows:
    """Pending work of a group on the rows of a batch: one result per worker, for its own rows."""

    group: WorkerGroup
    rows: list[list[int]]
    refs: list[Any]


def scatter_rows(
    group: WorkerGroup, method: str, batch: Experience, rows_per_unit: int = 1
) -> PendingRows:
    """Call `method` on every worker with its share of the batch, balanced by tokens; return the
    pending results. A share may be empty.
    """
    rows = batch.shard(len(group), rows_per_unit)
    return PendingRows(group, rows, group.scatter(method, [batch.select(r) for r in rows]))


def gather_rows(
    pending: PendingRows, batch: Experience, phase: str, deadline_s: float
) -> torch.Tensor:
    """Wait for the workers' rows; return them in the batch's order: [B] or [B,T]."""
    results = pending.group.gather(pending.refs, phase, deadline_s)
    shape = (len(batch),) if results[0].ndim == 1 else batch.loss_mask.shape
    out = torch.zeros(shape)
    for rows, result in zip(pending.rows, results, strict=True):
        if rows and result.ndim == 1:
            out[rows] = result
        elif rows:
            out[rows, : result.shape[1]] = result
    return out
