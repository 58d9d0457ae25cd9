"""Prompts, SFT examples and preference pairs: read through Hugging Face datasets, checked,
tokenised once.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from learners.errors import DataError
from learners.settings import DataSettings, PairData, PromptData, SFTData
from learners.tokenise import encode_chat, encode_prompt, encode_response

T = TypeVar("T")

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


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
    """Usable rows of a data set, and the number left out, by reason."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped: Counter[str] = Counter()


def load_prompts(data: PromptData, tokenizer: Any) -> Rows[Prompt]:
    """Load prompts. Raises DataError on bad rows, and on prompts over `max_prompt_tokens` unless
    `long_prompts` is drop.
    """
    rows: Rows[Prompt] = Rows()
    for i, row in enumerate(read_rows(data, [data.prompt_column, *data.answer_columns])):
        text, ids = _prompt(data, tokenizer, i, row[data.prompt_column])
        if len(ids) <= data.max_prompt_tokens:
            rows.append(Prompt(i, ids, text, {name: row[name] for name in data.answer_columns}))
        elif data.long_prompts == "drop":
            rows.dropped["too long"] += 1
        else:
            raise _row_error(
                data,
                i,
                f"the prompt has {len(ids)} tokens, max_prompt_tokens is {data.max_prompt_tokens}; "
                "raise it, or set long_prompts: drop",
            )
    return _not_empty(data, rows)


def load_sft(data: SFTData, tokenizer: Any, encoder: bool = False) -> Rows[Example]:
    """Load SFT examples, or texts that an `encoder` is to score; those over `max_tokens` are
    dropped. Raises DataError on bad rows and empty answers.
    """
    rows: Rows[Example] = Rows()
    for i, row in enumerate(read_rows(data, [data.prompt_column, data.response_column])):
        _, prompt = _prompt(data, tokenizer, i, row[data.prompt_column])
        answer = _text(data, i, data.response_column, row)
        if not answer:
            raise _row_error(
                data, i, f"{data.response_column} is empty: there is no answer to learn"
            )
        example = Example(prompt, encode_response(tokenizer, answer, encoder))
        if example.tokens <= data.max_tokens:
            rows.append(example)
        else:
            rows.dropped["too long"] += 1
    return _not_empty(data, rows)


def load_pairs(data: PairData, tokenizer: Any, encoder: bool) -> Rows[Pair]:
    """Load preference pairs; those over `max_tokens` and those of equal answers are dropped. Raises
    DataError on bad rows.
    """
    rows: Rows[Pair] = Rows()
    columns = [data.prompt_column, data.chosen_column, data.rejected_column]
    for i, row in enumerate(
        read_rows(data, columns + ([data.margin_column] if data.margin_column else []))
    ):
        _, prompt = _prompt(data, tokenizer, i, row[data.prompt_column])
        chosen = encode_response(tokenizer, _text(data, i, data.chosen_column, row), encoder)
        rejected = encode_response(tokenizer, _text(data, i, data.rejected_column, row), encoder)
        if chosen == rejected:
            rows.dropped["equal answers"] += 1
        elif len(prompt) + max(len(chosen), len(rejected)) > data.max_tokens:
            rows.dropped["too long"] += 1
        else:
            rows.append(Pair(prompt, chosen, rejected, _margin(data, i, row)))
    return _not_empty(data, rows)


def _prompt(data: DataSettings, tokenizer: Any, row: int, value: Any) -> tuple[str, list[int]]:
    """Return text and ids of a prompt, given as text or as chat messages."""
    if isinstance(value, str):
        text = value
        ids = encode_prompt(tokenizer, value)
    elif _is_chat(value):
        if not tokenizer.chat_template:
            raise _row_error(
                data, row, "the prompt is chat messages, but the tokenizer has no chat template"
            )
        # Columns are typed, so a key that any message has comes back as None in all the others.
        messages = [{k: v for k, v in message.items() if v is not None} for message in value]
        text, ids = encode_chat(tokenizer, messages)
    else:
        raise _row_error(
            data, row, "a prompt must be text, or a list of messages with role and content"
        )
    if not text or not ids:
        raise _row_error(data, row, "the prompt is empty")
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise _row_error(
            data,
            row,
            f"the prompt begins with {tokenizer.bos_token} twice; leave BOS to the tokenizer",
        )
    return text, ids


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) for message in value)
        and all(isinstance(message.get("role"), str) for message in value)
        and all(message.get("content") is not None for message in value)
    )


