"""Log-probabilities of given tokens, and the two safety rules shared by all of the mathematics.

What lies behind a mask is removed before the arithmetic, and a log-ratio is bounded before `exp`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # exp(±20) still leaves float32 room for products and sums over a batch


def token_logprobs(logits: Tensor, input_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probability of every next token under softmax(logits / temperature), in nats.

    logits [B, L, V] of any float dtype, input_ids [B, L] -> [B, L-1] in float32. Column t is the
    log-probability of `input_ids[:, t + 1]`, read from `logits[:, t]`. Raises ValueError for a
    temperature that is not positive and finite, and for shapes that do not match.
    """
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, not {temperature}")
    if logits.dim() != 3 or input_ids.shape != logits.shape[:2]:
        raise ValueError(
            f"logits [B, L, V] and input_ids [B, L] expected, "
            f"not {list(logits.shape)} and {list(input_ids.shape)}"
        )
    rows = zip(logits[:, :-1].split(1), input_ids[:, 1:].long().split(1), strict=True)
    return torch.cat([_row_logprobs(row, ids, temperature) for row, ids in rows])


def _row_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    # One sequence at a time, gather minus logsumexp: without gradient the float32 copy of the
    # logits is [L, V] instead of [B, L, V]; with gradient it is kept once, where a log-softmax
    # would keep a second one.
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def clean(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Return the mask as bool, then every tensor in float32 with 0 wherever the mask is not set.

    Filling *before* the arithmetic is what keeps NaN out of gradients: masking a result afterwards
    multiplies the infinite or NaN local derivative of a masked input by 0, which is NaN. Raises
    ValueError when a tensor does not have the shape of the mask, because broadcasting would
    silently mix up sequences and tokens.
    """
    mask = mask.bool()
    for tensor in tensors:
        if tensor.shape != mask.shape:
            raise ValueError(
                f"a tensor of shape {list(tensor.shape)} has a mask of shape {list(mask.shape)}"
            )
    return [mask, *(tensor.float().masked_fill(~mask, 0.0) for tensor in tensors)]
