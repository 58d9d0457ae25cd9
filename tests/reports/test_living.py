"""A run that people can live with: it goes on from its end, keeps its best model, stops in time."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from actors.loop import Loop
from actors.run.alarms import AlarmLog
from actors.run.folder import RunFolder, complete_or_absent, finished_checkpoints
from actors.run.outcome import accounted_for
from actors.run.resume import bent_schedules, nothing_left
from launch.demo.demo import RECIPES
from launch.plan.plan import make_plan
from launch.recipe.read import load_recipe, read_recipe
from learners.errors import UserError
from tests.reports.test_what_leaves import Trained

SFT = RECIPES / "demo_sft.yaml"


class Judged(Trained):
    """Stands for a training whose held-out loss after step i is the i-th of `losses`."""

    def __init__(self, losses: list[float], broken: set[str] | None = None, **known: Any) -> None:
        super().__init__(broken or set(), **known)
        self.losses = losses
        self.total_steps = len(losses)
        self.at = 0
        self.export.write_model = self.write_model

    def write_model(self, folder: Path) -> None:
        self.do("export")
        with complete_or_absent(folder) as draft:
            (draft / "weights").write_text(str(self.at))

    def step(self, step: int) -> tuple[dict[str, float], int]:
        self.at = step
        return super().step(step)

    def load(self, folder: Path) -> None:
        self.at = int(folder.name.removeprefix("step-"))

    def evaluation_due(self, step: int) -> bool:
        return True

    def evaluate(self, step: int) -> dict[str, float]:
        return {"held_out/loss": self.losses[step - 1]}

    def end(self, step: int) -> dict[str, Any]:
        self.do("evaluate")
        return self.evaluate(step)


def run(
    tmp_path: Path, training: Trained, *settings: str, resume: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Run to the end; return the summary, and the names of the alarms that were kept."""
    overrides = [f"run.folder={tmp_path / 'run'}", "run.tensorboard=false", "run.progress=false"]
    overrides += ["train.evaluate_every=1", f"held_out.path={tmp_path}", *settings]
    recipe = load_recipe(SFT, [*overrides, f"train.steps={training.total_steps}"])
    with accounted_for(recipe.run.folder):
        folder = RunFolder.open(recipe.run, "", resume)
        with folder:
            loop = Loop(recipe, training, folder, AlarmLog(folder, 3), clock=0.0)
            summary = loop.run(resume=resume)
            folder.finish(summary)
    alarms = (tmp_path / "run" / "alarms.jsonl").read_text().splitlines()
    return summary, [json.loads(line)["name"] for line in alarms]


def checkpoints(tmp_path: Path) -> list[int]:
    return [step for step, _ in finished_checkpoints(tmp_path / "run")]


def weights(tmp_path: Path) -> str:
    return (tmp_path / "run" / "model" / "weights").read_text()


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run" / "best").iterdir())


BEST = "run.keep_best=held_out/loss"


# --- the checkpoint at the end --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "there", "saves"),
    [
        ([], [3], 1),
        (["run.checkpoint_every_steps=2"], [2, 3], 2),
        (["run.checkpoint_every_steps=3"], [3], 1),  # the last step has one already
        (["run.final_checkpoint=false"], [], 0),
    ],
)
def test_a_run_ends_with_a_checkpoint(
    tmp_path: Path, settings: list[str], there: list[int], saves: int
) -> None:
    training = Judged([3.0, 2.0, 1.0])
    run(tmp_path, training, *settings)
    assert checkpoints(tmp_path) == there and training.done.count("save") == saves


def test_a_full_disk_after_the_export_is_an_alarm(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run" / "checkpoints"))
    summary, alarms = run(tmp_path, Judged([3.0, 2.0], {"save"}, error=full))
    assert alarms == ["final_checkpoint"] and summary["alarm/final_checkpoint"] == 1
    assert weights(tmp_path) == "2" and summary["held_out/loss"] == 2.0
    assert "free some space" in (tmp_path / "run" / "alarms.jsonl").read_text()


def test_a_finished_run_goes_on_with_more_steps(tmp_path: Path) -> None:
    run(tmp_path, Judged([3.0, 2.0]))
    first = json.loads((tmp_path / "run" / "summary.json").read_text())
    summary, _ = run(tmp_path, Judged([3.0, 2.0, 1.5, 1.0]), resume=True)
    assert first["steps"] == 2 and summary["steps"] == 4 and weights(tmp_path) == "4"
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if row["phase"] == "train"] == [1, 2, 3, 4]


