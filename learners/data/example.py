"""Examples: texts with their ids, and which of these are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from learners.data.tokenise import encode_prompt, encode_text, end_of_response
from learners.errors import DataError

Span = tuple[int, int]  # of letters of a text: the first, and the one behind the last


@dataclass(frozen=True)
class Example:
    """Text to learn from, its ids, and of each id whether it is learned (1) or only read (0).
    `row` is counted from 1 in its file.
    """

    row: int
    text: str
    ids: list[int]
    trained: bytes

    @property
    def first(self) -> int:
        """Position of the first trained token."""
        return self.trained.index(1)

    @property
    def end(self) -> int:
        """Position after the last trained token: what comes then moves nothing."""
        return self.trained.rindex(1) + 1

    @property
    def prompt_ids(self) -> list[int]:
        return self.ids[: self.first]

    @property
    def response_ids(self) -> list[int]:
        return self.ids[self.first : self.end]

    @property
    def loss_mask(self) -> bytes:
        """1 for every id of `response_ids` that is learned."""
        return self.trained[self.first : self.end]

    @property
    def parts(self) -> tuple[list[int], ...]:
        return self.prompt_ids, self.response_ids

    @property
    def tokens(self) -> int:
        return self.end

    @property
    def compared(self) -> dict[str, Any]:
        """Parts that must be the same for a resumed run."""
        same: dict[str, Any] = {"prompt_ids": self.prompt_ids, "response_ids": self.response_ids}
        if 0 in self.loss_mask:
            same["loss_mask"] = self.loss_mask.hex()
        return same


def for_encoder(tokenizer: Any, example: Example) -> Example:
    """Return an example in the special tokens of an encoder: [CLS] in front, [SEP] behind."""
    ids = encode_prompt(tokenizer, example.text)
    end = end_of_response(tokenizer, encoder=True)
    return Example(example.row, example.text, [*ids, end], bytes(len(ids)) + b"\1")


def encode_spans(tokenizer: Any, text: str, spans: Sequence[Span]) -> tuple[list[int], bytes]:
    """Return the ids of a text, and 1 for those within the spans, which are in order and apart.

    Each part is encoded by itself, as generation does with a prompt. By tokenizers that put a space
    before every part the whole is, and an id belongs to where it begins. Raises DataError where
    such a tokenizer does not tell where that is.
    """
    if not adds_space(tokenizer):
        ids: list[int] = []
        trained = b""
        cuts = [0, *(cut for span in spans for cut in span), len(text)]
        for i, (start, end) in enumerate(pairwise(cuts)):
            part = encode_text(tokenizer, text[start:end]) if end > start else []
            ids += part
            trained += bytes([i % 2]) * len(part)
        return ids, trained
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path} puts a space before every part of a text and "
            "does not tell where its tokens begin: use its fast version"
        )
    encoded = encode_text(tokenizer, text, offsets=True)
    inside = [any(a <= at < b for a, b in spans) for at, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], bytes(inside)


def adds_space(tokenizer: Any) -> bool:
    """Tell whether a tokenizer puts a space before whatever it encodes, so that parts of a text
    encoded one by one are another text.
    """
    try:
        one, other, both = (encode_text(tokenizer, text) for text in ("a", "b", "ab"))
    except DataError:  # it does not know these letters
        return False
    return bool(tokenizer.decode([*one, *other]) != tokenizer.decode(both))
