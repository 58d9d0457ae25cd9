"""Real runs that go on from their end and keep their best model: GRPO judged by its rewards, and a
reward model.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest

from actors.rewards.model import RewardWorker
from actors.rollouts.sample import Sample
from actors.run import metrics
from actors.run.folder import finished_checkpoints
from learners.schedules import schedule
from learners.settings import ModelSettings, OptimizerSettings
from tests.e2e.conftest import Run, Workshop

pytestmark = pytest.mark.engines

PROMPTS = 12  # held out


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluations(run: Run, name: str) -> dict[int, float]:
    """Return a metric of the evaluations by step."""
    lines = rows(run.folder / "metrics.jsonl")
    return {row["step"]: row[name] for row in lines if name in row}


def best_of(values: dict[int, float]) -> int:
    """Return the first step of the highest value."""
    return max(values, key=lambda step: (values[step], -step))


def is_that_of(run: Run, step: int) -> bool:
    """Tell whether the run's model is the one that was kept of a step."""
    kept = run.folder / "best" / f"step-{step:06d}"
    files = ("model.safetensors", "config.json", "tokenizer.json")
    return all((kept / file).read_bytes() == (run.model / file).read_bytes() for file in files)


def run_grpo(workshop: Workshop, sft: Run, steps: int, resume: bool = False) -> Run:
    """Four groups of four a step. No function judges: the rewards do."""
    small = ["step.prompts_per_step=4", "step.group_size=4", "step.mini_batch_size=8"]
    alone = ["algorithm.kl_beta=0", "actor.ranks=1", "actor.zero_stage=0"]
    judged = ["evaluation.function=null", "evaluation.test_prompts=null", "evaluation.greedy=true"]
    judged += [f"evaluation.prompts.limit={PROMPTS}", "evaluation.every_steps=1"]
    linear = ["actor.optimizer.schedule=linear", "actor.optimizer.warmup_steps=0"]
    keep = ["run.keep_best=evaluation/score", "run.samples_per_step=4", f"step.steps={steps}"]
    every = [*small, *alone, *judged, *linear, *keep, "run.final_checkpoint=true"]
    return workshop.reinforce("grpo", "grpo_living", sft, *every, resume=resume)


def test_reinforcement_goes_on_from_its_end(
    workshop: Workshop, sft: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_grpo(workshop, sft, 2)
    assert [step for step, _ in finished_checkpoints(first.folder)] == [2]
    assert "schedule" not in capsys.readouterr().err
    run = run_grpo(workshop, sft, 4, resume=True)
    said = capsys.readouterr().err
    assert "notice: actor.optimizer.schedule: linear over 4 steps, no longer 2: " in said
    assert [row["step"] for row in run.steps] == [1, 2, 3, 4] and run.summary["steps"] == 4
    peak = OptimizerSettings(schedule="linear", learning_rate=2.5e-4)
    rates = [fmean(schedule(peak, 8)(i) for i in pair) * 2.5e-4 for pair in ((4, 5), (6, 7))]
    assert [row["actor/learning_rate"] for row in run.steps[2:]] == pytest.approx(rates)

    scores = evaluations(run, "evaluation/score")
    assert sorted(scores) == [0, 1, 2, 3, 4] and "evaluation/accuracy_sampled" not in run.steps[0]
    assert run.summary["model"]["step"] == best_of(scores) and is_that_of(run, best_of(scores))
    assert not {name for name in workshop.logged() if metrics.find(name) is None}

    held_out = [row["prompt"] for row in rows(workshop.folder / "data" / "validation.jsonl")]
    for step, score in scores.items():
        for kind in ("sampled", "greedy"):
            answers = rows(run.folder / "samples" / f"evaluation-step-{step:06d}-{kind}.jsonl")
            assert [row["prompt"] for row in answers] == held_out[:PROMPTS]
            if kind == "sampled":
                assert fmean(row["score"] for row in answers) == pytest.approx(score)
        assert not step or len({row["prompt"] for row in run.samples(step)}) == 4


def run_reward_model(workshop: Workshop, sft: Run, steps: int) -> Run:
    """Learn much too fast, so that not every evaluation is better than the one before."""
    data = workshop.folder / "data"
    paths = [f"learner.model.path={sft.model}", f"data.path={data / 'pairs.jsonl'}"]
    paths += [f"held_out.path={data / 'pairs_test.jsonl'}", "held_out.limit=100"]
    paths += [f"reward_model.calibration.path={data / 'sft.jsonl'}"]
    fast = ["learner.optimizer.learning_rate=2.0e-2", "learner.optimizer.warmup_steps=0"]
    size = ["train.batch_size=16", "reward_model.calibration.limit=40", "train.evaluate_every=2"]
    every = [*paths, *fast, *size, f"train.steps={steps}", "run.final_checkpoint=true"]
    return workshop.run("rm", "rm_living", *every)


def test_a_reward_model_is_the_best_one_with_a_calibration_of_its_own(
    workshop: Workshop, sft: Run
) -> None:
    run = run_reward_model(workshop, sft, 10)
    accuracies = evaluations(run, "held_out/accuracy")
    best = best_of(accuracies)
    assert best < 10 and run.summary["model"] == {
        "step": best,
        "held_out/accuracy": accuracies[best],
    }
    assert is_that_of(run, best)
    config = json.loads((run.model / "config.json").read_text())
    assert config["score_mean"] == pytest.approx(run.summary["calibration/mean"])
    _, last = finished_checkpoints(run.folder)[-1]
    assert (
        json.loads((last / "model_files" / "config.json").read_text())["score_mean"]
        != config["score_mean"]
    )
    worker = RewardWorker(
        ModelSettings(path=str(run.model)), ModelSettings(path=str(sft.model)), 1000, "cpu"
    )
    texts = [(r["prompt"], r["response"]) for r in rows(workshop.folder / "data" / "sft.jsonl")]
    tokenizer = worker.reader.tokenizer
    scores = worker.scores(
        [
            Sample(
                tokenizer(prompt)["input_ids"],
                [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
                prompt,
                answer,
                "stop",
                {},
            )
            for prompt, answer in texts[:40]
        ]
    )
    values = [score.value for score in scores]
    assert fmean(values) == pytest.approx(0, abs=1e-3)  # type: ignore[type-var]
    assert pstdev(values) == pytest.approx(1, abs=1e-3)  # type: ignore[type-var]
