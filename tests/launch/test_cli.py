"""The command line as a stranger meets it: quick, light, and with a word about what is wrong."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import cli, doctor
from learners.errors import UserError

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "vllm", "deepspeed", "ray", "transformers", "datasets")
RUN = f"""
import sys
from launch.cli import main
code = main()
heavy = [name for name in {HEAVY!r} if name in sys.modules]
sys.exit(f"imports {{heavy}}" if heavy else code)
"""


def quatuor(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that must answer without anything heavy, in under a second of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = os.times()
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, env=environment
    )
    ended = os.times()
    busy = (
        ended.children_user
        + ended.children_system
        - started.children_user
        - started.children_system
    )
    assert busy < 1.0, f"{busy:.2f} s of CPU time"
    return done


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["ppo", "ppo.yaml", "actor.zero_stag=2"],
            "command line: actor.zero_stag: unknown key; did you mean",
        ),
        (
            ["ppo", "ppo.yaml", "actor.model.path=./none"],
            "actor.model.path: ./none: no such model folder",
        ),
        (["rm", "rm.yaml", "data.chosen_column=good"], "pairs.jsonl has no column 'good'"),
        (["grpo", "grpo.yaml", "step.group_size=1"], "GRPO needs 2 or more"),
        (["ppo", "ppo.yaml", "step.mini_batch_size=5"], "5 does not divide"),
        (["sft", "sft.yaml", "run.folder=decoder"], "run.folder: decoder exists"),
        (["ppo", "none.yaml"], "none.yaml: no such recipe file"),
        (["ppo"], "Missing argument 'RECIPE'"),
        (["pppo", "ppo.yaml"], "No such command 'pppo'"),
        (["ppo", "ppo.yaml", "--resum"], "No such option: --resum"),
        (["demo", "--seed", "x"], "--seed"),
        (["demo", "--folder", "."], "is not a demo's"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    place: Path, arguments: list[str], told: str
) -> None:
    before = sorted(p for p in place.rglob("*"))
    done = quatuor(*arguments)
    assert done.returncode == 2, done
    assert told in done.stderr and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""
    assert sorted(p for p in place.rglob("*")) == before


def test_help_lists_commands_and_every_key(place: Path) -> None:
    done = quatuor("--help")
    assert done.returncode == 0
    assert all(
        f"  {name} " in done.stdout for name in ("sft", "rm", "ppo", "grpo", "demo", "version")
    )
    keys = quatuor("ppo", "--help").stdout
    for line in (
        "actor.optimizer.learning_rate",
        "rewards.N.weight",
        "algorithm.lam",
        "cluster.start_deadline_s",
    ):
        assert f"\n{line} " in keys
    for command in ("plan", "submit", "slurm"):
        told = quatuor(command, "--help").stdout
        assert "keys below" not in told and "quatuor ppo --help lists" in " ".join(told.split())


def test_a_terminal_that_does_not_know_every_letter(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = quatuor("sft", "sft.yaml", "--check", "run.folder=läufe")
    assert done.returncode == 0 and "folder: l?ufe" in done.stdout, done.stderr
    assert quatuor("plan", str(ROOT / "launch/recipes/grpo_qwen3_8b.yaml")).returncode == 0


def test_a_port_that_is_taken_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It keeps nothing from running: Ray, engines and learners look for free ports, and a run may
    join that Ray.
    """
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(doctor, "HEAD_PORTS", (port,))
        cli.main(["doctor", "--no-start"])
    line = next(line for line in capsys.readouterr().out.splitlines() if " ports " in line)
    assert line.startswith("pass") and f"{port} taken: perhaps by a Ray head" in line


def test_a_reward_function_that_cannot_be_imported(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["grpo", "grpo.yaml", "rewards.0.function=nowhere:f"]) == 2
    told = capsys.readouterr().err
    assert (
        told.startswith("error: command line: rewards.0.function: ")
        and "No module named 'nowhere'" in told
    )
    assert len(told.splitlines()) == 1 and not Path("runs").exists()


def test_check_prints_the_resolved_recipe_and_runs_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["grpo", "grpo.yaml", "step.steps=3", "--check"]) == 0
    assert "steps: 3  # command line" in capsys.readouterr().out
    assert not Path("runs").exists()


def fake_runner(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    module = type(sys)("runner_of_test")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "runner_of_test", module)
    monkeypatch.setattr(cli, "RUNNER", "runner_of_test")


def test_a_run_gets_its_recipe_and_its_summary_is_shown(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def run(recipe: object, resume: bool, config_yaml: str) -> dict[str, object]:
        seen.append((resume, config_yaml))
        return {"before": {"test/accuracy": 0.4401}, "after": {"test/accuracy": 0.95}, "steps": 2}

    fake_runner(monkeypatch, run)
    assert cli.main(["grpo", "grpo.yaml", "run.seed=7"]) == 0
    out = capsys.readouterr().out
    assert "0.4401" in out and "0.95" in out and "steps" in out
    assert out.splitlines()[-1] == "the trained model is in runs/new/model"
    ((resume, saved),) = seen
    assert (
        not resume
        and "folder: runs/new  # grpo.yaml:" in saved
        and "seed: 7  # command line" in saved
        and "swap: never  # by plan's arithmetic" in saved
    )


def test_failures_inside_a_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user's mistake: its lines, 2. Ours: one line, the traceback in the run folder, 1. Ctrl-C:
    130.
    """

    def fail_with(error: BaseException) -> tuple[int, str]:
        def run(recipe: object, resume: bool, config_yaml: str) -> None:
            Path("runs/new").mkdir(parents=True, exist_ok=True)
            raise error

        fake_runner(monkeypatch, run)
        code = cli.main(["grpo", "grpo.yaml"])
        for file in Path("runs/new").glob("*"):
            file.rename(place / file.name)
        Path("runs/new").rmdir()
        return code, capsys.readouterr().err

    assert fail_with(UserError(["a: one", "b: two"])) == (2, "error: a: one\nerror: b: two\n")
    code, told = fail_with(RuntimeError("learn: actor[1] on node n failed: boom\nlong story"))
    assert code == 1
    assert (
        told == "error: learn: actor[1] on node n failed: boom (traceback in runs/new/error.log)\n"
    )
    assert "RuntimeError: learn" in (place / "error.log").read_text()
    assert fail_with(KeyboardInterrupt()) == (130, "interrupted\n")


def test_debug_lets_the_traceback_through(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(recipe: object, resume: bool, config_yaml: str) -> None:
        raise RuntimeError("boom")

    fake_runner(monkeypatch, run)
    with pytest.raises(RuntimeError, match="boom"):
        cli.main(["grpo", "grpo.yaml", "--debug"])


def test_python_m_launch_is_the_same_program(place: Path) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "launch", "version"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and done.stdout.strip() and time.monotonic() - started < 5
