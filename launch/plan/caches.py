"""Elements that an engine keeps of a sequence: keys and values of every token, and the states of
layers that have no keys; and what autograd keeps of such layers.

Bounds from above: a sliding window counts as if all tokens were kept. vLLM gives blocks behind the
window back, but a prompt may need them all at once.
"""

from __future__ import annotations

from typing import Any

from learners.kernels import NO_ATTENTION
from learners.positions import get_field

CONV = ("conv",)
LINEAR = ("linear_attention", "mamba")
# of those that have such attention, the ones whose cache vLLM compresses
COMPRESSED = ("axk", "deepseek_v", "glm4_moe_lite", "glm_moe_dsa", "kimi", "longcat_flash")
USUAL_STATE = 256  # of each hidden element, where a type's states are not known: Mamba-2's
CHUNK = 64  # tokens that see each other in full in a layer with linear attention


def kv_elements(config: Any, layers: int, kv_heads: int, head_dim: int) -> int:
    """Return the elements of one token in the cache of a model: keys and values, or what DeepSeek's
    attention compresses them to.

    `config` is what a config.json holds, or a config of Transformers.
    """
    attending = layers - _many(config, CONV) - _many(config, LINEAR)
    if is_compressed(config):
        return attending * (_size(config, "kv_lora_rank") + _size(config, "qk_rope_head_dim"))
    return 2 * attending * kv_heads * head_dim


def is_compressed(config: Any) -> bool:
    """Tell DeepSeek's latent attention, whose cache is no heads' and is not cut among GPUs."""
    named = str(get_field(config, "model_type")).startswith(COMPRESSED)
    return bool(named and _size(config, "kv_lora_rank") and _size(config, "qk_rope_head_dim"))


def state_elements(config: Any) -> int:
    """Return the elements of the states of one sequence, however long it is."""
    hidden = _size(config, "hidden_size")
    conv = hidden * _size(config, "conv_L_cache")
    one = _mamba(config) or _delta(config) or USUAL_STATE * hidden
    return _many(config, CONV) * conv + _many(config, LINEAR) * one


def mixed_elements(config: Any) -> int:
    """Return float32 elements of one token that autograd keeps of a layer without keys, as
    Transformers' own code computes it: measured and rounded up.
    """
    if _many(config, CONV):
        return 2 * _size(config, "hidden_size")
    if not _many(config, LINEAR):
        return 0
    delta = _size(config, "linear_num_value_heads") * _size(config, "linear_value_head_dim")
    if delta:
        return 30 * max(delta, CHUNK * _size(config, "linear_num_value_heads"))
    inner = _size(config, "intermediate_size")
    return 4 * inner * (_size(config, "state_size") or USUAL_STATE)


def _mamba(config: Any) -> int:
    states = _size(config, "state_size")
    kernel = _size(config, "conv_kernel")
    return _size(config, "intermediate_size") * (states + kernel) if states else 0


def _delta(config: Any) -> int:
    """Return the elements of a gated delta net's state: a matrix for each head, and a window."""
    width = _size(config, "linear_key_head_dim")
    keys = _size(config, "linear_num_key_heads") * width
    values = _size(config, "linear_num_value_heads") * _size(config, "linear_value_head_dim")
    return values * width + (2 * keys + values) * _size(config, "linear_conv_kernel_dim")


def _many(config: Any, kinds: tuple[str, ...]) -> int:
    """Return how many layers are of these kinds."""
    written = get_field(config, "layer_types") or get_field(config, "layers_block_type")
    if isinstance(written, list):
        return sum(kind in kinds for kind in written)
    without = get_field(config, "model_type") in NO_ATTENTION
    return _size(config, "num_hidden_layers") if without and kinds == LINEAR else 0


def _size(config: Any, name: str) -> int:
    """Return a size of a config; 0 where it has none."""
    size = get_field(config, name)
    return size if type(size) is int and size > 0 else 0
