"""Rows of a data set, as they were written and one after the other: exactly the files that are
meant, as they are now, and where each row came from.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from learners.data.choose import Where, in_order
from learners.data.files import (
    DataFiles,
    check_file,
    files_below,
    find_files,
    format_of,
    rows_below,
    split_names,
)
from learners.data.formats import BATCH, arrow_errors, count_rows, rows_of
from learners.data.store import REMEDY, cache_folder, unwritable
from learners.errors import DataError, in_a_line
from learners.settings import DataSettings

LOOKED_AT = 1000  # rows whose columns are those of the data


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it was written, its file, and its place there: number and line, from 1 (line 0: the
    file has none). `values` has None for a column of the data that this row lacks.
    """

    values: dict[str, Any]
    file: str
    number: int
    line: int = 0

    @property
    def place(self) -> str:
        line = f" (line {self.line})" if self.line not in (0, self.number) else ""
        return f"{self.file}: row {self.number}{line}"

    @contextmanager
    def located(self) -> Iterator[None]:
        """Say in DataErrors where the row that they are about came from."""
        try:
            yield
        except DataError as error:
            raise DataError(f"{self.place}: {error}") from error.__cause__


@dataclass(frozen=True)
class FileSplit:
    """Rows of files, one file after the other."""

    files: list[str]
    field: str | None = None
    separator: str | None = None

    @property
    def holds_texts(self) -> bool:
        return format_of(self.files[0]) == "csv"

    def __iter__(self) -> Iterator[Row]:
        for file in self.files:
            for number, (line, values) in enumerate(rows_of(file, self.field, self.separator), 1):
                yield Row(values, file, number, line)

    def __len__(self) -> int:
        return sum(count_rows(file, self.field, self.separator) for file in self.files)


@dataclass(frozen=True)
class HubSplit:
    """Rows of a `datasets.Dataset`, which maps its files into memory."""

    path: str
    rows: Any
    holds_texts = False

    def __iter__(self) -> Iterator[Row]:
        number = 0
        with arrow_errors(self.path):
            for batch in self.rows.iter(batch_size=BATCH):
                for values in zip(*batch.values(), strict=True):
                    number += 1
                    yield Row(dict(zip(batch, values, strict=True)), self.path, number)

    def __len__(self) -> int:
        return len(self.rows)


Split = FileSplit | HubSplit


class Stamps:
    """Marks of files, which change when the files do, as they were at first."""

    def __init__(self, files: Iterable[str]) -> None:
        self.files = list(files)
        self.first = [self._of(file) for file in self.files]

    @staticmethod
    def _of(file: str) -> tuple[int, ...]:
        try:
            there = os.stat(file)
        except OSError:  # not there
            return ()
        return there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns

    @contextmanager
    def unchanged(self, path: str) -> Iterator[None]:
        """Raise DataError, also instead of another, when files have changed since the first."""
        problem: DataError | None = None
        try:
            yield
        except DataError as error:
            problem = error
        if [self._of(file) for file in self.files] != self.first:
            raise DataError(
                f"{path}: changed while it was read; start again when nobody writes to it"
            ) from problem
        if problem is not None:
            raise problem


