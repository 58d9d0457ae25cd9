"""Notices of what tokenizers do to texts without a word: letters that they do not know, and text
that becomes control tokens.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Any

# Ends and beginnings of turns as models commonly write them; the tokenizer's own are known to it.
MARKERS = re.compile(r"</s>|<eos>|<\|\w+\|>|<(?:start|end)_of_turn>")
SHOWN = 5  # rows named in a notice


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
        self.looked_up: set[str] = set()
        self.left_out: set[str] = set()
        # by what there is to say: the rows, and what was found in them
        self.rows: dict[str, dict[int, str]] = {}
        self.found: dict[str, dict[str, None]] = {}

    def see(self, row: int, column: str, text: str, ids: list[int]) -> None:
        """Note letters of a text that its ids do not tell."""
        if self.unknown_id is not None and self.unknown_id in ids:
            written = text.count(self.unknown_token or "")
            if ids.count(self.unknown_id) > written:
                what = f"text that the tokenizer does not know, which becomes {self.unknown_token}"
                enough = len(self.found.get(what, ())) >= SHOWN
                self._note(what, row, column, [] if enough else self._unknown_parts(text))
        letters = set(text)
        if not letters <= self.looked_up:
            self._look_up(letters - self.looked_up)
        if not self.left_out.isdisjoint(letters):
            self._note(
                "letters that the tokenizer leaves out",
                row,
                column,
                [letter for letter in dict.fromkeys(text) if letter in self.left_out],
            )

    def see_answer(self, row: int, column: str, text: str, ids: list[int]) -> None:
        """Note also control tokens before the end of an answer, whose ids end with EOS."""
        self.see(row, column, text, ids[:-1])
        inside = self.special.intersection(ids[:-1])
        eos = self.tokenizer.convert_ids_to_tokens(ids[-1])
        tokens = [self.tokenizer.convert_ids_to_tokens(i) for i in sorted(inside)]
        markers = MARKERS.findall(text.removesuffix(eos)) if "<" in text else []
        if tokens or markers:
            self._note(
                "control tokens inside an answer, which are learned as part of it",
                row,
                column,
                [*tokens, *markers],
            )

    def lines(self, path: str, count: int, place: Callable[[int], str]) -> list[str]:
        """Return a line for each kind of thing that was seen in `count` rows."""
        folder = path.rstrip("/") + "/"
        lines = []
        for what, rows in self.rows.items():
            found = ", ".join(repr(part) for part in list(self.found[what])[:SHOWN])
            first = [
                f"{place(row).removeprefix(f'{path}: ').removeprefix(folder)} ({column})"
                for row, column in list(rows.items())[:SHOWN]
            ]
            more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
            lines.append(
                f"{path}: {len(rows)} of {count} rows hold {what}: {found}; "
                f"{', '.join(first)}{more}"
            )
        return lines

    def _note(self, what: str, row: int, column: str, parts: list[str]) -> None:
        self.rows.setdefault(what, {}).setdefault(row, column)
        found = self.found.setdefault(what, {})
        if len(found) < SHOWN:
            found.update(dict.fromkeys(parts))

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
