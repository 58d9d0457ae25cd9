"""Every alarm, raised by the numbers it is about and by nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.run.alarms import (
    Alarm,
    AlarmLog,
    of_evaluation,
    of_experience,
    of_metrics,
    of_recipe,
    of_training,
)
from actors.run.folder import RunFolder
from actors.run.metrics import find
from actors.settings import GenerationSettings, RLRecipe, RunSettings, rl_recipe
from learners.algorithms.grpo import GRPOSettings
from learners.experience import Experience, Rollout
from tests.actors.scored import scores

NAN = math.nan
INF = math.inf
Names = Callable[..., list[str]]
PER_TOKEN = ("old_logprobs", "ref_logprobs", "values", "advantages", "returns")


def rollouts(*finish_reasons: str) -> list[Rollout]:
    return [
        Rollout(0, i, 0, [5], [7, 8][: i + 1], [-1.0] * (i + 1), r, (0, 0))
        for i, r in enumerate(finish_reasons)
    ]


@pytest.fixture
def batch() -> Experience:
    """Two responses, of one and of two tokens; behind the shorter one there is garbage."""
    known = torch.tensor([[0.5, NAN], [0.5, 0.25]])
    batch = Experience.from_rollouts(rollouts("stop", "length"))
    scored = replace(batch, scores=torch.tensor([1.0, 0.0]))
    return replace(scored, **dict.fromkeys(PER_TOKEN, known))


def make_recipe() -> RLRecipe:
    model = {"path": "m"}
    judge, logged = (
        {"name": name, "kind": "model", "model": model} for name in ("judge", "logged")
    )
    return rl_recipe("grpo", "grpo").model_validate(
        {
            "run": {"folder": "r"},
            "step": {},
            "actor": {"model": model},
            "rewards": [judge, {**logged, "weight": 0.0}],
            "prompts": {"path": "p"},
        }
    )


@pytest.fixture
def recipe() -> RLRecipe:
    return make_recipe()


@pytest.fixture
def names(recipe: RLRecipe) -> Callable[..., list[str]]:
    def found(
        batch: Experience,
        *finish_reasons: str,
        source: list[float | None] | None = None,
        skip_step: bool | None = None,
    ) -> list[str]:
        given = {
            "judge": scores([1.0, 0.0] if source is None else source),
            "logged": scores([0.0, 0.0]),
        }
        alarms = list(
            of_experience(batch, rollouts(*(finish_reasons or ("stop", "length"))), given, recipe)
        )
        assert all(find(f"alarm/{alarm.name}") for alarm in alarms)
        return [alarm.name for alarm in alarms if skip_step is None or alarm.skip_step == skip_step]

    return found


def test_a_sound_step_raises_nothing(batch: Experience, names: Names) -> None:
    assert names(batch) == []


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", [*PER_TOKEN, "rollout_logprobs"])
def test_a_token_that_is_not_finite_skips_the_step_and_names_its_source(
    batch: Experience, names: Names, name: str, value: float
) -> None:
    broken = getattr(batch, name).clone()
    broken[1, 1] = value
    assert names(replace(batch, **{name: broken}), skip_step=True) == [f"{name}_not_finite"]


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e25])
def test_a_score_that_is_not_finite_skips_the_step(
    batch: Experience, names: Names, value: float
) -> None:
    """Nor may it be so large that the group's variance overflows in float32."""
    assert names(batch, source=[1.0, value], skip_step=True) == ["score_not_finite"]


def test_a_function_that_raised_is_named_with_what_it_said(
    batch: Experience, recipe: RLRecipe
) -> None:
    given = {
        "judge": scores([1.0, 0.0]),
        "logged": scores(["ZeroDivisionError: division by zero", 0.0]),
    }
    (alarm,) = of_experience(batch, rollouts("stop"), given, recipe)
    assert alarm.name == "reward_error" and not alarm.skip_step
    assert alarm.message == "logged failed for 1 of 2, first: ZeroDivisionError: division by zero"


def test_an_evaluation_that_partly_failed_says_so() -> None:
    assert list(of_evaluation("test", [])) == []
    (alarm,) = of_evaluation("test", ["KeyError: 'answer'", "ValueError: no"])
    assert alarm.name == "reward_error" and alarm.message.startswith("test: ")
    assert "2 responses, first: KeyError" in alarm.message


def test_a_source_that_is_only_logged_raises_the_alarm_and_skips_nothing(
    batch: Experience, recipe: RLRecipe
) -> None:
    (alarm,) = of_experience(
        batch, rollouts("stop"), {"judge": scores([1.0, 0.0]), "logged": scores([NAN, 0.0])}, recipe
    )
    assert alarm.name == "score_not_finite" and "of logged" in alarm.message and not alarm.skip_step


