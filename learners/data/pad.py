"""The PAD token. To us it is filler: masks come from lengths. Plain Transformers however reads a
decoder's score at the last token that is not PAD, so no text may end with a reward model's PAD.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

NEW = "<|pad|>"
# in names of tokens that are kept for such uses
READY = ("pad", "reserved", "unused", "dummy", "placeholder")
SEEN = frozenset(("image", "video", "vision", "audio"))  # that stand for what is not text


def settle_pad(tokenizer: Any, rows: int | None, ends: Collection[int | None]) -> str:
    """Give the tokenizer of a decoder reward model a PAD that ends no text: its own, a token that
    it has and no text holds, or a new one. `ends` are the ids that end texts, `rows` is the size of
    the model's embedding, which must grow for a PAD of an id that it does not have.

    Returns what there is to say about it, nothing where the model's own serves as it is.
    """
    own = tokenizer.pad_token
    serves = own is not None and tokenizer.pad_token_id not in ends
    if not serves:
        found = next(_unused(tokenizer, rows, ends), None)
        tokenizer.add_special_tokens({"pad_token": found or _new(tokenizer)})
    pad = f"{tokenizer.pad_token} ({tokenizer.pad_token_id})"
    grows = rows is not None and tokenizer.pad_token_id >= rows
    grown = f": the embedding grows from {rows} to {tokenizer.pad_token_id + 1} rows"
    if serves:
        return f"the model has no row for its PAD {pad}{grown}" if grows else ""
    why = "the tokenizer has no PAD" if own is None else f"the PAD {own} ends texts"
    return (
        f"{why}, and plain Transformers reads a score before the PAD: the reward model's is "
        f"{pad}{grown if grows else ''}"
    )


def settle_filler(tokenizer: Any, rows: int | None) -> str:
    """Give the tokenizer of a model that generates a PAD that the model has a row for: where it has
    none for its own, one that is there, or EOS. Returns what there is to say about it.
    """
    own = tokenizer.pad_token
    if own is None or rows is None or tokenizer.pad_token_id < rows:
        return ""
    lost = f"the model has no row for its PAD {own} ({tokenizer.pad_token_id})"
    tokenizer.pad_token = next(_unused(tokenizer, rows, ()), tokenizer.eos_token)
    return f"{lost}: {tokenizer.pad_token} ({tokenizer.pad_token_id}) is exported as its PAD"


def same_words(one: Any, other: Any) -> bool:
    """Tell whether two tokenizers have the same ids for everything but PAD, which no text holds."""
    differ = one.get_vocab().items() ^ other.get_vocab().items()
    return {token for token, _ in differ} <= {one.pad_token, other.pad_token}


def _unused(tokenizer: Any, rows: int | None, ends: Collection[int | None]) -> Iterator[str]:
    """Yield tokens that the model has a row for and that no text holds, the best first."""
    template = json.dumps(tokenizer.chat_template or "", ensure_ascii=False)
    taken = {*ends, tokenizer.bos_token_id, tokenizer.eos_token_id}

    def free(token: str, number: int) -> bool:
        fits = rows is None or number < rows
        return fits and number not in taken and token not in template

    found = []
    for number, added in tokenizer.added_tokens_decoder.items():
        parts = re.split(r"[\W_]+", str(added).lower())
        kinds = [i for i, kind in enumerate(READY) if any(p.startswith(kind) for p in parts)]
        bracketed = not str(added)[:1].isalnum()
        if kinds and bracketed and not SEEN.intersection(parts) and free(str(added), number):
            found.append((kinds[0] > 0, number, str(added)))
    yield from (token for *_, token in sorted(found))
    unknown = tokenizer.unk_token
    if unknown is not None and _never_unknown(tokenizer) and free(unknown, tokenizer.unk_token_id):
        yield unknown


def _never_unknown(tokenizer: Any) -> bool:
    """Tell whether the tokenizer has a token for every byte, and so none for what it lacks."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and bool(json.loads(backend.to_str())["model"].get("byte_fallback"))


def _new(tokenizer: Any) -> str:
    """Return a name that no token has."""
    known = tokenizer.get_vocab()
    name = NEW
    while name in known:
        name = f"<{name}>"
    return name
