"""Scores that cannot be read off a checkpoint, as far as its config.json tells. Imports nothing
heavy: recipes are checked by it.
"""

from __future__ import annotations

from typing import Any

from learners.positions import get_field

# Decoders whose class for scores in Transformers is more than a linear map of the last token.
UNLIKE = frozenset(("ctrl", "modernbert-decoder", "xlnet"))


def unreadable_head(config: Any) -> str:
    """Return why no score could be read off a model at the last token, nor a critic begun from such
    a reward model; nothing where one can. `config` is what a config.json holds (a mapping), or a
    config of Transformers.
    """
    kind = get_field(config, "model_type")
    if get_field(config, "is_encoder_decoder") is True:
        return (
            f"{kind} is an encoder-decoder; a reward model must be a decoder or an encoder, and a "
            "critic a decoder"
        )
    if kind in UNLIKE:
        return (
            f"{kind} has no head named score, read at the last token, in Transformers; use another "
            "decoder"
        )
    return ""
