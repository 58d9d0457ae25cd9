"""Alarms: faults that a step's numbers show, by name. A value that is not finite also skips the
step.

No alarm stops a step that is merely odd: it is printed, counted in the metrics as `alarm/{name}`,
and kept in `alarms.jsonl` of the run folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from actors.cluster.groups import WorkerError
from actors.rewards.score import Score
from actors.run.folder import RunFolder
from actors.settings import RLRecipe, asked_by_model
from learners.experience import Experience, Rollout

LARGEST_SCORE = 1e15  # squares of larger ones overflow in the statistics


@dataclass(frozen=True)
class Alarm:
    """One fault: `name` is one of `metrics.ALARMS`, `message` the numbers and where to look.

    `skip_step`: all of the step, or single updates, could not be learned from; such steps are
    counted.
    """

    name: str
    message: str
    skip_step: bool = False


@dataclass
class AlarmLog:
    """Reports a run's alarms, and counts the steps with a skipped part since the process began; at
    `limit` the run stops.
    """

    folder: RunFolder
    limit: int
    skipped: dict[int, list[str]] = field(default_factory=dict)

    def report(self, step: int, alarms: Iterable[Alarm]) -> dict[str, float]:
        """Print and keep the alarms of a step; return the metrics `alarm/{name}` and, when
        something was skipped, `alarm/skipped`.
        """
        metrics = {}
        for alarm in alarms:
            self.folder.alarm(step, alarm.name, alarm.message)
            metrics[f"alarm/{alarm.name}"] = 1.0
            if alarm.skip_step:
                metrics["alarm/skipped"] = 1.0
                self.skipped.setdefault(step, []).append(alarm.name)
        return metrics

    @property
    def full(self) -> bool:
        """True when too many steps had something skipped."""
        return len(self.skipped) >= self.limit

    def stop(self, step: int) -> WorkerError:
        """Return the error to raise once the checkpoint of `step` is saved."""
        names = ", ".join(dict.fromkeys(self.skipped[max(self.skipped)]))
        return WorkerError(
            f"stopped after step {step}: in {len(self.skipped)} steps something was skipped "
            f"(run.max_skipped_steps), the last time for {names}; checkpoint saved; see "
            "alarms.jsonl, then continue with --resume"
        )


def of_experience(
    batch: Experience,
    rollouts: Sequence[Rollout],
    by_source: Mapping[str, Sequence[Score]],
    recipe: RLRecipe,
) -> Iterator[Alarm]:
    """Yield the alarms of a step before anything is learned from it; `by_source` are the scores of
    every source.
    """
    assert batch.scores is not None
    bound = recipe.alarms
    weights = {reward.name: reward.weight for reward in recipe.rewards}
    for source, given in by_source.items():
        if failures := [score.error for score in given if score.error is not None]:
            yield Alarm(
                "reward_error",
                f"{source} failed for {len(failures)} of {len(given)}, first: {failures[0]}",
            )
        if bad := sum(s.value is not None and not abs(s.value) <= LARGEST_SCORE for s in given):
            message = (
                f"{bad} of {len(given)} scores of {source} are NaN, infinite or beyond "
                f"{LARGEST_SCORE:g}"
            )
            yield Alarm("score_not_finite", message, skip_step=weights.get(source) != 0)
    for name in (
        "rollout_logprobs",
        "old_logprobs",
        "ref_logprobs",
        "values",
        "advantages",
        "returns",
    ):
        if bad := _not_finite(getattr(batch, name), batch.loss_mask):
            message = f"{bad} of {int(batch.loss_mask.sum())} tokens are NaN or infinite"
            yield Alarm(f"{name}_not_finite", message, skip_step=True)
    if not batch.loss_mask.any():
        yield Alarm("nothing_to_learn", "no response has both a token and a score", skip_step=True)
        return
    scores = batch.scores[~batch.scores.isnan()]
    unscorable = 1 - len(scores) / len(batch)
    if unscorable > bound.unscorable:
        yield Alarm(
            "unscorable", f"{unscorable:.0%} of the responses have no score (alarms.unscorable)"
        )
    if len(scores) > 1 and bool((scores == scores[0]).all()):
        yield Alarm(
            "equal_scores",
            f"all {len(scores)} scores are {float(scores[0]):g}: there is nothing to prefer",
        )
    if all(r.finish_reason != "stop" for r in rollouts):
        yield Alarm(
            "all_truncated",
            "no response ended by itself: raise generation.max_new_tokens, or check the "
            "tokens that end one",
        )


def of_evaluation(name: str, failures: Sequence[str]) -> Iterator[Alarm]:
    """Yield an alarm for the errors of the function, which could not score all responses of the
    evaluation `name`.
    """
    if failures:
        yield Alarm(
            "reward_error",
            f"{name}: the function failed for {len(failures)} responses, first: {failures[0]}",
        )


def of_recipe(recipe: RLRecipe, defaults: Mapping[str, Any]) -> Iterator[Alarm]:
    """Yield alarms that concern every step: sampling other than the policy's or the model's own.
    `defaults`: the Actor's generation_config.json.
    """
    if asked := asked_by_model(defaults, recipe.generation):  # else such a model was refused
        yield Alarm(
            "ignored_sampling", f"the Actor's generation_config.json asks for {asked}: not applied"
        )
    correction = recipe.algorithm.rollout_correction
    off_policy_sampling = recipe.generation.off_policy_sampling
    if correction is not None and off_policy_sampling:
        listed = ", ".join(f"{name} {value:g}" for name, value in off_policy_sampling.items())
        message = (
            f"{listed}: not the policy's own distribution; weighted by {correction.kind}, cap "
            f"{correction.cap:g}"
        )
        yield Alarm("distorted_sampling", message)


def of_metrics(metrics: Mapping[str, float], recipe: RLRecipe) -> Iterator[Alarm]:
    """Yield the alarms of a step's metrics."""
    bound = recipe.alarms
    for role in ("actor", "critic"):
        yield from _of_updates(metrics, role)
    yield from _of_mismatch(metrics, recipe)
    no_spread = "in every group all scores are equal: no response has an advantage"
    held = metrics.get("actor/clip_fraction", 0.0)
    clipped = f"{held:.0%} of the tokens were held by the clip (alarms.clip_fraction)"
    entropy = metrics.get("actor/entropy", math.nan)
    low = f"{entropy:.2e} nats per token: the Actor hardly explores (alarms.least_entropy)"
    high = f"{entropy:.2f} nats per token: the Actor is close to noise (alarms.most_entropy)"
    still = "the Actor's gradient was 0 in every mini-batch"
    yield from _raised(
        (metrics.get("group/with_spread") == 0, Alarm("no_spread", no_spread)),
        (metrics.get("actor/grad_norm") == 0, Alarm("zero_gradient", still)),
        (held > bound.clip_fraction, Alarm("clip_fraction", clipped)),
        (entropy < bound.least_entropy, Alarm("entropy_low", low)),
        (entropy > bound.most_entropy, Alarm("entropy_high", high)),
    )


