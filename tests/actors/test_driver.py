"""What the driver computes itself: scores as the algorithm sees them, metrics, and which rows
belong to a step.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from actors.driver import rollout_metrics, with_scores
from actors.seeds import derive_seed, rows_of_step
from learners.algorithms.grpo import GRPO, GRPOSettings
from learners.algorithms.ppo import PPOSettings
from learners.experience import Experience, Rollout
from tests.actors.scored import scores as scores_of


def rollout(response: list[int], finish_reason: str = "stop", logprob: float = -1.0) -> Rollout:
    return Rollout(0, 0, 0, [5, 6], response, [logprob] * len(response), finish_reason, (0, 0))


@pytest.fixture
def batch() -> Experience:
    return Experience.from_rollouts([rollout([7, 2]), rollout([7, 8, 9], "length"), rollout([2])])


def test_scores_are_clipped_before_the_penalty_for_a_missing_eos(batch: Experience) -> None:
    settings = PPOSettings(score_clip=1.0, missing_eos_penalty=0.5)
    scored = with_scores(batch, scores_of([3.0, -3.0, 0.25]), ["stop", "length", "stop"], settings)
    assert scored.scores is not None
    assert scored.scores.tolist() == [1.0, -1.5, 0.25]
    assert torch.equal(scored.loss_mask, batch.loss_mask)


def test_an_unscorable_response_loses_its_whole_row(batch: Experience) -> None:
    scored = with_scores(batch, scores_of([1.0, math.nan, 0.0]), ["stop"] * 3, GRPOSettings())
    assert scored.loss_mask.any(1).tolist() == [True, False, True]


def test_a_response_with_a_gap_keeps_it_when_it_is_scored() -> None:
    told = replace(rollout([7, 8, 2]), loss_mask=(True, False, True))
    batch = Experience.from_rollouts([told, told])
    scored = with_scores(batch, scores_of([1.0, math.nan]), ["stop"] * 2, GRPOSettings())
    assert scored.loss_mask.tolist() == [[True, False, True], [False, False, False]]


def test_metrics_of_a_step(batch: Experience) -> None:
    rollouts = [rollout([7, 2]), rollout([7, 8, 9], "length"), rollout([2])]
    scored = with_scores(
        batch, scores_of([1.0, math.nan, 0.0]), [r.finish_reason for r in rollouts], PPOSettings()
    )
    assert batch.rollout_logprobs is not None
    shifted = batch.rollout_logprobs.clone()
    shifted[0, 1] += 0.25
    metrics = rollout_metrics(
        replace(scored, old_logprobs=shifted), rollouts, {"exact": scores_of([1.0, None, 0.0])}
    )
    assert metrics["response/length"] == 2.0
    assert metrics["response/truncated"] == pytest.approx(1 / 3)
    assert metrics["score/mean"] == 0.5 and metrics["score/exact"] == 0.5
    assert metrics["score/unscorable"] == pytest.approx(1 / 3)
    assert metrics["mismatch/max"] == 0.25
    # three tokens are left: two of row 0, one of row 2
    assert metrics["mismatch/mean"] == pytest.approx(0.25 / 3)
    assert metrics["mismatch/kl"] == pytest.approx((math.exp(0.25) - 1 - 0.25) / 3, rel=1e-5)


def test_old_logprobs_that_are_the_engines_leave_nothing_to_compare(batch: Experience) -> None:
    scored = with_scores(batch, scores_of([1.0, 0.0, 0.0]), ["stop"] * 3, PPOSettings())
    metrics = rollout_metrics(
        replace(scored, old_logprobs=scored.rollout_logprobs), [rollout([7])] * 3, {}
    )
    assert not any(name.startswith("mismatch") for name in metrics)


def test_an_empty_response_and_infinite_scores_are_counted_and_break_nothing() -> None:
    rollouts = [rollout([]), rollout([7, 2]), rollout([2])]
    batch = with_scores(
        Experience.from_rollouts(rollouts),
        scores_of([math.inf, -math.inf, 1.0]),
        ["stop"] * 3,
        PPOSettings(),
    )
    metrics = rollout_metrics(
        replace(batch, old_logprobs=batch.rollout_logprobs.clone()),
        rollouts,
        {"broken": scores_of([math.inf, -math.inf, 1.0])},
    )
    assert metrics["response/length"] == 1.0 and math.isnan(metrics["score/broken"])
    assert batch.loss_mask.any(1).tolist() == [False, True, True]


def test_every_pass_over_the_data_takes_each_row_once_in_an_order_of_its_own() -> None:
    steps = [rows_of_step(step, 3, 6, 0, "prompts") for step in range(1, 5)]
    first = steps[0] + steps[1]
    second = steps[2] + steps[3]
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second


def test_a_step_may_take_more_rows_than_there_are() -> None:
    rows = rows_of_step(1, 10, 4, 0)
    assert sorted(rows[:4]) == sorted(rows[4:8]) == [0, 1, 2, 3]


def test_rows_of_a_step_depend_on_the_seed_and_nothing_before() -> None:
    assert rows_of_step(3, 5, 17, 1) == rows_of_step(3, 5, 17, 1)
    assert rows_of_step(3, 5, 17, 1) != rows_of_step(3, 5, 17, 2)


def test_seeds_depend_on_every_part_and_fit_31_bits() -> None:
    seeds = [derive_seed(0, 1, 2), derive_seed(0, 1, 3), derive_seed(0, 12), derive_seed(0, "1", 2)]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_scores_far_from_zero_keep_their_differences_on_the_way_to_the_advantages() -> None:
    batch = Experience.from_ids([[1]] * 3, [[2]] * 3)
    near, far = (
        GRPO(GRPOSettings(), 3)
        .advantages(with_scores(batch, scores_of(scores), ["stop"] * 3, GRPOSettings()))[0]
        .advantages
        for scores in ([0.0, 1.0, 3.0], [1e9, 1e9 + 1, 1e9 + 3])
    )
    assert near is not None and far is not None and far.dtype == torch.float32
    torch.testing.assert_close(far, near)
