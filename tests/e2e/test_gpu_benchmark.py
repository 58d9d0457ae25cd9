"""benchmarks/gpu.py: the conductor of its parts, and all of them, tiny, on CPUs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu_parts import PARTS
from benchmarks.gpu_work import ROOT, Work, planned, spread

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


def test_the_recipes_of_the_benchmark_fit_a_card_of_80_gb(tmp_path: Path) -> None:
    import yaml

    for name in ("grpo", "ppo"):
        recipe = yaml.safe_load((ROOT / "benchmarks" / f"gpu_{name}.yaml").read_text())
        for role in {"actor", "critic"} & recipe.keys():
            recipe[role]["model"]["path"] = "Qwen/Qwen3-0.6B"
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
    for name in ("grpo", "ppo", "recipes/grpo_qwen3_8b_lora", "demo/grpo_float32", "demo/ppo"):
        part = parts[name]
        assert part["peak_gib"] > 0.5 and part["planned_gib"] > 0.1 and part["start_s"] > 1
        assert all(part["steps"][0][f"seconds/{phase}"] > 0 for phase in ("generate", "sync"))
    assert parts["demo/grpo_float32"]["gate"] < 1e-4 < parts["grpo"]["gate"]
    checked = {name for name, part in parts.items() if part.get("checked")}
    assert len(checked) == 4 and "recipes/ppo_qwen3_0.6b" in checked
    assert "test/accuracy_sampled" in parts["demo/ppo"]["summary"]["after"]
    assert 0 <= parts["demo/rm"]["summary"]["held_out/accuracy"] <= 1
