"""The shape of a model that shapes.py has no table for: Transformers builds it on torch's meta
device, where tensors have sizes and no memory. Importing this takes seconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from learners.checkpoints import is_encoder
from learners.positions import positions_of

SIZES = {  # a shape's sizes, by the names configs have for them
    "hidden": ("hidden_size",),
    "layers": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "vocabulary": ("vocab_size",),
    "intermediate": ("intermediate_size", "ffn_dim", "n_inner"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
}


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
        sizes = _sizes(known.get_text_config(), size_of)
        with torch.device("meta"):
            parts = _parts(auto.from_config(known), sizes["layers"])
    except Exception as error:  # a config.json may break a model's code in any way
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"model_type {family} cannot be planned: {reason}") from None
    tied = not encoder and not parts["own_head"]
    told = {"family": family, "tied": tied, "encoder": encoder, "positions": positions_of(known)}
    return {**told, **sizes, **parts}


def _sizes(config: Any, size_of: Callable[..., int]) -> dict[str, int]:
    """Return a shape's sizes. Raises ValueError with a size that the config does not say."""
    written = {
        names[0]: next(
            (v for name in names if (v := getattr(config, name, None)) is not None), None
        )
        for names in SIZES.values()
    }
    names = ("hidden", "layers", "heads", "vocabulary")
    found = {size: size_of(written, SIZES[size][0]) for size in names}
    usual = {
        "intermediate": 4 * found["hidden"],
        "kv_heads": found["heads"],
        "head_dim": found["hidden"] // found["heads"],
    }
    return found | {size: size_of(written, SIZES[size][0], n) for size, n in usual.items()}


def _parts(model: Any, layers: int) -> dict[str, tuple[int, ...]]:
    """Return the elements of each parameter of the embeddings, one layer, the head and what is
    left. Raises ValueError when layers differ.
    """
    body = {id(p) for p in model.base_model.parameters()}
    embeddings = {
        id(p)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for p in module.parameters()
    }
    parts: dict[str, list[int]] = {"embedding": [], "final": [], "own_head": []}
    numbered: dict[str, list[list[int]]] = {}
    for name, parameter in model.named_parameters():
        elements = parameter.numel()
        if found := re.match(r"(.*?)\.(\d+)\.", name):
            stack = numbered.setdefault(found[1], [])
            stack += [[] for _ in range(len(stack), int(found[2]) + 1)]
            stack[int(found[2])].append(elements)
        elif id(parameter) not in body:
            parts["own_head"].append(elements)
        else:
            parts["embedding" if id(parameter) in embeddings else "final"].append(elements)
    stacks = sorted(numbered.values(), key=lambda stack: sum(map(sum, stack)))
    if not stacks or len(stacks[-1]) != layers or any(one != stacks[-1][0] for one in stacks[-1]):
        raise ValueError(f"it is not made of {layers} layers that are alike")
    *others, main = stacks
    parts["final"] += [elements for stack in others for layer in stack for elements in layer]
    return {name: tuple(found) for name, found in parts.items()} | {"layer": tuple(main[0])}
