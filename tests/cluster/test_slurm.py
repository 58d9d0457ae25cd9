"""`quatuor slurm` under a real Slurm of two nodes: a run that succeeds, one that loses a node, one
out of time.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.demo.demo import RECIPES
from launch.tasks import unique_digits as task
from tests.cluster.one_machine_slurm import OneMachineSlurm, of_job, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

QUATUOR = str(Path(sys.executable).parent / "quatuor")
OVER = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")


@dataclass(frozen=True)
class Jobs:
    """Submits recipes on small data, and sees how they go."""

    slurm: OneMachineSlurm
    folder: Path

    def arguments(self, kind: str, name: str, *overrides: str) -> list[str]:
        fixed = [f"run.folder={self.folder / name}", "run.progress=false", "run.tensorboard=false"]
        return [str(RECIPES / f"demo_{kind}.yaml"), *fixed, *overrides]

    def sft(self, name: str, steps: int) -> list[str]:
        """SFT with a rank on each node."""
        return self.arguments(
            "sft",
            name,
            f"learner.model.path={self.folder / 'base'}",
            f"data.path={self.folder / 'sft.jsonl'}",
            f"train.steps={steps}",
            "learner.ranks=2",
            "learner.zero_stage=2",
        )

    def submit(self, arguments: list[str], time_limit: str) -> str:
        """Returns the job's number."""
        done = self.slurm.run(
            QUATUOR, "slurm", *arguments, "--nodes", "2", "--time", time_limit, "--submit"
        )
        assert done.returncode == 0, done.stderr
        return re.findall(r"Submitted batch job (\d+)", done.stdout)[0]

    def submit_until_begun(self, arguments: list[str], time_limit: str) -> str:
        """Return the number of a job that is still there once its run has begun: Slurm may send the
        signal before the time limit up to a minute early (sbatch(1)), here before there is a run.
        """
        run = Path(next(a for a in arguments if a.startswith("run.folder=")).partition("=")[2])
        for _ in range(3):
            number = self.submit(arguments, time_limit)
            ended = lambda: self.slurm.job(number)["JobState"] in OVER  # noqa: E731, B023
            wait_until(lambda: run.exists() or ended(), 120, "neither began nor ended")  # noqa: B023
            if run.exists():
                return number
        raise AssertionError("Slurm has ended three jobs before they began")

    def wait(self, number: str, *states: str, seconds: float = 400) -> dict[str, str]:
        wait_until(
            lambda: self.slurm.job(number)["JobState"] in (*states, *OVER), seconds, f"not {states}"
        )
        return self.slurm.job(number)

    def steps(self, name: str) -> list[int]:
        """Steps whose metrics the run has written so far."""
        file = self.folder / name / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [row["step"] for row in rows if row["phase"] == "train"]

    def log(self, name: str, number: str) -> str:
        return (self.folder / f"{name}.slurm-{number}.log").read_text()