def test_a_finished_run_without_more_steps_is_one_line(tmp_path: Path) -> None:
    run(tmp_path, Judged([3.0, 2.0]))
    recipe = load_recipe(SFT, [f"run.folder={tmp_path / 'run'}", "train.steps=2"])
    (problem,) = nothing_left(recipe, 2, 2)
    assert "train.steps: the run has ended after step 2, its model is in" in str(problem)
    assert not list(nothing_left(recipe, 3, 2))
    (tmp_path / "run" / "summary.json").unlink()  # it was killed at its end, which is done again
    assert not list(nothing_left(recipe, 2, 2))


@pytest.mark.parametrize(
    ("overrides", "total", "said"),
    [
        (["learner.optimizer.schedule=constant"], 400, ""),
        ([], 200, ""),
        (
            ["learner.optimizer.schedule=linear", "learner.optimizer.warmup_steps=0"],
            400,
            "learner.optimizer.schedule: linear over 400 steps, no longer 200: the learning rate "
            "was 0.000209 in step 200 and goes on from 0.0011",
        ),
    ],
)
def test_a_schedule_that_bends_is_said(overrides: list[str], total: int, said: str) -> None:
    recipe = load_recipe(SFT, overrides)
    assert bent_schedules(recipe, total, 200, 200) == said
    assert bent_schedules(recipe, total, 200, 0) == ""


def test_an_algorithms_schedules_bend_by_their_updates() -> None:
    linear = ["actor.optimizer.schedule=linear", "critic.optimizer.schedule=cosine"]
    line = bent_schedules(load_recipe(RECIPES / "demo_ppo.yaml", linear), 36, 18, 18)
    assert line.count(" over 36 steps, no longer 18: ") == 2 and "critic.optimizer" in line


# --- the best model -------------------------------------------------------------------------------


def test_the_best_model_is_the_result_and_a_fall_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary, alarms = run(tmp_path, Judged([3.0, 1.0, 1.01, 2.0]), BEST)
    assert weights(tmp_path) == "2" and kept(tmp_path) == ["step-000002"]
    assert summary["model"] == {"step": 2, "held_out/loss": 1.0} and summary["held_out/loss"] == 2.0
    assert alarms == ["fallen"]  # 1.01 is no fall
    assert checkpoints(tmp_path) == [4], "the last step is there too"
    said = capsys.readouterr().err
    assert "step 4: fallen: held_out/loss is 2, the best was 1 at step 2" in said
    assert "model is that of step 2, the best by held_out/loss" in said


def test_a_last_step_that_is_the_best_stays_the_result(tmp_path: Path) -> None:
    summary, alarms = run(tmp_path, Judged([3.0, 2.0, float("nan"), 1.0]), BEST)
    assert weights(tmp_path) == "4" and kept(tmp_path) == ["step-000004"] and not alarms
    assert summary["model"]["step"] == 4


def test_a_reward_model_keeps_the_best_by_itself() -> None:
    recipe = load_recipe(RECIPES / "demo_rm.yaml", [])
    assert recipe.run.keep_best == "held_out/accuracy" and not recipe.evaluates
    assert load_recipe(SFT, []).run.keep_best is None


def test_a_best_model_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    training = Judged([1.0, 2.0, 3.0])
    exported = training.write_model

    def write_model(folder: Path) -> None:
        if folder.parent.name == "best":
            raise OSError(errno.ENOSPC, "No space left on device")
        exported(folder)

    training.export.write_model = write_model
    summary, alarms = run(tmp_path, training, BEST)
    assert alarms == ["best_not_kept"] * 3 and weights(tmp_path) == "3" and "model" not in summary


def test_a_run_without_gain_ends(tmp_path: Path) -> None:
    losses = [3.0, 1.0, 1.5, 0.5, 0.6, 0.7, 0.1]
    training = Judged(losses)
    summary, _ = run(tmp_path, training, BEST, "run.patience=2")
    assert summary["steps"] == 6 and summary["evaluations_without_gain"] == 2
    assert weights(tmp_path) == "4" and checkpoints(tmp_path) == [6]
    where = [f"run.folder={tmp_path / 'run'}", f"held_out.path={tmp_path}", BEST]
    recipe = load_recipe(SFT, [*where, "train.evaluate_every=1", "run.patience=2"])
    (problem,) = nothing_left(recipe, 7, 6)
    assert str(problem).startswith("run.patience: the run has ended after step 6")
    summary, _ = run(tmp_path, Judged(losses), BEST, "run.patience=3", resume=True)
    assert summary["steps"] == 7 and weights(tmp_path) == "7"


