"""Attention kernels by config: the one that keeps all that a model was trained with, and what
others leave out of it without a word.

Transformers hands a kernel everything; one that knows no such thing computes other numbers. Caps on
the logits, multipliers, rope and ALiBi in the mask are outside the kernel or handed to all of them.
Which classes have which kernel is Transformers' word; it is written down here because asking takes
seconds, and a test compares.
"""

from __future__ import annotations

from typing import Any

from learners.errors import first_wrong
from learners.positions import get_field, positions_of, text_part
from learners.settings import ModelSettings

AUTO = "auto"
CAPPED = ("gemma2", "t5gemma", "vaultgemma")  # scores are cap * tanh(score / cap)
USUAL_CAP = 50.0  # of those, where config.json does not say
WINDOW_IN_MASK = ("phimoe", "qwen2_moe")  # their window is in the mask, which flash attention lacks
# every softmax has one more, learned entry, which flash_attention_2 and sdpa have no place for
SINKS = (
    "deepseek_v4",
    "gpt_oss",
    "granite_swa",
    "granitemoe_swa",
    "hy_v4",
    "mimo_v2_flash",
    "openai_privacy_filter",
)
NO_ATTENTION = frozenset(("falcon_mamba", "fnet", "mamba", "mamba2", "rwkv", "xlstm"))
# Types whose classes in Transformers compute attention in one way alone.
WITHOUT_SDPA = NO_ATTENTION.union(
    SINKS,
    (
        "big_bird",
        "bigbird_pegasus",
        "bloom",
        "canine",
        "codegen",
        "convbert",
        "cpmant",
        "deberta",
        "deberta-v2",
        "flaubert",
        "funnel",
        "git",
        "got_ocr2",
        "gpt_neo",
        "gpt_neox_japanese",
        "gptj",
        "ibert",
        "layoutlm",
        "layoutlmv2",
        "layoutlmv3",
        "lilt",
        "longformer",
        "luke",
        "markuplm",
        "megatron-bert",
        "mpnet",
        "mpt",
        "mra",
        "mvp",
        "nystromformer",
        "openai-gpt",
        "perceiver",
        "prophetnet",
        "reformer",
        "rembert",
        "roformer",
        "squeezebert",
        "tapas",
        "trocr",
        "xglm",
        "xlm",
        "xlnet",
        "yoso",
    ),
)
OWN_CODE = "its own code is known to be right with eager alone; name sdpa where it has that too"


def resolve_attention(model: ModelSettings, config: Any) -> str:
    """Return the kernel, by Transformers' name, that a model of this config is loaded with: the one
    that the settings name or, of `auto`, sdpa where it keeps everything and eager elsewhere.

    `config` is what a config.json holds (a mapping), or a config of Transformers.
    """
    if model.attention != AUTO:
        return model.attention
    return "eager" if _against_sdpa(model, config) else "sdpa"


def attention_notice(key: str, model: ModelSettings, config: Any) -> str:
    """Return what `auto` chose and why, where that is not the usual sdpa; else nothing. `key` is
    the model's in the recipe.
    """
    why = _against_sdpa(model, config) if model.attention == AUTO else ""
    if not why or _type(config) in NO_ATTENTION:
        return ""
    return f"{key}.attention: auto is eager for {model.path}: {why}"


def _against_sdpa(model: ModelSettings, config: Any) -> str:
    """Return why a model cannot have sdpa, nothing where it can."""
    return first_wrong(
        (model.trust_remote_code and get_field(config, "auto_map"), OWN_CODE),
        (_type(config) in WITHOUT_SDPA, f"{_type(config)} has no sdpa in Transformers"),
        (True, _dropped_by_sdpa(config)),
    )


def refused_attention(model: ModelSettings, config: Any) -> str:
    """Return what is wrong with the kernel that the settings name for a model of this config, and
    the one that would be right; nothing where none is known to be wrong.
    """
    missing = (
        model.attention == "sdpa" and not model.trust_remote_code and _type(config) in WITHOUT_SDPA
    )
    return first_wrong(
        (missing, f"{_type(config)} has no sdpa in Transformers; use eager, or auto"),
        (True, dropped_by(model.attention, config)),
    )


def dropped_by(attention: str, config: Any) -> str:
    """Return what the kernel would leave out of the attention that a config asks for, and what
    would be right; nothing where it leaves nothing out.

    `config` is what a config.json holds (a mapping), or a config of Transformers.
    """
    if attention == "sdpa" and (dropped := _dropped_by_sdpa(config)):
        return f"{dropped}: its numbers would be others; use eager, which is what auto chooses"
    if attention == "flash_attention_2" and (dropped := _dropped_by_flash(text_part(config))):
        return dropped
    return ""


def _dropped_by_sdpa(config: Any) -> str:
    config = text_part(config)
    kind = _type(config)
    if kind in CAPPED and (cap := _cap(config)):
        return f"sdpa drops the cap on {kind}'s attention scores (attn_logit_softcapping {cap:g})"
    return ""


def _dropped_by_flash(config: Any) -> str:
    kind = _type(config)
    window = _window(config) if kind in WINDOW_IN_MASK else None
    return first_wrong(
        (
            window,
            f"flash_attention_2 drops {kind}'s sliding window of {window} tokens: its numbers "
            "would be others; use sdpa or eager",
        ),
        (
            kind in SINKS,
            f"flash_attention_2 has no attention sinks, which {kind} was trained with; use eager, "
            "which is what auto chooses",
        ),
        (
            kind == "falcon" and get_field(config, "alibi"),
            "flash_attention_2 has no ALiBi, which this falcon needs; use sdpa or eager",
        ),
    )


def _type(config: Any) -> str:
    return str(get_field(text_part(config), "model_type"))


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
