"""Rotary positions on CPUs, where vLLM's kernel turns the first head alone when queries come head
by head (LFM2, DeepSeek's latent attention). Imports vLLM.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

_kernel = RotaryEmbedding.forward_cpu


def rotate_every_head(
    rotary: RotaryEmbedding,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotate queries and keys, [tokens, heads * size] by the kernel and [tokens, heads, size] by
    vLLM's own arithmetic in torch.
    """
    by_head = query.ndim > 2 or (key is not None and key.ndim > 2)
    return (rotary.forward_native if by_head else _kernel.__get__(rotary))(positions, query, key)


def correct_rotary_positions() -> None:
    """Let all engines that this process builds from now on rotate every head."""
    RotaryEmbedding.forward_cpu = rotate_every_head