def _of_mismatch(metrics: Mapping[str, float], recipe: RLRecipe) -> Iterator[Alarm]:
    """Return the alarms of the difference between engine and Actor."""
    # Truncated or penalised sampling differs from the policy by design: then only an explicit bound
    # counts.
    unbounded = math.inf if recipe.generation.off_policy_sampling else None
    most = recipe.alarms.mismatch or unbounded or recipe.alarming_logprob_diff
    usual = recipe.alarms.mean_mismatch or unbounded or recipe.mean_logprob_diff
    worst = metrics.get("mismatch/max", 0.0)
    mean = metrics.get("mismatch/mean", 0.0)
    differ = "engine and Actor log-probs differ"
    largest = f"{differ} by {worst:.2e} nats, above {most:.0e} (alarms.mismatch)"
    average = f"{differ} on average by {mean:.2e} nats, above {usual:.0e} (alarms.mean_mismatch)"
    return _raised(
        (worst > most, Alarm("mismatch", largest)),
        (mean > usual, Alarm("mean_mismatch", average)),
    )


def _raised(*alarms: tuple[bool, Alarm]) -> Iterator[Alarm]:
    return (alarm for raised, alarm in alarms if raised)


def of_training(metrics: Mapping[str, float]) -> Iterator[Alarm]:
    """Yield the alarms of a step of SFT or reward-model training."""
    yield from _of_updates({f"learner/{name}": value for name, value in metrics.items()}, "learner")


def _of_updates(metrics: Mapping[str, float], role: str) -> Iterator[Alarm]:
    if skipped := metrics.get(f"{role}/skipped_updates"):
        what = "gradient" if math.isfinite(metrics[f"{role}/loss"]) else "loss"
        yield Alarm(
            f"{role}_{what}_not_finite",
            f"{skipped:.0f} optimizer steps were skipped",
            skip_step=True,
        )


def _not_finite(values: Tensor | None, mask: Tensor) -> int:
    return 0 if values is None else int((~torch.isfinite(values) & mask).sum())
