"""Rows of one file as they were written: JSON keeps its numbers and its missing keys, CSV holds
texts, parquet and Arrow what their columns hold. Nothing is converted to fit other rows.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from learners.data.files import (
    begins_one_value,
    checked_row,
    format_of,
    is_text,
    json_lines,
    opened_text,
    suffix_of,
)
from learners.errors import DataError, in_a_line

BATCH = 1000  # rows of parquet and Arrow that are in memory at once
Numbered = tuple[int, dict[str, Any]]
"""A row with the number of its line, from 1; 0 in files without lines."""


def rows_of(
    file: str, field: str | None = None, separator: str | None = None
) -> Iterator[Numbered]:
    """Yield the rows of a file. Few are in memory at once; all of a file that is one JSON value.

    `field`: the key of a JSON file under which its list of rows lies; `separator`: of CSV, unless
    its name says it. Raises DataError, with the line where there is one, on what is no row.
    """
    of = format_of(file)
    if of == "json":
        return _json(file, field)
    if of == "csv":
        return _csv(file, separator or ("\t" if suffix_of(file).startswith(".tsv") else ","))
    return _arrow_rows(file, _parquet_batches if of == "parquet" else _arrow_batches)


def count_rows(file: str, field: str | None = None, separator: str | None = None) -> int:
    """Return the number of a file's rows; text is read for it."""
    if format_of(file) == "parquet":
        from pyarrow.parquet import read_metadata

        with arrow_errors(file):
            return int(read_metadata(file).num_rows)
    return sum(1 for _ in rows_of(file, field, separator))


# --- JSON -----------------------------------------------------------------------------------------


def _json(file: str, field: str | None) -> Iterator[Numbered]:
    if field is not None or _is_one_value(file):
        for number, row in enumerate(_listed(file, _value(file), field), 1):
            yield 0, checked_row(f"{file}: row {number}", row)
        return
    rows = json_lines(file, empty=True)
    first = list(islice(rows, 2))
    if len(first) == 1:  # one object: perhaps no row, but rows below one of its keys
        _listed(file, first[0][1], None)
    yield from first
    yield from rows


def _is_one_value(file: str) -> bool:
    with opened_text(file) as lines:
        first = next((line for line in lines if line.strip()), "")
    return begins_one_value(file, first)


def _value(file: str) -> Any:
    """Return the one JSON value of a file."""
    with opened_text(file) as opened:
        text = opened.read()
    if not is_text(text):
        number = next(n for n, line in enumerate(text.splitlines(), 1) if not is_text(line))
        raise DataError(f"{file}:{number}: cannot be read as UTF-8 text")
    try:
        return json.loads(text.strip() or "[]")
    except json.JSONDecodeError as error:
        number = error.lineno + text[: len(text) - len(text.lstrip())].count("\n")
        where = f"{file}:{number}"
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{file}: not JSON: too many brackets in each other") from None
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {in_a_line(error)}") from None


def _listed(file: str, value: Any, field: str | None) -> list[Any]:
    """Return the rows of a JSON value: those under a key, such as data or result.rows, or a list
    itself. Raises DataError on an object that seems to hold its rows under a key that is not told.
    """
    found = value
    for key in field.split(".") if field else ():
        if not isinstance(found, dict) or key not in found:
            raise DataError(f"{file}: has no list under {field}{_lists_in(value)}")
        found = found[key]
    if isinstance(found, list):
        return found
    if field:
        raise DataError(f"{file}: {field} is no list of rows{_lists_in(value)}")
    lists = "" if suffix_of(file).startswith(".jsonl") else _lists_in(value)
    if lists:
        raise DataError(
            f"{file}: one object, not a list of rows: set field to the key of its rows{lists} "
            "(or put the object in [ ] if it is a row)"
        )
    return [value]


def _lists_in(value: Any) -> str:
    """Return a clause about the keys below which lists of rows lie, at most two deep."""
    found = list(_keys_of_lists(value, 2))
    return f"; lists of rows lie under {', '.join(found)}" if found else ""


def _keys_of_lists(value: Any, depth: int) -> Iterator[str]:
    for key, inner in value.items() if isinstance(value, dict) and depth else ():
        if isinstance(inner, list) and inner and all(_may_be_row(item) for item in inner):
            yield key
        yield from (f"{key}.{below}" for below in _keys_of_lists(inner, depth - 1))


def _may_be_row(value: Any) -> bool:
    """Tell an object that may be a row from others, and from the messages of a conversation."""
    return isinstance(value, dict) and not {"role", "from"}.intersection(value)


# --- CSV ------------------------------------------------------------------------------------------


def _csv(file: str, separator: str) -> Iterator[Numbered]:
    """Yield rows whose values are all texts, as they are written, an empty cell an empty text. The
    first line that is not empty names the columns.
    """
    csv.field_size_limit(sys.maxsize)  # a text may be longer than its default of 128 KiB
    with opened_text(file, newline="") as lines:
        cells = csv.reader(_sound(file, lines), delimiter=separator, strict=True)
        header: list[str] = []
        for line, values in _records(file, cells):
            if not header:
                header = _checked_header(file, line, values)
            elif len(values) != len(header):
                raise DataError(
                    f"{file}:{line}: {len(values)} cells, but {len(header)} columns: "
                    f"{', '.join(header)}"
                )
            else:
                yield line, dict(zip(header, values, strict=True))


def _records(file: str, cells: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield records that are not empty, each with the line that it begins on."""
    line = 1
    try:
        for values in cells:
            if values:
                yield line, values
            line = cells.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}:{line}: not a line of CSV: {in_a_line(error)}") from None


def _checked_header(file: str, line: int, names: list[str]) -> list[str]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{file}:{line}: columns named twice: {', '.join(map(repr, twice))}")
    return names


def _sound(file: str, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not is_text(line):
            raise DataError(f"{file}:{number}: cannot be read as UTF-8 text")
        yield line


# --- parquet and Arrow ----------------------------------------------------------------------------


def _arrow_rows(file: str, batches_of: Any) -> Iterator[Numbered]:
    with arrow_errors(file):
        for batch in batches_of(file):
            for row in _values_of(batch):
                yield 0, row


def _parquet_batches(file: str) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file, memory_map=True) as opened:
        yield from opened.iter_batches(batch_size=BATCH)


def _arrow_batches(file: str) -> Iterator[Any]:
    """Yield slices of a memory-mapped file, in the file or the stream format."""
    import pyarrow

    with pyarrow.memory_map(file) as opened:
        if not opened.size():
            return
        if opened.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(opened)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            opened.seek(0)
            batches = iter(pyarrow.ipc.open_stream(opened))
        for batch in batches:
            yield from (batch.slice(at, BATCH) for at in range(0, batch.num_rows, BATCH))


def _values_of(batch: Any) -> list[dict[str, Any]]:
    if "arrow.json" not in str(batch.schema):
        return list(batch.to_pylist())
    import pyarrow
    from datasets import Dataset  # whose columns of free-form JSON are text in Arrow

    return list(Dataset(pyarrow.Table.from_batches([batch])))


@contextmanager
def arrow_errors(file: str) -> Iterator[None]:
    """Name the file in what Arrow raises: its own errors, and built-in ones."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{file}: cannot be read: {in_a_line(error)}") from error
