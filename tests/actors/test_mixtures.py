"""Mixtures: which rows a step takes of each source, and what is told of each."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from actors.mixtures import evaluated_sources, shares_of_sources, trained_sources
from actors.run.metrics import find
from actors.seeds import rows_of_mixture, rows_of_step, shares
from actors.settings import StepSettings
from learners.data.store import Part
from learners.experience import Experience, Rollout
from tests.actors.scored import scores as scores_of


def part(name: str, size: int, weight: float | None = None) -> Part:
    return Part(name, weight, size)


@pytest.mark.parametrize(
    ("parts", "counts"),
    [
        ([part("a", 9, 1.0), part("b", 9, 1.0)], [(1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3)]),
        ([part("a", 9, 3.0), part("b", 9, 1.0)], [(1, 0), (2, 0), (2, 1), (3, 1), (4, 1), (5, 1)]),
        ([part("a", 2), part("b", 4)], [(0, 1), (1, 1), (1, 2), (1, 3), (2, 3), (2, 4)]),
        (
            [part("a", 9, 0.5), part("b", 9, 0.25), part("c", 9, 0.25)],
            [(1, 0, 0), (1, 1, 0), (2, 1, 0), (2, 1, 1), (3, 1, 1), (3, 2, 1)],
        ),
        ([part("a", 5)], [(1,), (2,), (3,), (4,), (5,), (6,)]),
    ],
)
def test_shares_are_those_by_hand(parts: list[Part], counts: list[tuple[int, ...]]) -> None:
    """Of 3 : 1, for example, 6 rows are 4.5 + 0.5 rounded up."""
    assert [tuple(shares(total, parts)) for total in range(1, 7)] == counts
    assert shares(0, parts) == [0] * len(parts)


@pytest.mark.parametrize("weights", [(1, 2, 3, 4), (0.1, 0.7, 1e-3, 5), (None,) * 4])
def test_shares_add_up_and_never_fall(weights: tuple[float | None, ...]) -> None:
    parts = [part("", size, w) for size, w in zip((5, 11, 2, 400), weights, strict=True)]
    before = [0] * 4
    for total in range(1, 300):
        now = shares(total, parts)
        assert sum(now) == total
        assert all(later >= earlier for later, earlier in zip(now, before, strict=True))
        before = now
    whole = sum(p.size if p.weight is None else p.weight for p in parts)
    exact = [300 * (p.size if p.weight is None else p.weight) / whole for p in parts]
    assert all(abs(n - e) < 1.5 for n, e in zip(shares(300, parts), exact, strict=True))


def test_one_source_gives_the_rows_it_always_gave() -> None:
    for weight in (None, 3.0):
        rows = [rows_of_mixture(step, 5, [part("a", 7, weight)], 4, "rows") for step in (1, 2, 9)]
        assert rows == [[rows_of_step(step, 5, 7, 4, "rows")] for step in (1, 2, 9)]


def test_each_source_passes_over_its_own_rows() -> None:
    parts = [part("a", 4, 2.0), part("b", 6, 1.0)]
    steps = [rows_of_mixture(step, 3, parts, 0, "rows") for step in range(1, 7)]
    assert [[len(own) for own in step] for step in steps] == [[2, 1]] * 6
    first = [row for step in steps for row in step[0]]
    second = [row for step in steps for row in step[1]]
    assert sorted(first[:4]) == sorted(first[4:8]) == sorted(first[8:]) == [0, 1, 2, 3]
    assert sorted(second) == [4, 5, 6, 7, 8, 9]
    assert len({tuple(first[i : i + 4]) for i in (0, 4, 8)}) > 1
    assert rows_of_mixture(5, 3, parts, 0, "rows") == steps[4]  # of (seed, step) alone
    assert rows_of_mixture(5, 3, parts, 1, "rows") != steps[4]


def rollout(length: int) -> Rollout:
    return Rollout(0, 0, 0, [1], [5] * length, [0.0] * length, "stop", (0, 0))


def test_a_step_tells_shares_scores_and_lengths() -> None:
    """3 prompts of two answers: two of source a, one of b, by rows."""
    parts = [part("a", 4), part("b", 2)]
    settings = StepSettings(steps=1, prompts_per_step=3, group_size=2, mini_batch_size=2)
    rollouts = [rollout(n) for n in (1, 2, 3, 4, 5, 8)]
    batch = Experience.from_rollouts(rollouts)
    batch = replace(batch, scores=torch.tensor([1.0, 0.0, 0.5, math.nan, 4.0, 2.0]))
    metrics = trained_sources(parts, 1, settings, batch, rollouts)
    assert metrics == {
        "source/a/share": pytest.approx(2 / 3),
        "source/b/share": pytest.approx(1 / 3),
        "source/a/score": 0.5,
        "source/b/score": 3.0,
        "source/a/length": 2.5,
        "source/b/length": 6.5,
    }
    assert all(find(name) for name in metrics)
    assert trained_sources(parts[:1], 1, settings, batch, rollouts) == {}
    assert shares_of_sources(parts[:1], [[1, 2]]) == {}


def test_an_evaluation_tells_every_source() -> None:
    parts = [part("a", 1), part("b", 2)]
    scores = scores_of([1.0, 0.5, None])
    rollouts = [rollout(n) for n in (1, 2, 4)]
    metrics = evaluated_sources("test", "sampled", parts, scores, rollouts)
    assert metrics == {
        "test/a/accuracy_sampled": 1.0,
        "test/a/score": 1.0,
        "test/a/length_sampled": 1.0,
        "test/b/accuracy_sampled": 0.5,
        "test/b/score": 0.5,
        "test/b/unscorable_sampled": 0.5,
        "test/b/length_sampled": 3.0,
    }
    assert all(find(name) for name in metrics)
    assert evaluated_sources("test", "sampled", parts[:1], scores[:1], rollouts[:1]) == {}
    greedy = evaluated_sources("test", "greedy", parts, scores, rollouts, by_function=False)
    assert set(greedy) == {
        "test/a/length_greedy",
        "test/b/length_greedy",
        "test/b/unscorable_greedy",
    }
