"""SIGUSR1: taken note of while a run listens, and answered with a checkpoint after the step."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import driver, supervised
from actors.cluster.sharing import GpuSharing
from actors.loop import Loop
from actors.run.alarms import AlarmLog
from actors.run.folder import RunFolder
from actors.run.stop import Interrupted, catch_stop_signals, stop_requested
from launch.demo.demo import RECIPES
from launch.recipe.read import load_recipe


def test_the_signal_is_taken_note_of_until_the_run_ends() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with catch_stop_signals():
        assert not stop_requested()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop_requested()
    assert signal.getsignal(signal.SIGUSR1) is before
    with catch_stop_signals():
        assert not stop_requested()


def test_leaving_is_no_error_and_has_an_exit_code_of_its_own() -> None:
    with pytest.raises(SystemExit) as left:
        raise Interrupted(7)
    assert (
        left.value.code == 75
        and "after step 7" in str(left.value)
        and not isinstance(left.value, Exception)
    )


def signalled_in_step(number: int) -> Any:
    """Stands for a step of training."""

    def step(self: Any, step: int) -> tuple[dict[str, float], int]:
        if step == number:
            os.kill(os.getpid(), signal.SIGUSR1)
        return {"score/mean": 1.0}, 64

    return step


def steps_and_checkpoints(folder: Path) -> tuple[list[int], list[str]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    saved = [path.name for path in (folder / "checkpoints").iterdir()]
    return [row["step"] for row in rows if row["phase"] == "train"], saved


def run(recipe: Any, folder: RunFolder, training: Any, data: Any, workers: Any) -> None:
    alarms = AlarmLog(folder, 3)
    made = training(recipe, data, workers, folder, alarms)
    made.export = SimpleNamespace(  # there is no model here
        rehearse=lambda run: None, disk_bytes=lambda: (0, 0), write_files=lambda folder: None
    )
    Loop(recipe, made, folder, alarms, clock=0.0).run(resume=False)


def test_reinforcement_leaves_after_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [
        f"run.folder={tmp_path / 'run'}",
        "run.tensorboard=false",
        "evaluation.every_steps=0",
    ]
    recipe: Any = load_recipe(RECIPES / "demo_grpo.yaml", settings)
    workers: Any = SimpleNamespace(
        groups={"actor": None, "critic": None},
        engines=None,
        actor=None,
        learners={},
        weights=SimpleNamespace(connect=lambda version: None),
        evaluator=None,
        gpu_sharing=GpuSharing(),
    )
    data: Any = SimpleNamespace(
        prompts=SimpleNamespace(dropped={}),
        held_out=[],
        test=[],
        tokenizer=None,
        template=None,
        stops=[],
    )
    monkeypatch.setattr(driver, "check_engine_agrees", lambda *_: 0.0)
    monkeypatch.setattr(driver.Driver, "step", signalled_in_step(2))
    folder = RunFolder.open(recipe.run, recipe.to_yaml())
    with catch_stop_signals(), pytest.raises(Interrupted):
        run(recipe, folder, driver.Driver, data, workers)
    assert steps_and_checkpoints(folder.path) == ([1, 2], ["step-000002"])
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    times = {(row["phase"], row["step"]): row for row in map(json.loads, lines)}
    assert times["train", 2]["seconds/checkpoint"] > 0 and times["start", 0]["seconds/start"] > 0
    assert "seconds/checkpoint" not in times["train", 1]
    assert times["train", 1]["throughput/tokens_per_second"] > 0
    assert (
        json.loads((folder.path / "checkpoints" / "step-000002" / "driver.json").read_text())[
            "step"
        ]
        == 2
    )


def test_supervised_training_leaves_after_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: Any = load_recipe(
        RECIPES / "demo_sft.yaml", [f"run.folder={tmp_path / 'run'}", "run.tensorboard=false"]
    )
    unused: Any = None
    rows: Any = [0] * 64
    data = supervised.SupervisedData(unused, unused, rows, unused, unused)
    group: Any = SimpleNamespace(nodes=[], call=lambda *_, **__: [])
    monkeypatch.setattr(supervised.Supervised, "step", signalled_in_step(3))
    folder = RunFolder.open(recipe.run, recipe.to_yaml())
    with catch_stop_signals(), pytest.raises(Interrupted):
        run(recipe, folder, supervised.Supervised, data, group)
    assert steps_and_checkpoints(folder.path) == ([1, 2, 3], ["step-000003"])
