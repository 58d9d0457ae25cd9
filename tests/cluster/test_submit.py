"""`quatuor submit` against a real Ray head with its job server, as a user runs it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import yaml

from launch.cluster import ray_job
from launch.tasks import unique_digits as task

RECIPES = ray_job.ROOT / "launch" / "recipes"
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]
BIN = Path(sys.executable).parent
TOKEN = secrets.token_hex(16)  # a job server runs whatever it is sent: ours asks for a token
MINE = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
SECRETS = {
    "RAY_AUTH_TOKEN": TOKEN,
    "HF_TOKEN": "hf_" + secrets.token_hex(16),
    "WANDB_API_KEY": secrets.token_hex(20),
}
MINE |= {"RAY_AUTH_MODE": "token", **SECRETS}


@dataclass(frozen=True)
class Head:
    """A Ray head of our own: its job server, and the folder of its session."""

    address: str
    folder: Path

    def job_processes(self) -> list[int]:
        """Processes that run in what a job shipped: drivers and workers."""
        return [
            pid
            for pid, folder in working_folders()
            if str(self.folder) in folder and "working_dir" in folder
        ]


def working_folders() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended, or is not ours
                yield int(entry.name), os.readlink(entry / "cwd")


def wait_until(holds: Callable[[], Any], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="q", dir="/tmp"))  # socket paths have 107 bytes at most
    gcs, dashboard, client, agent, agent_grpc, metrics = free_ports(6)
    command = [
        BIN / "ray",
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        "--num-cpus=12",
        f"--temp-dir={folder}",
        "--node-ip-address=127.0.0.1",
        f"--port={gcs}",
        f"--ray-client-server-port={client}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--metrics-export-port={metrics}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--object-store-memory=500000000",
    ]
    environment = {**MINE, "PATH": f"{BIN}:{os.environ['PATH']}"}
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        wait_until(lambda: answers(dashboard), 90, f"a job server; see {folder / 'head.log'}")
        yield Head(f"http://127.0.0.1:{dashboard}", folder)
    finally:
        process.terminate()  # --block ends its own processes, and no other cluster's
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def answers(port: int) -> bool:
    """Whether the job server takes requests."""
    request = Request(
        f"http://127.0.0.1:{port}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    try:
        with urlopen(request, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained language model and reward model, prompts, and a recipe: all of it outside the
    checkout.
    """
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("shared storage")
    for name in ("base", "rm"):
        task.make_tokenizer(folder / name)
    task.make_model(folder / "base", 3)
    AutoModelForSequenceClassification.from_pretrained(
        folder / "base", num_labels=1
    ).save_pretrained(folder / "rm")
    task.write_rows(folder / "prompts.jsonl", task.make_prompts(50, 3, "train"))
    recipe = yaml.safe_load((RECIPES / "demo_ppo.yaml").read_text())
    recipe["rewards"].append(
        {"name": "origin", "kind": "function", "function": "origin_of_test:origin"}
    )
    (folder / "my ppo.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@dataclass(frozen=True)
class Desk:
    """Where a user sits: shared storage with everything a recipe names, and the checkout that is
    shipped.
    """

    models: Path
    checkout: Path

    def submit(
        self, address: str, name: str, *overrides: str, token: str = TOKEN
    ) -> subprocess.Popen[str]:
        """`quatuor submit` of the demo's PPO, small, in the background."""
        few = [f"evaluation.{key}=null" for key in ("prompts", "test_prompts", "function")]
        few += [
            "evaluation.every_steps=0",
            "run.progress=false",
            "run.tensorboard=false",
            "generation.threads=1",
        ]
        size = [
            "step.steps=2",
            "step.prompts_per_step=8",
            "step.mini_batch_size=8",
            "step.ppo_epochs=1",
        ]
        paths = [
            f"run.folder={self.models / name}",
            f"prompts.path={self.models / 'prompts.jsonl'}",
        ]
        paths += [f"actor.model.path={self.models / 'base'}", "actor.ranks=1"]
        paths += [f"{role}.model.path={self.models / 'rm'}" for role in ("critic", "rewards.0")]
        command = [
            str(BIN / "quatuor"),
            "submit",
            str(self.models / "my ppo.yaml"),
            "--address",
            address,
        ]
        environment = {**MINE, "RAY_AUTH_TOKEN": token, "PYTHONPATH": str(self.checkout)}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(
            [*command, *few, *size, *paths, *overrides], cwd=self.models, env=environment, **pipes
        )


@pytest.fixture(scope="module")
def desk(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A copy of this checkout with one more module, so that a job that ran what is installed would
    be found out.
    """
    folder = tmp_path_factory.mktemp("checkout")
    for name in ray_job.shipped_files(ray_job.ROOT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ray_job.ROOT / name, folder / name)
    (folder / "origin_of_test.py").write_text(
        "from pathlib import Path\nimport actors.rewards.function, learners.settings\n"
        "def origin(prompts, responses):\n"
        "    files = actors.rewards.function.__file__, learners.settings.__file__\n"
        f"    Path({str(models / 'origin')!r}).write_text('\\n'.join(files))\n"
        "    return [0.0] * len(prompts)\n"
    )
    return Desk(models, folder)


def steps(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["phase"] == "train"]


def told_secrets(output: str, *folders: Path) -> list[tuple[str, str]]:
    """Names of secrets whose values were printed, or lie in a file under one of the folders, and
    where.
    """
    texts = {"output": output.encode()}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():  # not a socket
                with contextlib.suppress(FileNotFoundError):  # the cluster is alive
                    texts[str(path)] = path.read_bytes()
    return [
        (name, place)
        for name, value in SECRETS.items()
        for place, text in texts.items()
        if value.encode() in text
    ]


def test_ppo_runs_as_a_job(head: Head, desk: Desk) -> None:
    process = desk.submit(head.address, "two steps")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    assert [row["step"] for row in steps(desk.models / "two steps")] == [1, 2]
    assert (desk.models / "two steps" / "model" / "config.json").is_file()
    assert "Running entrypoint" in out
    assert out.splitlines()[-1] == f"the trained model is in {desk.models / 'two steps'}/model"
    origins = (desk.models / "origin").read_text().splitlines()
    assert all(str(head.folder) in origin for origin in origins), (
        "the job ran what is installed, not what was shipped"
    )
    assert "shipped; Ctrl-C stops it" in err and "succeeded, exit code 0" in err
    assert not told_secrets(out + err, desk.models / "two steps", head.folder), (
        "a secret was printed or saved"
    )
    wait_until(lambda: not head.job_processes(), 30, "the job's processes have ended")


def test_bad_input_is_told_by_the_job_with_its_exit_code(head: Head, desk: Desk) -> None:
    process = desk.submit(head.address, "bad", "prompts.path=/nowhere/prompts.jsonl")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2, out + err
    assert "error: command line: prompts.path: /nowhere/prompts.jsonl: no such data file" in out
    assert "failed, exit code 2" in err
    assert not (desk.models / "bad").exists()


def test_ctrl_c_stops_the_job_and_all_of_its_processes(head: Head, desk: Desk) -> None:
    process = desk.submit(head.address, "stopped", "step.steps=100000")
    try:
        wait_until(
            lambda: steps(desk.models / "stopped") or process.poll() is not None,
            150,
            "a first step",
        )
        assert process.poll() is None, process.communicate()
        assert len(head.job_processes()) >= 5  # driver, engine, Actor, Critic, Reference, Reward
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, out + err
    assert "Running entrypoint" in out  # the log came while the job ran
    assert [line.rpartition(": ")[2] for line in err.splitlines()[-3:]] == [
        "stopping",
        "stopped",
        "interrupted",
    ]
    wait_until(lambda: not head.job_processes(), 30, "the job's processes have ended")
    (job,) = [word.rstrip(":") for word in err.split() if word.startswith("quatuor-ppo-")][:1]
    status = [BIN / "ray", "job", "status", "--address", head.address, job]
    assert (
        "was stopped"
        in subprocess.run(status, capture_output=True, text=True, env=MINE, timeout=60).stdout
    )


def test_a_wrong_token_is_one_line(head: Head, desk: Desk) -> None:
    process = desk.submit(head.address, "stranger", token="0" * 32)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    (line,) = err.splitlines()
    assert "Invalid authentication token" in line and "set RAY_AUTH_TOKEN" in line


def test_an_unreachable_address_is_one_line(desk: Desk) -> None:
    (port,) = free_ports(1)
    started = time.monotonic()
    process = desk.submit(f"http://127.0.0.1:{port}", "unreachable")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(
        f"error: --address: no Ray job server answers at http://127.0.0.1:{port}"
    )
    assert time.monotonic() - started < 30


def test_an_address_that_accepts_and_says_nothing_is_one_line(desk: Desk) -> None:
    """Not waited for until the operating system gives up."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = desk.submit(f"http://127.0.0.1:{silent.getsockname()[1]}", "silent")
        out, err = process.communicate(timeout=90)
    assert (process.returncode, out) == (2, "")
    (line,) = err.splitlines()
    assert "no Ray job server answers" in line
