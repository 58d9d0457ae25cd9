"""Scores from a user's Python function."""

from __future__ import annotations

import inspect
import math
import reprlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import Any

from actors.functions import load_function
from actors.rewards.contained import contained, is_interrupt, kind_and_words
from actors.rewards.score import Score
from actors.rollouts.sample import Sample

PATIENCE_S = 60.0  # spent in calls for single responses, none of which has succeeded
SHARE = 0.5  # of the deadline, after which no further call begins


class FunctionReward:
    """Scores from a user's function `f(prompts, responses, **columns) -> list[float | None]`, in a
    process of its own.

    `columns` are the data's answer columns, `finish_reasons`, `messages` (each a conversation that
    ends with the response; None for a raw text prompt), `prompt_ids` and `response_ids`; the
    function gets those its signature accepts. None marks a response that could not be scored; a
    number that is not finite raises an alarm. Whatever else goes wrong costs the responses at
    fault: when the function raises, or gives another number of scores, it is called again for parts
    of them. So that a server that is away does not take a step's whole time, this ends after
    `patience_s` without any success, and in any case well before `deadline_s`, after which nobody
    waits for the scores.
    """

    def __init__(
        self, function: str, deadline_s: float = math.inf, patience_s: float = PATIENCE_S
    ) -> None:
        self.name = function
        self.function = load_function(function)
        self.deadline_s = deadline_s
        self.patience_s = patience_s
        parameters = inspect.signature(self.function).parameters
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.accepted = set(parameters)
        # a source of a mixture may lack a column that another has
        self.required = [
            p.name
            for p in list(parameters.values())[2:]
            if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]

    def scores(self, samples: Sequence[Sample]) -> list[Score]:
        """Return one score per sample: without a value where the function gave None, with an error
        where it failed.
        """
        if not samples:
            return []
        began = time.monotonic()
        scores = self._asked(samples)
        if isinstance(scores, list):
            return scores
        if len(samples) == 1:
            return [scores]
        return self._again(samples, scores, began)

    def _asked(self, samples: Sequence[Sample]) -> list[Score] | Score:
        """Return one score per sample of a single call; one error where the call failed."""
        try:
            with contained():
                given = one_each(self._call(samples), len(samples))
                return [self._score(value) for value in given]
        except BaseException as error:  # sys.exit() in user code is a failure like any other
            if is_interrupt(error):
                raise
            return Score(error=kind_and_words(error))

    def _call(self, samples: Sequence[Sample]) -> Any:
        columns = dict.fromkeys(name for c in samples for name in c.columns)
        names = dict.fromkeys([*OFFERED, *columns, *self.required])
        taken = names if self.takes_all else [name for name in names if name in self.accepted]
        return self.function(
            [c.prompt for c in samples],
            [c.response for c in samples],
            **{name: [_offered(c, name) for c in samples] for name in taken},
        )

    def _score(self, value: Any) -> Score:
        try:
            return Score(None if value is None else float(value))
        except Exception as error:  # what is no number may raise anything
            shown = reprlib.repr(value)
            return Score(error=f"{self.name} gave {shown}, not a number: {kind_and_words(error)}")

    def _again(self, samples: Sequence[Sample], failed: Score, began: float) -> list[Score]:
        """Ask for the responses of a call that failed: for one at a time until one succeeds, so the
        server is there, and then for parts of all others, smaller ones where one fails.
        """
        scores: dict[int, Score] = {}
        alone_s: float | None = None  # what the first success took
        latest = began + SHARE * self.deadline_s
        patient = time.monotonic() + self.patience_s
        # neighbours answer the same prompt, and a prompt that is too hard is not a server away
        stride = math.isqrt(len(samples))
        spread = [i for first in range(stride) for i in range(first, len(samples), stride)]
        parts = deque([i] for i in spread)
        while parts:
            start = time.monotonic()
            if start > latest or (alone_s is None and scores and start > patient):
                break
            part = parts.popleft()
            asked = self._asked([samples[i] for i in part])
            took_s = time.monotonic() - start
            if isinstance(asked, list):
                scores.update(zip(part, asked, strict=True))
                if alone_s is None:
                    alone_s = took_s
                    parts = deque([sorted(i for (i,) in parts)] if parts else [])
                continue
            failed = asked
            if len(part) == 1:
                scores[part[0]] = failed
            else:
                parts.extendleft(reversed(_smaller(part, alone_s or 0.0, took_s)))
        done = f"{len(scores)} of {len(samples)} were done after {time.monotonic() - began:.0f} s"
        rest = Score(error=f"{failed.error} (not asked again: {done})")
        return [scores.get(i, rest) for i in range(len(samples))]


def _offered(sample: Sample, name: str) -> Any:
    """Return what a function is given of a sample under a name: our own, or the column's."""
    own = OFFERED.get(name)
    return own(sample) if own else sample.columns.get(name)


def _messages(sample: Sample) -> list[dict[str, Any]] | None:
    answered = sample.answered
    return None if answered is None else [dict(message) for message in answered.messages]


OFFERED: dict[str, Callable[[Sample], Any]] = {
    "finish_reasons": lambda sample: sample.finish_reason,
    "messages": _messages,
    "prompt_ids": lambda sample: list(sample.prompt_ids),
    "response_ids": lambda sample: list(sample.response_ids),
}
"""What a function may take beside prompts, responses and the data's columns, of each sample."""


def _smaller(part: list[int], alone_s: float, failed_s: float) -> list[list[int]]:
    """Return the halves of a part, or its single members if these are done sooner than one at fault
    is found by halves.
    """
    alone = len(part) * alone_s <= math.log2(len(part)) * failed_s
    size = 1 if alone else math.ceil(len(part) / 2)
    return [part[i : i + size] for i in range(0, len(part), size)]


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
