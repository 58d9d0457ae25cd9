"""A real Slurm of two nodes on this machine: its daemons, configuration and state live in one
folder.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

CONTROLLER_PORT = 17000  # and the nodes' ports after it
NODES = ("n1", "n2")
PACKAGES = ("slurm-wlm", "munge")

CONFIGURATION = """
ClusterName=quatuor
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=5
SlurmdTimeout=15
KillWait=5
OverTimeLimit=5
ReturnToService=2
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=1 RealMemory=4000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class OneMachineSlurm:
    """Start it, submit to it, kill one of its nodes, stop it. Installs Slurm when it is missing;
    needs root.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.started_munge = False

    def start(self) -> None:
        install()
        self.started_munge = start_munge()
        (self.folder / "state").mkdir()
        host = socket.gethostname().split(".")[0]
        ports = (CONTROLLER_PORT, CONTROLLER_PORT + 1, CONTROLLER_PORT + 2)
        values = {
            "host": host,
            "folder": self.folder,
            "port": ports[0],
            "first": ports[1],
            "last": ports[2],
        }
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
        self._launch("slurmctld", "slurmctld", "-D", "-i")
        for node in NODES:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Start the node's daemon and wait until Slurm would give it work."""
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self._launch(node, "slurmd", "-D", "-N", node)
        wait_until(
            lambda: self._ask("sinfo", "-h", "-n", node, "-o", "%t") == "idle",
            60,
            f"{node} is not idle",
        )

    def stop(self) -> None:
        for daemon in reversed(list(self.daemons.values())):
            daemon.terminate()
        for daemon in self.daemons.values():
            daemon.wait(30)
        if self.started_munge:
            subprocess.run(
                ["runuser", "-u", "munge", "--", "munged", "--stop"], check=True, timeout=30
            )

    def fell(self, node: str) -> None:
        """What a loss of power does to a node: its daemon and everything it started end at once."""
        doomed = started_on(node)
        self.daemons[node].kill()
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.daemons.pop(node).wait(10)

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, ExitCode, Restarts and so on."""
        words = self._ask("scontrol", "show", "--oneliner", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=self.environment
        )

    def _ask(self, *command: str) -> str:
        return self.run(*command).stdout.strip()

    def _launch(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment
            )


def install() -> None:
    """Debian's packages, unless they are there; whoever cannot install them cannot run these
    tests.
    """
    if shutil.which("slurmd") and shutil.which("munged"):
        return
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["update", "-qq"],
        ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES],
    ):
        done = subprocess.run(
            ["apt-get", *command], capture_output=True, text=True, timeout=300, env=quiet
        )
    assert done.returncode == 0, (
        f"Slurm cannot be installed (it takes Debian's packages and root): {done.stderr}"
    )


def start_munge() -> bool:
    """Slurm's messages are signed by it, and one serves the whole machine. Returns whether it had
    to be started.
    """
    Path("/run/munge").mkdir(mode=0o755, exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    if munge_answers():
        return False
    subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True, timeout=30)
    wait_until(munge_answers, 20, "munge does not answer")
    return True


def munge_answers() -> bool:
    return subprocess.run(["munge", "-n"], capture_output=True).returncode == 0


def started_on(node: str) -> list[psutil.Process]:
    """Every step of the node's daemon, then all that runs inside them."""
    inside = [p for p in psutil.process_iter() if environment_of(p).get("SLURMD_NODENAME") == node]
    steps = {parent for p in inside if (parent := p.parent()) and parent.name() == "slurmstepd"}
    return [*steps, *{p for step in steps for p in step.children(recursive=True)}]


def of_job(number: str) -> dict[int, str]:
    """Command lines of all processes a job has started, by their environment, arguments or open
    files.

    Ray's workers rename themselves, which overwrites their environment; but they write to logs in
    the job's folder.
    """
    folder = f"/tmp/quatuor-{number}/"
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            names_it = any(folder in text for text in (line, *open_files(process)))
            if names_it or environment_of(process).get("SLURM_JOB_ID") == number:
                found[process.pid] = line
    return found


def open_files(process: psutil.Process) -> Iterator[str]:
    for file in Path(f"/proc/{process.pid}/fd").glob("*"):
        with suppress(OSError):
            yield os.readlink(file)


def environment_of(process: psutil.Process) -> dict[str, str]:
    with suppress(psutil.Error):
        return process.environ()
    return {}


def wait_until(condition: Callable[[], bool], seconds: float, complaint: str) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{complaint} after {seconds:.0f} s"
        time.sleep(0.3)
