"""How a run begins: side by side, its parts timed, nothing heavy where it is not needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.demo.demo import RECIPES
from launch.tasks import unique_digits as task
from learners.imports import ROOT

pytestmark = pytest.mark.engines

LOOKING = """
import json, sys
import psutil, ray
from actors import begin
from launch.recipe.read import load_recipe

HEAVY = ("torch", "transformers", "vllm", "deepspeed", "ray")

def heavy(_=None):
    import gc, os, sys
    found = [name for name in HEAVY if name in sys.modules]
    names = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "TRITON_CACHE_DIR")
    return found, [os.environ.get(name) for name in names], gc.isenabled()

def parts(recipe):
    kind = begin.parts_of(recipe)

    class Looking(kind.training):
        def begin(self, first):
            seen = {"driver": heavy()}
            for name, group in self.groups.items():
                (seen[name],) = ray.get([h.__ray_call__.remote(heavy) for h in group.handles])
            commands = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
            seen["commands"] = commands
            print("seen", json.dumps(seen), flush=True)
            return super().begin(first)

    return kind._replace(training=Looking)

begin.run(load_recipe(sys.argv[1], sys.argv[2:], "grpo"), parts=parts)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    """One step of GRPO from the command line's own process: what its processes are like before that
    step.
    """
    task.make_tokenizer(folder / "base")
    task.make_model(folder / "base", 3)
    task.write_rows(folder / "prompts.jsonl", task.make_prompts(20, 3, "train"))
    known = Path(os.environ.get("VLLM_CACHE_ROOT", Path.home() / ".cache" / "vllm"))
    known.mkdir(parents=True, exist_ok=True)
    (folder / "cache").mkdir()
    (folder / "cache" / "vllm").symlink_to(known)  # else vLLM would look into its models anew
    prompts = folder / "prompts.jsonl"
    overrides = [
        f"run.folder={folder / 'run'}",
        "run.tensorboard=false",
        "run.final_checkpoint=false",
        f"actor.model.path={folder / 'base'}",
        "actor.ranks=1",
        f"prompts.path={prompts}",
        f"evaluation.prompts.path={prompts}",
        "evaluation.prompts.limit=2",
        "evaluation.test_prompts=null",
        "evaluation.every_steps=0",
        "step.steps=1",
        "step.prompts_per_step=2",
        "step.group_size=2",
        "step.mini_batch_size=4",
        f"cluster.cache={folder / 'cache'}",
    ]
    command = [sys.executable, "-c", LOOKING, str(RECIPES / "demo_grpo.yaml"), *overrides]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    told = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert told.returncode == 0, told.stderr
    line = next(line for line in told.stdout.splitlines() if line.startswith("seen "))
    return dict(json.loads(line.removeprefix("seen ")))


def test_nothing_heavy_is_imported_where_it_is_not_needed(seen: dict[str, Any]) -> None:
    modules = {name: set(found) for name, (found, *_) in seen.items() if name != "commands"}
    assert not modules["driver"] & {"vllm", "deepspeed"}
    assert "vllm" in modules["engine"] and "deepspeed" not in modules["engine"]
    assert "deepspeed" in modules["actor"] and "vllm" not in modules["actor"]
    assert not modules["reference"] & {"vllm", "deepspeed"}
    assert modules["reward exact_match"] == modules["evaluator"] == {"ray"}


def test_processes_have_their_environment_without_one_of_rays(
    seen: dict[str, Any], folder: Path
) -> None:
    triton = str(folder / "cache" / "triton")
    assert seen["engine"][1] == ["2", "cpu", triton]
    assert seen["actor"][1] == ["1", "cpu", triton]
    assert all(seen[name][2] for name in seen if name != "commands"), "garbage is collected again"


def test_ray_starts_only_what_a_run_needs(seen: dict[str, Any]) -> None:
    commands = "\n".join(seen["commands"])
    assert "raylet" in commands and "gcs_server" in commands
    for spare in ("monitor.py", "dashboard.py", "log_monitor.py"):
        assert spare not in commands


def test_the_parts_of_a_start_are_in_the_timeline(seen: dict[str, Any], folder: Path) -> None:
    _, *events = json.loads((folder / "run" / "timeline.json").read_text())
    parts = {e["name"]: e for e in events if e["name"].startswith("start")}
    roles = ("engine", "actor", "reference", "reward exact_match", "evaluator")
    of_roles = {f"start/{part} {role}" for part in ("import", "load") for role in roles}
    assert set(parts) == {"start", "start/ray", "start/import driver", "start/data"} | of_roles
    whole = parts["start"]
    end = whole["ts"] + whole["dur"]
    slack = 100_000  # microseconds: two clocks
    for part in parts.values():
        assert whole["ts"] - slack <= part["ts"] and part["ts"] + part["dur"] <= end + slack
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    (start,) = [row for row in rows if row["phase"] == "start"]
    assert {f"seconds/{name}" for name in parts} <= set(start)
    read = parts["start/data"]["ts"] + parts["start/data"]["dur"]
    assert all(parts[f"start/load {role}"]["ts"] > read for role in roles)


def test_data_that_cannot_serve_end_a_run_whose_ray_has_begun(
    seen: dict[str, Any], folder: Path
) -> None:
    (folder / "bad.jsonl").write_text('{"prompt": 3, "answer": "3"}\n')
    run = folder / "refused"
    command = [sys.executable, "-m", "launch", "grpo", str(RECIPES / "demo_grpo.yaml")]
    overrides = [
        f"run.folder={run}",
        f"actor.model.path={folder / 'base'}",
        f"prompts.path={folder / 'bad.jsonl'}",
        "evaluation.prompts=null",
        "evaluation.test_prompts=null",
        "evaluation.every_steps=0",
        "evaluation.function=null",
    ]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    told = subprocess.run(
        command + overrides,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert told.returncode == 2, told.stderr
    (line,) = told.stderr.splitlines()
    assert line.startswith("error: ") and "bad.jsonl" in line
    assert not run.exists()
