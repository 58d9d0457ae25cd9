"""Places of a vLLM model for the weights of a checkpoint, recorded once, so that later weights go
there directly. Imports vLLM.

vLLM's own way of loading weights anew, the layerwise reload, replaces all parameters, calls every
loader twice and allocates the model a second time. Nothing of that is needed where loading only
copies: then a trial load without any weights shows which part of which parameter each of them
becomes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.attention import Attention, is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import (
    _get_original_loader,
    get_layerwise_info,
)
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs
from vllm.v1.attention.backend import AttentionImplBase

PLAIN = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


class NotRecordable(Exception):
    """Loading this model does more than to copy; the message says what."""


class Part(NamedTuple):
    """A part of a tensor, as `as_strided` takes it; `start` counts from the tensor's beginning."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.start)


class Copy(NamedTuple):
    """One copy that loading makes: a part of the weight `name` into a part of a parameter."""

    name: str
    source: Part
    target: Part


@dataclass
class Packed:
    """A layer that keeps its weight packed for its kernel alone, and the copies that make it up."""

    layer: Any
    shape: torch.Size
    dtype: torch.dtype
    copies: list[Copy] = field(default_factory=list)

    def pack(self, weights: Mapping[str, Tensor]) -> None:
        """Pack the layer's weight anew, from checkpoint weights by name."""
        weight = self._in_place(weights)
        if weight is None:
            weight = torch.empty(self.shape, dtype=self.dtype)
            for name, source, target in self.copies:
                target.of(weight).copy_(source.of(weights[name]))
        layer = self.layer
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.cpu_linear = None  # the old one goes first: its memory is taken again
        layer.quant_method.process_weights_after_loading(layer)

    def _in_place(self, weights: Mapping[str, Tensor]) -> Tensor | None:
        """Return the whole weight where it lies if its parts lie there one after the other, as
        those that are packed together do.
        """
        stop = 0
        first = weights[self.copies[0].name]
        begin = self.copies[0].source.of(first)
        for name, source, target in self.copies:
            part = source.of(weights[name])
            follows = part.data_ptr() == begin.data_ptr() + stop * begin.element_size()
            whole_rows = target.start == stop and part.shape[1:] == self.shape[1:]
            if not (follows and whole_rows and part.is_contiguous() and part.dtype == self.dtype):
                return None
            if part.untyped_storage().data_ptr() != begin.untyped_storage().data_ptr():
                return None
            stop += part.numel()
        return (
            begin.as_strided(self.shape, (self.shape[1], 1)) if stop == self.shape.numel() else None
        )


class Destinations:
    """Copies weights of a checkpoint to where they belong in a vLLM model, once that is recorded.

    A packed layer whose weights have not all come keeps the old ones; those that came are held
    until `clear`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: set[str] = set()
        self.live: dict[str, list[tuple[Part, Tensor]]] = {}
        self.packed: dict[str, Packed] = {}  # by name of weight
        self.held: dict[str, Tensor] = {}

    def record(self, weights: Mapping[str, Tensor]) -> None:
        """Record where the model puts weights of these names, dtypes and shapes. Raises
        NotRecordable where it does more with them, and what loading them would raise.
        """
        refuse_more_than_copies(self.model)
        shapes = {n: torch.empty_like(w, device="meta") for n, w in weights.items()}
        with _unpacked(self.model) as packed:
            targets = _storages(self.model)
            with torch.no_grad(), _Recorder(targets, shapes) as recorder:
                self.model.load_weights(shapes.items())
        live: dict[str, list[tuple[Part, Tensor]]] = {}
        for storage, copy in recorder.copies:
            if storage in packed:
                packed[storage].copies.append(copy)
            else:
                view = targets[storage].data.as_strided(*copy.target)
                live.setdefault(copy.name, []).append((copy.source, view))
        for one in packed.values():
            one.copies.sort(key=lambda copy: copy.target.start)
            if sum(math.prod(copy.target.size) for copy in one.copies) != one.shape.numel():
                raise ValueError(f"a weight of {type(one.layer).__name__} is not whole")
        self.live |= live
        self.packed |= {copy.name: one for one in packed.values() for copy in one.copies}
        self.names |= weights.keys()

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy these weights; those of packed layers must stay as they are until `clear`."""
        sources = []
        views = []
        for name, weight in weights.items():
            for source, view in self.live.get(name, ()):
                sources.append(source.of(weight))
                views.append(view)
        if views:
            torch._foreach_copy_(views, sources)
        self.held |= {n: weight for n, weight in weights.items() if n in self.packed}
        layers = {id(p): p for name in weights if (p := self.packed.get(name)) is not None}
        for packed in layers.values():
            if all(copy.name in self.held for copy in packed.copies):
                packed.pack(self.held)

    def clear(self) -> None:
        """Let go of all weights that were given."""
        self.held = {}


