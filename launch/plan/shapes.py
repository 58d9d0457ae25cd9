"""The sizes of a model from its config.json alone: every parameter, counted; no tensor is made and
nothing downloaded.

Shapes come from the model's folder, from the hub's cache on this machine, or from the table in
model_shapes.yaml.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from actors.roles import Head, Role
from launch.recipe.document import in_words
from learners.data.files import read_json
from learners.errors import UserError
from learners.kernels import AUTO, resolve_attention
from learners.positions import positions_of
from learners.settings import ModelSettings

TABLE = Path(__file__).with_name("model_shapes.yaml")
SAME_SHAPE = re.compile(r"(-(Base|Instruct|Chat|chat|hf|it|Thinking|2507|v0\.\d))+$")
GATED = ("llama", "mistral", "qwen2", "qwen3")  # decoders with a gated MLP
BERT = ("bert", "roberta", "xlm-roberta")  # encoders that are counted like it

BYTES = {"float32": 4, "bfloat16": 2}
LARGEST = 10**9  # of any size of a model
SIZES = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_hidden_layers",
    "max_position_embeddings",
)


class Linear(NamedTuple):
    """A linear layer that an adapter may stand beside, by the name that the model has for it."""

    name: str
    inputs: int
    outputs: int


class Experts(NamedTuple):
    """MLPs of which a token passes some: how many there are in a layer, how many it passes, columns
    of one and of those that every token passes, and elements of all in the model.
    """

    many: int
    active: int
    columns: int
    shared: int
    elements: int

    @property
    def idle(self) -> int:
        """Elements that one token does not pass."""
        return self.elements * (self.many - self.active) // self.many


@dataclass(frozen=True)
class Shape:
    """One model. `embedding`, `layer` (one of `layers`) and `final` hold the number of elements of
    each parameter; so does `own_head` of a model that was counted on the meta device: the head it
    comes with. Layers that differ from `layer` are among the `layers` too, as how many there are of
    a kind and the elements of one.

    `linear` are the layers beside which LoRA's adapter may stand: not the head, the output layer,
    or experts. `positions` are those a sequence may have (None: any number). `kv_elements` of one
    token are in an engine's cache, and `state_elements` of one sequence. `auto` is the attention
    kernel that `attention: auto` means.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    positions: int | None
    tied: bool
    embedding: tuple[int, ...]
    layer: tuple[int, ...]
    final: tuple[int, ...]
    encoder: bool = False
    own_head: tuple[int, ...] | None = None
    others: tuple[tuple[int, tuple[int, ...]], ...] = ()
    experts: Experts | None = None
    linear: tuple[Linear, ...] = ()
    kv_elements: int = 0
    state_elements: int = 0
    compressed: bool = False  # the cache is no heads', so GPUs do not share it
    normed: int = 0  # elements of a token that a layer's norms read
    mixed: int = 0  # elements of a token that autograd keeps in float32 of a layer without keys
    head_width: int = 0  # what heads read, where it is not the hidden size
    auto: str = "sdpa"

    def head(self, head: Head) -> tuple[int, ...]:
        """Return elements of each parameter that a role's head adds: log-probs, one score a
        sequence, one value a token.
        """
        hidden = self.head_width or self.hidden
        if self.own_head is not None and (self.encoder or head == "lm"):
            return self.own_head
        if self.encoder:  # BERT's pooler, RoBERTa's dense layer: the same sizes
            return (hidden * hidden, hidden, hidden, 1)
        if head == "lm":
            return () if self.tied else (self.vocabulary * hidden,)
        return (hidden,) if head == "score" else (hidden, 1)

    def tensors(self, head: Head) -> Counter[int]:
        """Return how many parameters of the model with this head have so many elements."""
        found = Counter((*self.embedding, *self.final, *self.head(head)))
        for count, layer in self.kinds:
            for elements in layer:
                found[elements] += count
        return found

    def parameters(self, head: Head) -> int:
        """Return all, every expert among them."""
        layers = sum(count * sum(layer) for count, layer in self.kinds)
        return sum(map(sum, (self.embedding, self.final, self.head(head)))) + layers

    def active(self, head: Head) -> int:
        """Return the parameters that one token passes: of experts those it is sent to."""
        return self.parameters(head) - (self.experts.idle if self.experts else 0)

    def largest_group(self, head: Head) -> int:
        """Return elements of the largest part that is gathered at once: a layer, an embedding or
        the head.
        """
        layer = max(sum(layer) for _, layer in self.kinds)
        return max(sum(self.embedding), layer, sum(self.head(head)))

    def is_eager(self, attention: str) -> bool:
        """Tell whether a kernel of the recipe's, or what `auto` chooses, is eager."""
        return (self.auto if attention == AUTO else attention) == "eager"

    @property
    def kinds(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Every kind of layer: how many there are, and the elements of each parameter of one."""
        alike = self.layers - sum(count for count, _ in self.others)
        return ((alike, self.layer), *self.others)

    @property
    def columns(self) -> int:
        """Columns of the MLPs that one token passes in a layer, at most."""
        experts = self.experts
        sparse = experts.active * experts.columns + experts.shared if experts else 0
        return max(self.intermediate, sparse)


@dataclass(frozen=True)
class Model:
    """A role's model and its shape."""

    role: Role
    settings: ModelSettings
    shape: Shape

    @property
    def parameters(self) -> int:
        """Parameters, those of the role's head among them."""
        return self.shape.parameters(self.role.head)

    @property
    def active(self) -> int:
        """Parameters that one token passes."""
        return self.shape.active(self.role.head)

    @property
    def width(self) -> int:
        """Bytes of one weight."""
        return BYTES[self.settings.dtype]


def uneven(shape: Shape, parallel: int) -> list[str]:
    """Return what of a model cannot be cut into so many equal parts, one for each GPU of
    an engine.
    """
    parts = {
        "attention heads": shape.heads,
        "key-value heads": shape.kv_heads,
        "MLP columns": shape.experts.columns if shape.experts else shape.intermediate,
    }
    # where there are fewer key-value heads than GPUs
    copied = not shape.kv_heads or parallel % shape.kv_heads == 0
    return [
        f"{n} {what}"
        for what, n in parts.items()
        if n % parallel and not (copied and what == "key-value heads")
    ]


def find_shape(path: str, like: str | None = None) -> Shape:
    """Return the shape of a model, of the one that it is `like` while it does not exist. Raises
    UserError when it is nowhere to be read or makes no sense.
    """
    config = read_json(Path(path) / "config.json") or _cached(path) or _tabled(path)
    if config is None and like is not None:
        return find_shape(like)
    if config is None:
        raise UserError(
            f"{path}: its shape is not known here: no config.json in that folder or in the "
            "hub's cache, "
            f"nor an entry in {TABLE.name}; name a model of the same shape, such as Qwen/Qwen3-8B, "
            "there or in the model's like"
        )
    try:
        return read_shape(config)
    except ValueError as error:
        raise UserError(f"{path}: config.json: {error}") from None


def read_shape(config: dict[str, Any]) -> Shape:
    """Return the shape that a config.json describes. Raises ValueError for a family that cannot be
    counted and for a size that is missing or makes no sense. A family that is not in the table
    takes seconds: it needs torch and Transformers.
    """
    auto = resolve_attention(ModelSettings(path="."), config)
    family = str(config.get("model_type"))
    if family == "gpt2":
        return replace(_gpt2(config), auto=auto)
    if family in BERT:
        return replace(_encoder(family, config), auto=auto)
    if family in GATED:
        return replace(_gated(family, config), auto=auto)
    from launch.plan.meta_device import count

    fields = count(family, config, size_of)
    experts = fields.pop("experts")
    linear = tuple(Linear(*layer) for layer in fields.pop("linear"))
    return Shape(**fields, experts=experts and Experts(*experts), linear=linear, auto=auto)


def size_of(config: dict[str, Any], key: str, default: int | None = None) -> int:
    """Return a size as it is written; the default where nothing is."""
    size = config.get(key)
    if size is None:
        size = default
    if type(size) is not int or not 0 < size <= LARGEST:
        raise ValueError(
            f"{key} must be a whole number from 1 to {LARGEST:,}, not {in_words(size)}"
        )
    return size


def _gated(family: str, config: dict[str, Any]) -> Shape:
    hidden, inner, vocabulary, heads, layers, _ = (size_of(config, key) for key in SIZES)
    kv_heads = size_of(config, "num_key_value_heads", heads)
    head_dim = size_of(config, "head_dim", 128 if family == "qwen3" else hidden // heads)
    wide = heads * head_dim
    narrow = kv_heads * head_dim
    linear = {
        "self_attn.q_proj": (hidden, wide),
        "self_attn.k_proj": (hidden, narrow),
        "self_attn.v_proj": (hidden, narrow),
        "self_attn.o_proj": (wide, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    layer = [*_weights(linear), hidden, hidden]
    bias = family in ("llama", "qwen3") and config.get("attention_bias", False)
    if bias or family == "qwen2":
        layer += [wide, narrow, narrow]
    if bias:
        layer += [hidden]
    if family == "llama" and config.get("mlp_bias", False):
        layer += [inner, inner, hidden]
    if family == "qwen3":
        layer += [head_dim, head_dim]
    return Shape(
        family,
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        inner,
        vocabulary,
        positions_of(config),
        config.get("tie_word_embeddings", False),
        embedding=(vocabulary * hidden,),
        layer=tuple(layer),
        final=(hidden,),
        linear=_named("model.layers", layers, linear),
        kv_elements=2 * layers * kv_heads * head_dim,
        normed=2 * hidden + (wide + narrow if family == "qwen3" else 0),
    )


def _gpt2(config: dict[str, Any]) -> Shape:
    keys = ("n_embd", "n_head", "n_layer", "vocab_size", "n_positions")
    hidden, heads, layers, vocabulary, table = (size_of(config, key) for key in keys)
    inner = size_of(config, "n_inner", 4 * hidden)
    head_dim = size_of(config, "head_dim", hidden // heads)
    norm = (hidden, hidden)
    linear = {
        "attn.c_attn": (hidden, 3 * hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (hidden, inner),
        "mlp.c_proj": (inner, hidden),
    }
    biases = (outputs for _, outputs in linear.values())
    return Shape(
        "gpt2",
        hidden,
        layers,
        heads,
        heads,
        head_dim,
        inner,
        vocabulary,
        positions_of(config),
        config.get("tie_word_embeddings", True),
        embedding=(vocabulary * hidden, table * hidden),
        layer=(*norm, *norm, *_weights(linear), *biases),
        final=norm,
        linear=_named("transformer.h", layers, linear),
        kv_elements=2 * layers * heads * head_dim,
    )


def _encoder(family: str, config: dict[str, Any]) -> Shape:
    hidden, inner, vocabulary, heads, layers, table = (size_of(config, key) for key in SIZES)
    norm = (hidden, hidden)
    square = (hidden, hidden)
    linear = {
        "attention.self.query": square,
        "attention.self.key": square,
        "attention.self.value": square,
        "attention.output.dense": square,
        "intermediate.dense": (hidden, inner),
        "output.dense": (inner, hidden),
    }
    biases = (outputs for _, outputs in linear.values())
    name = "bert" if family == "bert" else "roberta"
    return Shape(
        family,
        hidden,
        layers,
        heads,
        heads,
        hidden // heads,
        inner,
        vocabulary,
        positions_of(config),
        True,
        embedding=(
            vocabulary * hidden,
            table * hidden,
            size_of(config, "type_vocab_size") * hidden,
            *norm,
        ),
        layer=(*norm, *norm, *_weights(linear), *biases),
        final=(),
        encoder=True,
        linear=_named(f"{name}.encoder.layer", layers, linear),
    )


def _weights(linear: dict[str, tuple[int, int]]) -> list[int]:
    """Return the elements of the weights of linear layers."""
    return [inputs * outputs for inputs, outputs in linear.values()]


def _named(prefix: str, layers: int, linear: dict[str, tuple[int, int]]) -> tuple[Linear, ...]:
    """Return the linear layers of all layers, of which each has these."""
    return tuple(
        Linear(f"{prefix}.{i}.{name}", *sides)
        for i in range(layers)
        for name, sides in linear.items()
    )


def _cached(path: str) -> dict[str, Any] | None:
    """Return the config.json of a hub model that this machine has downloaded before."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    found = sorted(
        cache.glob(f"models--{glob.escape(path.replace('/', '--'))}/snapshots/*/config.json")
    )
    return read_json(found[-1]) if found else None


def _tabled(path: str) -> dict[str, Any] | None:
    """Return the table's entry of a model, which may also be named without its organisation."""
    table = model_table()
    plain = SAME_SHAPE.sub("", path)
    short = next((name for name in table if name.rpartition("/")[2] == plain), plain)
    entry = table.get(path, table.get(plain, table.get(short)))
    return table[entry] if isinstance(entry, str) else entry


@cache
def model_table() -> dict[str, Any]:
    """Return name -> the keys of a config.json that decide sizes, or the name of a model of the
    same shape.
    """
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))
