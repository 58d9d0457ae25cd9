"""PPO and GRPO with the real engines: Actor on two ranks, ZeRO-2 and ZeRO-3, the same checks on
every run.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from actors.cluster.groups import WorkerError
from actors.run import metrics
from launch.export import export_model
from learners.errors import UserError
from tests.actors.test_alarms import SOUND
from tests.e2e.conftest import Run, Workshop

pytestmark = pytest.mark.engines


def run_ppo_zero2(
    name: str, workshop: Workshop, sft: Run, reward_model: Run, resume: bool = False
) -> Run:
    return workshop.reinforce(
        "ppo",
        name,
        sft,
        f"critic.model.path={reward_model.model}",
        f"rewards.0.model.path={reward_model.model}",
        "step.steps=2",
        "step.prompts_per_step=48",
        "step.mini_batch_size=24",
        "run.checkpoint_every_steps=1",
        "run.keep_checkpoints=2",
        "algorithm.kl_target=0.5",
        "algorithm.kl_horizon=1000",
        "actor.optimizer.learning_rate=3.0e-4",
        resume=resume,
    )


def run_grpo_zero2(name: str, workshop: Workshop, sft: Run, reward_model: Run) -> Run:
    return workshop.reinforce(
        "grpo",
        name,
        sft,
        "step.steps=2",
        "step.prompts_per_step=8",
        "step.mini_batch_size=16",
        "generation.engines=2",
        "generation.threads=1",
        "actor.optimizer.learning_rate=3.0e-4",
        "rewards=[{name: exact_match, kind: function, weight: 2.0,"
        " function: 'launch.tasks.unique_digits:exact_match'},"
        f" {{name: judge, kind: model, model: {{path: {reward_model.model}}}, weight: 0.5}}]",
    )


@pytest.fixture(scope="session")
def ppo_zero2(workshop: Workshop, sft: Run, reward_model: Run) -> Run:
    """Two steps of PPO; Critic from the reward model; adaptive KL; a checkpoint after each step."""
    return run_ppo_zero2("ppo_zero2", workshop, sft, reward_model)


@pytest.fixture(scope="session")
def ppo_zero3(workshop: Workshop, sft: Run, encoder_reward_model: Run) -> Run:
    """Two steps of PPO under ZeRO-3 at temperature 0.8; Critic on two ranks from the SFT model; an
    encoder judges.
    """
    return workshop.reinforce(
        "ppo",
        "ppo_zero3",
        sft,
        f"critic.model.path={sft.model}",
        "critic.ranks=2",
        "critic.zero_stage=3",
        f"rewards.0.model.path={encoder_reward_model.model}",
        "step.steps=2",
        "step.prompts_per_step=48",
        "step.mini_batch_size=24",
        "actor.zero_stage=3",
        "actor.micro_batch_tokens=300",
        "generation.temperature=0.8",
        "actor.optimizer.learning_rate=3.0e-4",
    )


@pytest.fixture(scope="session")
def grpo_zero2(workshop: Workshop, sft: Run, reward_model: Run) -> Run:
    """Two steps of GRPO on two engines; the score is a weighted sum of a reward model and a
    function.
    """
    return run_grpo_zero2("grpo_zero2", workshop, sft, reward_model)


@pytest.fixture(scope="session")
def grpo_zero3(workshop: Workshop, sft: Run) -> Run:
    """A short run that has to learn, under ZeRO-3."""
    return workshop.reinforce(
        "grpo",
        "grpo_zero3",
        sft,
        "step.steps=8",
        "actor.zero_stage=3",
        "actor.optimizer.learning_rate=3.0e-4",
        "actor.optimizer.warmup_steps=2",
    )


@pytest.fixture(scope="session", params=["ppo_zero2", "ppo_zero3", "grpo_zero2", "grpo_zero3"])
def any_run(request: pytest.FixtureRequest) -> Run:
    return request.getfixturevalue(request.param)


def test_first_mini_batch_has_ratio_one_and_a_gradient(any_run: Run) -> None:
    for step in any_run.steps:
        assert step["actor/max_ratio_deviation_first"] <= 1e-4
        assert step["actor/grad_norm_first"] > 1e-3


def test_later_mini_batches_drift(any_run: Run) -> None:
    for step in any_run.steps:
        assert step["actor/max_ratio_deviation"] > 10 * max(
            step["actor/max_ratio_deviation_first"], 1e-6
        )
        assert step["actor/approx_kl"] > 0


def test_engine_and_actor_agree_before_and_after_every_sync(any_run: Run) -> None:
    for step in any_run.steps:
        assert step["mismatch/max"] <= 1e-4  # what was sampled with the weights of the sync before
        assert (
            0 <= step["mismatch/mean"] <= step["mismatch/max"] and 0 <= step["mismatch/kl"] <= 1e-8
        )
        assert step["sync/probe_difference"] <= 1e-4  # the sync after learning


def test_the_engine_serves_the_version_of_the_step_before(any_run: Run) -> None:
    for number in range(1, len(any_run.steps) + 1):
        assert {tuple(row["weight_versions"]) for row in any_run.samples(number)} == {
            (number - 1, number - 1)
        }


def test_a_run_begins_with_the_comparison_of_engine_and_actor(any_run: Run) -> None:
    rows = [
        json.loads(line) for line in (any_run.folder / "metrics.jsonl").read_text().splitlines()
    ]
    (gate,) = [row for row in rows if row["phase"] == "gate"]
    assert gate["step"] == 0 and 0 < gate["mismatch/gate"] <= 1e-4


def test_sound_runs_raise_no_alarm(any_run: Run) -> None:
    assert any_run.alarms == []
    watched = SOUND.keys() - ({"group/with_spread"} if "ppo" in any_run.folder.name else set())
    assert all(watched <= step.keys() for step in any_run.steps), (
        "an alarm waits for a metric that never comes"
    )


def test_exported_actor_loads_in_plain_transformers_and_has_learned(any_run: Run, sft: Run) -> None:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(any_run.model, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before = AutoModelForCausalLM.from_pretrained(sft.model).state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_of_ppo_exports_the_actor(ppo_zero2: Run, tmp_path: Path) -> None:
    export_model(ppo_zero2.folder, tmp_path / "out")
    written = {path.name: path.read_bytes() for path in ppo_zero2.model.iterdir()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_ppo_reports_critic_and_kl(ppo_zero2: Run, ppo_zero3: Run) -> None:
    for run in (ppo_zero2, ppo_zero3):
        first, second = run.steps
        # the Actor still is the Reference
        assert first["kl/sequence"] == pytest.approx(0, abs=1e-4)
        assert second["kl/sequence"] != 0
        assert all(step["critic/loss"] > 0 and step["critic/grad_norm"] > 0 for step in run.steps)


def test_adaptive_kl_weakens_beta_while_kl_is_below_its_target(ppo_zero2: Run) -> None:
    first, second = ppo_zero2.steps
    assert first["kl/beta"] == 0.1
    assert second["kl/beta"] == pytest.approx(0.1 * (1 - 0.2 * 48 / 1000))


def test_the_score_is_the_weighted_sum_of_its_sources(grpo_zero2: Run) -> None:
    for step in grpo_zero2.steps:
        expected = 2.0 * step["score/exact_match"] + 0.5 * step["score/judge"]
        assert step["score/mean"] == pytest.approx(expected, abs=1e-5)


def test_a_short_grpo_run_raises_the_true_accuracy(grpo_zero3: Run) -> None:
    before, after = (
        grpo_zero3.summary[when]["test/accuracy_sampled"] for when in ("before", "after")
    )
    assert after >= before + 0.10


def test_a_run_resumes_as_if_it_had_never_stopped(
    workshop: Workshop, sft: Run, reward_model: Run, ppo_zero2: Run
) -> None:
    """Go back to the checkpoint after step 1 and do step 2 again: the same metrics, the same
    model.
    """
    copy = workshop.folder / "ppo_resumed"
    shutil.copytree(ppo_zero2.folder, copy)
    shutil.rmtree(copy / "checkpoints" / "step-000002")
    again = run_ppo_zero2("ppo_resumed", workshop, sft, reward_model, resume=True)
    assert [row["step"] for row in again.steps] == [1, 2]
    for key, value in ppo_zero2.figures[1].items():
        assert again.steps[1][key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_two_runs_with_one_seed_are_identical(
    kind: str, workshop: Workshop, sft: Run, reward_model: Run, request: pytest.FixtureRequest
) -> None:
    """Every sampled id and every metric, bit by bit: ZeRO-2 on two ranks, PPO with one engine, GRPO
    with two.
    """
    first: Run = request.getfixturevalue(f"{kind}_zero2")
    run = run_ppo_zero2 if kind == "ppo" else run_grpo_zero2
    second = run(f"{kind}_again", workshop, sft, reward_model)
    for step in (1, 2):
        assert second.samples(step) == first.samples(step) and len(first.samples(step)) >= 48
    assert second.figures == first.figures
    assert second.summary == first.summary


def test_an_existing_run_folder_is_refused(workshop: Workshop, sft: Run, grpo_zero2: Run) -> None:
    with pytest.raises(UserError, match="exists"):
        workshop.reinforce("grpo", "grpo_zero2", sft, "step.steps=1")


# --- numbers nobody should learn from -------------------------------------------------------------


def test_a_run_does_not_begin_when_engine_and_actor_disagree(workshop: Workshop, sft: Run) -> None:
    """No two programs agree to 1e-12: this bound refuses a sound engine too, and says where they
    differ most.
    """
    with pytest.raises(UserError) as refused:
        workshop.quick("gated", sft, "sync.max_logprob_diff=1.0e-12")
    what, where, causes = refused.value.problems
    assert "before step 1" in what and "sync.max_logprob_diff" in what
    assert "engine[0] -" in where and "Actor -" in where and "likely causes" in causes
    assert not (workshop.folder / "gated").exists()


def test_the_engines_logprobs_may_be_the_old_ones(workshop: Workshop, sft: Run) -> None:
    """One forward less; the first mini-batch's ratio is still 1 within the bound, and the same
    things are learned.
    """
    engine = workshop.quick("old_from_engine", sft, "algorithm.old_logprobs=engine")
    actor = workshop.quick("old_from_actor", sft)
    for ours, theirs in zip(engine.figures, actor.figures, strict=True):
        assert 0 < ours["actor/max_ratio_deviation_first"] <= 1e-4
        assert (
            0 <= ours["mismatch/mean"] <= ours["mismatch/max"] <= 1e-4
            and 0 <= ours["mismatch/kl"] <= 1e-8
        )
        for name in ("actor/loss", "actor/grad_norm", "score/mean", "response/length"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_a_bfloat16_run_keeps_its_own_bounds(workshop: Workshop, sft: Run) -> None:
    run = workshop.quick("narrow", sft, "actor.model.dtype=bfloat16", "actor.zero_stage=2")
    for step in run.steps:
        assert 1e-4 < step["mismatch/max"] <= 0.1 and step["sync/probe_difference"] <= 0.1
        assert step["actor/skipped_updates"] == 0 and "alarm/mismatch" not in step


def test_truncated_sampling_is_weighed_and_reported(workshop: Workshop, sft: Run) -> None:
    run = workshop.quick(
        "truncated",
        sft,
        "generation.top_p=0.8",
        "algorithm.rollout_correction={kind: token_truncate, cap: 2.0}",
    )
    assert [row["name"] for row in run.alarms if row["step"] == 0] == ["distorted_sampling"]
    for step in run.steps:
        # kept share of the probability: weights below 1, down to top_p
        assert 0.8 < step["actor/rollout_weight"] < 1
        assert step["actor/rollout_capped"] == 0
        assert step["mismatch/max"] > 1e-2 and "alarm/mismatch" not in step  # it is meant


asked: list[str] = []


def flat(prompts: list[str], responses: list[str]) -> list[float | None]:
    """Takes one response at a time, all are worth the same; the sixth breaks it, the seventh ends
    its process, and for the eighth it forks one that does.
    """
    (response,) = responses
    asked.append(response)
    if len(asked) == 6:
        raise ArithmeticError("the sixth")
    if len(asked) == 7:
        sys.exit("the seventh")
    if len(asked) == 8 and os.fork() == 0:
        sys.exit(0)
    return [0.5]


def test_a_step_from_which_nothing_can_be_learned_says_so(workshop: Workshop, sft: Run) -> None:
    rewards = f"rewards=[{{name: flat, kind: function, function: '{__name__}:flat'}}]"
    run = workshop.quick("flat", sft, rewards, "step.steps=1", "generation.max_new_tokens=2")
    raised = {row["name"] for row in run.alarms}
    assert raised == {"reward_error", "equal_scores", "all_truncated", "no_spread", "zero_gradient"}
    assert "flat failed for 2 of 64, first: ArithmeticError: the sixth" in {
        row["message"] for row in run.alarms
    }
    assert run.steps[0]["score/unscorable"] == 2 / 64 and "alarm/skipped" not in run.steps[0]


def infinite(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    return [
        float("inf") if i == 3 else float(r == a)
        for i, (r, a) in enumerate(zip(responses, answer, strict=True))
    ]


def test_a_run_of_broken_scores_stops_with_everything_saved(workshop: Workshop, sft: Run) -> None:
    """One infinite score a step: nothing is learned from it, and after two such steps the run
    stops.
    """
    broken = f"rewards=[{{name: broken, kind: function, function: '{__name__}:infinite'}}]"
    with pytest.raises(WorkerError, match="stopped after step 2: in 2 steps .*score_not_finite"):
        workshop.quick("stopped", sft, broken, "step.steps=9", "run.max_skipped_steps=2")
    run = Run(workshop.folder / "stopped", {})
    assert [step["alarm/skipped"] for step in run.steps] == [1.0, 1.0]
    assert {(row["step"], row["name"]) for row in run.alarms} == {
        (1, "score_not_finite"),
        (2, "score_not_finite"),
    }
    assert {tuple(row["weight_versions"]) for step in (1, 2) for row in run.samples(step)} == {
        (0, 0)
    }
    assert not any(name.startswith("actor/") for step in run.steps for name in step)
    assert [p.name for p in (run.folder / "checkpoints").iterdir()] == ["step-000002"]
    # with a sound reward it goes on from there
    sound = workshop.quick("stopped", sft, "step.steps=3", resume=True)
    assert [step["step"] for step in sound.steps] == [1, 2, 3] and sound.steps[2][
        "actor/grad_norm"
    ] > 0


def test_every_metric_is_registered(
    workshop: Workshop, ppo_zero2: Run, ppo_zero3: Run, grpo_zero2: Run, grpo_zero3: Run
) -> None:
    """Last in this file: of every run above, also of those that went wrong."""
    logged = workshop.logged()
    assert {"critic/loss", "actor/kl", "group/with_spread", "mismatch/gate"} <= logged
    assert {"seconds/evaluate", "seconds/checkpoint", "seconds/start", "seconds/wall"} <= logged
    assert not {name for name in logged if metrics.find(name) is None}
