"""The rows of a data set as they are kept, any number of them in bounded memory."""

from __future__ import annotations

import mmap
import os
import pickle
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any, TypeVar, overload

from learners.errors import UserError
from learners.settings import DataSettings, sources_of

T = TypeVar("T")
AS_OBJECTS = 10_000  # rows at the end of `Rows` that are Python objects; all before are encoded


@dataclass
class Part:
    """The rows of one source of a data set. `weight`: its share, relative to the others' (None: by
    rows).
    """

    name: str
    weight: float | None = None
    size: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class Rows(Sequence[T]):
    """Usable rows of a data set; the number left out, by reason; and lines for whoever starts the
    run, about files and texts.

    Memory holds the objects of fewer than `AS_OBJECTS` rows, the last ones. Those before lie in an
    Arrow file that is mapped into memory and read row by row: what comes back equals what was
    appended, but is another object each time. The file has no name, so nothing is left of it when
    the process ends, however that ends.
    """

    def __init__(self, rows: Iterable[T] = ()) -> None:
        self.dropped: Counter[str] = Counter()
        self.notices: list[str] = []
        self.parts: list[Part] = []
        self._last: list[T] = []
        self._encoded = _EncodedRows()
        self.extend(rows)

    def append(self, row: T) -> None:
        """Add a row. Raises UserError when there is no room for the file of encoded rows."""
        self._last.append(row)
        if len(self._last) == AS_OBJECTS:
            self._encoded.add(self._last)
            self._last = []

    def extend(self, rows: Iterable[T]) -> None:
        """Add rows, as `append` does."""
        for row in rows:
            self.append(row)

    def close_part(self, part: Part) -> None:
        """End the rows of a source."""
        self.parts.append(part)
        self.dropped += part.dropped

    def __len__(self) -> int:
        return len(self._encoded) + len(self._last)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(index)
        if position < len(self._encoded):
            return self._encoded[position]
        return self._last[position - len(self._encoded)]

    def __iter__(self) -> Iterator[T]:
        return (self[i] for i in range(len(self)))


def by_source(
    key: str, data: DataSettings | tuple[DataSettings, ...], rows: Rows[Any]
) -> Iterator[tuple[str, DataSettings, Part, range]]:
    """Yield for every source of the data set under a recipe's `key` its own key, its settings, its
    part, and the places of its rows among all.
    """
    start = 0
    for i, (source, part) in enumerate(zip(sources_of(data), rows.parts, strict=True)):
        name = f"{key}.{i}" if isinstance(data, tuple) else key
        yield name, source, part, range(start, start + part.size)
        start += part.size


class _EncodedRows:
    """Rows as bytes, in batches of `AS_OBJECTS`, in an Arrow stream without a name."""

    def __init__(self) -> None:
        self._folder = ""
        self._file: Any = None
        self._writer: Any = None
        self._batches: list[Any] = []  # of what has been mapped
        self._written = 0  # batches

    def __len__(self) -> int:
        return self._written * AS_OBJECTS

    def add(self, rows: list[Any]) -> None:
        import pyarrow

        column = pyarrow.array([pickle.dumps(row, -1) for row in rows], pyarrow.large_binary())
        batch = pyarrow.record_batch([column], ["row"])
        if self._file is None:
            self._folder, self._file = _nameless_file()
            self._writer = pyarrow.ipc.new_stream(self._file, batch.schema)
        try:
            self._writer.write_batch(batch)
            self._file.flush()
        except OSError as error:
            why = error.strerror or error
            with suppress(OSError):  # it would try again to write
                self._file.close()
            raise UserError(f"rows cannot be kept in {self._folder}: {why}; {REMEDY}") from None
        self._written += 1

    def __getitem__(self, position: int) -> Any:
        batch, row = divmod(position, AS_OBJECTS)
        if batch >= len(self._batches):
            self._map()
        return pickle.loads(self._batches[batch].column(0)[row].as_buffer())

    def _map(self) -> None:
        """Map into memory what has been written until now."""
        import pyarrow

        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        stream = pyarrow.ipc.open_stream(pyarrow.py_buffer(mapped))
        self._batches = [stream.read_next_batch() for _ in range(self._written)]


def by_part(
    parts: Sequence[Part], values: Sequence[T], per_row: int = 1
) -> Iterator[tuple[Part, Sequence[T]]]:
    """Yield the parts of a data set, each with its own of the values, `per_row` for each row."""
    start = 0
    for part in parts:
        end = start + part.size * per_row
        yield part, values[start:end]
        start = end


# --- where it lies --------------------------------------------------------------------------------

REMEDY = "set HF_HOME (or HF_DATASETS_CACHE alone) to a folder with room that can be written"


def cache_folder() -> str:
    """Return the folder in which `datasets` keeps its own, without importing it for that."""
    from huggingface_hub.constants import HF_HOME

    folder = os.environ.get("HF_DATASETS_CACHE") or os.path.join(HF_HOME, "datasets")
    return os.path.expanduser(folder)


def unwritable(folder: str) -> str:
    """Return why nothing can be written in a folder, in one line; nothing when it can."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror or error}; {REMEDY}"
    return ""


def _nameless_file() -> tuple[str, IO[bytes]]:
    """Return a folder, that of `datasets` or, where nothing can be written there, the one for
    temporary files, and a file in it that nobody else sees.
    """
    cache = cache_folder()
    problem = unwritable(cache)
    try:
        folder = tempfile.gettempdir() if problem else cache
        return folder, tempfile.TemporaryFile(dir=folder)
    except OSError:  # there is no such folder at all
        raise UserError(f"the cache {problem}") from None
