"""Finding the files that a data set on disk is made of. Names are names, never patterns; what would
have to be guessed is refused. Standard library alone: recipes are checked with it.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TextIO

from learners.errors import DataError, in_a_line

FORMATS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
READABLE = ", ".join(FORMATS)
# rows too, of formats that are not read
OTHER_FORMATS = (".avro", ".orc")
# how a packed file begins, by the second suffix of its name: .jsonl.gz
PACKED = {
    ".gz": b"\x1f\x8b",
    ".bz2": b"BZh",
    ".xz": b"\xfd7zXZ\x00",
    ".zst": b"\x28\xb5\x2f\xfd",
}
# and how files of the formats begin that are no text, and are not packed but inside
BEGINS = {"parquet": (b"PAR1",), "arrow": (b"ARROW1", b"\xff\xff\xff\xff")}
# what lies beside rows: descriptions by `datasets`, and a model's
NOT_ROWS = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json")
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", ".huggingface.yaml")

# The names that `datasets` knows splits by, as whole words of a file's or folder's name.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "val": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
BETWEEN_WORDS = re.compile(r"[-._ 0-9]+")
SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class DataFiles:
    """The files that are read, by the split they belong to and in the order of their rows."""

    splits: dict[str, list[str]]
    folder: str = ""  # empty when one file was named
    left: list[str] = field(default_factory=list)  # not read, relative to the folder

    @property
    def all(self) -> list[str]:
        return [file for files in self.splits.values() for file in files]

    @property
    def format(self) -> str:
        """Return json, csv, parquet or arrow."""
        return format_of(self.all[0])

    def notice(self) -> str:
        """Return which files of a folder are read and which not; nothing when a file was named."""
        if not self.folder:
            return ""
        read = [os.path.relpath(file, self.folder) for file in self.all]
        return read_and_left(self.folder, read, self.left)


def find_files(name: str, split: str) -> DataFiles | None:
    """Return the files of a split. None where `datasets` knows them: on the hub, and in a folder
    that describes itself (`describes_itself`).

    Raises DataError when there is nothing to read, or when it would have to be guessed what to
    read.
    """
    if os.path.isdir(name):
        if saved := _saved_to_disk(name, split):
            return saved
        return None if describes_itself(name) else _of_folder(name, split)
    if os.path.isfile(name):
        check_file(name)
        return DataFiles({split_names(split)[0]: [name]})
    if os.path.islink(name):
        raise DataError(f"{name}: a link to {os.readlink(name)}, which is not there")
    if os.path.exists(name):
        raise DataError(f"{name}: neither a file nor a folder")
    if format_of(name) or not HUB_NAME.fullmatch(name):
        raise DataError(f"{name}: no such file or folder")
    return None


def split_names(split: str) -> list[str]:
    """Return the names in a split such as train[:100]+test."""
    return [re.split(r"[\[(]", part)[0].strip() for part in split.split("+")]


def describes_itself(folder: str) -> bool:
    """Tell whether a folder says in the words of `datasets` what it holds: by a dataset card with
    `configs`, or a description that `datasets` wrote.
    """
    if any(os.path.isfile(os.path.join(folder, name)) for name in DESCRIPTIONS):
        return True
    try:
        with open(os.path.join(folder, "README.md"), encoding="utf-8") as card:
            text = card.read()
    except (OSError, UnicodeDecodeError):  # no card, or none that `datasets` could read
        return False
    header = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    return header is not None and bool(re.search(r"^configs\s*:", header[1], re.MULTILINE))


def _saved_to_disk(folder: str, split: str) -> DataFiles | None:
    """Return the files of a folder that `save_to_disk` wrote, a data set or several splits; None
    when it is none.
    """
    if (several := read_json(Path(folder, "dataset_dict.json"))) is None:
        if not all(Path(folder, name).is_file() for name in ("dataset_info.json", "state.json")):
            return None
        return DataFiles({split_names(split)[0]: _saved_files(folder)}, folder)
    there = [str(name) for name in several.get("splits", ())]
    wanted = there if split == "all" else list(dict.fromkeys(split_names(split)))
    for name in wanted:
        if name not in there:
            raise DataError(f"{folder}: no split {name}; it holds {', '.join(there)}")
    paths = {name: _saved_files(os.path.join(folder, name)) for name in there}
    left = [os.path.relpath(f, folder) for name in there if name not in wanted for f in paths[name]]
    return DataFiles({name: paths[name] for name in wanted}, folder, left)


def _saved_files(folder: str) -> list[str]:
    state = read_json(Path(folder, "state.json")) or {}
    named = state.get("_data_files") or ()
    files = [os.path.join(folder, str(file["filename"])) for file in named]
    if not files:
        raise DataError(
            f"{folder}: written by save_to_disk, but its state.json names no files: write it again"
        )
    for file in files:
        check_file(file, empty=True)
    return files


def rows_below(folder: str) -> list[str]:
    """Return the paths, relative to the folder and sorted, of all files of rows below it."""
    return [file for file in files_below(folder) if _holds_rows(os.path.basename(file))]


def files_below(folder: str) -> list[str]:
    """Return the paths, relative to the folder and sorted, of all files below it, except in hidden
    folders. Links are followed, circles are not.
    """
    found: list[str] = []
    inside_of: dict[str, set[str]] = {}  # by folder: where it really lies, and all above it
    top = os.path.normpath(folder)
    for here, folders, files in os.walk(top, followlinks=True, onerror=_unreadable):
        real = os.path.realpath(here)
        above = inside_of.get(os.path.dirname(here), set())
        if real in above:
            folders.clear()
            continue
        inside_of[here] = above | {real}
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        inside = os.path.relpath(here, top)
        found += [os.path.normpath(os.path.join(inside, name)) for name in files]
    return sorted(found)


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}")


def _of_folder(folder: str, split: str) -> DataFiles:
    """Return the files of a split in a folder: those that carry its name, or, where no file carries
    the name of any, all of them as split train.
    """
    splits = _splits_of_files(folder)
    there = sorted(set().union(*splits.values()))
    wanted = there if split == "all" else list(dict.fromkeys(split_names(split)))
    found = {name: [file for file in splits if name in splits[file]] for name in wanted}
    for name, files in found.items():
        if not files:
            have = "; ".join(f"{s}: {some([f for f in splits if s in splits[f]])}" for s in there)
            raise DataError(f"{folder}: no file is of split {name}; it holds {have}")
        for file in files:
            if len(splits[file]) > 1:
                raise DataError(
                    f"{folder}: {file} carries the names of the splits "
                    f"{', '.join(sorted(splits[file]))}: name the file to read as the path, or "
                    "rename it"
                )
        _check_one_format(folder, files, {suffix_of(file) for file in files})
    every = [file for files in found.values() for file in files]
    _check_one_format(folder, every, {format_of(file) for file in every})
    paths = {n: [os.path.join(folder, file) for file in files] for n, files in found.items()}
    for files in paths.values():
        for file in files:
            check_file(file, empty=True)
    left = [file for file in splits if not splits[file].intersection(wanted)]
    return DataFiles(paths, folder, left)


def _splits_of_files(folder: str) -> dict[str, set[str]]:
    """Return the splits that each file of rows belongs to. Raises DataError when some carry the
    name of a split and others do not.
    """
    rows = rows_below(folder)
    if not any(format_of(file) for file in rows):
        raise DataError(f"{folder}: the folder holds no {READABLE} files")
    splits = {file: named_splits(file) for file in rows}
    nameless = [file for file in rows if not splits[file]]
    if len(nameless) == len(rows):
        return {file: {"train"} for file in rows}
    if nameless:
        raise DataError(
            f"{folder}: {some([f for f in rows if splits[f]])}: named after a split; "
            f"{some(nameless)}: not. Name the file to read as the path, give each the name of its "
            "split, or move it"
        )
    return splits


def _holds_rows(name: str) -> bool:
    """Tell whether a name is that of a file of rows, in a format that is read or in another."""
    rows = os.path.splitext(suffix_of(name))[0]
    hidden = name.startswith(".")
    return not hidden and name not in NOT_ROWS and rows in (*FORMATS, *OTHER_FORMATS)


def named_splits(file: str) -> set[str]:
    """Return the splits whose names are words of a relative path."""
    if shard := SHARD.fullmatch(PurePath(file).as_posix()):
        return {shard.group(1)}
    words = (word for part in PurePath(file).parts for word in BETWEEN_WORDS.split(part.lower()))
    return {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}


def _check_one_format(folder: str, files: Sequence[str], formats: set[str]) -> None:
    if len(formats) > 1:
        raise DataError(
            f"{folder}: {some(files)} are of different formats ({', '.join(sorted(formats))}), "
            "perhaps the same rows twice: name the file to read as the path, or move the others"
        )
    if not all(format_of(file) for file in files):
        raise DataError(f"{folder}: {some(files)} must be one of {READABLE}")


def check_file(file: str, empty: bool = False) -> None:
    """Raise DataError on what nobody could read: another format, a file that is not there or is
    none, and one that its first bytes show not to be what its name says.
    """
    if not (of := format_of(file)):
        raise DataError(
            f"{file}: must be one of {READABLE} (text also with {', '.join(PACKED)}), a folder of "
            "those, or a hub name"
        )
    if os.path.exists(file) and not os.path.isfile(file):  # opening a pipe would wait for ever
        raise DataError(f"{file}: not a file")
    try:
        with open(file, "rb") as opened:
            head = opened.read(8)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    if not head and not empty:
        raise DataError(f"{file}: the file is empty")
    kind = os.path.splitext(suffix_of(file))[1] or of
    begins = (PACKED[kind],) if kind in PACKED else BEGINS.get(kind, (b"",))
    if (head or of in BEGINS) and not head.startswith(begins):
        name = "an Arrow" if kind == "arrow" else f"a {kind}"
        raise DataError(f"{file}: not {name} file, whatever its name says")


def format_of(file: str) -> str:
    """Return the format that a file's name says, as in `FORMATS`, also of a packed one; nothing
    when it is none that is read.
    """
    suffix, packing = os.path.splitext(suffix_of(file))
    of = FORMATS.get(suffix, "")
    return "" if packing and of in BEGINS else of


def suffix_of(file: str) -> str:
    """Return a file's suffix, with that of its packing: .jsonl.gz."""
    bare, suffix = os.path.splitext(file.lower())
    return os.path.splitext(bare)[1] + suffix if suffix in PACKED else suffix


