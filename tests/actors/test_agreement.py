"""Agreement of engine and Actor before step 1: what it lets pass, and what it says else."""

from __future__ import annotations

import math

import pytest
import torch

from actors.weights.agreement import check
from learners.errors import DisagreementError
from learners.experience import Experience, Rollout

ROLLOUTS = [
    Rollout(3, 0, 0, [5], [7, 8, 9], [-1.0, -2.0, -0.5], "length", (0, 0)),
    Rollout(4, 1, 0, [5], [6, 2], [-3.0, -0.25], "stop", (0, 0)),
]


def actor(*differences: tuple[int, int, float]) -> torch.Tensor:
    """Actor log-probs [2,3]: the engine's, with differences at (row, token), and garbage behind the
    shorter row.
    """
    batch = Experience.from_rollouts(ROLLOUTS)
    assert batch.rollout_logprobs is not None
    logprobs = batch.rollout_logprobs.masked_fill(~batch.loss_mask, 17.0)
    for row, token, difference in differences:
        logprobs[row, token] += difference
    return logprobs


def test_the_largest_difference_within_the_bound_is_returned() -> None:
    assert check(
        ROLLOUTS, actor((0, 2, 5e-5), (1, 0, -8e-5)), max_logprob_diff=1e-4
    ) == pytest.approx(8e-5, rel=1e-2)


def test_the_worst_token_is_named_and_the_bound_and_how_many_are_over_it() -> None:
    with pytest.raises(DisagreementError) as refused:
        check(ROLLOUTS, actor((0, 2, 0.5), (1, 1, -0.75)), max_logprob_diff=1e-4)
    what, where, _ = refused.value.problems
    assert (
        "differ by 7.50e-01 nats" in what
        and "2 of 5 tokens" in what
        and "0.0001 (sync.max_logprob_diff)" in what
    )
    assert "response token 1 (id 2) of prompt 4: engine[0] -0.2500, Actor -1.0000" in where


def test_the_mean_decides_too_where_single_tokens_may_differ() -> None:
    shifted = actor(*((row, t, 0.1) for row, t in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))))
    assert check(ROLLOUTS, shifted, max_logprob_diff=1.0, mean_logprob_diff=0.2) == pytest.approx(
        0.1, rel=1e-4
    )
    with pytest.raises(DisagreementError, match="1.00e-01 on average"):
        check(ROLLOUTS, shifted, max_logprob_diff=1.0, mean_logprob_diff=0.05)


def test_nothing_to_compare_does_not_pass() -> None:
    with pytest.raises(DisagreementError, match="sampled no token"):
        check([], torch.zeros(0, 0), max_logprob_diff=1.0)


@pytest.mark.parametrize(
    ("difference", "cause"),
    [
        ((1, 1, 5e-3), "another dtype or attention kernel"),
        ((1, 0, 0.7), "other weights than the Actor"),
        ((0, 2, 0.7), "positions or attention differ along the response"),
        ((1, 1, math.nan), "NaN or infinite logits"),
    ],
)
def test_the_pattern_of_the_difference_names_its_likely_cause(
    difference: tuple[int, int, float], cause: str
) -> None:
    with pytest.raises(DisagreementError) as refused:
        check(ROLLOUTS, actor(difference), max_logprob_diff=1e-4)
    assert cause in refused.value.problems[2] and len(refused.value.problems) == 3
