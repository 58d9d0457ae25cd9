"""Scores from a user's Python function."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from actors.functions import load_function
from actors.rewards.score import Score
from actors.rollouts.requests import Sample


class FunctionReward:
    """Scores from a user's function `f(prompts, responses, **columns) -> list[float | None]`, in a
    process of its own.

    `columns` are the data's answer columns and `finish_reasons`; the function gets those its
    signature accepts. None marks a response that could not be scored; a number that is not finite
    raises an alarm. When the function raises, it is called again for one response at a time, so
    that only the responses at fault go without a score; not after an OSError, when a file or a
    server is missing for all of them.
    """

    def __init__(self, function: str) -> None:
        self.name = function
        self.function = load_function(function)
        parameters = inspect.signature(self.function).parameters
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.accepted = set(parameters)

    def scores(self, samples: Sequence[Sample]) -> list[Score]:
        """Return one score per sample: without a value where the function gave None, with an error
        where it raised.
        """
        if not samples:
            return []
        try:
            scores = self._call(samples)
        except Exception as error:
            if len(samples) == 1 or isinstance(error, OSError):
                return [Score(error=f"{type(error).__name__}: {error}")] * len(samples)
            return [score for one in samples for score in self.scores([one])]
        if len(scores) != len(samples):
            raise ValueError(
                f"{self.name} returned {len(scores)} scores for {len(samples)} responses"
            )
        return [Score(None if s is None else float(s)) for s in scores]

    def _call(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        names = {name for c in samples for name in c.columns}
        columns = {name: [c.columns.get(name) for c in samples] for name in names}
        columns["finish_reasons"] = [c.finish_reason for c in samples]
        return self.function(
            [c.prompt for c in samples],
            [c.response for c in samples],
            **{k: v for k, v in columns.items() if self.takes_all or k in self.accepted},
        )
