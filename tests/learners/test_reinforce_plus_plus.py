"""REINFORCE++ on a small batch, against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from learners.algorithms.reinforce_plus_plus import ReinforcePlusPlus, ReinforcePlusPlusSettings
from learners.experience import Experience

NAN = math.nan


def reinforce(**changes: Any) -> ReinforcePlusPlus:
    return ReinforcePlusPlus(ReinforcePlusPlusSettings(**{"kl_beta": 0.5, **changes}))


@pytest.fixture
def batch() -> Experience:
    """Two responses; KL per token (k1) 1, 0, -0.5 and 0.2, scores 2 and -1 on the last tokens: at
    beta 0.5 the rewards are -0.5, 0, 2.25 and -1.1. What lies behind the second one is garbage.
    """
    ids = Experience.from_ids([[5, 6]] * 2, [[7] * 3, [7]])
    return replace(
        ids,
        scores=torch.tensor([2.0, -1.0]),
        old_logprobs=torch.tensor([[-1.0, -2.0, -1.5], [-0.3, NAN, NAN]]),
        ref_logprobs=torch.tensor([[-2.0, -2.0, -1.0], [-0.5, NAN, NAN]]),
    )


def close(found: torch.Tensor | None, expected: list[list[float]]) -> None:
    assert found is not None
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)


def test_the_baseline_is_the_mean_return_of_all_tokens(batch: Experience) -> None:
    """Returns 1.75, 2.25, 2.25 and -1.1; their mean is 1.2875, their variance 1.94171875."""
    found, metrics = reinforce().advantages(batch)
    close(found.advantages, [[0.331909, 0.690728, 0.690728], [-1.713366, 0.0, 0.0]])
    assert found.returns is None and found.values is None
    assert metrics["return/mean"] == pytest.approx(1.2875)
    assert metrics["advantage/std"] == pytest.approx(math.sqrt(1.94171875))
    assert metrics["reward/per_sequence"] == pytest.approx((1.75 - 1.1) / 2)
    assert metrics["kl/sequence"] == pytest.approx((0.5 + 0.2) / 2)


def test_a_discount_shrinks_what_is_far_away(batch: Experience) -> None:
    """At gamma 0.5 the first response returns -0.5 + 0.25 * 2.25, 0.5 * 2.25 and 2.25."""
    _, metrics = reinforce(gamma=0.5).advantages(batch)
    assert metrics["return/mean"] == pytest.approx((0.0625 + 1.125 + 2.25 - 1.1) / 4)


def test_without_a_penalty_there_is_no_reference(batch: Experience) -> None:
    """Every token then returns its response's score: 2, 2, 2 and -1, mean 1.25, variance 1.6875."""
    algorithm = reinforce(kl_beta=0.0)
    assert not algorithm.settings.needs_reference and reinforce().settings.needs_reference
    found, metrics = algorithm.advantages(replace(batch, ref_logprobs=None))
    deviation = math.sqrt(1.6875)
    close(found.advantages, [[0.75 / deviation] * 3, [-2.25 / deviation, 0.0, 0.0]])
    assert "kl/sequence" not in metrics


def test_an_unscorable_response_moves_nothing(batch: Experience) -> None:
    alone, _ = reinforce().advantages(batch.select([0]))
    scores = torch.tensor([2.0, NAN])
    found, _ = reinforce().advantages(without_row(replace(batch, scores=scores), 1))
    assert found.advantages is not None and alone.advantages is not None
    torch.testing.assert_close(found.advantages[:1], alone.advantages)
    assert not found.advantages[1].any()


def without_row(batch: Experience, row: int) -> Experience:
    loss_mask = batch.loss_mask.clone()
    loss_mask[row] = False
    return replace(batch, loss_mask=loss_mask)
