"""Metrics of the single sources of a mixture; none where there is only one source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from actors.rewards.score import Score
from actors.run.metrics import reduce
from actors.seeds import places_of_step
from actors.settings import StepSettings
from learners.data.store import Part, by_part
from learners.experience import Experience, Rollout


def shares_of_sources(parts: Sequence[Part], picked: Sequence[Sequence[Any]]) -> dict[str, float]:
    """Return the share of each source in what was picked, by part."""
    total = sum(map(len, picked))
    shares = {part.name: len(own) / total for part, own in zip(parts, picked, strict=True)}
    return {f"source/{name}/share": share for name, share in shares.items() if len(parts) > 1}


def trained_sources(
    parts: Sequence[Part],
    step: int,
    settings: StepSettings,
    batch: Experience,
    rollouts: Sequence[Rollout],
) -> dict[str, float]:
    """Return each source's share of a step's prompts and, of the responses to them, the mean score
    (of those that have one) and length. `batch` has the scores.
    """
    if len(parts) < 2:
        return {}
    assert batch.scores is not None
    scores = batch.scores.tolist()
    places = places_of_step(step, settings.prompts_per_step, parts)
    metrics = shares_of_sources(parts, places)
    start = 0
    for part, own in zip(parts, places, strict=True):
        end = start + len(own) * settings.group_size
        scored = [score for score in scores[start:end] if not math.isnan(score)]
        if scored:
            metrics[f"source/{part.name}/score"] = fmean(scored)
        if end > start:
            lengths = [len(rollout.response_ids) for rollout in rollouts[start:end]]
            metrics[f"source/{part.name}/length"] = fmean(lengths)
        start = end
    return metrics


def evaluated_sources(
    name: str,
    kind: str,
    parts: Sequence[Part],
    scores: Sequence[Score],
    rollouts: Sequence[Rollout],
    by_function: bool = True,
) -> dict[str, float]:
    """Return the metrics of an evaluation for each source: `{name}/{source}/accuracy_{kind}` where
    a function scores, of sampled responses `{name}/{source}/score`, and the mean length.
    """
    if len(parts) < 2:
        return {}
    metrics: dict[str, float] = {}
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    for (part, own), (_, tokens) in zip(
        by_part(parts, scores), by_part(parts, lengths), strict=True
    ):
        key = f"{name}/{part.name}"
        values = [score.value for score in own if score.value is not None]
        mean = reduce(f"{key}/accuracy_{kind}", values)
        metrics |= {f"{key}/accuracy_{kind}": mean} if by_function else {}
        metrics |= {f"{key}/score": mean} if kind == "sampled" else {}
        metrics |= (
            {f"{key}/unscorable_{kind}": 1 - len(values) / len(own)}
            if len(values) < len(own)
            else {}
        )
        metrics[f"{key}/length_{kind}"] = fmean(tokens)
    return metrics
