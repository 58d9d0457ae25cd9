"""The rows of a data set as they are kept: where each source's begin, and what was left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TypeVar

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
