"""benchmarks/gpu.py: the conductor of its parts, and all of them, tiny, on CPUs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_parts import PARTS
from benchmarks.gpu_work import ROOT, Memory, Work, planned, spread
from launch.plan.plan import make_plan
from launch.recipe.read import load_recipe

LIMIT_S = 300.0  # for all parts together; an idle machine needs 120
EXCUSES = ("TRL is not installed", "torch sees no GPU")
ABSENT = "there is no benchmarks/"
SLOW = pytest.mark.timeout(400)


def test_a_name_stands_for_all_parts_below_it_and_parts_keep_their_order() -> None:
    assert gpu.chosen("") == list(PARTS)
    assert gpu.chosen("sync,grpo") == ["grpo", "sync/0.6b", "sync/1.7b"]
    assert gpu.chosen("demo/ppo") == ["demo/ppo"]
    with pytest.raises(SystemExit, match="--parts: there is no gr, but versions, grpo"):
        gpu.chosen("gr")


def test_in_two_lanes_every_part_runs_once_and_the_demos_stay_in_order() -> None:
    rows = gpu.lanes(list(PARTS))
    assert sorted(name for row in rows for name in row) == sorted(PARTS)
    (demo,) = [row for row in rows if "demo/sft" in row]
    assert [name for name in demo if name.startswith("demo/")] == gpu.chosen("demo")
    assert gpu.lanes(["grpo"]) == [["grpo"]]


def test_a_part_that_is_cut_leaves_the_others_their_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process of the parts is a script here that writes one result and then hangs."""
    script = tmp_path / "gpu_parts.py"
    script.write_text(
        "import json, pathlib, sys, time\n"
        "print('== one'); found = pathlib.Path(sys.argv[1], 'found'); found.mkdir(exist_ok=True)\n"
        "(found / 'one.json').write_text(json.dumps({'ok': True, 'seconds': 1.0}))\n"
        "print('== two'); print('about to hang', flush=True); time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "gpu.py"))
    monkeypatch.setattr(gpu, "LIMIT_S", 0.4)
    options = argparse.Namespace(device="cpu", small=True)
    report = gpu.Report(tmp_path / "found.json", "cpu", True)
    gpu.measure(["one", "two"], tmp_path, options, report)
    parts = json.loads((tmp_path / "found.json").read_text())["parts"]
    assert parts["one"] == {"ok": True, "seconds": 1.0}
    assert not parts["two"]["ok"] and parts["two"]["why"] == "took longer than 0 s"
    assert parts["two"]["tail"] == "about to hang\n"


def test_a_reward_without_meaning_depends_on_the_text_alone() -> None:
    scores = spread(["a", "b", "c"], ["same", "same", "other"])
    assert scores[0] == scores[1] != scores[2] and all(0 <= score < 1 for score in scores)


def test_shapes_are_those_of_the_table_unless_all_is_small(tmp_path: Path) -> None:
    whole = Work("cuda", False, tmp_path).shape("Skywork/Skywork-Reward-V2-Qwen3-0.6B")
    assert whole["hidden_size"] == 1024 and whole["vocab_size"] == 151936
    small = Work("cpu", True, tmp_path).shape("Qwen/Qwen3-8B")
    assert small["hidden_size"] == 64 and small["tie_word_embeddings"] is False


def test_a_gpus_recipe_is_told_where_all_of_it_lies_and_how_much_memory_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program that asks the driver is a script here."""
    asked = tmp_path / "nvidia-smi"
    asked.write_text('#!/bin/sh\necho "$@" >>"$0.said"; echo 81559\n')
    asked.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    work = Work("cuda", False, tmp_path)
    assert work.card() == ["cluster.gpu_memory_gib=79.6"]
    with Memory("cuda") as memory:
        pass
    assert memory.report() == {"peak_gib": 81559 / 1024}
    said = (tmp_path / "nvidia-smi.said").read_text().splitlines()
    assert said[0] == "--query-gpu=memory.total --format=csv,noheader,nounits --id=3"
    assert said[1] == "--query-gpu=memory.used --format=csv,noheader,nounits --id=3"
    assert "cluster.placement=colocated" in work.cluster("grpo")
    assert "cluster.placement=separate" in work.cluster("sft")


RUNS = [name for name in PARTS if name in ("grpo", "ppo") or name.startswith("recipes/")]


@pytest.mark.parametrize("part", [*RUNS, "demo/grpo_bfloat16", "demo/ppo"])
def test_on_a_gpu_too_every_recipe_is_sound(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the sizes of a GPU, on a card of 80 GiB; nothing is run, and models are names."""
    asked: list[tuple[str, Path, list[str]]] = []

    def run(
        work: Work, name: str, kind: str, recipe: Path, changes: list[str], *_: object, **__: object
    ) -> dict[str, Any]:
        asked.append((kind, recipe, [*work.cluster(kind), "run.folder=there", *changes]))
        return {}

    monkeypatch.setattr(Work, "run", run)
    monkeypatch.setattr(Work, "model", lambda self, like, scores=False: like)
    monkeypatch.setattr("benchmarks.gpu_work.gpu_memory", lambda which="used": 80 * 2**30)
    PARTS[part](Work("cuda", False, tmp_path))
    ((kind, file, changes),) = asked
    recipe = load_recipe(file, changes, kind)
    assert recipe.cluster.device == "cuda" and recipe.cluster.placement == "colocated"
    if part in RUNS:
        assert make_plan(recipe).fits
    if part in ("grpo", "ppo"):
        assert recipe.sequences_per_step == 256 and recipe.updates_per_step == 2


def test_the_plan_of_a_run_is_that_of_its_config(tmp_path: Path) -> None:
    import yaml

    recipe = yaml.safe_load((ROOT / "benchmarks" / "gpu_grpo.yaml").read_text())
    recipe["actor"]["model"]["path"] = "Qwen/Qwen3-0.6B"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    assert 20 < planned(tmp_path) < 80


@SLOW
@pytest.mark.engines
def test_all_parts_run_on_cpus_in_a_tiny_form(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device=cpu", "--small"]
    subprocess.run([*command, f"--json={file}"], check=True, timeout=LIMIT_S, cwd=tmp_path)
    parts = json.loads(file.read_text())["parts"]
    assert parts.keys() == PARTS.keys()
    failed = {name: part["why"] for name, part in parts.items() if not part["ok"]}
    assert all(why in EXCUSES or why.startswith(ABSENT) for why in failed.values()), failed
    assert parts["versions"]["matmul_tflops"]["float32"] > 0
    for name in ("grpo", "recipes/grpo_qwen3_8b_lora", "demo/ppo"):
        part = parts[name]
        assert part["peak_gib"] > 0.5 and part["planned_gib"] > 0.1 and part["start_s"] > 1
        assert all(part["steps"][0][f"seconds/{phase}"] > 0 for phase in ("generate", "sync"))
    assert parts["demo/ppo"]["gate"] < 1e-4 < parts["grpo"]["gate"]  # float32, bfloat16
    checked = {name for name, part in parts.items() if part.get("checked")}
    assert len(checked) == 6 and "recipes/ppo_qwen3_0.6b" in checked
    assert "test/accuracy_sampled" in parts["demo/ppo"]["summary"]["after"]
    assert 0 <= parts["demo/rm"]["summary"]["held_out/accuracy"] <= 1
