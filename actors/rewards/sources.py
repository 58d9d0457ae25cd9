"""Where a score comes from: reward models and Python functions, and their weighted sum."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.cluster.groups import WorkerGroup
from actors.functions import load_function
from actors.settings import RewardSettings

Score = float | None | str  # None: could not be scored; words: what went wrong


@dataclass(frozen=True)
class Sample:
    """A finished response to be scored, as ids and as text without special tokens, and the data's
    answer columns.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    prompt: str
    response: str
    finish_reason: str
    columns: dict[str, Any]


class FunctionReward:
    """Runs a user's function `f(prompts, responses, **columns) -> list[float | None]` in a process
    of its own.

    `columns` are the data's answer columns and `finish_reasons`; the function gets those its
    signature accepts. None marks a response that could not be scored; a number that is not finite
    raises an alarm. When the function raises, it is asked again, for one response at a time, so
    that those that are to blame do not take others along; not after an OSError, when a file or a
    server is away for all of them.
    """

    def __init__(self, function: str) -> None:
        self.name = function
        self.function = load_function(function)
        parameters = inspect.signature(self.function).parameters
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.accepted = set(parameters)

    def scores(self, samples: Sequence[Sample]) -> list[Score]:
        """One score per sample; None where the function could not judge, in words what it
        raised.
        """
        if not samples:
            return []
        try:
            scores = self._call(samples)
        except Exception as error:
            if len(samples) == 1 or isinstance(error, OSError):
                return [f"{type(error).__name__}: {error}"] * len(samples)
            return [score for one in samples for score in self.scores([one])]
        if len(scores) != len(samples):
            raise ValueError(
                f"{self.name} returned {len(scores)} scores for {len(samples)} responses"
            )
        return [None if s is None else float(s) for s in scores]

    def _call(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        names = {name for c in samples for name in c.columns}
        columns = {name: [c.columns.get(name) for c in samples] for name in names}
        columns["finish_reasons"] = [c.finish_reason for c in samples]
        return self.function(
            [c.prompt for c in samples],
            [c.response for c in samples],
            **{k: v for k, v in columns.items() if self.takes_all or k in self.accepted},
        )


class Rewards:
    """All sources of one run. The score of a response is the weighted sum over its sources."""

    def __init__(
        self, settings: Sequence[RewardSettings], groups: Sequence[WorkerGroup], deadline_s: float
    ) -> None:
        self.settings = settings
        self.groups = groups
        self.deadline_s = deadline_s

    def submit(self, samples: Sequence[Sample]) -> list[list[Any]]:
        """Begin scoring; hand the result to `gather`."""
        return [
            group.scatter("scores", [samples[i :: len(group)] for i in range(len(group))])
            for group in self.groups
        ]

    def gather(
        self, pending: Sequence[Sequence[Any]], count: int
    ) -> tuple[list[float], dict[str, list[Score]]]:
        """Weighted sums of all samples in order (NaN where a source could not judge), and scores
        per source.
        """
        sources: dict[str, list[Score]] = {}
        for one, group, refs in zip(self.settings, self.groups, pending, strict=True):
            scores: list[Score] = [None] * count
            for i, share in enumerate(group.gather(refs, "score", self.deadline_s)):
                scores[i :: len(group)] = share
            sources[one.name] = scores
        # a source of weight 0 is only logged
        counted = [one for one in self.settings if one.weight != 0]
        return [
            _sum([(one.weight, sources[one.name][i]) for one in counted]) for i in range(count)
        ], sources


def _sum(weighted: Sequence[tuple[float, Score]]) -> float:
    scored = [weight * score for weight, score in weighted if isinstance(score, float)]
    return sum(scored) if len(scored) == len(weighted) else math.nan
