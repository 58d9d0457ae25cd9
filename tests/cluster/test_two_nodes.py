"""A run over two Ray nodes: learners on both, the engine on one, and the same metrics as on one
node.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.tasks import unique_digits as task

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

BIN = Path(sys.executable).parent
PORT = 26379
ROOT = Path(__file__).parents[2]
# what this cluster asks for; a user's own lies in ~/.ray/auth_token
TOKEN = {"RAY_AUTH_TOKEN": "0" * 64}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A head with four CPUs and a second raylet with four, both on this machine; each ends with its
    process.
    """
    import ray

    # Ray takes localhost for this address, so say it at once
    head = f"{ray.util.get_node_ip_address()}:{PORT}"
    common = [str(BIN / "ray"), "start", "--block", "--num-cpus=4"]
    first = [
        *common,
        "--head",
        f"--port={PORT}",
        "--include-dashboard=false",
        "--temp-dir=/tmp/quatuor-two-nodes",
    ]
    with open(tmp_path_factory.mktemp("ray") / "log", "w") as log:
        environment = {**os.environ, **TOKEN, "RAY_AUTH_MODE": "token"}
        nodes = [subprocess.Popen(first, stdout=log, stderr=log, env=environment)]
        try:
            wait_for_nodes(head, 1)
            nodes.append(
                subprocess.Popen(
                    [*common, f"--address={head}"], stdout=log, stderr=log, env=environment
                )
            )
            wait_for_nodes(head, 2)
            yield head
        finally:
            for node in reversed(nodes):
                node.terminate()
                node.wait(60)


def wait_for_nodes(address: str, count: int) -> None:
    question = "from launch.cli import show_ray_token; show_ray_token(); import ray; "
    question += (
        f"ray.init('{address}', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    )
    until = time.monotonic() + 60
    seen = ""
    while time.monotonic() < until:
        environment = {**os.environ, **TOKEN}
        command = [sys.executable, "-c", question]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        seen = done.stdout.strip()
        if seen == str(count):
            return
        time.sleep(0.5)
    raise AssertionError(f"{seen or 'no'} nodes of {count} within 60 s: {done.stderr[-500:]}")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    task.make_tokenizer(folder / "base")
    task.make_model(folder / "base", 3)
    task.write_rows(folder / "prompts.jsonl", task.make_prompts(100, 3, "train"))
    return folder


def run(folder: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    """Two steps of GRPO through the command line; the metrics of the steps without times."""
    recipe = ROOT / "launch" / "recipes" / "demo_grpo.yaml"
    fixed = [
        f"run.folder={folder / name}",
        "run.progress=false",
        "run.tensorboard=false",
        "step.steps=2",
        "step.prompts_per_step=8",
        "step.mini_batch_size=32",
        f"actor.model.path={folder / 'base'}",
        "actor.ranks=2",
        "actor.zero_stage=2",
        "generation.threads=1",
        "algorithm.kl_beta=0.02",
        f"prompts.path={folder / 'prompts.jsonl'}",
        "evaluation.prompts=null",
        "evaluation.test_prompts=null",
        "evaluation.function=null",
        "evaluation.every_steps=0",
    ]
    command = [str(BIN / "quatuor"), "grpo", str(recipe), *fixed, *overrides]
    environment = {**os.environ, **TOKEN}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            k: v
            for k, v in row.items()
            if k not in ("phase", "time") and not k.startswith(("seconds/", "throughput/"))
        }
        for row in rows
        if row["phase"] == "train"
    ]


def test_two_nodes_give_the_metrics_of_one(workshop: Path, address: str) -> None:
    alone = run(workshop, "one_node")
    together = run(workshop, "two_nodes", f"cluster.address={address}", "cluster.nodes=2")
    nodes = json.loads((workshop / "two_nodes" / "placement.json").read_text())
    assert len({*nodes["actor"]}) == 2 and len(nodes["engine"]) == 1, nodes
    assert len(alone) == len(together) == 2
    for one, two in zip(alone, together, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
