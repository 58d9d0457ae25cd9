"""The output layer of a language model, computed in float32 while its weights stay 16 bit.

Rounding logits to bfloat16 is much of what engine and Actor differ by. vLLM has the same for its
engines (`head_dtype`); nothing of the model's files, names or weights changes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learners.errors import UserError


class _Float32Logits(torch.autograd.Function):
    """Logits in float32 of inputs and weights in 16 bit; gradients in 16 bit, as without it. No
    float32 copy of the weights is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        if hidden.is_cuda:  # products summed in float32, by the very call that vLLM makes
            flat = hidden.reshape(-1, hidden.shape[-1])
            logits = torch.mm(flat, weight.t(), out_dtype=torch.float32)
            return logits.reshape(*hidden.shape[:-1], -1)
        return F.linear(hidden.float(), weight.float())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        (gradient,) = gradients
        gradient = gradient.to(weight.dtype)
        of_hidden = of_weight = None
        if ctx.needs_input_grad[0]:
            of_hidden = gradient @ weight
        if ctx.needs_input_grad[1]:
            of_weight = gradient.flatten(0, -2).t() @ hidden.flatten(0, -2)
        return of_hidden, of_weight


def compute_in_float32(model: Any, path: str) -> None:
    """Have the output layer of a causal language model return float32 logits. Raises UserError
    where the model at `path` has no linear output layer.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"{path}: {type(model).__name__} has no linear output layer, which head_dtype: float32 "
            "needs; leave head_dtype out"
        )
    layer.forward = partial(_forward, layer)


def _forward(layer: nn.Linear, hidden: Tensor) -> Tensor:
    logits: Tensor = _Float32Logits.apply(hidden, layer.weight)
    return logits if layer.bias is None else logits + layer.bias.float()