def test_a_resumed_run_knows_the_best_of_its_checkpoint_and_none_that_came_later(
    tmp_path: Path,
) -> None:
    """The run is killed in step 4, whose predecessor was better than the checkpoint's best."""
    every = "run.checkpoint_every_steps=2"
    killed = Judged([1.0, 2.0, 0.5, 3.0])
    step = killed.step

    def die(number: int) -> tuple[dict[str, float], int]:
        if number == 4:
            raise RuntimeError("killed")
        return step(number)

    killed.step = die  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        run(tmp_path, killed, BEST, every)
    assert kept(tmp_path) == ["step-000001", "step-000003"]
    summary, _ = run(tmp_path, Judged([1.0, 2.0, 1.7, 1.6]), BEST, every, resume=True)
    assert summary["model"] == {"step": 1, "held_out/loss": 1.0} and weights(tmp_path) == "1"
    assert kept(tmp_path) == ["step-000001"]
    summary, _ = run(tmp_path, Judged([1.0, 2.0, 1.7, 1.6, 0.9, 1.0]), BEST, every, resume=True)
    assert summary["model"]["step"] == 5 and weights(tmp_path) == "5"


HELD_OUT = ["held_out.path=rows.jsonl", "train.evaluate_every=1"]


@pytest.mark.parametrize(
    ("kind", "overrides", "said"),
    [
        ("sft", ["run.keep_best=held_out/loss"], "run.keep_best: needs evaluations between"),
        ("sft", [*HELD_OUT, "run.keep_best=loss"], "no metric .*; there are held_out/loss$"),
        ("rm", ["run.keep_best=held_out/loss"], "set train.evaluate_every"),
        ("rm", ["run.patience=2"], "run.patience: needs evaluations between the steps"),
        ("rm", ["run.keep_best=null", "run.patience=2"], "must get better: set run.keep_best"),
        ("grpo", ["run.keep_best=evaluation/length_sampled"], "there are evaluation/score, eval"),
        (
            "grpo",
            ["run.keep_best=evaluation/accuracy_greedy", "evaluation.greedy=false"],
            "there are evaluation/score, evaluation/accuracy_sampled$",
        ),
        (
            "grpo",
            ["run.keep_best=evaluation/score", "evaluation.every_steps=0"],
            "set evaluation.e",
        ),
        ("grpo", ["run.patience=0"], "run.patience: must be at least 1"),
    ],
)
def test_what_cannot_be_the_best(kind: str, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        load_recipe(RECIPES / f"demo_{kind}.yaml", overrides)
    assert len(refused.value.problems) == 1


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "step", "sizes"),
    [
        ("ppo", "{}", (128, 1, 128)),
        ("grpo", "{}", (128, 8, 128)),
        ("grpo", "{group_size: 4}", (128, 4, 128)),
        ("grpo", "{prompts_per_step: 8}", (8, 8, 64)),
        ("ppo", "{prompts_per_step: 48}", (48, 1, 48)),
        ("grpo", "{prompts_per_step: 64, mini_batch_size: 256}", (64, 8, 256)),
    ],
)
def test_a_step_has_defaults(kind: str, step: str, sizes: tuple[int, int, int]) -> None:
    found: Any = load_recipe(RECIPES / f"demo_{kind}.yaml", [f"step={step}"]).step
    assert (found.prompts_per_step, found.group_size, found.mini_batch_size) == sizes


def test_the_section_step_may_be_left_out(tmp_path: Path) -> None:
    lines = (RECIPES / "demo_grpo.yaml").read_text().splitlines()
    without = tmp_path / "recipe.yaml"
    without.write_text("\n".join(line for line in lines if not line.startswith("step:")))
    recipe: Any = load_recipe(without)
    assert recipe.step.group_size == 8 and recipe.step.steps == 100


def test_short_names_of_dtypes_are_written_out() -> None:
    recipe: Any = load_recipe(SFT, ["learner.model.dtype=bf16", "learner.zero_stage=2"])
    assert "dtype: bfloat16" in recipe.to_yaml()
    assert load_recipe(SFT, ["learner.model.dtype=fp32"]) == load_recipe(SFT, [])


def test_a_model_that_does_not_exist_yet_is_planned_like_another(tmp_path: Path) -> None:
    missing = [f"learner.model.path={tmp_path / 'later'}"]
    with pytest.raises(UserError, match="shape is not known here.*or in the model's like"):
        make_plan(*read_recipe(SFT, missing))
    for like in ("Qwen/Qwen3-0.6B", "Qwen3-0.6B", "Qwen3-0.6B-Base"):
        plan = make_plan(*read_recipe(SFT, [*missing, f"learner.model.like={like}"]))
        assert plan.models["sft"].shape.hidden == 1024
    there = ["learner.model.path=Qwen/Qwen3-8B", "learner.model.like=Qwen/Qwen3-0.6B"]
    assert make_plan(*read_recipe(SFT, there)).models["sft"].shape.hidden == 4096
    with pytest.raises(UserError, match="learner.model.like: no/such: its shape is not known"):
        make_plan(*read_recipe(SFT, [*missing, "learner.model.like=no/such"]))
