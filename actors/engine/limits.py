"""Limits of vLLM that a config.json tells, before anything is started."""

from __future__ import annotations

from typing import Any

from learners.errors import first_wrong
from learners.positions import get_field, text_part
from learners.settings import DeviceType

# their gated delta rule is there for 16 bit alone
GATED_DELTA = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
SELECTIVE_SCAN = ("mamba", "falcon_mamba", "jamba")
# Their experts are copied past the loaders by which vLLM replaces weights while it runs.
COPIED_PAST = ("gpt_oss",)


def sync_problem(config: Any) -> str:
    """Return what keeps vLLM from taking new weights of a model that is trained; nothing where
    nothing does. `config` is as in `engine_problem`.
    """
    kind = str(get_field(text_part(config), "model_type"))
    return first_wrong(
        (
            kind in COPIED_PAST,
            f"vLLM cannot take new weights of {kind} while it runs, so PPO and GRPO cannot train "
            "it; SFT and reward models can",
        )
    )


def engine_problem(config: Any, dtype: str, device: DeviceType) -> str:
    """Return what keeps vLLM from serving a model, and what would be right; nothing where nothing
    does.

    `config` is what a config.json holds (a mapping), or a config of Transformers.
    """
    kind = str(get_field(text_part(config), "model_type"))
    on_cpu = device == "cpu"
    return first_wrong(
        (
            on_cpu and kind in SELECTIVE_SCAN,
            f"vLLM has no kernel for {kind} on CPUs: cluster.device must be cuda",
        ),
        (
            on_cpu and kind in GATED_DELTA and dtype != "bfloat16",
            f"on CPUs vLLM computes the linear attention of {kind} in bfloat16 alone: set "
            "dtype: bfloat16",
        ),
    )
