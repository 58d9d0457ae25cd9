"""Prompts, SFT examples and preference pairs: rows checked, and tokenised once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from learners.data.notices import Notices
from learners.data.reading import Source, read
from learners.data.tokenise import encode_chat, encode_prompt, encode_response, end_of_response
from learners.errors import DataError
from learners.settings import PairData, PromptData, SFTData

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """Prompt as text and as ids. `index` is the row in the data, from 0; reward functions see
    `text` and the answer `columns`.
    """

    index: int
    ids: list[int]
    text: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class Example:
    """Prompt and answer of SFT. `response_ids` end with EOS."""

    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def parts(self) -> tuple[list[int], ...]:
        return self.prompt_ids, self.response_ids

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Pair:
    """Prompt with two answers, which end with EOS ([SEP] on an encoder); `margin` is the difference
    in score that the chosen one must win by.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float

    @property
    def parts(self) -> tuple[list[int], ...]:
        return self.prompt_ids, self.chosen_ids, self.rejected_ids

    @property
    def tokens(self) -> int:
        """Length of the longer sequence."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


class Rows(list[T]):
    """Usable rows of a data set; the number left out, by reason; and lines for whoever starts the
    run, about files and texts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dropped: Counter[str] = Counter()
        self.notices: list[str] = []


def notices_of(*data_sets: Rows[Any]) -> list[str]:
    """Return the notices of all, once each: a run may read one file for several purposes."""
    return list(dict.fromkeys(line for rows in data_sets for line in rows.notices))


def load_prompts(data: PromptData, tokenizer: Any) -> Rows[Prompt]:
    """Load prompts. Raises DataError on bad rows, and on prompts over `max_prompt_tokens` unless
    `long_prompts` is drop.
    """
    source = read(data, [data.prompt_column, *data.answer_columns])
    notices = Notices(tokenizer)
    rows: Rows[Prompt] = Rows()
    for i, row in enumerate(source.rows):
        with source.at(i):
            text, ids = _prompt(tokenizer, data.prompt_column, row)
            if len(ids) <= data.max_prompt_tokens:
                notices.see(i, data.prompt_column, text, ids)
                columns = {name: row[name] for name in data.answer_columns}
                rows.append(Prompt(i, ids, text, columns))
            elif data.long_prompts == "drop":
                rows.dropped["too long"] += 1
            else:
                raise DataError(
                    f"the prompt has {len(ids)} tokens, max_prompt_tokens is "
                    f"{data.max_prompt_tokens}; raise it, or set long_prompts: drop"
                )
    return _finished(rows, source, notices)


def load_sft(data: SFTData, tokenizer: Any, encoder: bool = False) -> Rows[Example]:
    """Load SFT examples, or texts that an `encoder` is to score; those over `max_tokens` are
    dropped. Raises DataError on bad rows and empty answers.
    """
    end_of_response(tokenizer, encoder)
    source = read(data, [data.prompt_column, data.response_column])
    notices = Notices(tokenizer)
    rows: Rows[Example] = Rows()
    for i, row in enumerate(source.rows):
        with source.at(i):
            text, prompt = _prompt(tokenizer, data.prompt_column, row)
            answer, ids = _answer(tokenizer, data.response_column, row, encoder)
            if not answer:
                raise DataError(f"{data.response_column} is empty: there is no answer to learn")
        example = Example(prompt, ids)
        if example.tokens <= data.max_tokens:
            notices.see(i, data.prompt_column, text, prompt)
            notices.see_answer(i, data.response_column, answer, ids)
            rows.append(example)
        else:
            rows.dropped["too long"] += 1
    return _finished(rows, source, notices)


def load_pairs(data: PairData, tokenizer: Any, encoder: bool) -> Rows[Pair]:
    """Load preference pairs; those over `max_tokens` and those of equal answers are dropped. Raises
    DataError on bad rows.
    """
    end_of_response(tokenizer, encoder)
    columns = [data.prompt_column, data.chosen_column, data.rejected_column]
    source = read(data, columns + ([data.margin_column] if data.margin_column else []))
    notices = Notices(tokenizer)
    rows: Rows[Pair] = Rows()
    for i, row in enumerate(source.rows):
        with source.at(i):
            text, prompt = _prompt(tokenizer, data.prompt_column, row)
            better, chosen = _answer(tokenizer, data.chosen_column, row, encoder)
            worse, rejected = _answer(tokenizer, data.rejected_column, row, encoder)
            pair = Pair(prompt, chosen, rejected, _margin(data, row))
        if chosen == rejected:
            rows.dropped["equal answers"] += 1
        elif pair.tokens > data.max_tokens:
            rows.dropped["too long"] += 1
        else:
            notices.see(i, data.prompt_column, text, prompt)
            notices.see_answer(i, data.chosen_column, better, chosen)
            notices.see_answer(i, data.rejected_column, worse, rejected)
            rows.append(pair)
    return _finished(rows, source, notices)


def _finished(rows: Rows[T], source: Source, notices: Notices) -> Rows[T]:
    """Return the rows with what there is to say about them. Raises DataError when none is left."""
    path = source.data.path
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in rows.dropped.items())
        raise DataError(f"{path}: no row can be used: {reasons}")
    rows.notices = [source.notice] if source.notice else []
    rows.notices += notices.lines(path, len(rows), source.place)
    return rows


def _prompt(tokenizer: Any, column: str, row: dict[str, Any]) -> tuple[str, list[int]]:
    """Return text and ids of a prompt, given as text or as chat messages."""
    value = row[column]
    if isinstance(value, str):
        text = value
        with _about(column):
            ids = encode_prompt(tokenizer, value)
    elif _is_chat(value):
        if not tokenizer.chat_template:
            raise DataError("the prompt is chat messages, but the tokenizer has no chat template")
        # Columns are typed, so a key that any message has comes back as None in all the others.
        messages = [{k: v for k, v in message.items() if v is not None} for message in value]
        with _about(column):
            text, ids = encode_chat(tokenizer, messages)
    else:
        raise DataError("a prompt must be text, or a list of messages with role and content")
    if not text or not ids:
        raise DataError("the prompt is empty")
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise DataError(
            f"the prompt begins with {tokenizer.bos_token} twice; leave BOS to the tokenizer"
        )
    return text, ids


@contextmanager
def _about(column: str) -> Iterator[None]:
    """Name the column in what tokenising it raises."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{column}: {error}") from error


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) for message in value)
        and all(isinstance(message.get("role"), str) for message in value)
        and all(message.get("content") is not None for message in value)
    )


def _answer(
    tokenizer: Any, column: str, row: dict[str, Any], encoder: bool = False
) -> tuple[str, list[int]]:
    """Return text and ids of an answer."""
    text = row[column]
    if not isinstance(text, str):
        raise DataError(f"{column} must be text, not {type(text).__name__}")
    with _about(column):
        return text, encode_response(tokenizer, text, encoder)


def _margin(data: PairData, row: dict[str, Any]) -> float:
    if data.margin_column is None:
        return 0.0
    value = row[data.margin_column]
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{data.margin_column} must be a number, not {value!r}")
    return float(value)
