"""Every family of docs/models.md in the plan: parameters against Transformers', experts, and what
an engine keeps of a sequence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from launch.plan.shapes import Shape, find_shape

SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = {**SMALL, "head_dim": 16}
OLD = {k: v for k, v in SMALL.items() if k not in ("intermediate_size", "num_key_value_heads")}
GPT = {"vocab_size": 96, "n_embd": 48, "n_layer": 4, "n_head": 6, "n_positions": 40}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = {"shared_expert_intermediate_size": 32}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 6,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
CONVS = {
    "layer_types": ["conv", "full_attention", "conv", "conv"],
    "block_auto_adjust_ff_dim": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "opt": {**OLD, "ffn_dim": 80, "word_embed_proj_dim": 24},
    "gpt_neox": {**OLD, "intermediate_size": 80},
    "llama": SMALL,
    "mistral": SMALL,
    "gemma": WIDE,
    "gemma2": WIDE,
    "gemma3_text": WIDE,
    "phi": SMALL,
    "phi3": SMALL,
    "qwen2": SMALL,
    "qwen3": WIDE,
    "qwen2_moe": {**SMALL, **MOE, **SHARED, "mlp_only_layers": [0]},
    "qwen3_moe": {**WIDE, **MOE, "decoder_sparse_step": 2},
    "mixtral": {**SMALL, "num_local_experts": 8, "num_experts_per_tok": 2},
    "olmo2": SMALL,
    "granite": SMALL,
    "cohere": SMALL,
    "stablelm": SMALL,
    "falcon": {**OLD, "ffn_hidden_size": 80},
    "gpt_bigcode": GPT,
    "smollm3": SMALL,
    "glm4": WIDE,
    "deepseek_v3": {**SMALL, **MLA},
    "lfm2": {**SMALL, **CONVS},
    "qwen3_next": {**WIDE, **MOE, **SHARED, **DELTA},
    "gpt_oss": {**WIDE, "num_local_experts": 8, "num_experts_per_tok": 2},
    "bloom": {"vocab_size": 96, "hidden_size": 48, "n_layer": 4, "n_head": 6},
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt_neo": {
        **OLD,
        "num_layers": 4,
        "num_heads": 6,
        "attention_types": [[["global", "local"], 2]],
    },
    "mamba": {**OLD, "state_size": 4},
}
FAMILIES["gpt_neo"] = {k: v for k, v in FAMILIES["gpt_neo"].items() if "num_att" not in k}


def shape_of(config: Any, folder: Path) -> Shape:
    config.save_pretrained(folder)
    return find_shape(str(folder))


def meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_family_is_counted(family: str, tmp_path: Path) -> None:
    """Tensor by tensor, with the language model's head and with ours: a score, or a value."""
    config = CONFIG_MAPPING[family](**FAMILIES[family])
    shape = shape_of(config, tmp_path)
    model = meta(config)
    whole = [p.numel() for p in model.parameters()]
    assert sorted(shape.tensors("lm").elements()) == sorted(whole)
    assert shape.parameters("lm") == sum(whole)
    backbone = sum(p.numel() for p in model.base_model.parameters())
    width = model.get_output_embeddings().weight.shape[1]
    assert shape.parameters("score") == backbone + width
    assert shape.parameters("value") == backbone + width + 1
    assert shape.layers == 4 and not shape.encoder


@pytest.mark.engines  # these take longer to build
@pytest.mark.parametrize("family", FAMILIES)
def test_models_as_large_as_published_ones_are_counted(family: str, tmp_path: Path) -> None:
    """With the sizes that Transformers gives a family, most of them a published model's."""
    config = CONFIG_MAPPING[family]()
    counted = shape_of(config, tmp_path).tensors("lm")
    assert sorted(counted.elements()) == sorted(p.numel() for p in meta(config).parameters())
