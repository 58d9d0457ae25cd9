"""Models of random weights in the shapes that benchmarks use: Qwen3's, and smaller ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def shape(vocabulary: int, hidden: int, middle: int, layers: int, heads: int) -> dict[str, Any]:
    """Return the fields of a Qwen3 config.json that differ: two heads of a query share a key."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": middle,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 64 if hidden <= 512 else 128,
    }


SHAPES = {
    "tiny": shape(512, 128, 256, 2, 2),
    "27m": shape(8192, 512, 1536, 7, 8),
    "0.6b": shape(151936, 1024, 3072, 28, 16),
    "1.7b": shape(151936, 2048, 6144, 28, 16),
}


def save_model(folder: Path, name: str, device: str) -> int:
    """Write a model of this shape (float32 for a CPU, else bfloat16); return its bytes. No token
    ends its responses.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(**SHAPES[name], tie_word_embeddings=True, eos_token_id=None)
    model = Qwen3ForCausalLM(config).to(torch.float32 if device == "cpu" else torch.bfloat16)
    model.save_pretrained(folder)
    return sum(p.numel() * p.element_size() for p in model.parameters())
