"""Problems of a model that is to serve a recipe and its data, as far as its small files tell:
unknown ids, lengths, the attention kernel, targets of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from learners.checkpoints import embedding_rows, load_config
from learners.errors import UserError, first_wrong
from learners.kernels import attention_notice, refused_attention, resolve_attention
from learners.lora import target_problems
from learners.positions import positions_of
from learners.settings import ModelSettings


def vocabulary_problems(
    key: str, model: ModelSettings, ids: Iterable[Sequence[int]], holder: str = "the data hold"
) -> list[str]:
    """Return a problem in a list if the model has no embedding for some of these ids, else [].

    Some tokenizers know more tokens than their model; only ids that the data use count. A model
    whose config does not say how many it knows (letters that it hashes) has no problem.
    """
    size = embedding_rows(load_config(model))
    last = max(map(max, filter(None, ids)))
    if size is None or size > last:
        return []
    return [f"{key}: {model.path} knows {size} ids, {holder} ids up to {last}"]


def length_problems(key: str, model: ModelSettings, tokens: int) -> list[str]:
    """Return the problems of giving the model sequences of `tokens`: it cannot be read, or has
    fewer positions.
    """
    try:
        limit = positions_of(load_config(model))
    except UserError as error:
        return [f"{key}: {problem}" for problem in error.problems]
    if limit is None or tokens <= limit:
        return []
    return [
        f"{key}: {model.path} has {limit} positions, prompt + response need up to {tokens}: "
        "shorten one of them"
    ]


def kernel_problems(key: str, model: ModelSettings) -> list[str]:
    """Return a problem in a list if Transformers has no such attention kernel for the model, or one
    that would compute another model than the one that was trained, else [].
    """
    config = load_config(model)
    kernel = resolve_attention(model, config)
    supported = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}
    wrong = first_wrong(
        (True, refused_attention(model, config)),
        (
            not getattr(_model_class(config), supported.get(kernel, ""), True),
            f"{config.model_type} has no {kernel} in Transformers; use eager",
        ),
    )
    return [f"{key}.attention: {model.path}: {wrong}"] if wrong else []


def adapter_problems(key: str, model: ModelSettings) -> list[str]:
    """Return the problems of the targets that an adapter of the model names."""
    return target_problems(key, model, load_config(model)) if model.lora else []


def kernel_notices(models: Mapping[str, ModelSettings]) -> list[str]:
    """Return a line for every model, by its key in the recipe, for which `auto` is another kernel
    than usual.
    """
    lines = (attention_notice(key, model, load_config(model)) for key, model in models.items())
    return [line for line in lines if line]


def _model_class(config: Any) -> Any:
    """Return Transformers' class for models of this config; None where it has none."""
    kinds = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)
    return next((kind[type(config)] for kind in kinds if type(config) in kind), None)
