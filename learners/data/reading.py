"""Data sets read by Hugging Face datasets: exactly the files that are meant, as they are now, and
where each row came from.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from learners.data.files import (
    DataFiles,
    files_below,
    find_files,
    json_lines,
    numbered_lines,
    read_and_left,
    rows_below,
    split_names,
)
from learners.errors import DataError, in_a_line
from learners.settings import DataSettings

# Rows of files up to this many bytes are read anew and held in memory; those of larger ones stay
# where `datasets` keeps its own, by what the files hold.
IN_MEMORY = 1 << 28


@dataclass(frozen=True)
class Source:
    """The rows of a data set, as a `datasets.Dataset`, and what a person should know of its files;
    `files` is None where `datasets` found them.
    """

    data: DataSettings
    rows: Any
    files: DataFiles | None
    notice: str = ""

    @contextmanager
    def at(self, row: int) -> Iterator[None]:
        """Say in DataErrors about a row, counted from 0, where that came from."""
        try:
            yield
        except DataError as error:
            raise DataError(f"{self.place(row)}: {error}") from error.__cause__

    def place(self, row: int) -> str:
        """Return the file of a row, counted from 0, and its place there, counted from 1."""
        try:
            place = self._place_in_file(row)
        except (OSError, ValueError):  # the file has changed since, or is gone
            place = ""
        return place or f"{self.data.path}: row {row + 1}"

    def _place_in_file(self, row: int) -> str:
        """Return nothing when it cannot be told from the files."""
        if self.files is None:
            return ""
        split, row = self._row_of_split(row)
        lines = {file: self._lines[file] for file in self.files.splits[split]}
        if sum(map(len, lines.values())) != self.rows.info.splits[split].num_examples:
            return ""  # several rows on a line, or one over several
        for file, numbers in lines.items():
            if row < len(numbers):
                line = f" (line {numbers[row]})" if numbers[row] not in (0, row + 1) else ""
                return f"{file}: row {row + 1}{line}"
            row -= len(numbers)
        return ""

    @cached_property
    def _lines(self) -> dict[str, Sequence[int]]:
        """The line of every row, by file."""
        return {file: _lines_of_rows(file) for file in (self.files.all if self.files else [])}

    def _row_of_split(self, row: int) -> tuple[str, int]:
        """Return the split and the place in it of a row, which may be of a slice or a sum."""
        from datasets import ReadInstruction

        sizes = {name: split.num_examples for name, split in self.rows.info.splits.items()}
        asked = "+".join(sizes) if self.data.split == "all" else self.data.split
        for part in ReadInstruction.from_spec(asked).to_absolute(sizes):
            if row < part.to - part.from_:
                return part.splitname, part.from_ + row
            row -= part.to - part.from_
        raise IndexError(row)


def _lines_of_rows(file: str) -> Sequence[int]:
    """Return the line of every row; 0 in files without lines."""
    if file.lower().endswith(".parquet"):
        from pyarrow.parquet import read_metadata

        return [0] * read_metadata(file).num_rows
    lines = [number for number, _ in numbered_lines(file, empty=True)]
    return lines or [0] * len(_one_value(file))


def _check_json(file: str) -> None:
    """Raise DataError, with its line, on what is no JSON."""
    if not sum(1 for _ in json_lines(file, empty=True)):
        _one_value(file)


def _one_value(file: str) -> list[Any]:
    """Return the rows of a file that is one JSON value."""
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8-sig").strip() or "[]")
    except json.JSONDecodeError as error:
        where = f"{file}:{error.lineno}"
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{file}: not JSON: too many brackets in each other") from None
    return value if isinstance(value, list) else [value]


# --- reading --------------------------------------------------------------------------------------


def read(data: DataSettings, columns: Sequence[str]) -> Source:
    """Read a data set's rows, with just these columns; needs no tokenizer.

    Raises DataError when there is nothing at the path, when it cannot be read or would have to be
    guessed, has no rows, or lacks columns.
    """
    files = find_files(data.path, data.split)
    if not os.path.exists(data.path):
        rows = _from_hub(data)
        notice = ""
    elif files is None:
        rows, notice = _from_folder(data)
    else:
        rows = _from_files(data, files)
        notice = files.notice()
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise DataError(f"{data.path}: columns {missing} missing; it has {rows.column_names}")
    if not len(rows):
        raise DataError(f"{data.path}: no rows in split {data.split}")
    if data.limit is not None:
        rows = rows.select(range(min(data.limit, len(rows))))
    return Source(data, rows, files, notice)


def _from_files(data: DataSettings, files: DataFiles) -> Any:
    """Read just these files."""
    names = {file: f"{i}.{files.format}" for i, file in enumerate(files.all)}
    # rows that look like an agent's log are rows here
    options = {"parse_agent_traces": False} if files.format == "json" else {}
    shape = {split: len(of_split) for split, of_split in files.splits.items()}
    with _links(data, {name: file for file, name in names.items()}, shape) as (folder, kept):
        # the folder for temporary files may itself look like a pattern
        splits = {
            split: [glob.escape(os.path.join(folder, names[file])) for file in of_split]
            for split, of_split in files.splits.items()
        }
        try:
            _, rows = _load(
                files.format,
                data.split,
                _small(files.all),
                kept,
                cache_dir=folder,
                data_files=splits,
                **options,
            )
        except Exception:
            if files.format == "json":
                for file in files.all:
                    _check_json(file)
            raise
    return rows


def _from_folder(data: DataSettings) -> tuple[Any, str]:
    """Read a folder that describes itself; return its rows, and which files they are from."""
    below = files_below(data.path)
    files = {os.path.join("data", file): os.path.join(data.path, file) for file in below}
    with _links(data, files) as (folder, kept):
        copy = os.path.join(folder, "data")
        builder, rows = _load(copy, data.split, _small(files.values()), kept, cache_dir=folder)
        wanted = rows.info.splits if data.split == "all" else split_names(data.split)
        found = [file for split in wanted for file in builder.config.data_files[split]]
        read_files = [os.path.relpath(file, copy) for file in found]
    left = [file for file in rows_below(data.path) if file not in read_files]
    return rows, read_and_left(data.path, read_files, left)


def _from_hub(data: DataSettings) -> Any:
    """Read a data set of the hub, which `datasets` keeps by revision."""
    try:
        return _load(data.path, data.split, False)[1]
    except Exception as error:  # datasets raises its own, Arrow's, the hub's and built-in ones
        raise DataError(
            f"{data.path}: no file or folder here, and cannot be read from the hub "
            f"(split {data.split}): {_first_line(error)}"
        ) from error


def _load(
    source: str, split: str, in_memory: bool, kept: str = "", features: Any = None, **where: Any
) -> tuple[Any, Any]:
    """Return what read a split, and its rows. What is in the folder `kept` already is taken from
    there; empty: nothing is.
    """
    import datasets  # takes a second, and processes that only tokenise do without

    datasets.disable_progress_bars()
    builder = datasets.load_dataset_builder(source, features=features, **where)
    form = "read" if features is None else "texts"
    builder.download_and_prepare(os.path.join(kept, form) if kept else None)
    rows = builder.as_dataset(split=split, in_memory=in_memory)
    # Text that looks like a date in every row is read from JSON as one; as free-form JSON it stays
    # text.
    dates = [name for name, feature in rows.features.items() if "timestamp" in str(feature)]
    if rows.info.builder_name != "json" or not dates:
        rows.data.validate(
            full=True
        )  # bytes that are no text are found otherwise when they are used
        return builder, rows
    texts = datasets.Features(rows.features | {name: datasets.Json() for name in dates})
    return _load(source, split, in_memory, kept, texts, **where)


@contextmanager
def _links(
    data: DataSettings, links: Mapping[str, str], shape: Mapping[str, int] | None = None
) -> Iterator[tuple[str, str]]:
    """Make a temporary folder of links, by their names, to files, whose own names `datasets` would
    take for patterns and addresses. There it may write what it likes, and it finds nothing that an
    earlier run wrote. Yield it, and the folder in which rows are kept, or "". `shape`: which of the
    files are of which split.

    Raises DataError for whatever goes wrong meanwhile, also when a file changes.
    """
    before = _stamps(links.values())
    kept = ""
    with _temporary_folder(data) as folder, _nobody_told():
        for name, file in links.items():
            link = os.path.join(folder, name)
            os.makedirs(os.path.dirname(link), exist_ok=True)
            os.symlink(os.path.abspath(file), link)
        problem: Exception | None = None
        try:
            kept = _kept(links, shape)
            yield folder, kept
        except Exception as error:  # datasets raises its own, Arrow's and built-in ones
            problem = error
    changed = _stamps(links.values()) != before
    if kept and (changed or problem):  # perhaps not what its name says, or damaged
        shutil.rmtree(kept, ignore_errors=True)
    if changed:
        raise DataError(
            f"{data.path}: changed while it was read; start again when nobody writes to it"
        ) from problem
    if isinstance(problem, DataError):
        raise problem
    if problem is not None:
        said = _first_line(problem, kept)
        for name, file in links.items():
            said = said.replace(os.path.join(folder, name), file)
        raise DataError(f"{data.path}: cannot be read (split {data.split}): {said}") from problem


def _kept(files: Mapping[str, str], shape: Mapping[str, int] | None) -> str:
    """Return the folder in which the rows of large files stay for the next run, named after sizes
    and digests of the files; "" for small ones, and where nothing can be written.
    """
    if _small(files.values()):
        return ""
    from datasets import __version__, config

    above = os.path.join(config.HF_DATASETS_CACHE, "quatuor")
    try:
        os.makedirs(above, exist_ok=True)
        tempfile.TemporaryFile(dir=above).close()
    except OSError:
        return ""
    key = hashlib.blake2b(json.dumps([__version__, shape]).encode(), digest_size=16)
    for name, file in files.items():
        with open(file, "rb") as opened:
            digest = hashlib.file_digest(opened, "blake2b").hexdigest()
        key.update(json.dumps([name, os.path.getsize(file), digest]).encode())
    return os.path.join(above, key.hexdigest())


@contextmanager
def _temporary_folder(data: DataSettings) -> Iterator[str]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="quatuor-data-")
    except OSError as error:
        why = error.strerror or error
        raise DataError(
            f"{data.path}: reading needs a folder for temporary files: {why}; set TMPDIR to one"
        ) from None
    with folder as name:
        yield name


@contextmanager
def _nobody_told() -> Iterator[None]:
    """Keep `datasets` from logging what goes wrong, which is for our one line to say, and from
    telling its makers that a file was read, for which it waits where no network is.
    """
    from datasets import config
    from datasets.utils import logging

    verbosity = logging.get_verbosity()
    counts = config.HF_UPDATE_DOWNLOAD_COUNTS
    logging.set_verbosity(logging.CRITICAL)
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        config.HF_UPDATE_DOWNLOAD_COUNTS = counts


def _stamps(files: Iterable[str]) -> list[tuple[int, ...]]:
    """Return what changes when files do; a file that is not there has nothing."""
    stamps: list[tuple[int, ...]] = []
    for file in files:
        try:
            there = os.stat(file)
        except OSError:
            stamps.append(())
        else:
            stamps.append((there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns))
    return stamps


def _small(files: Iterable[str]) -> bool:
    return sum(os.path.getsize(file) for file in files) <= IN_MEMORY


def _first_line(error: Exception, kept: str = "") -> str:
    cause = error.__cause__ or error
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        full = os.path.dirname(kept) or tempfile.gettempdir()
        variable = "HF_DATASETS_CACHE" if kept else "TMPDIR"
        return f"no space left in {full}; set {variable} to a folder with more"
    # what does not fit, and to what, stands on the lines after the first
    whole = " ".join(str(cause).split())[:300]
    return whole if whole.startswith("Couldn't cast") else in_a_line(cause)


@dataclass(frozen=True)
class Row:
    values: dict[str, Any]
    place: str
    number: int

    @contextmanager
    def located(self) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            raise DataError(f"{self.place}: {error}") from error.__cause__


_read = read


class _Stream:
    def __init__(self, source: Any, columns: list[str]) -> None:
        self.source = source
        self.columns = columns
        self.notice = source.notice

    def __iter__(self) -> Iterator[Any]:
        for i, values in enumerate(self.source.rows):
            yield Row(values, self.source.place(i), i + 1)


def read(data: DataSettings) -> Any:  # type: ignore[no-redef]

    source = _read(data, [])
    return _Stream(source, source.rows.column_names)