class Source:
    """The rows of a data set that are used, its columns, and what a person should know of its
    files. Rows are read anew by every iteration, which raises DataError on what is no row, and when
    a file has changed since the first.
    """

    def __init__(
        self,
        data: DataSettings,
        splits: Mapping[str, Split],
        files: Iterable[str] = (),
        notice: str = "",
    ) -> None:
        self.data = data
        self.notice = notice
        self._splits = splits
        self._stamps = Stamps(files)
        with self._stamps.unchanged(data.path):
            self._parts = list(_parts(data, splits))
            self.columns = self._look()

    def __iter__(self) -> Iterator[Row]:
        with self._stamps.unchanged(self.data.path):
            yield from in_order(self._matching, self.data.shuffle, self.data.limit)

    def _matching(self) -> Iterator[Row]:
        where = self._where()
        columns = dict.fromkeys(self.columns)
        for row in self._written():
            if where is None or where.holds(row.values):
                complete = row.values.keys() >= columns.keys()
                yield row if complete else dataclasses.replace(row, values=columns | row.values)

    def _written(self) -> Iterator[Row]:
        return chain.from_iterable(
            islice(iter(self._splits[name]), start, stop) for name, start, stop in self._parts
        )

    def _where(self) -> Where | None:
        texts = any(split.holds_texts for split in self._splits.values())
        return Where(self.data.where, texts) if self.data.where else None

    def _look(self) -> list[str]:
        """Return the columns that the first rows have. Raises DataError when no row is left."""
        where = self._where()
        first = self.data.limit if self.data.shuffle is None else None
        columns: dict[str, None] = {}
        seen = 0
        left = 0
        for seen, row in enumerate(self._written(), 1):
            columns.update(dict.fromkeys(row.values))
            left += where is None or where.holds(row.values)
            if left and (seen >= LOOKED_AT or left == first):
                break
        path = self.data.path
        if not seen:
            raise DataError(f"{path}: no rows in split {self.data.split}")
        if missing := [name for name in self.data.where if name not in columns]:
            raise DataError(
                f"{path}: where names the column {missing[0]!r}; there are {', '.join(columns)}"
            )
        if where is not None and not left:
            raise DataError(f"{path}: {where.problem()}")
        return list(columns)


def _parts(
    data: DataSettings, splits: Mapping[str, Split]
) -> Iterator[tuple[str, int, int | None]]:
    """Yield the splits that are asked for, in order, each with the first of its rows and the one
    behind its last (None: all). Raises DataError on a split that is not there, or none at all.
    """
    names = list(splits) if data.split == "all" else split_names(data.split)
    if set(names) <= set(splits) and not any(mark in data.split for mark in "[("):
        yield from ((name, 0, None) for name in names)
        return
    from datasets import ReadInstruction

    counted = any(mark in data.split for mark in "%-")  # else nothing is counted from the end
    try:
        asked = ReadInstruction.from_spec(data.split)
        sizes = {name: len(rows) if counted else sys.maxsize for name, rows in splits.items()}
        parts = asked.to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        if isinstance(error, DataError):
            raise
        why = f"cannot be read (split {data.split}): {in_a_line(error)}"
        raise DataError(f"{data.path}: {why}") from None
    yield from ((part.splitname, part.from_, part.to) for part in parts)


# --- reading --------------------------------------------------------------------------------------


def read(data: DataSettings) -> Source:
    """Return the rows of a data set; needs no tokenizer.

    Raises DataError when there is nothing at the path, when it cannot be read or would have to be
    guessed, has no rows, or when a condition of `where` leaves none.
    """
    files = find_files(data.path, data.split)
    if not os.path.exists(data.path):
        _check_unused(data, "field")
        return Source(data, _on_hub(data))
    _check_unused(data, "revision")
    field = data.field
    separator = None
    if files is None:
        files, field, separator = _described(data)
    else:
        _check_unused(data, "configuration")
    if files.format != "json":
        _check_unused(data, "field")
    splits = {
        name: FileSplit(of_split, field, separator) for name, of_split in files.splits.items()
    }
    return Source(data, splits, files.all, files.notice())


def _check_unused(data: DataSettings, key: str) -> None:
    meant = {
        "field": "a JSON file",
        "revision": "a data set of the hub",
        "configuration": "a data set of the hub, or of a folder with a dataset card",
    }
    if getattr(data, key) is not None:
        raise DataError(f"{data.path}: {key} is of {meant[key]}: leave it out")


def _described(data: DataSettings) -> tuple[DataFiles, str | None, str | None]:
    """Return the files of a folder that describes itself, the key of their rows (`field`) and the
    separator of their cells, where it says these.
    """
    with _links(data) as (folder, copy), _nobody_told():
        try:
            config = _builder(data, copy, cache_dir=folder).config
        except DataError:
            raise
        except Exception as error:  # datasets raises its own, the hub's and built-in ones
            said = in_a_line(error).replace(copy, data.path)
            raise DataError(f"{data.path}: cannot be read (split {data.split}): {said}") from error
        there = {
            str(split): [os.path.relpath(file, copy) for file in files]
            for split, files in (config.data_files or {}).items()
        }
    wanted = list(there) if data.split == "all" else list(dict.fromkeys(split_names(data.split)))
    for name in wanted:
        if name not in there:
            raise DataError(f"{data.path}: no split {name}; it holds {', '.join(there)}")
    paths = {name: [os.path.join(data.path, file) for file in there[name]] for name in wanted}
    for file in chain.from_iterable(paths.values()):
        check_file(file, empty=True)
    read_files = {file for name in wanted for file in there[name]}
    left = [file for file in rows_below(data.path) if file not in read_files]
    return DataFiles(paths, data.path, left), *_options(data, config)


