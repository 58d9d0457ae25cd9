"""Elements that an engine keeps of a sequence: keys and values of every token, and the states of
layers that have no keys.

Bounds from above: a sliding window counts as if all tokens were kept. vLLM gives blocks behind the
window back, but a prompt may need them all at once.
"""

from __future__ import annotations

from typing import Any

from learners.positions import get_field

CONV = ("conv",)
LINEAR = ("linear_attention", "mamba")


def kv_elements(config: Any, layers: int, kv_heads: int, head_dim: int) -> int:
    """Return the elements of one token in the cache of a model: keys and values, or what DeepSeek's
    attention compresses them to.

    `config` is what a config.json holds, or a config of Transformers.
    """
    attending = layers - _many(config, CONV) - _many(config, LINEAR)
    compressed = get_field(config, "kv_lora_rank")
    if is_compressed(config):
        return attending * (int(compressed) + int(get_field(config, "qk_rope_head_dim")))
    return 2 * attending * kv_heads * head_dim


def is_compressed(config: Any) -> bool:
    """Tell DeepSeek's latent attention, whose cache is no heads' and is not cut among GPUs."""
    fields = ("kv_lora_rank", "qk_rope_head_dim")
    return all(type(get_field(config, name)) is int for name in fields)


def state_elements(config: Any) -> int:
    """Return the elements of the states of one sequence, however long it is."""

    def size(name: str) -> int:
        return int(get_field(config, name) or 0)

    conv = size("hidden_size") * size("conv_L_cache")
    inner = size("intermediate_size")
    mamba = inner * (size("state_size") + size("conv_kernel"))
    keys = size("linear_num_key_heads") * size("linear_key_head_dim")
    values = size("linear_num_value_heads") * size("linear_value_head_dim")
    mixed = (2 * keys + values) * size("linear_conv_kernel_dim")
    delta = values * size("linear_key_head_dim") + mixed
    return _many(config, CONV) * conv + _many(config, LINEAR) * (
        mamba if size("state_size") else delta
    )


def _many(config: Any, kinds: tuple[str, ...]) -> int:
    """Return how many layers are of these kinds."""
    written = get_field(config, "layer_types") or get_field(config, "layers_block_type")
    if isinstance(written, list):
        return sum(kind in kinds for kind in written)
    if kinds == LINEAR and get_field(config, "model_type") in ("mamba", "falcon_mamba"):
        return int(get_field(config, "num_hidden_layers") or 0)
    return 0
