"""Scores of responses, from every source, and their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.cluster.groups import WorkerGroup
from actors.rollouts.sample import Sample
from actors.settings import RewardSettings


@dataclass(frozen=True)
class Score:
    """A source's answer for one response: a value, or else an error in words.

    Neither means that the source looked at the response and could not score it. A value that is not
    finite is a fault of the source, which an alarm reports. `noise`: values of the source that
    differ by no more are equal (a model's rounding; 0 for a function, whose differences are meant).
    """

    value: float | None = None
    error: str | None = None
    noise: float = 0.0


class Rewards:
    """All sources of one run. The score of a response is the weighted sum over its sources.

    `compared`: so many neighbours are compared with each other, the responses to one prompt; 1
    where the algorithm compares none. Among them a difference that is only a source's noise would
    become a difference in advantage.
    """

    def __init__(
        self,
        settings: Sequence[RewardSettings],
        groups: Sequence[WorkerGroup],
        deadline_s: float,
        compared: int = 1,
    ) -> None:
        self.settings = settings
        self.groups = groups
        self.deadline_s = deadline_s
        self.compared = compared

    def submit(self, samples: Sequence[Sample]) -> list[list[Any]]:
        """Begin scoring; hand the result to `gather`."""
        return [
            group.scatter("scores", [samples[i :: len(group)] for i in range(len(group))])
            for group in self.groups
        ]

    def alone(self, samples: Sequence[Sample]) -> list[Score]:
        """Return the weighted sums of samples that are compared with no neighbours."""
        single = Rewards(self.settings, self.groups, self.deadline_s)
        return single.gather(single.submit(samples), samples)[0]

    def gather(
        self, pending: Sequence[Sequence[Any]], samples: Sequence[Sample]
    ) -> tuple[list[Score], dict[str, list[Score]]]:
        """Return the weighted sums of all samples in order, and every source's own scores."""
        sources: dict[str, list[Score]] = {}
        for one, group, refs in zip(self.settings, self.groups, pending, strict=True):
            scores = [Score()] * len(samples)
            for i, share in enumerate(group.gather(refs, "score", self.deadline_s)):
                scores[i :: len(group)] = share
            if self.compared > 1 and any(score.noise for score in scores):
                scores = without_noise(scores, samples, self.compared)
            sources[one.name] = scores
        # A source of weight 0 is only logged: its errors leave the sum alone.
        counted = {one.name: one.weight for one in self.settings if one.weight != 0}
        sums = [
            weighted_sum([(weight, sources[name][i]) for name, weight in counted.items()])
            for i in range(len(samples))
        ]
        return sums, sources


def without_noise(
    scores: Sequence[Score], samples: Sequence[Sample], group_size: int
) -> list[Score]:
    """Return a source's scores without differences that are only its noise: the same ids have one
    score, and a group of neighbours that differ by no more than the noise has one.
    """
    first: dict[tuple[tuple[int, ...], ...], Score] = {}
    same = [
        first.setdefault((tuple(sample.prompt_ids), tuple(sample.response_ids)), score)
        for sample, score in zip(samples, scores, strict=True)
    ]
    groups = [same[i : i + group_size] for i in range(0, len(same), group_size)]
    return [score for group in groups for score in _levelled(group)]


def _levelled(group: Sequence[Score]) -> Sequence[Score]:
    """Return a group with equal values, the first one's, if noise is all that they differ by."""
    usable = [s for s in group if s.value is not None and math.isfinite(s.value)]
    values = [s.value for s in usable if s.value is not None]
    if not values or max(values) - min(values) > max(s.noise for s in usable):
        return group
    return [replace(s, value=values[0]) if s in usable else s for s in group]


def weighted_sum(weighted: Sequence[tuple[float, Score]]) -> Score:
    """Return the sum of (weight, score); without a value, and with the first error, when a source
    has no value.
    """
    values = [weight * score.value for weight, score in weighted if score.value is not None]
    if len(values) == len(weighted):
        return Score(sum(values))
    return Score(error=next((s.error for _, s in weighted if s.error is not None), None))
