"""The smallest sound recipes, and models that are nothing but their JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DECODER = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "max_position_embeddings": 64,
}
REWARD_MODEL = {
    **DECODER,
    "architectures": ["Qwen3ForSequenceClassification"],
    "id2label": {"0": "LABEL_0"},
}
ENCODER = {"architectures": ["BertForMaskedLM"], "model_type": "bert", "pad_token_id": 0}
TOKENS = {"pad_token": "<pad>", "eos_token": {"content": "<eos>"}}


def make_model(path: Path, config: dict[str, Any], tokens: dict[str, Any] | None = None) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text(json.dumps(TOKENS if tokens is None else tokens))


def recipes() -> dict[str, dict[str, Any]]:
    """The smallest sound recipe of each kind."""
    prompts = {"path": "prompts.jsonl", "answer_columns": ["answer"]}
    rl = {
        "run": {"folder": "runs/new"},
        "step": {"prompts_per_step": 8, "group_size": 4, "mini_batch_size": 16},
        "actor": {"model": {"path": "./decoder"}},
        "prompts": prompts,
        "generation": {"max_new_tokens": 16},
    }
    function = {"name": "exact", "kind": "function", "function": "rewards_of_test:exact"}
    model = {"name": "rm", "kind": "model", "model": {"path": "./reward_model"}}
    supervised = {"run": {"folder": "runs/new"}, "learner": {"model": {"path": "./decoder"}}}
    pairs = {"path": "pairs.jsonl"}
    return {
        "sft": {
            "kind": "sft",
            **supervised,
            "data": {"path": "pairs.jsonl", "response_column": "chosen"},
        },
        "rm": {"kind": "rm", **supervised, "data": pairs, "held_out": pairs},
        "ppo": {
            "kind": "ppo",
            **rl,
            "critic": {"model": {"path": "./reward_model"}},
            "rewards": [model],
        },
        "grpo": {"kind": "grpo", **rl, "rewards": [function]},
        "rl": {
            "kind": "rl",
            **rl,
            "rewards": [function],
            "algorithm": {"kind": "reinforce_plus_plus"},
        },
    }
