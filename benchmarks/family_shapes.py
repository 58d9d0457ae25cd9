"""Tiny random shapes of model families: the fields of a config.json, by the name under which the
matrix of families shows them.

What differs in kind is there (attention, positions, experts, heads), and nothing is larger than it
must be: heads of 32 and sizes divisible by 32 are what engines on CPUs accept.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 128
POSITIONS = 256
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# large enough that every part moves the outputs
SPREAD = {"initializer_range": 0.1}

LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
    **ENDS,
    **SPREAD,
}
TIED = LLAMA | {"tie_word_embeddings": True}
WITHOUT_GQA = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "head_dim")}
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {  # DeepSeek's attention; engines on CPUs have it in this size alone: 512 + 64
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


SHORT = {"original_max_position_embeddings": POSITIONS // 4}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": POSITIONS,
    **ENDS,
    **SPREAD,
}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS,
    "word_embed_proj_dim": 64,
    "init_std": 0.1,
    **ENDS,
}
FALCON = {k: v for k, v in WITHOUT_GQA.items() if k != "intermediate_size"} | {
    "new_decoder_architecture": False,
    "multi_query": True,
    "parallel_attn": True,
    "bias": False,
}

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", **GPT2},
    "opt": {"model_type": "opt", **OPT},
    "opt (word_embed_proj)": {"model_type": "opt", **OPT, "word_embed_proj_dim": 32},
    "gpt_neox": {"model_type": "gpt_neox", **WITHOUT_GQA},
    "gpt_neox (padded vocabulary)": {"model_type": "gpt_neox", **WITHOUT_GQA, "vocab_size": 100},
    "llama": {"model_type": "llama", **LLAMA},
    "llama (tied)": {"model_type": "llama", **TIED},
    "llama (llama3 rope)": {
        "model_type": "llama",
        **LLAMA,
        **_rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, **SHORT),
    },
    "llama (linear rope)": {"model_type": "llama", **LLAMA, **_rope("linear", factor=2.0)},
    "llama (dynamic rope)": {"model_type": "llama", **LLAMA, **_rope("dynamic", factor=2.0)},
    "llama (yarn rope)": {"model_type": "llama", **LLAMA, **_rope("yarn", factor=4.0, **SHORT)},
    "mistral (sliding window)": {"model_type": "mistral", **LLAMA, "sliding_window": 8},
    "gemma": {"model_type": "gemma", **TIED},
    "gemma2": {"model_type": "gemma2", **TIED, "sliding_window": 8, "query_pre_attn_scalar": 32},
    "gemma3_text": {
        "model_type": "gemma3_text",
        **TIED,
        "sliding_window": 8,
        "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi": {"model_type": "phi", **WITHOUT_GQA},
    "phi3": {"model_type": "phi3", **WITHOUT_GQA, "num_key_value_heads": 1},
    "qwen2": {"model_type": "qwen2", **LLAMA},
    "qwen3": {"model_type": "qwen3", **LLAMA},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **LLAMA,
        **EXPERTS,
        "shared_expert_intermediate_size": 64,
    },
    "qwen3_moe": {"model_type": "qwen3_moe", **LLAMA, **EXPERTS},
    "mixtral": {
        "model_type": "mixtral",
        **LLAMA,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "olmo2": {"model_type": "olmo2", **LLAMA},
    "granite": {"model_type": "granite", **LLAMA, "residual_multiplier": 0.5},
    "cohere": {  # whose head is always its embedding
        "model_type": "cohere",
        **WITHOUT_GQA,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "logit_scale": 0.5,
    },
    "stablelm": {"model_type": "stablelm", **WITHOUT_GQA, "num_key_value_heads": 1},
    "falcon": {"model_type": "falcon", **FALCON},
    "gpt_bigcode": {"model_type": "gpt_bigcode", **GPT2},
    "smollm3": {"model_type": "smollm3", **LLAMA, "no_rope_layer_interval": 2},
    "glm4": {"model_type": "glm4", **LLAMA},
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        **LLAMA,
        **LATENT,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
    "lfm2": {
        "model_type": "lfm2",
        **WITHOUT_GQA,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
        # which Transformers does not read, and engines do
        "conv_dim": 64,
        "block_dim": 64,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
    },
    "qwen3_next": {
        "model_type": "qwen3_next",
        **LLAMA,
        **EXPERTS,
        "shared_expert_intermediate_size": 64,
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 64,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        **LLAMA,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "bloom": {
        "model_type": "bloom",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 2,
        **ENDS,
        **SPREAD,
    },
    "gptj": {"model_type": "gptj", **GPT2, "rotary_dim": 16, "tie_word_embeddings": False},
    "gpt_neo": {
        "model_type": "gpt_neo",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "num_heads": 2,
        "max_position_embeddings": POSITIONS,
        **ENDS,
        **SPREAD,
    },
    "mamba": {
        "model_type": "mamba",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "state_size": 16,
        **ENDS,
        **SPREAD,
    },
}

# Engines on CPUs compute these in bfloat16 alone: compared are means, within its rounding.
ENGINE_IN_BFLOAT16 = ("qwen3_next",)
