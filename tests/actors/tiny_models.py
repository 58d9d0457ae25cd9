"""Tiny random Qwen3 models, and what Transformers says about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.engine.engine import GenerationEngine
from actors.settings import GenerationSettings
from actors.weights.packing import pack_group
from actors.weights.proof import Receipt
from learners.settings import ModelSettings

VOCAB = 64
EOS = 2
MAX_TOKENS = 192
THREADS = 1  # not what torch would take by itself


@dataclass
class Served:
    """An engine, and the Transformers model whose weights it serves as version 0."""

    engine: GenerationEngine
    model: Any
    folder: Path


def make_model(seed: int, tied: bool, heads: int = 2) -> Any:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


def save_model(folder: Path, seed: int, tied: bool, heads: int = 2) -> Any:
    model = make_model(seed, tied, heads)
    model.save_pretrained(folder)
    return model


def start_engine(folder: Path) -> GenerationEngine:
    generation = GenerationSettings(threads=THREADS, kv_cache_gib=0.125, max_concurrent=64)
    return GenerationEngine(ModelSettings(path=str(folder)), generation, "cpu", MAX_TOKENS, [EOS])


def logprobs(model: Any, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Transformers' log-probs of ids[1:]."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def packed_groups(model: Any) -> list[dict[str, Any]]:
    """The model's weights as our backend sends them, three tensors to a group; arrays instead of
    Ray references.
    """
    named = [(name, p.detach()) for name, p in model.named_parameters()]
    groups = []
    for start in range(0, len(named), 3):
        meta, data = pack_group(f"group {start // 3}", named[start : start + 3])
        groups.append({**meta, "ref": data.copy()})
    return groups


def transfer(engine: GenerationEngine, model: Any, version: int = 0) -> Receipt:
    """A full weight update, up to but without `accept`."""
    engine.start_weight_update()
    engine.update_weights({"groups": packed_groups(model)})
    return engine.finish_weight_update(str(version))