def some(files: Sequence[str]) -> str:
    """Return names for one line: at most five of them, and how many more there are."""
    shown = ", ".join(str(file) for file in files[:5])
    return shown if len(files) <= 5 else f"{shown} and {len(files) - 5} more"


def read_and_left(folder: str, read: Sequence[str], left: Sequence[str]) -> str:
    """Return one line about the files of a folder, given as relative paths."""
    return f"{folder}: read {some(read)}" + (f"; not read: {some(left)}" if left else "")


# --- text -----------------------------------------------------------------------------------------


@contextmanager
def opened_text(file: str, newline: str | None = None) -> Iterator[TextIO]:
    """Open a file of text, packed or not, without its byte-order mark; bytes that are no UTF-8
    become lone surrogates. Raises DataError when it cannot be read or unpacked.
    """
    try:
        with open(file, "rb") as raw:
            unpacked = _unpacked(raw, _packing(file, raw))
            with io.TextIOWrapper(unpacked, "utf-8-sig", "surrogateescape", newline) as text:
                yield text
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{file}: cannot be unpacked: {in_a_line(error)}") from None
    except OSError as error:  # what is damaged has no error number
        what = "be unpacked" if error.errno is None else "be read"
        raise DataError(f"{file}: cannot {what}: {error.strerror or in_a_line(error)}") from None


