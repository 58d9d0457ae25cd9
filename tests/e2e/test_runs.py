"""PPO and GRPO with the real engines: Actor on two ranks, ZeRO-2 and ZeRO-3, the same checks on every run."""

from __future__ import annotations

import json

import pytest
import torch

from learners.settings import UserError
from tests.e2e.conftest import Run, Workshop

pytestmark = pytest.mark.engines


@pytest.fixture(scope="session")
def ppo_zero2(workshop: Workshop, sft: Run, reward_model: Run) -> Run:
    """Two steps of PPO; Critic from the reward model; adaptive KL; a checkpoint after each step."""
    return workshop.reinforce(
        "ppo", "ppo_zero2", sft, f"critic.model.path={reward_model.model}",
        f"rewards.0.model.path={reward_model.model}", "step.steps=2", "step.prompts_per_step=48",
        "step.mini_batch_size=24", "run.checkpoint_every_steps=1", "run.keep_checkpoints=2",
        "algorithm.kl_target=0.5", "algorithm.kl_horizon=1000", "actor.optimizer.learning_rate=3.0e-4",
    )  # fmt: skip


@pytest.fixture(scope="session")
def ppo_zero3(workshop: Workshop, sft: Run, encoder_reward_model: Run) -> Run:
    """Two steps of PPO under ZeRO-3; Critic on two ranks from the SFT model; a BERT-style encoder judges."""
    return workshop.reinforce(
        "ppo", "ppo_zero3", sft, f"critic.model.path={sft.model}", "critic.ranks=2", "critic.zero_stage=3",
        f"rewards.0.model.path={encoder_reward_model.model}", "step.steps=2", "step.prompts_per_step=48",
        "step.mini_batch_size=24", "actor.zero_stage=3", "actor.micro_batch_tokens=300",
        "actor.optimizer.learning_rate=3.0e-4",
    )  # fmt: skip


@pytest.fixture(scope="session")
def grpo_zero2(workshop: Workshop, sft: Run, reward_model: Run) -> Run:
    """Two steps of GRPO on two engines; the score is a weighted sum of a reward model and a function."""
    return workshop.reinforce(
        "grpo", "grpo_zero2", sft, "step.steps=2", "step.prompts_per_step=8", "step.mini_batch_size=16",
        "generation.engines=2", "generation.threads=1", "actor.optimizer.learning_rate=3.0e-4",
        "rewards=[{name: exact_match, kind: function, function: 'launch.tasks.unique_digits:exact_match', weight: 2.0},"
        f" {{name: judge, kind: model, model: {{path: {reward_model.model}}}, weight: 0.5}}]",
    )  # fmt: skip


@pytest.fixture(scope="session")
def grpo_zero3(workshop: Workshop, sft: Run) -> Run:
    """A short run that has to learn, under ZeRO-3."""
    return workshop.reinforce(
        "grpo", "grpo_zero3", sft, "step.steps=8", "actor.zero_stage=3", "actor.optimizer.learning_rate=3.0e-4",
        "actor.optimizer.warmup_steps=2",
    )  # fmt: skip


@pytest.fixture(scope="session", params=["ppo_zero2", "ppo_zero3", "grpo_zero2", "grpo_zero3"])
def any_run(request: pytest.FixtureRequest) -> Run:
    return request.getfixturevalue(request.param)


def test_first_mini_batch_has_ratio_one_and_a_gradient(any_run: Run) -> None:
    for step in any_run.steps:
        assert step["actor/max_ratio_deviation_first"] <= 1e-4
        assert step["actor/grad_norm_first"] > 1e-3


def test_later_mini_batches_drift(any_run: Run) -> None:
    for step in any_run.steps:
        assert step["actor/max_ratio_deviation"] > 10 * max(step["actor/max_ratio_deviation_first"], 1e-6)
        assert step["actor/approx_kl"] > 0


def test_engine_and_actor_agree_before_and_after_every_sync(any_run: Run) -> None:
    for step in any_run.steps:
        assert step["mismatch/max"] <= 1e-4  # what was sampled with the weights of the sync before
        assert step["sync/probe_difference"] <= 1e-4  # the sync after learning


def test_the_engine_serves_the_version_of_the_step_before(any_run: Run) -> None:
    for number in range(1, len(any_run.steps) + 1):
        lines = (any_run.folder / "samples" / f"step-{number:06d}.jsonl").read_text().splitlines()
        assert {tuple(json.loads(line)["weight_versions"]) for line in lines} == {(number - 1, number - 1)}


def test_exported_actor_loads_in_plain_transformers_and_has_learned(any_run: Run, sft: Run) -> None:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(any_run.model, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    before = AutoModelForCausalLM.from_pretrained(sft.model).state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_ppo_reports_critic_and_kl(ppo_zero2: Run, ppo_zero3: Run) -> None:
    for run in (ppo_zero2, ppo_zero3):
        first, second = run.steps
        assert first["kl/sequence"] == pytest.approx(0, abs=1e-4)  # the Actor still is the Reference
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
    before, after = (grpo_zero3.summary[when]["test/accuracy_sampled"] for when in ("before", "after"))
    assert after >= before + 0.10


def test_a_run_resumes_as_if_it_had_never_stopped(
    workshop: Workshop, sft: Run, reward_model: Run, ppo_zero2: Run
) -> None:
    """Go back to the checkpoint after step 1 and do step 2 again: the same metrics, the same model."""
    import shutil

    whole = ppo_zero2.steps
    copy = workshop.folder / "ppo_resumed"
    shutil.copytree(ppo_zero2.folder, copy)
    shutil.rmtree(copy / "checkpoints" / "step-000002")
    again = workshop.reinforce(
        "ppo", "ppo_resumed", sft, f"critic.model.path={reward_model.model}",
        f"rewards.0.model.path={reward_model.model}", "step.steps=2", "step.prompts_per_step=48",
        "step.mini_batch_size=24", "run.checkpoint_every_steps=1", "algorithm.kl_target=0.5",
        "algorithm.kl_horizon=1000", "actor.optimizer.learning_rate=3.0e-4", resume=True,
    )  # fmt: skip
    assert [row["step"] for row in again.steps] == [1, 2]
    for key, value in whole[1].items():
        if key not in ("phase", "time") and not key.startswith("seconds/"):
            assert again.steps[1][key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_an_existing_run_folder_is_refused(workshop: Workshop, sft: Run, grpo_zero2: Run) -> None:
    with pytest.raises(UserError, match="exists"):
        workshop.reinforce("grpo", "grpo_zero2", sft, "step.steps=1")