def refuse_more_than_copies(model: nn.Module) -> None:
    """Raise NotRecordable if something is computed from the weights of `model` after loading,
    other than a packed copy of one.
    """
    for name, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            if type(method) not in PLAIN:
                raise NotRecordable(f"{name} has {type(method).__name__}")
        elif is_deferred_attention_layer(layer):
            ours = (
                type(layer).process_weights_after_loading is Attention.process_weights_after_loading
            )
            theirs = getattr(
                type(getattr(layer, "impl", None)), "process_weights_after_loading", None
            )
            if not ours or theirs is not AttentionImplBase.process_weights_after_loading:
                raise NotRecordable(f"{name} has weights that {type(layer).__name__} converts")
        elif callable(getattr(layer, "process_weights_after_loading", None)):
            raise NotRecordable(f"{name} has weights that {type(layer).__name__} converts")


@contextmanager
def _unpacked(model: nn.Module) -> Iterator[dict[int, Packed]]:
    """Give the layers that dropped their weight after packing one without memory, as they had when
    they were built; yield these layers by the storage of that weight.
    """
    dropped = {}
    packed = {}
    try:
        for layer in model.modules():
            built = get_layerwise_info(layer).restore_metadata[0].get("weight")
            method = getattr(layer, "quant_method", None)
            if built is None or type(method) is not UnquantizedLinearMethod:
                continue
            if built.ndim != 2:
                what = f"a weight of {built.ndim} dimensions"
                raise NotRecordable(f"{type(layer).__name__} has {what}")
            if layer.weight.numel() == 0 < built.numel():
                built.weight_loader = _get_original_loader(built)  # a reload wraps it
                dropped[layer] = layer.weight
                layer.weight = restore_layer_refs(built, layer)
                packed[_storage(layer.weight)] = Packed(layer, built.shape, built.dtype)
        yield packed
    finally:
        for layer, weight in dropped.items():
            layer.weight = weight


def _storages(model: nn.Module) -> dict[int, Tensor]:
    """Return the parameters and buffers by their storage. Raises NotRecordable where one is no
    longer what the layer was built with.
    """
    found = {}
    for layer in model.modules():
        built = {k: v for one in get_layerwise_info(layer).restore_metadata for k, v in one.items()}
        for name, tensor in [
            *layer.named_parameters(recurse=False),
            *layer.named_buffers(recurse=False),
        ]:
            was = built.get(name)
            if was is not None and (was.shape, was.stride()) != (tensor.shape, tensor.stride()):
                raise NotRecordable(f"{type(layer).__name__} laid out its {name} anew")
            found[_storage(tensor)] = tensor
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Recorder(TorchDispatchMode):
    """Notes copies from `sources` into `targets` (tensors by storage) without making them, and
    refuses all else that is done with a target.
    """

    def __init__(self, targets: Mapping[int, Tensor], sources: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.targets = targets
        self.names = {_storage(tensor): name for name, tensor in sources.items()}
        self.copies: list[tuple[int, Copy]] = []
        self.written: dict[tuple[int, int], str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if func.is_view or not any(_storage(t) in self.targets for t in tensors):
            return func(*args, **kwargs or {})
        target = args[0]
        if func is torch.ops.aten.copy_.default and _storage(args[1]) in self.names:
            self._note(target, args[1])
        elif not (func is torch.ops.aten.fill_.Scalar and args[1] == 0):  # of padding, as it is
            raise NotRecordable(f"loading calls {func} on a parameter")
        return target

    def _note(self, target: Tensor, source: Tensor) -> None:
        name = self.names[_storage(source)]
        source = source.expand(target.shape)
        storage = _storage(target)
        place = (storage, target.storage_offset())
        if target.numel() and self.written.setdefault(place, name) != name:
            raise NotRecordable(f"{name} and {self.written[place]} have the same place")
        self.copies.append((storage, Copy(name, _part(source), _part(target))))


def _part(tensor: Tensor) -> Part:
    return Part(tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())
