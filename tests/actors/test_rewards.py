"""Scores from Python functions, and their weighted sum."""

from __future__ import annotations

import math

import pytest

from actors.functions import load_function
from actors.rewards.function import FunctionReward
from actors.rewards.score import Rewards, Score
from actors.rollouts.sample import Sample
from actors.settings import RewardSettings
from learners.errors import UserError
from tests.actors.scored import scores as scores_of


def sample(response: str, finish_reason: str = "stop", **columns: object) -> Sample:
    return Sample([1], [2], "2+2=", response, finish_reason, dict(columns))


def exact(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    return [float(r == a) for r, a in zip(responses, answer, strict=True)]


def everything(prompts: list[str], responses: list[str], **columns: list) -> list[float | None]:
    own = {"finish_reasons", "messages", "prompt_ids", "response_ids"}
    assert set(columns) == {"answer", *own}
    return [None if reason == "length" else math.nan for reason in columns["finish_reasons"]]


def one_short(prompts: list[str], responses: list[str]) -> list[float]:
    return [0.0] * (len(responses) - 1)


def test_a_function_gets_the_columns_its_signature_names() -> None:
    reward = FunctionReward(f"{__name__}:exact")
    found = reward.scores([sample("4", answer="4"), sample("5", answer="4")])
    assert found == scores_of([1.0, 0.0])


def test_none_means_that_a_response_could_not_be_judged_and_nan_is_passed_on() -> None:
    """The driver raises an alarm for the second: a function that answers NaN is a function that is
    broken.
    """
    unjudged, broken = FunctionReward(f"{__name__}:everything").scores(
        [sample("4", "length", answer="4"), sample("4", "stop", answer="4")]
    )
    assert unjudged == Score() and broken.value is not None and math.isnan(broken.value)


def fragile(prompts: list[str], responses: list[str]) -> list[float]:
    return [1 / int(r) for r in responses]


def test_a_response_that_the_function_cannot_take_spoils_no_other() -> None:
    scores = FunctionReward(f"{__name__}:fragile").scores([sample(r) for r in ("2", "0", "4", "x")])
    assert scores[::2] == scores_of([0.5, 0.25])
    assert scores[1] == Score(error="ZeroDivisionError: division by zero")
    assert str(scores[3].error).startswith("ValueError: invalid")
    assert FunctionReward(f"{__name__}:fragile").scores([sample("0")]) == [scores[1]]


calls: list[int] = []


def offline(prompts: list[str], responses: list[str]) -> list[float]:
    calls.append(len(responses))
    raise ConnectionError("no route to host")


def test_a_server_that_is_away_is_not_asked_for_every_response() -> None:
    scores = FunctionReward(f"{__name__}:offline", patience_s=0.0).scores([sample("4")] * 3)
    assert scores[0] == Score(error="ConnectionError: no route to host")
    assert all(str(score.error).startswith(f"{scores[0].error} (not asked") for score in scores[1:])
    assert FunctionReward(f"{__name__}:offline").function.__globals__["calls"] == [3, 1]


def test_no_candidates_no_call() -> None:
    assert FunctionReward(f"{__name__}:one_short").scores([]) == []


def test_a_function_that_answers_too_little_is_named() -> None:
    scores = FunctionReward(f"{__name__}:one_short").scores([sample("4"), sample("5")])
    assert scores == scores_of(["ValueError: returned 0 scores for 1 responses"] * 2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:f", "No module named"),
        ("math:no_such", "no_such"),
        ("math:pi", "is a float, not a function"),
    ],
)
def test_a_function_that_cannot_be_found_is_one_line(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        load_function(name)
    assert len(error.value.problems) == 1 and "\n" not in str(error.value)


class Answers:
    """Two workers of a group that have already answered."""

    def __init__(self, shares: list[list[Score]]) -> None:
        self.shares = shares

    def __len__(self) -> int:
        return len(self.shares)

    def scatter(self, method: str, shares: list[list[Sample]]) -> list[list[Score]]:
        assert method == "scores" and [len(s) for s in shares] == [len(s) for s in self.shares]
        return self.shares

    def gather(
        self, pending: list[list[Score]], phase: str, deadline_s: float
    ) -> list[list[Score]]:
        return pending


def source(name: str, weight: float) -> RewardSettings:
    return RewardSettings(name=name, kind="function", function="m:f", weight=weight)


def test_the_sum_is_weighted_and_in_order() -> None:
    """Three samples over two workers: the first judges samples 0 and 2."""
    rewards = Rewards(
        [source("a", 2.0), source("b", 0.5), source("logged", 0.0)],
        [
            Answers([scores_of([1.0, 3.0]), scores_of([2.0])]),
            Answers([scores_of([10.0, 30.0]), scores_of([20.0])]),
            Answers([scores_of([None, 0.0]), scores_of([0.0])]),
        ],  # type: ignore[list-item]
        deadline_s=1,
    )
    samples = [sample("x")] * 3
    total, sources = rewards.gather(rewards.submit(samples), samples)
    assert total == scores_of([2 * 1 + 0.5 * 10, 2 * 2 + 0.5 * 20, 2 * 3 + 0.5 * 30])
    assert sources["b"] == scores_of([10.0, 20.0, 30.0])


def test_one_source_that_cannot_judge_takes_the_response_out() -> None:
    rewards = Rewards(
        [source("a", 1.0), source("b", 1.0)],
        [  # type: ignore[list-item]
            Answers([scores_of([1.0, 1.0, 1.0])]),
            Answers([scores_of([1.0, None, "ValueError: no"])]),
        ],
        deadline_s=1,
    )
    samples = [sample("x")] * 3
    total, sources = rewards.gather(rewards.submit(samples), samples)
    assert total == scores_of([2.0, None, "ValueError: no"])
    assert sources["b"] == scores_of([1.0, None, "ValueError: no"])
