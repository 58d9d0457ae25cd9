"""The positions a model has: how long a sequence may be that it reads. One answer for everybody who
asks: config.json alone, or the config that Transformers made of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

# The names configs have for it. The first that is written counts: some write other numbers of
# tokens beside it.
NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
    "model_max_length",
)
# Command-R writes what its positions were scaled to beside what they were.
SCALED_TO = {"cohere": "model_max_length", "cohere2": "model_max_length"}

# Their tokens know how far apart they are, or come one after the other: nothing is counted.
UNLIMITED = frozenset(
    (
        "bloom",
        "falcon_mamba",
        "funnel",
        "mamba",
        "mamba2",
        "mt5",
        "rwkv",
        "t5",
        "umt5",
        "xlnet",
        "xlstm",
    )
)
# They count from behind the id of their PAD token, in a table as long as the config says.
FROM_PAD = frozenset(
    (
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "layoutlmv3",
        "lilt",
        "longformer",
        "luke",
        "markuplm",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    )
)
USUAL_PAD = 1  # of those, where config.json does not say; MPNet's, whatever it says
NESTED = ("text_config", "text_encoder", "decoder", "generator", "language_config", "llm_config")


def positions_of(config: Any) -> int | None:
    """Return the tokens of the longest sequence that the model can read; None where nothing limits
    it, or where nothing is written.

    `config` is what a config.json holds (a mapping), or a config of Transformers. What is written
    there and is no number counts as unwritten.
    """
    config = text_part(config)
    kind = str(get_field(config, "model_type"))
    names = (SCALED_TO.get(kind, ""), *NAMES)
    stated = next((n for name in names if (n := _count(get_field(config, name)))), None)
    if stated is None or kind in UNLIMITED or _is_relative(kind, config):
        return None
    if kind in FROM_PAD and get_field(config, "position_embedding_type") != "rotary":
        pad = get_field(config, "pad_token_id")
        own = isinstance(pad, int) and kind != "mpnet"
        return stated - (pad if own else USUAL_PAD) - 1
    if kind.startswith("gemma3"):  # its positions are written as scaled
        return stated
    return min((_scaled(rope, stated) for rope in _ropes(config)), default=stated)


def text_part(config: Any) -> Any:
    """Return the config of the part that reads text."""
    for name in NESTED:
        part = get_field(config, name)
        if isinstance(part, Mapping) or hasattr(part, "to_dict"):
            return text_part(part)
    return config


def get_field(config: Any, name: str) -> Any:
    """Return a field of a config.json or of a config of Transformers; None where there is none."""
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _count(value: Any) -> int | None:
    """Return a whole number above 0; None for everything else (XLNet's -1 among it)."""
    return value if type(value) is int and value > 0 else None


def _is_relative(kind: str, config: Any) -> bool:
    """Tell ALiBi and DeBERTa's attention, which use distances alone, from tables of positions."""
    if kind in ("deberta", "deberta-v2"):
        absolute = get_field(config, "position_biased_input")
        return bool(get_field(config, "relative_attention")) and absolute is False
    return (
        bool(get_field(config, "alibi")) or get_field(config, "position_embedding_type") == "alibi"
    )


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the rotary embeddings' parameters, those of every kind of layer that sees the whole
    sequence where kinds have their own.
    """
    rope = get_field(config, "rope_scaling") or get_field(config, "rope_parameters")
    if not isinstance(rope, Mapping):
        return
    layers = {name: part for name, part in rope.items() if isinstance(part, Mapping)}
    if layers:
        yield from (part for name, part in layers.items() if "sliding" not in name)
    else:
        yield rope


def _scaled(rope: Mapping[str, Any], stated: int) -> int:
    """Return the positions of rotary embeddings for which `stated` are written.

    Linear scaling and YaRN stretch those that the model was trained with; llama3 and longrope are
    written as stretched. Dynamic NTK stretches every sequence of a batch by the longest one, so
    beyond the written positions a row's numbers would depend on its neighbours: not counted.
    """
    factor = rope.get("factor")
    if rope.get("rope_type", rope.get("type")) not in ("linear", "yarn"):
        return stated
    if isinstance(factor, bool) or not isinstance(factor, (int, float)):
        return stated
    trained = min(_count(rope.get("original_max_position_embeddings")) or stated, stated)
    stretched = trained * factor
    return (_count(int(stretched)) if math.isfinite(stretched) else None) or stated