def _packing(file: str, raw: io.BufferedReader) -> str:
    """Return how a file is packed, by its name or, where that does not say, its first bytes."""
    if named := os.path.splitext(suffix_of(file))[1]:
        return named
    head = raw.peek(8)  # a text may begin with BZh
    return next((p for p, begin in PACKED.items() if p != ".bz2" and head.startswith(begin)), "")


def _unpacked(raw: BinaryIO, packing: str) -> Any:
    if packing == ".zst":
        import pyarrow  # Python's own comes with 3.14

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    readers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return readers[packing](raw) if packing else raw


def json_lines(file: str, empty: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a file of JSON lines, each with the number of its line, from 1; nothing
    when the file is one JSON value over many lines.

    Raises DataError with the number of a line that is no row, and on a file without rows unless it
    may be empty.
    """
    found = False
    with opened_text(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if not found and begins_one_value(file, line):
                return
            found = True
            for row in _rows(file, number, line):
                yield number, row
    if not (found or empty):
        raise DataError(f"{file}: has no rows")


def begins_one_value(file: str, line: str) -> bool:
    """Tell whether the first line of a file begins a JSON value that goes on over many."""
    if line.lstrip().startswith("["):
        return True
    if not suffix_of(file).startswith(".json") or suffix_of(file).startswith(".jsonl"):
        return False
    try:
        _DECODER.raw_decode(line.strip())
    except (ValueError, RecursionError):
        return True
    return False


_DECODER = json.JSONDecoder()


def is_text(line: str) -> bool:
    """Tell whether all bytes of a text were UTF-8: others were read as lone surrogates."""
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


def _rows(file: str, number: int, line: str) -> Iterator[dict[str, Any]]:
    """Yield the row of a line; several where several stand on it."""
    where = f"{file}:{number}"
    if not is_text(line):
        raise DataError(f"{where}: cannot be read as UTF-8 text")
    line = line.rstrip()
    end = len(line) - len(line.lstrip())
    while end < len(line):
        try:
            row, end = _DECODER.raw_decode(line, end)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not a line of JSON: {error.msg} at column {error.colno}"
            ) from None
        except (ValueError, RecursionError):
            raise DataError(f"{where}: not a line of JSON") from None
        yield checked_row(where, row, escapes="\\u" in line)
        while line[end : end + 1].isspace():
            end += 1


def checked_row(where: str, row: Any, escapes: bool = True) -> dict[str, Any]:
    """Return a row of JSON. Raises DataError, which begins with `where`, on what is no object, and
    on half a character, which only `escapes` can write.
    """
    if escapes and not is_text(json.dumps(row, ensure_ascii=False)):
        raise DataError(f"{where}: half a character (\\ud800 to \\udfff stand in pairs)")
    if not isinstance(row, dict):
        raise DataError(f'{where}: not a row of columns, such as {{"prompt": "..."}}')
    return row


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
