"""Limits of vLLM on CPUs that a config.json tells, before anything is started."""

from __future__ import annotations

from typing import Any

from learners.positions import get_field, text_part

# their gated delta rule is there for 16 bit alone
GATED_DELTA = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")


def cpu_problem(config: Any, dtype: str) -> str:
    """Return what keeps vLLM from serving a model on CPUs, and what would be right; nothing where
    nothing does.

    `config` is what a config.json holds (a mapping), or a config of Transformers.
    """
    kind = str(get_field(text_part(config), "model_type"))
    if kind in GATED_DELTA and dtype != "bfloat16":
        return (
            f"on CPUs vLLM computes the linear attention of {kind} in bfloat16 alone: set "
            "dtype: bfloat16"
        )
    return ""
