"""From texts to token ids.

A text prompt gets the special tokens its tokenizer puts in front (BOS, [CLS]), never those it puts
behind; a chat prompt is what the tokenizer's template renders, ready for the answer; a response
gets no special tokens but the closing EOS ([SEP] on an encoder).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from learners.errors import DataError


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Return ids with the tokenizer's leading special tokens (once, even if the text has them), no
    trailing ones.
    """
    encoded = tokenizer(text, return_special_tokens_mask=True)
    ids = encoded["input_ids"]
    added = encoded["special_tokens_mask"]
    end = len(ids)
    while end and added[end - 1]:
        end -= 1
    start = 1 if end > 1 and added[0] and ids[0] == ids[1] else 0
    return ids[start:end]


def encode_chat(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[str, list[int]]:
    """Return text and ids of a conversation that the assistant is to continue."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template has written its special tokens; the tokenizer would add them twice.
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_response(tokenizer: Any, text: str, encoder: bool = False) -> list[int]:
    """Return ids that end with one EOS, or [SEP] on an encoder. Raises DataError when the tokenizer
    has none.
    """
    end = tokenizer.sep_token_id if encoder else tokenizer.eos_token_id
    if end is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path} has no {'SEP' if encoder else 'EOS'} token"
        )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if ids[-1:] == [end] else [*ids, end]


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


def pad_problem(pad: int | str | None, ends: Iterable[Any]) -> str:
    """Return what is wrong with the PAD token of a decoder reward model, given the tokens that end
    a response; nothing if it is sound.

    Plain Transformers reads the score at the last token that is not PAD, so a response that ends
    with PAD would lose its end.
    """
    if pad is None:
        return "the tokenizer has no PAD token, which a reward model needs; add one, not the EOS"
    if pad in ends:
        return (
            f"PAD equals EOS ({pad}), the same token: plain Transformers would read the score "
            "before the EOS; give PAD a token of its own"
        )
    return ""
