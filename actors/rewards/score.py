"""Scores of responses, from every source, and their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.cluster.groups import WorkerGroup
from actors.rollouts.requests import Sample
from actors.settings import RewardSettings


@dataclass(frozen=True)
class Score:
    """A source's answer for one response: a value, or else an error in words.

    Neither means that the source looked at the response and could not score it. A value that is not
    finite is a fault of the source, which an alarm reports.
    """

    value: float | None = None
    error: str | None = None


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
    ) -> tuple[list[Score], dict[str, list[Score]]]:
        """Return the weighted sums of all samples in order, and every source's own scores."""
        sources: dict[str, list[Score]] = {}
        for one, group, refs in zip(self.settings, self.groups, pending, strict=True):
            scores = [Score()] * count
            for i, share in enumerate(group.gather(refs, "score", self.deadline_s)):
                scores[i :: len(group)] = share
            sources[one.name] = scores
        # A source of weight 0 is only logged: its errors leave the sum alone.
        counted = {one.name: one.weight for one in self.settings if one.weight != 0}
        sums = [
            weighted_sum([(weight, sources[name][i]) for name, weight in counted.items()])
            for i in range(count)
        ]
        return sums, sources


def weighted_sum(weighted: Sequence[tuple[float, Score]]) -> Score:
    """Return the sum of (weight, score); without a value, and with the first error, when a source
    has no value.
    """
    values = [weight * score.value for weight, score in weighted if score.value is not None]
    if len(values) == len(weighted):
        return Score(sum(values))
    return Score(error=next((s.error for _, s in weighted if s.error is not None), None))