def test_a_few_unscorable_responses_are_no_alarm_and_many_are(
    batch: Experience, recipe: RLRecipe
) -> None:
    twenty = batch.select([0, 1] * 10)
    assert twenty.scores is not None
    for lost, expected in ((2, []), (3, ["unscorable"])):
        values = twenty.scores.clone()
        values[:lost] = NAN
        found = of_experience(
            replace(twenty, scores=values),
            rollouts("stop"),
            {"judge": scores([None] * lost + [1.0])},
            recipe,
        )
        assert [(alarm.name, alarm.skip_step) for alarm in found] == [
            (name, False) for name in expected
        ]


@pytest.mark.parametrize("why", ["unscorable", "empty"])
def test_a_step_with_nothing_to_learn_is_skipped(batch: Experience, names: Names, why: str) -> None:
    if why == "unscorable":
        batch = replace(batch, scores=torch.tensor([NAN, NAN]))
    else:
        batch = replace(batch, response_lengths=torch.zeros(2, dtype=torch.long))
    batch = replace(batch, loss_mask=torch.zeros(2, 2, dtype=torch.bool))
    assert names(batch, skip_step=True) == ["nothing_to_learn"]


def test_equal_scores_and_truncation_are_named_without_skipping(
    batch: Experience, names: Names
) -> None:
    equal = replace(batch, scores=torch.tensor([0.5, 0.5]))
    assert names(equal, "length", "length", skip_step=False) == ["equal_scores", "all_truncated"]
    assert names(equal, "length", "length", skip_step=True) == []
    given = {"judge": scores([1.0, 0.0])}
    _, truncated = of_experience(equal, rollouts("length", "length"), given, make_recipe())
    # a turn may end with another token than the EOS
    assert truncated.message.startswith("no response ended by itself") and "EOS" not in str(
        truncated
    )


SOUND = {
    "actor/grad_norm": 0.5,
    "actor/skipped_updates": 0.0,
    "actor/loss": 0.1,
    "actor/clip_fraction": 0.1,
    "actor/entropy": 1.0,
    "mismatch/max": 1e-6,
    "mismatch/mean": 1e-7,
    "group/with_spread": 0.5,
}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"actor/skipped_updates": 2.0, "actor/loss": NAN}, ["actor_loss_not_finite"]),
        ({"actor/skipped_updates": 2.0}, ["actor_gradient_not_finite"]),
        ({"critic/skipped_updates": 1.0, "critic/loss": INF}, ["critic_loss_not_finite"]),
        ({"actor/grad_norm": 0.0}, ["zero_gradient"]),
        ({"group/with_spread": 0.0}, ["no_spread"]),
        ({"actor/skipped_updates": 1.0, "actor/grad_norm": NAN}, ["actor_gradient_not_finite"]),
        ({"mismatch/max": 2e-3}, ["mismatch"]),
        ({"mismatch/mean": 2e-4}, ["mean_mismatch"]),
        ({"actor/clip_fraction": 0.6}, ["clip_fraction"]),
        ({"actor/entropy": 1e-4}, ["entropy_low"]),
        ({"actor/entropy": 9.5}, ["entropy_high"]),
    ],
)
def test_metrics_out_of_their_band(
    recipe: RLRecipe, changed: dict[str, float], expected: list[str]
) -> None:
    found = list(of_metrics(SOUND | changed, recipe))
    assert [alarm.name for alarm in found] == expected
    assert all(find(f"alarm/{alarm.name}") for alarm in found)
    assert all(alarm.skip_step == alarm.name.endswith("not_finite") for alarm in found)


def test_distorted_sampling_is_reported_once_and_raises_no_mismatch(recipe: RLRecipe) -> None:
    algorithm = GRPOSettings.model_validate(
        {"rollout_correction": {"kind": "token_mask", "cap": 3}}
    )
    generation = GenerationSettings(top_p=0.9, repetition_penalty=1.2)
    weighed = recipe.model_copy(update={"algorithm": algorithm, "generation": generation})
    (said,) = of_recipe(weighed, {})
    assert said.name == "distorted_sampling" and "top_p 0.9, repetition_penalty 1.2" in said.message
    assert "token_mask, cap 3" in said.message and not said.skip_step
    assert list(of_metrics(SOUND | {"mismatch/max": 2.0, "mismatch/mean": 1.0}, weighed)) == []
    assert list(of_recipe(recipe, {"top_p": 1.0, "top_k": 0})) == []


