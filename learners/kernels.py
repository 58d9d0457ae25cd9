"""Parts of the attention a model was trained with that kernels leave out without a word.

Transformers hands a kernel everything; one that knows no such thing computes other numbers. Models
of which Transformers says itself that they have no such kernel are not listed here.
"""

from __future__ import annotations

from typing import Any

from learners.positions import get_field, positions_of, text_part

CAPPED = ("gemma2", "t5gemma", "vaultgemma")  # scores are cap * tanh(score / cap)
USUAL_CAP = 50.0  # of those, where config.json does not say
WINDOW_IN_MASK = ("phimoe", "qwen2_moe")  # their window is in the mask, which flash attention lacks


def dropped_by(attention: str, config: Any) -> str:
    """Return what the kernel would leave out of the attention that a config asks for, and what
    would be right; nothing where it leaves nothing out.

    `config` is what a config.json holds (a mapping), or a config of Transformers.
    """
    config = text_part(config)
    kind = str(get_field(config, "model_type"))
    if attention == "sdpa" and kind in CAPPED and (cap := _cap(config)):
        return (
            f"sdpa drops the cap on {kind}'s attention scores (attn_logit_softcapping {cap:g}): "
            "its numbers would be others; use eager, or flash_attention_2 on cuda in bfloat16"
        )
    if attention == "flash_attention_2" and kind in WINDOW_IN_MASK and (window := _window(config)):
        return (
            f"flash_attention_2 drops {kind}'s sliding window of {window} tokens: its numbers "
            "would be others; use sdpa or eager"
        )
    return ""


def _cap(config: Any) -> float | None:
    """Return the cap on attention scores; None where the config turns it off with null."""
    name = "attn_logit_softcapping"
    written = name in config if isinstance(config, dict) else hasattr(config, name)
    cap = get_field(config, name) if written else USUAL_CAP
    return cap if isinstance(cap, (int, float)) else None


def _window(config: Any) -> int | None:
    """Return the sliding window; None where there is none, or no sequence is longer than it."""
    window = get_field(config, "sliding_window")
    layers = get_field(config, "layer_types")
    off = (
        get_field(config, "model_type") == "qwen2_moe"
        and get_field(config, "use_sliding_window") is not True
    )
    everywhere_full = isinstance(layers, list) and "sliding_attention" not in layers
    if off or everywhere_full or not isinstance(window, int) or window < 1:
        return None
    positions = positions_of(config)
    return window if positions is None or window < positions else None