@pytest.fixture(scope="module")
def jobs(slurm: OneMachineSlurm, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    folder = tmp_path_factory.mktemp("runs")
    task.make_tokenizer(folder / "base")
    task.make_model(folder / "base", 3)
    make_judge(folder / "base", folder / "judge")
    task.write_rows(folder / "sft.jsonl", task.make_demonstrations(2000, 3))
    task.write_rows(folder / "prompts.jsonl", task.make_prompts(100, 3, "train"))
    return Jobs(slurm, folder)


@pytest.fixture(autouse=True)
def only_one_job(jobs: Jobs) -> Iterator[None]:
    """A test that failed may have left its job running."""
    yield
    jobs.slurm.run("scancel", "--user=root")
    wait_until(lambda: not jobs.slurm.run("squeue", "-h").stdout, 60, "a job does not end")


def make_judge(base: Path, folder: Path) -> None:
    """An untrained reward model, good enough to be a Reward and a Critic."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def nothing_left(number: str) -> None:
    wait_until(lambda: not of_job(number), 30, f"left behind by job {number}: {of_job(number)}")


def test_ppo_runs_on_two_nodes(jobs: Jobs) -> None:
    base = jobs.folder / "base"
    judge = jobs.folder / "judge"
    number = jobs.submit(
        jobs.arguments(
            "ppo",
            "ppo",
            f"actor.model.path={base}",
            f"critic.model.path={judge}",
            f"rewards.0.model.path={judge}",
            f"prompts.path={jobs.folder / 'prompts.jsonl'}",
            "step.steps=2",
            "step.prompts_per_step=16",
            "step.mini_batch_size=8",
            "generation.threads=1",
            "evaluation.prompts=null",
            "evaluation.test_prompts=null",
            "evaluation.function=null",
            "evaluation.every_steps=0",
        ),
        "10",
    )
    job = jobs.wait(number, "COMPLETED")
    log = jobs.log("ppo", number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert jobs.steps("ppo") == [1, 2]
    assert (jobs.folder / "ppo" / "model" / "config.json").exists()
    where = json.loads((jobs.folder / "ppo" / "placement.json").read_text())
    assert len({node for nodes in where.values() for node in nodes}) == 2, where
    nothing_left(number)
    assert not Path(f"/tmp/quatuor-{number}").exists() and not list(jobs.folder.glob("ppo.ray-*"))


def test_the_loss_of_a_node_ends_the_job(jobs: Jobs) -> None:
    number = jobs.submit(jobs.sft("fallen", 5000), "10")
    wait_until(lambda: len(jobs.steps("fallen")) > 2, 120, "no step was made")
    try:
        jobs.slurm.fell("n2")
        job = jobs.wait(number, "FAILED", seconds=60)
        assert job["JobState"] == "FAILED" and job["ExitCode"] != "0:0", job
        assert "n2" in jobs.log("fallen", number)
        nothing_left(number)
    finally:
        jobs.slurm.start_node("n2")
        shutil.rmtree(f"/tmp/quatuor-{number}")  # Ray's logs stay after a failure


def test_out_of_time_it_is_queued_again_and_completes(jobs: Jobs) -> None:
    steps = 150  # cannot be done within a minute
    arguments = [*jobs.sft("long", 150), "train.batch_size=384"]
    number = jobs.submit_until_begun(arguments, "1")
    wait_until(lambda: jobs.slurm.job(number)["Restarts"] == "1", 120, "was not queued again")
    reached = jobs.steps("long")[-1]
    assert 1 <= reached < steps
    assert [p.name for p in (jobs.folder / "long" / "checkpoints").iterdir()] == [
        f"step-{reached:06d}"
    ]
    nothing_left(number)
    for other in ("learner.ranks=1", "learner.zero_stage=1"):
        refused = subprocess.run(
            [QUATUOR, "sft", *arguments, other, "--resume"], capture_output=True, text=True
        )
        assert refused.returncode == 2 and other.partition("=")[0] in refused.stderr, refused.stderr

    jobs.slurm.run("scontrol", "update", f"JobId={number}", "TimeLimit=10")
    job = jobs.wait(number, "COMPLETED")
    log = jobs.log("long", number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert jobs.steps("long") == list(range(1, steps + 1))
    assert "left with a checkpoint" in log and "--resume" in log
    assert (jobs.folder / "long" / "model" / "config.json").exists()
    nothing_left(number)


def test_after_sigterm_there_is_time_for_the_step_and_the_job_is_queued_again(jobs: Jobs) -> None:
    number = jobs.submit(jobs.sft("told", 5000), "10")
    wait_until(lambda: len(jobs.steps("told")) > 2, 120, "no step was made")
    jobs.slurm.run("scancel", "--batch", "--signal=TERM", number)
    wait_until(lambda: jobs.slurm.job(number)["Restarts"] == "1", 60, "was not queued again")
    reached = jobs.steps("told")[-1]
    saved = [p.name for p in (jobs.folder / "told" / "checkpoints").iterdir()]
    assert saved == [f"step-{reached:06d}"], jobs.log("told", number)
    assert "left with a checkpoint; queueing" in jobs.log("told", number)
    nothing_left(number)
