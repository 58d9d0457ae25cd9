"""From texts to token ids.

A text prompt gets the special tokens its tokenizer puts in front (BOS, [CLS]), never those it puts
behind; its response gets none but the closing EOS ([SEP] on an encoder). What a chat template has
rendered (learners/data/templates.py) has its special tokens already.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from learners.errors import DataError, in_a_line


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Return ids with the tokenizer's leading special tokens (once, even if the text has them), no
    trailing ones. Raises DataError on a text that the tokenizer cannot encode.
    """
    encoded = _encoded(tokenizer, text, return_special_tokens_mask=True)
    ids = encoded["input_ids"]
    added = encoded["special_tokens_mask"]
    end = len(ids)
    while end and added[end - 1]:
        end -= 1
    start = 1 if end > 1 and added[0] and ids[0] == ids[1] else 0
    return ids[start:end]


def encode_text(tokenizer: Any, text: str, offsets: bool = False) -> Any:
    """Return the ids of a text that has all its special tokens; with `offsets` also where each of
    them lies, as the tokenizer gives it. Raises DataError on a text that it cannot encode.
    """
    if offsets:
        return _encoded(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True)
    return _encoded(tokenizer, text, add_special_tokens=False)["input_ids"]


def encode_response(tokenizer: Any, text: str, encoder: bool = False) -> list[int]:
    """Return ids that end with one EOS, or [SEP] on an encoder. Raises DataError when the tokenizer
    has none, or cannot encode the text.
    """
    end = end_of_response(tokenizer, encoder)
    ids: list[int] = encode_text(tokenizer, text)
    return ids if ids[-1:] == [end] else [*ids, end]


def end_of_response(tokenizer: Any, encoder: bool = False) -> int:
    """Return the id that ends a response: EOS, or [SEP] on an encoder. Raises DataError when the
    tokenizer has none.
    """
    end: int | None = tokenizer.sep_token_id if encoder else tokenizer.eos_token_id
    if end is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path} has no {'SEP' if encoder else 'EOS'} token"
        )
    return end


def _encoded(tokenizer: Any, text: str, **how: Any) -> Any:
    """Return what a tokenizer makes of a text; a DataError of whatever it raises."""
    try:
        return tokenizer(text, verbose=False, **how)  # lengths are ours to judge
    except Exception as error:  # tokenizers raises bare Exceptions, others TypeErrors and the like
        unknown = _unknown_parts(tokenizer, text)
        parts = f" (unknown: {', '.join(map(repr, unknown))})" if unknown else ""
        raise DataError(f"the tokenizer cannot encode it: {said(error)}{parts}") from error


def _unknown_parts(tokenizer: Any, text: str, most: int = 5) -> list[str]:
    """Return the letters that a tokenizer cannot encode; words, if it knows no letter."""

    def fails(part: str) -> bool:
        try:
            tokenizer(part, add_special_tokens=False)
        except Exception:  # as with the whole text
            return True
        return False

    letters = list(dict.fromkeys(text))
    unknown = [letter for letter in letters if fails(letter)]
    if len(unknown) == len(letters):
        unknown = [word for word in dict.fromkeys(text.split()) if fails(word)]
    return unknown[:most]


def said(error: Exception) -> str:
    """Return one line of an error, with its kind where that says something."""
    line = in_a_line(error)
    kind = type(error).__name__
    return line if kind in ("Exception", line) else f"{kind}: {line}"


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest that changes when a text would become other ids: by another vocabulary, other
    special tokens or other splitting.
    """
    seen: list[Any] = [
        sorted(tokenizer.get_vocab().items()),
        sorted(tokenizer.special_tokens_map.items()),
    ]
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        rules = json.loads(backend.to_str())
        seen += [rules[name] for name in ("normalizer", "pre_tokenizer", "post_processor", "model")]
    return hashlib.blake2b(
        json.dumps(seen, default=str, sort_keys=True).encode(), digest_size=8
    ).hexdigest()
