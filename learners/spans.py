"""Seconds of the parts of a phase, measured where they pass: in any process of a run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Span(NamedTuple):
    """One part: its name, its beginning in Unix seconds, and how many seconds it took."""

    name: str
    started: float
    seconds: float


class Stopwatch:
    """Times parts, and keeps them until they are taken."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what is inside, also where it fails."""
        started = time.time()
        clock = time.perf_counter()
        try:
            yield
        finally:
            self.spans.append(Span(name, started, time.perf_counter() - clock))

    def add(self, spans: Iterable[Span]) -> None:
        """Keep what another process timed."""
        self.spans.extend(spans)

    def take(self) -> list[Span]:
        """Return the spans so far, and forget them."""
        spans = self.spans
        self.spans = []
        return spans
