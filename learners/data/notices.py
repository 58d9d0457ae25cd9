"""Notices of what tokenizers do to texts without a word: letters that they do not know, and text
that becomes control tokens.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from learners.data.templates import MARKERS

SHOWN = 5  # rows named in a notice
CONTROL = "control tokens inside an answer, which are learned as part of it"
IN_MESSAGE = "control tokens inside a message, which could end it"


@dataclass
class _Kind:
    """Sightings of one kind: in how many rows, which first, and some of what was found."""

    rows: int = 0
    last: str = ""  # the row counted last
    first: list[str] = field(default_factory=list)
    found: dict[str, None] = field(default_factory=dict)


class Notices:
    """Looks at texts with the ids they became, and counts the rows with something to say about."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.unknown_token = _unknown_token(tokenizer)
        self.unknown_id = (
            None
            if self.unknown_token is None
            else tokenizer.convert_tokens_to_ids(self.unknown_token)
        )
        self.special = _special_ids(tokenizer)
        self.special_texts = [tokenizer.convert_ids_to_tokens(i) for i in sorted(self.special)]
        self.looked_up: set[str] = set()
        self.left_out: set[str] = set()
        self.kinds: dict[str, _Kind] = {}  # by what there is to say

    def see(self, place: str, column: str, text: str, ids: list[int]) -> None:
        """Note letters of a text that its ids do not tell."""
        if self.unknown_id is not None and self.unknown_id in ids:
            written = text.count(self.unknown_token or "")
            if ids.count(self.unknown_id) > written:
                what = f"text that the tokenizer does not know, which becomes {self.unknown_token}"
                enough = what in self.kinds and len(self.kinds[what].found) >= SHOWN
                self.note(what, place, column, [] if enough else self._unknown_parts(text))
        letters = set(text)
        if not letters <= self.looked_up:
            self._look_up(letters - self.looked_up)
        if not self.left_out.isdisjoint(letters):
            self.note(
                "letters that the tokenizer leaves out",
                place,
                column,
                [letter for letter in dict.fromkeys(text) if letter in self.left_out],
            )

    def see_answer(self, place: str, column: str, text: str, ids: list[int]) -> None:
        """Note also control tokens before the end of an answer, whose ids end with EOS."""
        self.see(place, column, text, ids[:-1])
        inside = self.special.intersection(ids[:-1])
        eos = self.tokenizer.convert_ids_to_tokens(ids[-1])
        tokens = [self.tokenizer.convert_ids_to_tokens(i) for i in sorted(inside)]
        markers = MARKERS.findall(text.removesuffix(eos)) if "<" in text else []
        if tokens or markers:
            self.note(CONTROL, place, column, [*tokens, *markers])

    def see_message(self, place: str, column: str, message: dict[str, Any]) -> None:
        """Note control tokens in the text of a message."""
        text = message["content"]
        tokens = [token for token in self.special_texts if token in text]
        if found := [*tokens, *(m for m in MARKERS.findall(text) if m not in tokens)]:
            learned = message["role"] == "assistant"
            self.note(CONTROL if learned else IN_MESSAGE, place, column, found)

    def note(self, what: str, place: str, column: str, found: Sequence[str] = ()) -> None:
        """Note something about the column of a row."""
        kind = self.kinds.setdefault(what, _Kind())
        if kind.last != place:
            kind.rows += 1
            kind.last = place
            if len(kind.first) < SHOWN:
                kind.first.append(f"{place} ({column})")
        if len(kind.found) < SHOWN:
            kind.found.update(dict.fromkeys(found))

    def lines(self, path: str, count: int) -> list[str]:
        """Return a line for each kind of thing that was seen in `count` rows."""
        folder = path.rstrip("/") + "/"
        lines = []
        for what, kind in self.kinds.items():
            found = ", ".join(repr(part) for part in list(kind.found)[:SHOWN])
            first = [one.removeprefix(f"{path}: ").removeprefix(folder) for one in kind.first]
            more = f" and {kind.rows - SHOWN} more" if kind.rows > SHOWN else ""
            lines.append(
                f"{path}: {kind.rows} of {count} rows hold {what}: {found and f'{found}; '}"
                f"{', '.join(first)}{more}"
            )
        return lines

    def _unknown_parts(self, text: str) -> list[str]:
        """Return the parts of a text that became the unknown token; only fast tokenizers tell."""
        if not self.tokenizer.is_fast:
            return []
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        parts = [text[start:end] for i, (start, end) in spans if i == self.unknown_id]
        return [part for part in parts if part != self.unknown_token]

    def _look_up(self, letters: set[str]) -> None:
        """Find those that no id stands for. Spaces, accents and invisible signs may be left out."""
        self.looked_up |= letters
        seen = [c for c in letters if unicodedata.category(c)[0] in "LNPS"]
        try:
            ids = self.tokenizer(seen, add_special_tokens=False)["input_ids"] if seen else []
        except Exception:  # knows words, not their letters, and refuses what it does not know
            return
        self.left_out |= {c for c, one in zip(seen, ids, strict=True) if not one}


def _unknown_token(tokenizer: Any) -> str | None:
    """Return the token that unknown text becomes; nothing when it is one with another meaning, as
    with tokenizers that know every byte.
    """
    token: str | None = tokenizer.unk_token
    if token is None and tokenizer.is_fast:
        token = getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
    ends = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.cls_token, tokenizer.sep_token)
    known = token is not None and token in tokenizer.get_vocab()
    return token if known and token not in ends else None


def _special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of control tokens, the unknown token not among them."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}
