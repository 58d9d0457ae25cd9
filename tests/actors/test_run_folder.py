"""The run folder on disk: what is written, what survives a broken run, and what a resume throws
away.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from actors.run.folder import RunFolder, finished_checkpoints
from actors.run.progress import _bar
from actors.settings import RunSettings
from learners.errors import UserError


def settings(path: Path, **changes: Any) -> RunSettings:
    return RunSettings(
        folder=str(path / "run"), **({"tensorboard": False, "progress": False} | changes)
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_new_folder_holds_the_config_and_is_never_overwritten(tmp_path: Path) -> None:
    folder = RunFolder.open(settings(tmp_path), "kind: ppo\n")
    folder.log(1, {"loss": 0.5})
    folder.close()
    assert (folder.path / "config.yaml").read_text() == "kind: ppo\n"
    with pytest.raises(UserError, match="exists: choose another") as error:
        RunFolder.open(settings(tmp_path), "kind: grpo\n")
    assert len(error.value.problems) == 1 and "\n" not in str(error.value)
    assert (folder.path / "config.yaml").read_text() == "kind: ppo\n"
    assert len(lines(folder.path / "metrics.jsonl")) == 1


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made: .*file is a file"):
        RunFolder.open(settings(tmp_path / "file"), "")


def test_metrics_are_valid_json_at_every_moment(tmp_path: Path) -> None:
    folder = RunFolder.open(settings(tmp_path), "")
    folder.log(1, {"score/mean": math.nan, "loss": math.inf, "kl/sequence": 0.25})
    first, *_ = lines(folder.path / "metrics.jsonl")  # readable before the folder is closed
    assert (first["step"], first["phase"]) == (1, "train")
    assert (first["score/mean"], first["loss"], first["kl/sequence"]) == (None, None, 0.25)
    folder.log(1, {"evaluation/accuracy_sampled": 0.5}, phase="evaluation")
    assert [r["phase"] for r in lines(folder.path / "metrics.jsonl")] == ["train", "evaluation"]
    folder.close()
    folder.close()


def test_samples_are_kept_at_their_interval(tmp_path: Path) -> None:
    folder = RunFolder.open(settings(tmp_path, samples_every_steps=2, samples_per_step=3), "")
    for step in range(1, 5):
        folder.save_samples(
            step, [{"prompt": "größer", "score": math.nan, "ids": (1, i)} for i in range(5)]
        )
    files = sorted((folder.path / "samples").iterdir())
    assert [f.name for f in files] == ["step-000002.jsonl", "step-000004.jsonl"]
    assert lines(files[0])[2] == {"prompt": "größer", "score": None, "ids": [1, 3]}
    assert [row["ids"][1] for row in lines(files[0])] == [0, 1, 3]
    folder.save_answers("evaluation", 5, "greedy", [{"prompt": str(i)} for i in range(9)])
    folder.settings = settings(tmp_path, samples_every_steps=0)
    folder.save_answers("evaluation", 6, "greedy", [{"prompt": "unwanted"}])
    folder.save_samples(6, [{"prompt": "unwanted"}])
    (answers,) = {*(folder.path / "samples").iterdir()} - {*files}
    assert answers.name == "evaluation-step-000005-greedy.jsonl" and len(lines(answers)) == 9


def test_samples_are_of_as_many_prompts_as_there_may_be(tmp_path: Path) -> None:
    folder = RunFolder.open(settings(tmp_path), "")
    for step, (prompts, group) in enumerate([(32, 8), (4, 4), (1, 3), (0, 8)], start=1):
        folder.save_samples(step, [{"p": p, "k": k} for p in range(prompts) for k in range(group)])
        kept = lines(folder.path / "samples" / f"step-{step:06d}.jsonl")
        assert len(kept) == min(8, prompts * group)
        assert len({row["p"] for row in kept}) == min(8, prompts)
        assert len({(row["p"], row["k"]) for row in kept}) == len(kept)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    folder = RunFolder.open(settings(tmp_path, keep_checkpoints=2), "")
    assert finished_checkpoints(folder.path) == []
    for step in (3, 6, 9):
        with folder.checkpoint(step) as draft:
            assert draft.name.endswith(".tmp")
            (draft / "actor").mkdir()
            (draft / "actor" / "state").write_text(str(step))
    checkpoints = folder.path / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-000006", "step-000009"]
    assert finished_checkpoints(folder.path)[-1] == (9, checkpoints / "step-000009")
    assert (checkpoints / "step-000009" / "actor" / "state").read_text() == "9"


def test_a_failed_checkpoint_leaves_nothing_and_removes_nothing(tmp_path: Path) -> None:
    folder = RunFolder.open(settings(tmp_path, keep_checkpoints=1), "")
    with folder.checkpoint(1):
        pass
    with pytest.raises(KeyboardInterrupt), folder.checkpoint(2) as draft:
        (draft / "half").write_text("x")
        raise KeyboardInterrupt
    assert [p.name for p in (folder.path / "checkpoints").iterdir()] == ["step-000001"]


def test_a_resumed_run_holds_what_an_unbroken_run_would_hold(tmp_path: Path) -> None:
    def log(folder: RunFolder, step: int) -> None:
        folder.log(step, {"loss": float(step)})

    folder = RunFolder.open(settings(tmp_path), "steps: 3", resume=False)
    folder.log(0, {"evaluation/accuracy_sampled": 0.1}, phase="evaluation")
    log(folder, 1)
    log(folder, 2)
    with folder.checkpoint(2):
        pass
    log(folder, 3)
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # the process was killed here
    (folder.path / "checkpoints" / "step-000004.tmp").mkdir()  # and had begun a checkpoint

    resumed = RunFolder.open(settings(tmp_path), "steps: 4", resume=True)
    assert finished_checkpoints(resumed.path)[-1] == (
        2,
        folder.path / "checkpoints" / "step-000002",
    )
    log(resumed, 3)
    log(resumed, 4)
    with resumed.checkpoint(4):
        pass
    assert [r["step"] for r in lines(resumed.path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert sorted(p.name for p in (folder.path / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000004",
    ]
    assert (resumed.path / "config.yaml").read_text() == "steps: 4"


def test_only_what_is_named_like_a_checkpoint_is_one(tmp_path: Path) -> None:
    folder = RunFolder.open(settings(tmp_path, keep_checkpoints=1), "")
    with folder.checkpoint(2):
        pass
    checkpoints = folder.path / "checkpoints"
    beside = {"step-000002.bak", "step-000001-good", "step-", "step-3x"}
    for name in beside:
        (checkpoints / name).mkdir()
    (checkpoints / "step-000009").write_text("a file")
    assert finished_checkpoints(folder.path)[-1] == (2, checkpoints / "step-000002")
    resumed = RunFolder.open(settings(tmp_path, keep_checkpoints=1), "", resume=True)
    with resumed.checkpoint(4):
        pass
    left = {p.name for p in checkpoints.iterdir()}
    assert left == beside | {"step-000004", "step-000009"}


def test_a_resume_keeps_the_recipe_it_replaces(tmp_path: Path) -> None:
    def resume(text: str) -> RunFolder:
        return RunFolder.open(settings(tmp_path), text, resume=True)

    folder = RunFolder.open(settings(tmp_path), "steps: 3")
    with folder.checkpoint(2):
        pass
    resume("steps: 3")
    assert not list(folder.path.glob("config-*"))
    resume("steps: 4")
    resume("steps: 5")  # the one before had no step of its own: step 2 is the work of the first
    assert (folder.path / "config.yaml").read_text() == "steps: 5"
    (kept,) = folder.path.glob("config-*")
    assert (kept.name, kept.read_text()) == ("config-until-step-000002.yaml", "steps: 3")


def test_a_resume_cut_off_while_it_writes_leaves_the_old_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.open(settings(tmp_path), "steps: 3")
    with folder.checkpoint(2):
        pass

    def halfway(path: Path, text: str, **_: Any) -> None:
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", halfway)
    with pytest.raises(KeyboardInterrupt):
        RunFolder.open(settings(tmp_path), "steps: 4", resume=True)
    assert (folder.path / "config.yaml").read_text() == "steps: 3"


def test_resume_needs_a_finished_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished checkpoint"):
        RunFolder.open(settings(tmp_path), "", resume=True)
    assert not (tmp_path / "run").exists()
    (RunFolder.open(settings(tmp_path), "").path / "checkpoints" / "step-000004.tmp").mkdir(
        parents=True
    )
    with pytest.raises(UserError, match="no finished checkpoint"):
        RunFolder.open(settings(tmp_path), "", resume=True)


def test_the_timeline_is_a_chrome_trace_and_seconds_add_up(tmp_path: Path) -> None:
    folder = RunFolder.open(settings(tmp_path), "")
    with folder.phase("generate", 1):
        pass
    for _ in range(2):
        with folder.phase("learn", 1):
            pass
    with pytest.raises(ValueError), folder.phase("sync", 2):
        raise ValueError
    head, *events = json.loads((folder.path / "timeline.json").read_text())
    assert head["ph"] == "M"
    assert [(e["name"], e["args"]["step"]) for e in events] == [
        ("generate", 1),
        ("learn", 1),
        ("learn", 1),
        ("sync", 2),
    ]
    assert all(e["ph"] == "X" and e["dur"] >= 0 for e in events)
    assert [e["ts"] for e in events] == sorted(e["ts"] for e in events)
    seconds = folder.seconds(1)
    assert set(seconds) == {"seconds/generate", "seconds/learn"}
    assert seconds["seconds/learn"] == pytest.approx(
        sum(e["dur"] for e in events[1:3]) / 1e6, abs=1e-5
    )
    assert folder.seconds(1) == {} and set(folder.seconds(2)) == {"seconds/sync"}


def test_without_a_terminal_progress_is_a_few_plain_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder.open(settings(tmp_path, progress=True), "")
    for step in folder.progress(range(3, 8), 7, "ppo"):
        folder.log(step, {"score/mean": step / 10, "unimportant": 1.0})
    assert capsys.readouterr().err.splitlines() == [
        "ppo 3/7  score/mean 0.3",
        "ppo 7/7  score/mean 0.7",
    ]
    folder.settings = settings(tmp_path, progress=False)
    assert list(folder.progress(range(3, 8), 7, "ppo")) == [3, 4, 5, 6, 7]
    assert capsys.readouterr().err == ""


def test_in_a_terminal_progress_is_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(_bar(range(2, 4), 3, "grpo", {"score/mean": 0.5})) == [2, 3]
    assert "grpo" in (shown := capsys.readouterr().err) and "3/3" in shown


def test_finish_writes_the_summary(tmp_path: Path) -> None:
    folder = RunFolder.open(settings(tmp_path), "")
    folder.finish({"after": {"accuracy": 0.9, "score": math.nan}, "seconds": 12})
    summary = json.loads((folder.path / "summary.json").read_text())
    assert summary == {"after": {"accuracy": 0.9, "score": None}, "seconds": 12}


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = RunFolder.open(settings(tmp_path, tensorboard=True), "")
    folder.log(1, {"loss": 2.0})
    folder.log(2, {"loss": 1.0})
    folder.close()
    events = accumulator.EventAccumulator(str(folder.path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]


def test_wandb_must_be_installed_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed"):
        RunFolder.open(settings(tmp_path, wandb_project="p"), "")
    assert not (tmp_path / "run").exists()
