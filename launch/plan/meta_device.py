"""The shape of a model that shapes.py has no table for: Transformers builds it on torch's meta
device, where tensors have sizes and no memory. Importing this takes seconds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from launch.plan.caches import is_compressed, kv_elements, mixed_elements, state_elements
from learners.checkpoints import is_encoder
from learners.kernels import NO_ATTENTION
from learners.lora import head_of, linear_layers
from learners.positions import positions_of

SIZES = {  # a shape's sizes, by the names configs have for them
    "hidden": ("hidden_size",),
    "layers": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "vocabulary": ("vocab_size",),
    "intermediate": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("qk_head_dim", "head_dim"),
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
SENT = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
SHARED = "shared_expert"


def count(family: str, config: dict[str, Any], size_of: Callable[..., int]) -> dict[str, Any]:
    """Count every parameter of a model, with the head it is used with (log-probs, or an encoder's
    score), and return the fields of its shape.

    `size_of` reads a size from a config and checks it. Raises ValueError when Transformers does not
    know the type, cannot build the model, or a size is nowhere written.
    """
    values = {key: value for key, value in config.items() if key != "model_type"}
    logging.set_verbosity_error()
    try:
        known = AutoConfig.for_model(family, **(values | {"num_labels": 1}))
        encoder = is_encoder(known)
        auto = AutoModelForSequenceClassification if encoder else AutoModelForCausalLM
        text = known.get_text_config()
        sizes = _sizes(text, size_of)
        with torch.device("meta"):
            model = auto.from_config(known)
        parts = _parts(model, sizes["layers"])
        sparse = _experts(model, text)
        linear = _linear(model, encoder)
    except Exception as error:  # a config.json may break a model's code in any way
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"model_type {family} cannot be planned: {reason}") from None
    told = {
        "family": family,
        "tied": not encoder and not parts["own_head"],
        "encoder": encoder,
        "positions": positions_of(known),
        "experts": sparse,
        "linear": linear,
        "compressed": is_compressed(text),
        "kv_elements": kv_elements(text, sizes["layers"], sizes["kv_heads"], sizes["head_dim"]),
        "state_elements": state_elements(text),
        "mixed": mixed_elements(text),
        "normed": _normed(model, sizes),
        "head_width": 0 if encoder else model.get_output_embeddings().weight.shape[1],
    }
    return {**told, **sizes, **parts}


def _sizes(config: Any, size_of: Callable[..., int]) -> dict[str, int]:
    """Return a shape's sizes; a model without attention has no heads. Raises ValueError with a size
    that the config does not say.
    """
    written = {
        names[0]: next(
            (v for name in names if (v := getattr(config, name, None)) is not None), None
        )
        for names in SIZES.values()
    }
    if config.model_type in NO_ATTENTION:
        written |= {SIZES["heads"][0]: 1}
    names = ("hidden", "layers", "heads", "vocabulary")
    found = {size: size_of(written, SIZES[size][0]) for size in names}
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        written[SIZES["kv_heads"][0]] = 1 if config.multi_query else found["heads"]
    usual = {
        "intermediate": 4 * found["hidden"],
        "kv_heads": found["heads"],
        "head_dim": found["hidden"] // found["heads"],
    }
    found |= {size: size_of(written, SIZES[size][0], n) for size, n in usual.items()}
    none = dict.fromkeys(("heads", "kv_heads", "head_dim"), 0)
    return found | (none if config.model_type in NO_ATTENTION else {})


def _experts(model: Any, config: Any) -> tuple[int, int, int, int, int] | None:
    """Return the fields of a shape's experts; None where there are none."""
    named = {name: p for name, p in model.named_parameters() if ".experts." in name}
    if not named:
        return None
    many = next(n for name in EXPERTS if (n := getattr(config, name, None)) is not None)
    active = next((n for name in SENT if (n := getattr(config, name, None))), many)
    columns = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    every = [m for name, m in model.named_modules() if SHARED in name and hasattr(m, "up_proj")]
    shared = max((m.up_proj.weight.shape[0] for m in every), default=0)
    return many, min(active, many), columns, shared, sum(p.numel() for p in named.values())


def _linear(model: Any, encoder: bool) -> list[tuple[str, int, int]]:
    """Return name, inputs and outputs of the layers that an adapter may stand beside."""
    names = linear_layers(model, head_of(model) if encoder else ())
    found = []
    for name in names:
        module = model.get_submodule(name)
        sides = module.weight.shape  # [out, in], of GPT-2's kind [in, out]
        inputs, outputs = reversed(sides) if isinstance(module, torch.nn.Linear) else sides
        found.append((name, inputs, outputs))
    return found


def _normed(model: Any, sizes: dict[str, int]) -> int:
    """Return the elements of one token that the norms of a layer read, at most."""
    heads = {"q": sizes["heads"], "k": sizes["kv_heads"]}
    layers: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if (found := re.match(r"(.*?\.\d+)\.(.*)", name)) and re.search(
            r"(norm|ln_?\w*)\.weight$", found[2]
        ):
            elements = parameter.numel()
            each = heads.get(found[2].split(".")[-2][0], 1) if elements == sizes["head_dim"] else 1
            layers[found[1]] += each * elements
    return max(layers.values(), default=0)


def _parts(model: Any, layers: int) -> dict[str, Any]:
    """Return the elements of each parameter of the embeddings, the layers of every kind, the head
    and what is left. Raises ValueError when the layers are not those that the config says.
    """
    body = {id(p) for p in model.base_model.parameters()}
    embeddings = {
        id(p)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for p in module.parameters()
    }
    parts: dict[str, list[int]] = {"embedding": [], "final": [], "own_head": []}
    numbered: dict[str, dict[int, list[int]]] = {}
    for name, parameter in model.named_parameters():
        elements = parameter.numel()
        if found := re.match(r"(.*?)\.(\d+)\.", name):
            numbered.setdefault(found[1], {}).setdefault(int(found[2]), []).append(elements)
        elif id(parameter) not in body:
            parts["own_head"].append(elements)
        else:
            parts["embedding" if id(parameter) in embeddings else "final"].append(elements)
    stacks = sorted(
        (list(stack.values()) for stack in numbered.values()), key=lambda s: sum(map(sum, s))
    )
    if not stacks or len(stacks[-1]) != layers:
        raise ValueError(f"it is not made of {layers} layers")
    *others, main = stacks
    parts["final"] += [elements for stack in others for layer in stack for elements in layer]
    kinds = Counter(map(tuple, main)).most_common()
    found_parts = {name: tuple(elements) for name, elements in parts.items()}
    return found_parts | {"layer": kinds[0][0], "others": tuple((n, kind) for kind, n in kinds[1:])}
