"""Choosing the rows that are used, and their order: conditions on columns, shuffling, limit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from learners.data.store import Rows

T = TypeVar("T")


class Where:
    """Conditions on the values of columns, all of which must hold, and how many rows passed them.

    Values are compared as they are written: the text "1" is not the number 1, nor is true. In files
    that hold `texts` alone (CSV) a number or truth value is met by its text, null by no text.
    """

    def __init__(self, conditions: Mapping[str, Any], texts: bool = False) -> None:
        self.texts = texts
        self.wanted = {
            column: value if isinstance(value, list) else [value]
            for column, value in conditions.items()
        }
        self.passed = [0] * (len(self.wanted) + 1)  # rows that met the first n conditions

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Tell whether a row meets all conditions; a column that it lacks is null."""
        self.passed[0] += 1
        for n, (column, wanted) in enumerate(self.wanted.items(), 1):
            value = row.get(column)
            if not any(self._same(value, one) for one in wanted):
                return False
            self.passed[n] += 1
        return True

    def _same(self, value: Any, wanted: Any) -> bool:
        if self.texts and isinstance(value, str) and not isinstance(wanted, str):
            text = "" if wanted is None else json.dumps(wanted)
            return (value.lower() if isinstance(wanted, bool) else value) == text
        return bool(isinstance(value, bool) == isinstance(wanted, bool) and value == wanted)

    def problem(self) -> str:
        """Return which condition no row met."""
        n = self.passed.index(0)
        said = [f"{column}: {_written(wanted)}" for column, wanted in self.wanted.items()]
        others = f" with {' and '.join(said[: n - 1])}" if n > 1 else ""
        return f"where leaves no row: none of {self.passed[n - 1]} rows{others} has {said[n - 1]}"


def _written(wanted: list[Any]) -> str:
    return json.dumps(wanted if len(wanted) > 1 else wanted[0], ensure_ascii=False)


def in_order(rows: Callable[[], Iterable[T]], seed: int | None, limit: int | None) -> Iterable[T]:
    """Return the first `limit` rows (None: all), in an order that is random but the same for a
    seed; None keeps the order, and reads no further than the limit.

    What is shuffled is kept as `Rows` are, which bounds the memory; with a limit, `rows` is called
    twice: to count, and to keep just those chosen.
    """
    if seed is None:
        return islice(rows(), limit)
    if limit is None:
        kept = _kept(rows())
        return _taken(kept, _permuted(len(kept), seed))
    order = _permuted(sum(1 for _ in rows()), seed)[:limit]
    places = {position: place for place, position in enumerate(sorted(order))}
    kept = _kept(row for position, row in enumerate(rows()) if position in places)
    return _taken(kept, [places[position] for position in order])


def _permuted(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def _kept(rows: Iterable[T]) -> Rows[T]:
    kept: Rows[T] = Rows()
    kept.extend(rows)
    return kept


def _taken(rows: Sequence[T], order: Sequence[int]) -> Iterator[T]:
    return (rows[i] for i in order)
