"""The script of `quatuor slurm` without Slurm: what it says, what it refuses, and what it does with
stand-ins.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.cluster.slurm import BODY, least_cpus, seconds, write_job
from launch.demo.demo import RECIPES
from launch.recipe.read import load_recipe
from learners.errors import UserError

STAND_INS = {
    # Runs its command here. Options come first.
    "srun": 'while [[ $1 == --* ]]; do shift; done; export SLURM_CPUS_ON_NODE=3; exec "$@"',
    "scontrol": 'case "$1 $2" in "show job") echo "   JobState=${STATE:-RUNNING} Reason=None";; '
    'show*) printf "n1\\nn2\\n";; *) echo "scontrol $*" >>"$HERE/calls";; esac',
    "sleep": "exec /bin/sleep 0.05",
    # the head's address; or silence: all nodes are there
    "python": "if [ $1 = -c ]; then echo 10.0.0.1; fi",
    "ray": 'printf "ray $*\\nauth $RAY_AUTH_MODE $RAY_AUTH_TOKEN\\n" >>"$HERE/calls"\necho "Ray '
    'speaks"\n'
    'exec /bin/sleep "${RAY_SECONDS:-100}"',
    "quatuor": 'echo "quatuor $*" >>"$HERE/calls"; exec "$PYTHON" -c "$DRIVER"',
}
BEGINS = """
import os, pathlib, signal, sys, time
terms = []
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
signal.signal(signal.SIGTERM, lambda *_: terms.append(1))
pathlib.Path(os.environ["HERE"], "stays").touch()
"""
STAYS = BEGINS.replace("signal.signal(signal.SIGTERM", "(lambda *_: None)(None") + "time.sleep(60)"
SAVES = BEGINS + "while not terms: time.sleep(0.01)\ntime.sleep(0.2)\nexit(75)"
LEAVES = BEGINS + "while len(terms) < 2: time.sleep(0.01)\nprint('stopped by SIGTERM')\nexit(143)"
HANGS = BEGINS + "while True: time.sleep(60)"
PYTHON = sys.executable


@dataclass(frozen=True)
class Job:
    """A script on two nodes that are both this process's machine."""

    here: Path
    script: Path

    @property
    def folder(self) -> Path:
        return self.here / "run"

    def start(self, driver: str, **more: str) -> subprocess.Popen[str]:
        given = {"SLURM_JOB_ID": "7003", "SLURMD_NODENAME": "n1", "SLURM_JOB_NODELIST": "n[1-2]"}
        given |= {
            "SLURM_JOB_NUM_NODES": "2",
            "HERE": str(self.here),
            "DRIVER": driver,
            "PYTHON": PYTHON,
        }
        given |= {"PATH": f"{self.here / 'bin'}:{os.environ['PATH']}"} | more
        return subprocess.Popen(
            ["bash", str(self.script)],
            env=given,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, driver: str, **more: str) -> tuple[int, str]:
        """Exit code and output."""
        job = self.start(driver, **more)
        said = job.communicate(timeout=30)[0]
        return job.returncode, said

    def calls(self, program: str) -> list[str]:
        lines = (self.here / "calls").read_text().splitlines()
        return [
            line.removeprefix(f"{program} ") for line in lines if line.startswith(f"{program} ")
        ]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    (tmp_path / "bin").mkdir()
    for name, does in STAND_INS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/usr/bin/env bash\n{does}\n")
        program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    return Job(tmp_path, write(tmp_path, "two words=1"))


def write(
    folder: Path, *overrides: str, kind: str = "sft", given: Sequence[str] = (), **options: Any
) -> Path:
    """Write a demo recipe's script; `given` are overrides that the recipe itself knows."""
    path = RECIPES / f"demo_{kind}.yaml"
    values: dict[str, Any] = {
        "nodes": 2,
        "time_limit": "10",
        "partition": None,
        "account": None,
        "send": False,
    }
    script = folder / "run.slurm.sh"
    recipe = load_recipe(path, [f"run.folder={folder / 'run'}", *given])
    write_job(recipe, path, overrides, script=script, **values | options)
    return script


