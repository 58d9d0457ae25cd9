"""The rows of a data set as they are kept: where each source's begin, and what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from learners.settings import DataSettings, sources_of

T = TypeVar("T")


@dataclass
class Part:
    """The rows of one source of a data set. `weight`: its share, relative to the others' (None: by
    rows).
    """

    name: str
    weight: float | None = None
    size: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class Rows(list[T]):
    """Usable rows of a data set; the number left out, by reason; and lines for whoever starts the
    run, about files and texts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dropped: Counter[str] = Counter()
        self.notices: list[str] = []
        self.parts: list[Part] = []

    def close_part(self, part: Part) -> None:
        """End the rows of a source."""
        self.parts.append(part)
        self.dropped += part.dropped


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
