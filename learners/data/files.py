"""Finding the files that a data set on disk is made of. Names are names, never patterns; what would
have to be guessed is refused. Standard library alone: recipes are checked with it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from learners.errors import DataError

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
READABLE = ", ".join(FORMATS)
# rows too, of formats that are not read
OTHER_FORMATS = (".arrow", ".avro", ".csv", ".feather", ".orc", ".tsv")
PACKED = (".bz2", ".gz", ".xz", ".zst")
# what lies beside rows: descriptions by `datasets`, and a model's
NOT_ROWS = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json")
DESCRIPTIONS = (*NOT_ROWS[1:], "state.json", ".huggingface.yaml")

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
        return FORMATS[_suffix(self.all[0])]

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
        return None if describes_itself(name) else _of_folder(name, split)
    if os.path.isfile(name):
        _check_file(name)
        return DataFiles({split_names(split)[0]: [name]})
    if os.path.islink(name):
        raise DataError(f"{name}: a link to {os.readlink(name)}, which is not there")
    if os.path.exists(name):
        raise DataError(f"{name}: neither a file nor a folder")
    if _suffix(name) in FORMATS or not HUB_NAME.fullmatch(name):
        raise DataError(f"{name}: no such file or folder")
    return None


def split_names(split: str) -> list[str]:
    """Return the names in a split such as train[:100]+test."""
    return [re.split(r"[\[(]", part)[0].strip() for part in split.split("+")]


def describes_itself(folder: str) -> bool:
    """Tell whether a folder says in the words of `datasets` what it holds: by a dataset card with
    `configs`, or a description that `datasets` wrote.
    """
    there = {name for name in DESCRIPTIONS if os.path.isfile(os.path.join(folder, name))}
    if "dataset_dict.json" in there or {"dataset_info.json", "state.json"} <= there:
        raise DataError(
            f"{folder}: written by save_to_disk, which load_from_disk alone reads: write it with "
            "to_parquet or to_json"
        )
    if there - {"state.json"}:
        return True
    try:
        with open(os.path.join(folder, "README.md"), encoding="utf-8") as card:
            text = card.read()
    except (OSError, UnicodeDecodeError):  # no card, or none that `datasets` could read
        return False
    header = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    return header is not None and bool(re.search(r"^configs\s*:", header[1], re.MULTILINE))


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
        _check_one_format(folder, files, {_suffix(file) for file in files})
    every = [file for files in found.values() for file in files]
    _check_one_format(folder, every, {FORMATS[_suffix(file)] for file in every})
    paths = {n: [os.path.join(folder, file) for file in files] for n, files in found.items()}
    for files in paths.values():
        for file in files:
            _check_file(file, empty=True)
    left = [file for file in splits if not splits[file].intersection(wanted)]
    return DataFiles(paths, folder, left)


def _splits_of_files(folder: str) -> dict[str, set[str]]:
    """Return the splits that each file of rows belongs to. Raises DataError when some carry the
    name of a split and others do not.
    """
    rows = rows_below(folder)
    if not any(_suffix(file) in FORMATS for file in rows):
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
    bare, suffix = os.path.splitext(name)
    rows = (*FORMATS, *OTHER_FORMATS)
    packed = suffix.lower() in PACKED and _suffix(bare) in rows
    hidden = name.startswith(".")
    return not hidden and name not in NOT_ROWS and (packed or suffix.lower() in rows)


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
    if not formats.issubset((*FORMATS, *FORMATS.values())):
        raise DataError(f"{folder}: {some(files)} must be one of {READABLE}")


def _check_file(file: str, empty: bool = False) -> None:
    """Raise DataError on what nobody could read: another format, a file that is not there or is
    none, and parquet that is not.
    """
    if _suffix(file) not in FORMATS:
        raise DataError(f"{file}: must be one of {READABLE}, a folder of those, or a hub name")
    if os.path.exists(file) and not os.path.isfile(file):  # opening a pipe would wait for ever
        raise DataError(f"{file}: not a file")
    try:
        with open(file, "rb") as opened:
            head = opened.read(4)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    if not head and not empty:
        raise DataError(f"{file}: the file is empty")
    if _suffix(file) == ".parquet" and head != b"PAR1":
        raise DataError(f"{file}: not a parquet file, whatever its name says")


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def some(files: Sequence[str]) -> str:
    """Return names for one line: at most five of them, and how many more there are."""
    shown = ", ".join(str(file) for file in files[:5])
    return shown if len(files) <= 5 else f"{shown} and {len(files) - 5} more"


def read_and_left(folder: str, read: Sequence[str], left: Sequence[str]) -> str:
    """Return one line about the files of a folder, given as relative paths."""
    return f"{folder}: read {some(read)}" + (f"; not read: {some(left)}" if left else "")


# --- JSON -----------------------------------------------------------------------------------------


def json_lines(file: str, empty: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a file of JSON lines, each with the number of its line, from 1; nothing
    when the file is one JSON value over many lines.

    Raises DataError with the number of a line that is no row, and on a file without rows unless it
    may be empty.
    """
    for number, line in numbered_lines(file, empty):
        yield number, _row(file, number, line)


def numbered_lines(file: str, empty: bool = False) -> Iterator[tuple[int, str]]:
    """Yield the lines of `json_lines` as text, without looking into them."""
    found = False
    try:
        with open(file, encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                if not found and _begins_one_value(file, line):
                    return
                found = True
                yield number, line
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    if not (found or empty):
        raise DataError(f"{file}: has no rows")


def _begins_one_value(file: str, line: str) -> bool:
    return line.lstrip().startswith("[") or (_suffix(file) == ".json" and line.strip() == "{")


def _is_text(line: str) -> bool:
    """Tell whether all bytes of a line were UTF-8: others were read as lone surrogates."""
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


def _row(file: str, number: int, line: str) -> dict[str, Any]:
    if not _is_text(line):
        raise DataError(f"{file}:{number}: cannot be read as UTF-8 text")
    try:
        row = json.loads(line.rstrip())
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{file}:{number}: half a character (\\ud800 to \\udfff stand in pairs)"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}:{number}: not a line of JSON: {error.msg} at column {error.colno}"
        ) from None
    except (ValueError, RecursionError):
        raise DataError(f"{file}:{number}: not a line of JSON") from None
    if not isinstance(row, dict):
        raise DataError(f'{file}:{number}: not a row of columns, such as {{"prompt": "..."}}')
    return row


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