def test_shellcheck_finds_nothing(job: Job) -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}")
    assert program, "shellcheck is missing: it comes with the dev packages"
    done = subprocess.run([program, str(job.script), str(BODY)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_run_that_succeeds(job: Job) -> None:
    code, said = job.run("exit(0)")
    assert code == 0, said
    head, worker = job.calls("ray")
    # 20000 + 2 * (7003 mod 5000)
    assert "--head --port=24006 --ray-client-server-port=24007" in head
    assert "--address=10.0.0.1:24006" in worker and "--head" not in worker
    for node in (head, worker):
        assert "--num-cpus=3 --num-gpus=0 --temp-dir=/tmp/quatuor-7003 " in node
    tokens = job.calls("auth")
    assert (
        len(tokens) == 2
        and tokens[0] == tokens[1]
        and re.fullmatch("token [0-9a-f]{64}", tokens[0])
    ), tokens
    recipe = RECIPES / "demo_sft.yaml"
    assert job.calls("quatuor") == [
        f'sft {recipe} two words=1 run.folder="{job.folder}" cluster.nodes=2 '
        "cluster.address=10.0.0.1:24006"
    ]
    assert not left_of(job) and not list(job.here.glob("run.ray-*"))


def test_a_checkpoint_is_gone_on_from(job: Job) -> None:
    (job.folder / "checkpoints" / "step-000007").mkdir(parents=True)
    code, said = job.run("exit(0)")
    assert code == 0 and "--resume" in job.calls("quatuor")[0], said


@pytest.mark.parametrize("name", ["step-000007.tmp", "step-000007.bak2"])
def test_an_unfinished_checkpoint_is_none(job: Job, name: str) -> None:
    (job.folder / "checkpoints" / name).mkdir(parents=True)
    job.run("exit(0)")
    assert "--resume" not in job.calls("quatuor")[0] and job.folder.exists()


def test_started_again_without_a_checkpoint_it_puts_the_first_try_aside(job: Job) -> None:
    job.folder.mkdir()
    code, said = job.run("exit(0)", SLURM_RESTART_COUNT="1")
    assert code == 0 and "--resume" not in job.calls("quatuor")[0], said
    assert not job.folder.exists() and (job.here / "run.before-7003.1").is_dir()


def test_the_drivers_exit_code_is_the_jobs(job: Job) -> None:
    code, said = job.run("exit(2)")
    assert code == 2 and not job.calls("scontrol"), said
    assert not left_of(job)


def test_a_node_that_ends_is_the_end(job: Job) -> None:
    code, said = job.run(STAYS, RAY_SECONDS="1")
    assert code == 1 and "ended" in said and "Ray speaks" in said, said
    assert not left_of(job) and not job.calls("scontrol")


def test_a_node_that_ends_before_all_have_come_is_the_end(job: Job) -> None:
    waits = (
        "#!/usr/bin/env bash\nif [ $1 = -c ]; then echo 10.0.0.1; else exec /bin/sleep 100; fi\n"
    )
    (job.here / "bin" / "python").write_text(waits)
    code, said = job.run("exit(0)", RAY_SECONDS="0.3")
    assert code == 1 and "Ray on n1 ended" in said, said
    assert not job.calls("quatuor") and not left_of(job)


def test_nodes_that_do_not_come_are_the_end(job: Job) -> None:
    (job.here / "bin" / "python").write_text("#!/usr/bin/env bash\n[ $1 = -c ] && echo 10.0.0.1\n")
    code, said = job.run("exit(0)")
    assert code == 1 and "did not come up" in said, said
    assert not job.calls("quatuor") and not left_of(job)


def signalled(job: Job, driver: str, number: signal.Signals, **more: str) -> tuple[int, str]:
    """Exit code and output of a job whose script gets a signal while its driver runs."""
    running = job.start(driver, **more)
    until = time.monotonic() + 20
    while not (job.here / "stays").exists():
        assert time.monotonic() < until, "the driver was not started"
        time.sleep(0.05)
    running.send_signal(number)
    try:
        said = running.communicate(timeout=20)[0]
    finally:
        running.terminate()  # it ends whatever it has started
    return running.returncode, said


def test_the_signal_before_the_time_limit_queues_the_job_again(job: Job) -> None:
    code, said = signalled(job, STAYS, signal.SIGUSR1)
    assert code == 75 and job.calls("scontrol") == ["requeue 7003"], said
    assert not left_of(job)


def test_a_step_that_is_finished_after_sigterm_queues_the_job_again(job: Job) -> None:
    code, said = signalled(job, SAVES, signal.SIGTERM)
    assert code == 75 and job.calls("scontrol") == ["requeue 7003"], said
    assert not left_of(job)


def test_a_job_that_slurm_ends_does_not_come_back(job: Job) -> None:
    code, said = signalled(job, SAVES, signal.SIGTERM, STATE="COMPLETING")
    assert code == 75 and not job.calls("scontrol") and "submit this script once more" in said
    assert not left_of(job)


def test_a_driver_without_time_leaves_with_its_line_before_it_is_killed(job: Job) -> None:
    code, said = signalled(job, LEAVES, signal.SIGTERM)
    assert code == 143 and "stopped by SIGTERM" in said and not job.calls("scontrol"), said
    assert not left_of(job)


def test_a_driver_that_hangs_is_killed(job: Job) -> None:
    code, said = signalled(job, HANGS, signal.SIGTERM)
    assert code == 137 and not job.calls("scontrol"), said
    assert not left_of(job)


def test_all_that_follows_sigterm_fits_into_slurms_kill_wait() -> None:
    step, stop = (
        int(re.findall(rf"^{name}_seconds=(\d+)", BODY.read_text(), re.MULTILINE)[0])
        for name in ("step", "stop")
    )
    # the driver's first signal, its second, Ray's; a second one within 2 s would be an echo
    assert step > 2 and step + 2 * stop < 30


def test_the_driver_writes_where_the_script_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable may have another value on the nodes."""
    monkeypatch.setenv("SCRATCH", str(tmp_path / "a: #b é"))
    text = write(tmp_path, "run.folder=$SCRATCH/run", given=["run.folder=$SCRATCH/run"]).read_text()
    (line,) = re.findall(r"^command=\((.*)\)$", text, re.MULTILINE)
    monkeypatch.setenv("SCRATCH", "/elsewhere")
    _, recipe, *overrides = shlex.split(line)
    assert load_recipe(Path(recipe), overrides).run.folder == str(tmp_path / "a: #b é" / "run")


def left_of(job: Job) -> list[str]:
    """Command lines of processes that still know of the job."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"HERE={job.here}" in (process / "environ").read_text(errors="replace").split("\0"):
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


def test_sbatch_is_told_of_time_signal_and_site(tmp_path: Path) -> None:
    text = write(tmp_path, time_limit="1-00", partition="gpu", account="us").read_text()
    for line in (
        "nodes=2",
        "time=1-00",
        "signal=B:USR1@600",
        "requeue",
        "open-mode=append",
        "partition=gpu",
    ):
        assert f"\n#SBATCH --{line}\n" in text, line
    assert "\n#SBATCH --account=us\n" in text and "gpus-per-node" not in text
    gpus = write(tmp_path, kind="ppo", given=["cluster.device=cuda"]).read_text()
    assert "\n#SBATCH --gpus-per-node=8\n" in gpus


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"time_limit": "soon"}, "--time: 'soon' is not a time"),
        ({"time_limit": "0:30"}, "at least one"),
        (
            {
                "nodes": 1,
                "kind": "ppo",
                "given": ["cluster.device=cuda", "cluster.gpus_per_node=2"],
            },
            "ask for 3 nodes",
        ),
        ({"send": True}, "no sbatch"),
    ],
)
def test_what_it_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], complaint: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=complaint):
        write(tmp_path, **options)
    assert not (tmp_path / "run.slurm.sh").exists()


