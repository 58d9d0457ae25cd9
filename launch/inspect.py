"""`quatuor inspect` and `--check --data`: what the rows of a recipe become, read as a run reads
them. Tokenizers and configs are loaded, models are not, and nothing is started.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from hashlib import blake2b
from pathlib import Path
from typing import Any

from actors.cluster.surroundings import ray_folder
from actors.run.resume import Resume
from actors.settings import Recipe, RLRecipe
from learners.data.store import Part, Rows, by_source
from learners.errors import UserError

TRAINED_ON = ("data", "prompts")
MEASURED_ON = ("held_out", "evaluation.prompts", "evaluation.test_prompts")
AT_ONCE = 1 << 20  # ids counted at once


def load_data(recipe: Recipe, every_model: bool = True) -> Any:
    """Read all data of a recipe and check them, as its run does; without `every_model` by the
    trained model's tokenizer and config alone. Raises UserError on what cannot serve.
    """
    if isinstance(recipe, RLRecipe):
        from actors.run_data import RunData

        return RunData.load(recipe) if every_model else RunData.read(recipe)
    from actors.supervised import SupervisedData

    return SupervisedData.load(recipe)


def check_data(recipe: Recipe, resume: Resume | None) -> list[str]:
    """Return a line for each source of a recipe's data: rows used, and those left out. Says what
    the run would say of the data, also against the checkpoint that it goes on from.

    Raises UserError on data, models' files and surroundings with which the run would not start.
    """
    data = load_data(recipe)
    from actors.begin import look_at
    from actors.run.things import Things

    look_at(data, Things(Path(recipe.run.folder), resume), recipe)
    if not recipe.cluster.address:
        ray_folder()
    return [f"{source.name}: {source.summary}" for source in sources(recipe, data)]


@dataclass(frozen=True)
class Source:
    """Usable rows of one source of a recipe's data; `name` is its key in the recipe."""

    name: str
    key: str  # of the data set it belongs to
    part: Part
    all_rows: Rows[Any]  # of the data set
    places: range  # of the source's own among them

    @property
    def rows(self) -> Iterator[Any]:
        return (self.all_rows[i] for i in self.places)

    @property
    def summary(self) -> str:
        """Rows used, and those left out by reason, in words."""
        dropped = ", ".join(f"{count} {reason}" for reason, count in self.part.dropped.items())
        return f"{self.part.size} rows used" + (f"; left out: {dropped}" if dropped else "")


def sources(recipe: Recipe, data: Any) -> Iterator[Source]:
    """Yield every source of a recipe's data that was loaded."""
    for key, rows in data.sets.items():
        written: Any = reduce(getattr, key.split("."), recipe)
        for name, _, part, places in by_source(key, written, rows):
            yield Source(name, key, part, rows, places)


def read_by_model(row: Any) -> list[Any]:
    """Return what of a row is read in one piece: both answers of a pair, else the row itself."""
    return [row.chosen, row.rejected] if hasattr(row, "chosen") else [row]


def trained_of(piece: Any) -> list[int]:
    """Return for every id of a prompt or an example whether it is learned."""
    return list(getattr(piece, "trained", bytes(len(piece.ids))))


# --- all rows, in numbers -------------------------------------------------------------------------


@dataclass
class Numbers:
    """Facts about the rows of a source, in their order."""

    lengths: array[int] = field(default_factory=lambda: array("L"))  # tokens
    numbers: array[int] = field(default_factory=lambda: array("L"))  # in their files, from 1
    digests: array[int] = field(default_factory=lambda: array("Q"))  # of their ids
    special: Counter[str] = field(default_factory=Counter)  # by token


def count(source: Source, tokenizer: Any) -> Numbers:
    """Read all rows of a source once."""
    found = Numbers()
    ids = array("L")
    for row in source.rows:
        pieces = read_by_model(row)
        found.lengths.append(max(len(piece.ids) for piece in pieces))
        found.numbers.append(row.row)
        digest = blake2b(digest_size=8)
        for piece in pieces:
            digest.update(array("L", piece.ids).tobytes() + b"|")
            ids.extend(piece.ids)
        found.digests.append(int.from_bytes(digest.digest()))
        if len(ids) >= AT_ONCE:
            _count_special(ids, tokenizer, found.special)
            ids = array("L")
    _count_special(ids, tokenizer, found.special)
    return found


def _count_special(ids: Sequence[int], tokenizer: Any, counts: Counter[str]) -> None:
    import numpy as np

    every = np.bincount(np.asarray(ids, dtype=np.int64))
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for i in sorted(added | set(tokenizer.all_special_ids)):
        if i < len(every) and every[i]:
            counts[tokenizer.convert_ids_to_tokens(i)] += int(every[i])


def repeated(found: Numbers) -> list[int]:
    """Return the numbers of rows that are, id for id, an earlier one of their source."""
    import numpy as np

    _, first = np.unique(np.asarray(found.digests), return_index=True)
    again: Any = np.ones(len(found.digests), bool)
    again[first] = False
    return [found.numbers[i] for i in np.flatnonzero(again)]


def also_in(found: Numbers, other: Numbers) -> list[int]:
    """Return the numbers of the first's rows that are, id for id, rows of the other."""
    import numpy as np

    both = np.isin(np.asarray(found.digests), np.asarray(other.digests))
    return [found.numbers[i] for i in np.flatnonzero(both)]


def buckets(lengths: Sequence[int], most: int = 8) -> list[tuple[int, int, int]]:
    """Return a histogram of lengths: shortest and longest of each bucket, and the rows in it."""
    import numpy as np

    every = np.asarray(lengths)
    low = int(every.min())
    width = -(-(int(every.max()) - low + 1) // most)
    rows = np.bincount((every - low) // width)
    return [(low + i * width, low + (i + 1) * width - 1, int(n)) for i, n in enumerate(rows)]


# --- some rows, as they are -----------------------------------------------------------------------


def first_rows(source: Source, rows: int) -> Iterator[Any]:
    """Yield the first usable rows of a source."""
    return (source.all_rows[i] for i in source.places[:rows])


def as_json(every: Sequence[Source], rows: int) -> dict[str, Any]:
    """Return the first rows of all sources, and what was dropped, as plain values."""
    return {
        "sources": [
            {
                "name": source.name,
                "rows": [_row_as_json(row) for row in first_rows(source, rows)],
                "dropped": dict(source.part.dropped),
            }
            for source in every
        ]
    }


def _row_as_json(row: Any) -> dict[str, Any]:
    pieces = [
        {"text": piece.text, "ids": list(piece.ids), "trained": trained_of(piece)}
        for piece in read_by_model(row)
    ]
    if len(pieces) == 1:
        return {"row": row.row, **pieces[0]}
    return {"row": row.row, "chosen": pieces[0], "rejected": pieces[1]}


def inspect_recipe(recipe: Recipe, rows: int, json_file: Path | None) -> None:
    """Show a recipe's data on the terminal; write its first rows as JSON if asked. Of its models
    the trained one alone must be there. Raises UserError on data that a run would refuse.
    """
    data = load_data(recipe, every_model=False)
    every = list(sources(recipe, data))
    if json_file is not None:
        try:
            json_file.write_text(
                json.dumps(as_json(every, rows), ensure_ascii=False) + "\n", encoding="utf-8"
            )
        except OSError as error:
            raise UserError(f"--json: {json_file} cannot be written: {error.strerror}") from None
    from launch.inspect_screen import show

    show(every, data, rows)
