"""Scores as tests write them: a number, None (could not be scored), or the words of an error."""

from __future__ import annotations

from collections.abc import Iterable

from actors.rewards.score import Score


def scores(values: Iterable[float | str | None]) -> list[Score]:
    return [Score(error=v) if isinstance(v, str) else Score(v) for v in values]