def test_it_replaces_only_its_own_script(tmp_path: Path) -> None:
    script = write(tmp_path)
    assert write(tmp_path) == script
    script.write_text("my recipe")
    with pytest.raises(UserError, match="not a script of quatuor"):
        write(tmp_path)


def test_a_folder_without_a_checkpoint_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        write(tmp_path)


def test_times_are_read_as_slurm_reads_them() -> None:
    written = {
        "90": 5400,
        "90:30": 5430,
        "1:30:15": 5415,
        "2-3": 183600,
        "2-3:30": 185400,
        "2-3:30:15": 185415,
    }
    assert {text: seconds(text) for text in written} == written


def test_every_node_offers_room_for_its_share() -> None:
    three = ["learner.ranks=3", "learner.threads=2"]
    on = {
        n: load_recipe(RECIPES / "demo_sft.yaml", [*three, f"cluster.nodes={n}"]) for n in (1, 2, 3)
    }
    assert [least_cpus(recipe) for recipe in on.values()] == [6, 4, 2]


def test_the_run_uses_as_many_nodes_as_the_job_has(tmp_path: Path) -> None:
    """A recipe that says nothing of nodes would put everything on one of them, and leave the others
    idle.
    """
    text = write(tmp_path, nodes=3, given=["cluster.nodes=1"]).read_text()
    assert " cluster.nodes=3)" in text and "least_cpus=1\n" in text


def test_nothing_heavy_is_loaded() -> None:
    heavy = "{'torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'datasets'}"
    question = f"import sys, launch.cli, launch.cluster.slurm; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
