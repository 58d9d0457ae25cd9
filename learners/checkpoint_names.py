"""Weights under the names and in the shapes of a checkpoint, which is how engines read them.

Transformers holds some families otherwise in memory than in their files: all experts of a layer in
one tensor, a block under another name. What it did while loading is undone here by its own
functions, for one layer after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightTransform, revert_weight_conversion

Entry = tuple[str, torch.dtype, tuple[int, ...]]  # name, dtype and shape of a whole tensor


def to_checkpoint(
    model: Any, names: Sequence[str], tensors: Sequence[Tensor]
) -> tuple[list[str], list[Tensor]]:
    """Return one layer's whole tensors, named and shaped in memory, as a checkpoint holds them.

    Where a tensor of the file is made of several in memory, all of them must be given. Values are
    moved and never computed with; tensors on the meta device stay there.
    """
    if not _conversions(model):
        return list(names), list(tensors)
    held = dict(zip(names, tensors, strict=True))
    converted = revert_weight_conversion(model, held)
    return list(converted), list(converted.values())


def entries_of(model: Any, layer: Sequence[Entry]) -> list[Entry]:
    """Return what `to_checkpoint` makes of a layer's entries, without any weights."""
    if not _conversions(model):
        return list(layer)
    shapes = [torch.empty(shape, dtype=dtype, device="meta") for _, dtype, shape in layer]
    names, tensors = to_checkpoint(model, [name for name, _, _ in layer], shapes)
    return [(n, t.dtype, tuple(t.shape)) for n, t in zip(names, tensors, strict=True)]


def _conversions(model: Any) -> list[WeightTransform]:
    """Return what loading this model converted; of one that came from no files, what loading its
    kind does.

    Engines read the very files the model came from, so it is their names that count. Names of old
    times, which are read and no longer written, are left out: under ZeRO-3 Transformers keeps them
    with the others.
    """
    given = getattr(model, "_weight_conversions", None)
    if given is None:
        # A prefix may be there or not: nobody knows which without files.
        found = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [c for c in found if not isinstance(c, PrefixChange)]
    elif given:
        old = _patterns(get_model_conversion_mapping(model))
        old -= _patterns(get_model_conversion_mapping(model, add_legacy=False))
        model._weight_conversions = [c for c in given if not _patterns([c]) <= old]
    return list(model._weight_conversions)


def _patterns(conversions: Sequence[WeightTransform]) -> set[tuple[str, ...]]:
    return {tuple(conversion.source_patterns) for conversion in conversions}
