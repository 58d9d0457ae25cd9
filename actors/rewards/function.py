"""Scores from a user's Python function."""

from __future__ import annotations

import inspect
import math
import reprlib
import time
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import Any

from actors.functions import load_function
from actors.rewards.contained import contained, is_interrupt, kind_and_words
from actors.rewards.score import Score
from actors.rollouts.requests import Sample

PATIENCE_S = 60.0  # spent in calls for single responses, none of which has succeeded


class FunctionReward:
    """Scores from a user's function `f(prompts, responses, **columns) -> list[float | None]`, in a
    process of its own.

    `columns` are the data's answer columns and `finish_reasons`; the function gets those its
    signature accepts. None marks a response that could not be scored; a number that is not finite
    raises an alarm. Whatever else goes wrong costs the responses at fault: when the function
    raises, or gives another number of scores, it is called again for one response at a time. So
    that a server that is away does not take a step's whole time, this ends after `patience_s`
    without any success.
    """

    def __init__(self, function: str, patience_s: float = PATIENCE_S) -> None:
        self.name = function
        self.function = load_function(function)
        self.patience_s = patience_s
        parameters = inspect.signature(self.function).parameters
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.accepted = set(parameters)

    def scores(self, samples: Sequence[Sample]) -> list[Score]:
        """Return one score per sample: without a value where the function gave None, with an error
        where it failed.
        """
        if not samples:
            return []
        try:
            with contained():
                given = one_each(self._call(samples), len(samples))
                return [self._score(value) for value in given]
        except BaseException as error:  # sys.exit() in user code is a failure like any other
            if is_interrupt(error):
                raise
            if len(samples) == 1:
                return [Score(error=kind_and_words(error))]
        return self._one_by_one(samples)

    def _call(self, samples: Sequence[Sample]) -> Any:
        names = {name for c in samples for name in c.columns}
        columns = {name: [c.columns.get(name) for c in samples] for name in names}
        columns["finish_reasons"] = [c.finish_reason for c in samples]
        return self.function(
            [c.prompt for c in samples],
            [c.response for c in samples],
            **{k: v for k, v in columns.items() if self.takes_all or k in self.accepted},
        )

    def _score(self, value: Any) -> Score:
        try:
            return Score(None if value is None else float(value))
        except Exception as error:  # what is no number may raise anything
            shown = reprlib.repr(value)
            return Score(error=f"{self.name} gave {shown}, not a number: {kind_and_words(error)}")

    def _one_by_one(self, samples: Sequence[Sample]) -> list[Score]:
        """Ask for every response alone; after `patience_s` of failures only, for no further one."""
        began = time.monotonic()
        scores: dict[int, Score] = {}
        succeeded = False
        # neighbours answer the same prompt, and a prompt that is too hard is not a server away
        stride = math.isqrt(len(samples))
        for i in [i for first in range(stride) for i in range(first, len(samples), stride)]:
            (scores[i],) = self.scores([samples[i]])
            succeeded = succeeded or scores[i].error is None
            spent = time.monotonic() - began
            if not succeeded and spent > self.patience_s:
                failed = f"the first {len(scores)} asked alone failed for {spent:.0f} s"
                rest = Score(error=f"{scores[i].error} (not asked again: {failed})")
                return [scores.get(j, rest) for j in range(len(samples))]
        return [scores[j] for j in range(len(samples))]


def one_each(given: Any, count: int) -> list[Any]:
    """Return what a function gave as a list of `count` entries. Raises TypeError where it has no
    order, ValueError where there are fewer or more.
    """
    unordered = isinstance(given, str | bytes | Mapping | AbstractSet)
    if unordered or not isinstance(given, Iterable):
        kind = type(given).__name__
        raise TypeError(f"returned a {kind}, not a list with one score for each response")
    values = list(islice(given, count + 1))  # a generator may never end
    if len(values) != count:
        found = len(values) if len(values) < count else f"more than {count}"
        raise ValueError(f"returned {found} scores for {count} responses")
    return values