def _options(data: DataSettings, config: Any) -> tuple[str | None, str | None]:
    """Return the two options of a card's configuration that say how files are to be read. Raises
    DataError on others, without which the rows would be read as something else.
    """
    own = {field.name for field in dataclasses.fields(config)}
    usual = type(config)()
    known = {"name", "version", "data_dir", "data_files", "description", "features"}
    known |= {"field", "sep", "delimiter"}
    for name in sorted(own - known):
        if getattr(config, name) != getattr(usual, name):
            raise DataError(f"{data.path}: its card says {name}, which is not known here")
    separator = getattr(config, "sep", ",")
    field = data.field or getattr(config, "field", None)
    return field, None if separator == "," else separator  # as the files' names say


def _on_hub(data: DataSettings) -> dict[str, Split]:
    """Return the splits of a data set of the hub, which `datasets` keeps by revision."""
    try:
        with _nobody_told():
            builder = _builder(data, data.path)
            builder.download_and_prepare()
            rows = builder.as_dataset()
    except DataError:
        raise
    except Exception as error:  # datasets raises its own, Arrow's, the hub's and built-in ones
        if problem := _cache_problem(error):
            raise DataError(f"{data.path}: the cache {problem}") from error
        raise DataError(
            f"{data.path}: no file or folder here, and cannot be read from the hub "
            f"(split {data.split}): {' '.join(str(error.__cause__ or error).split())[:300]}"
        ) from error
    return {str(name): HubSplit(data.path, split) for name, split in rows.items()}


def _builder(data: DataSettings, source: str, **where: Any) -> Any:
    """Return what knows a data set's files. Raises DataError where it has several configurations
    and the one that is meant is not named, and whatever `datasets` raises.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset_builder(
            source, data.configuration, revision=data.revision, **where
        )
    except ValueError as error:
        if "in the cache" in str(error):  # the hub cannot be reached, and names no configurations
            raise
        names = datasets.get_dataset_config_names(source, revision=data.revision)
        named = data.configuration
        if named in names:
            raise
        what = f"no configuration {named}" if named else "several configurations"
        raise DataError(
            f"{data.path}: {what}: set configuration to one of {', '.join(names)}"
        ) from None


@contextmanager
def _links(data: DataSettings) -> Iterator[tuple[str, str]]:
    """Yield a temporary folder, and in it one of links to all files of the data's folder, whose own
    name `datasets` may take for a pattern.
    """
    try:
        temporary = tempfile.TemporaryDirectory(prefix="quatuor-data-")
    except OSError as error:
        why = error.strerror or error
        raise DataError(
            f"{data.path}: reading needs a folder for temporary files: {why}; set TMPDIR to one"
        ) from None
    with temporary as folder:
        copy = os.path.join(folder, "data")
        for file in files_below(data.path):
            link = os.path.join(copy, file)
            os.makedirs(os.path.dirname(link), exist_ok=True)
            os.symlink(os.path.abspath(os.path.join(data.path, file)), link)
        yield folder, copy


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


def _cache_problem(error: BaseException) -> str:
    """Return what is wrong with the folders in which data of the hub are kept; nothing when the
    error is another.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = [cache_folder(), HF_HUB_CACHE]
    causes = [error, error.__cause__, error.__context__]
    system = [cause for cause in causes if isinstance(cause, OSError)]
    for cause in system:
        if cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{folders[0]} is full: {cause.strerror}; {REMEDY}"
    return next((problem for f in folders if system and (problem := unwritable(f))), "")