def test_sampling_defaults_that_are_ignored_are_reported(recipe: RLRecipe) -> None:
    ignored = recipe.model_copy(update={"generation": GenerationSettings(model_sampling="ignore")})
    (said,) = of_recipe(ignored, {"repetition_penalty": 1.1, "temperature": 0.6})
    assert (
        said.name == "ignored_sampling"
        and "asks for repetition_penalty 1.1: not applied" in said.message
    )


def test_rounding_of_a_deep_model_in_float32_is_no_alarm_and_a_wrong_mean_is(
    recipe: RLRecipe,
) -> None:
    """A sound run of 30 layers has shown 1.24e-4; what a run begins with stays within 1e-4."""
    assert list(of_metrics(SOUND | {"mismatch/max": 1.24e-4}, recipe)) == []
    assert recipe.max_logprob_diff == recipe.mean_logprob_diff == 1e-4
    said = of_metrics(SOUND | {"mismatch/max": 2e-4, "mismatch/mean": 1.1e-4}, recipe)
    assert [alarm.name for alarm in said] == ["mean_mismatch"]
    stricter = recipe.model_copy(
        update={"sync": recipe.sync.model_copy(update={"max_logprob_diff": 2e-5})}
    )
    assert stricter.mean_logprob_diff == stricter.alarming_logprob_diff == 2e-5
    (alarm,) = of_metrics(SOUND | {"mismatch/max": 3e-5}, stricter)
    assert alarm.name == "mismatch"


def test_float32_on_gpus_is_bounded_by_what_was_measured_there(recipe: RLRecipe) -> None:
    cluster = recipe.cluster.model_copy(update={"device": "cuda"})
    there = recipe.model_copy(update={"cluster": cluster})
    bounds = (there.max_logprob_diff, there.mean_logprob_diff, there.alarming_logprob_diff)
    assert bounds == (2e-2, 2e-3, 2e-2)
    assert list(of_metrics(SOUND | {"mismatch/max": 3.9e-3, "mismatch/mean": 5.6e-4}, there)) == []


def test_in_bfloat16_single_tokens_may_differ_far_but_not_the_mean(recipe: RLRecipe) -> None:
    model = recipe.actor.model.model_copy(update={"dtype": "bfloat16"})
    narrow = recipe.model_copy(update={"actor": recipe.actor.model_copy(update={"model": model})})
    assert list(of_metrics(SOUND | {"mismatch/max": 0.9, "mismatch/mean": 0.06}, narrow)) == []
    (alarm,) = of_metrics(SOUND | {"mismatch/max": 0.9, "mismatch/mean": 0.12}, narrow)
    assert alarm.name == "mean_mismatch" and "alarms.mean_mismatch" in alarm.message
    tighter = narrow.model_copy(
        update={"sync": narrow.sync.model_copy(update={"max_logprob_diff": 0.2})}
    )
    assert (tighter.max_logprob_diff, tighter.mean_logprob_diff) == (0.2, 0.1)


def test_a_skipped_update_of_sft_or_a_reward_model_is_named() -> None:
    assert [a.name for a in of_training({"loss": NAN, "skipped_updates": 1.0})] == [
        "learner_loss_not_finite"
    ]
    assert list(of_training({"loss": 1.0, "skipped_updates": 0.0})) == []


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    settings = RunSettings(folder=str(tmp_path / "run"), tensorboard=False, progress=False)
    with closing(RunFolder.open(settings, "")) as folder:
        yield folder


def test_the_alarm_log_counts_skipped_steps_and_tells_where_to_look(
    folder: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    alarms = AlarmLog(folder, limit=2)
    odd = Alarm("clip_fraction", "odd")
    bad = Alarm("values_not_finite", "bad", skip_step=True)
    assert alarms.report(1, [odd]) == {"alarm/clip_fraction": 1.0} and not alarms.full
    assert alarms.report(2, [odd])["alarm/clip_fraction"] == 1.0
    assert alarms.report(2, [bad])["alarm/skipped"] == 1.0 and not alarms.full
    assert alarms.report(3, []) == {}
    alarms.report(4, [bad])
    assert alarms.full
    assert (
        "in 2 steps something was skipped (run.max_skipped_steps), the last time for values"
        in str(alarms.stop(4))
    )
    rows = [json.loads(line) for line in (folder.path / "alarms.jsonl").read_text().splitlines()]
    assert [(r["step"], r["name"]) for r in rows] == [
        (1, "clip_fraction"),
        (2, "clip_fraction"),
        (2, "values_not_finite"),
        (4, "values_not_finite"),
    ]
    printed = capsys.readouterr().err.splitlines()  # what goes on is not said again
    assert [line.split(": ")[1:3] for line in printed] == [
        ["step 1", "clip_fraction"],
        ["step 2", "values_not_finite"],
        ["step 4", "values_not_finite"],
    ]