def _text(data: DataSettings, row: int, column: str, values: dict[str, Any]) -> str:
    value = values[column]
    if not isinstance(value, str):
        raise _row_error(data, row, f"{column} must be text, not {type(value).__name__}")
    return value


def _margin(data: PairData, row: int, values: dict[str, Any]) -> float:
    if data.margin_column is None:
        return 0.0
    value = values[data.margin_column]
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _row_error(data, row, f"{data.margin_column} must be a number, not {value!r}")
    return float(value)


def _not_empty(data: DataSettings, rows: Rows[T]) -> Rows[T]:
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in rows.dropped.items())
        raise DataError(f"{data.path}: no row can be used: {reasons}")
    return rows


def _row_error(data: DataSettings, row: int, problem: str) -> DataError:
    return DataError(f"{data.path}: row {row + 1}: {problem}")


# --- reading --------------------------------------------------------------------------------------


def read_rows(data: DataSettings, columns: Sequence[str]) -> Any:
    """Return the rows as a `datasets.Dataset` with just these columns; needs no tokenizer.

    Raises DataError when there is nothing at the path, when it cannot be read, has no rows, or
    lacks columns.
    """
    rows = _open(data)
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise DataError(f"{data.path}: columns {missing} missing; it has {rows.column_names}")
    if not len(rows):
        raise DataError(f"{data.path}: no rows in split {data.split}")
    rows = rows.select_columns(list(dict.fromkeys(columns)))
    return rows if data.limit is None else rows.select(range(min(data.limit, len(rows))))


def _open(data: DataSettings) -> Any:
    import datasets  # takes a second, and processes that only tokenise do without

    datasets.disable_progress_bars()
    path = Path(data.path)
    check_path(data.path)
    try:
        if not path.is_file():
            return _load(datasets, str(path) if path.is_dir() else data.path, split=data.split)
        # A single file is whatever split is asked for; "train[:100]" asks for train.
        files = {re.split(r"[\[+]", data.split)[0]: str(path)}
        return _load(datasets, FORMATS[path.suffix], data_files=files, split=data.split)
    except Exception as error:  # datasets raises its own, Arrow's, the hub's and built-in ones
        cause = error.__cause__ or error
        first_line = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        what = (
            "cannot be read"
            if os.path.exists(path)
            else "no file or folder here, and cannot be read from the hub"
        )
        raise DataError(f"{data.path}: {what} (split {data.split}): {first_line}") from error


def check_path(name: str) -> None:
    """Raise DataError unless there is a file or folder of a known format, or the name may be one on
    the hub.
    """
    path = Path(name)
    formats = ", ".join(FORMATS)
    if os.path.isdir(name):
        if not any(file.suffix in FORMATS for file in path.rglob("*")):
            raise DataError(f"{name}: the folder holds no {formats} files")
    elif os.path.isfile(name):
        if path.suffix not in FORMATS:
            raise DataError(f"{name}: must be one of {formats}, a folder of those, or a hub name")
        if not path.stat().st_size:
            raise DataError(f"{name}: the file is empty")
    elif path.suffix in FORMATS or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise DataError(f"{name}: no such file or folder")


def _load(datasets: Any, source: str, **where: Any) -> Any:
    rows = datasets.load_dataset(source, **where)
    # Text that looks like a date in every row is read from JSON as one; as free-form JSON it stays
    # text.
    dates = [name for name, feature in rows.features.items() if "timestamp" in str(feature)]
    if rows.info.builder_name != "json" or not dates:
        return rows
    features = rows.features | {name: datasets.Json() for name in dates}
    return datasets.load_dataset(source, features=datasets.Features(features), **where)
