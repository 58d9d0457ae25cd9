"""`quatuor slurm`: an sbatch script that starts a Ray cluster on a job's nodes and runs a recipe
there.

Its first half is written here, for one recipe; its second half is slurm.sh, the same for all.
Nothing heavy is imported before the script runs; there, `python -m launch.cluster.slurm ADDRESS
NODES SECONDS` waits for the cluster.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from actors.cluster.layout import layout
from actors.roles import roles_of
from actors.run.folder import finished_checkpoints
from actors.run.lock import only_locked
from actors.settings import Recipe
from launch.recipe.combinations import lacking_gpus
from learners.errors import UserError

MARK = "# Written by quatuor slurm"
BODY = Path(__file__).with_name("slurm.sh")


def write_job(
    recipe: Recipe,
    path: Path,
    overrides: Sequence[str],
    nodes: int | None,
    time_limit: str,
    partition: str | None,
    account: str | None,
    script: Path | None,
    send: bool,
) -> None:
    """Write the script, by default beside the run folder, and tell how to use it; with `send` hand
    it to sbatch.
    """
    nodes = nodes or recipe.cluster.nodes
    recipe = recipe.model_copy(
        update={"cluster": recipe.cluster.model_copy(update={"nodes": nodes})}
    )
    if lacking := lacking_gpus(recipe):
        raise UserError(f"--nodes: {lacking}")
    folder = Path(recipe.run.folder).absolute()
    begun = os.path.exists(folder) and not only_locked(folder)
    if begun and not finished_checkpoints(folder):
        raise UserError(
            f"run.folder: {folder} exists and holds no checkpoint to go on from; choose "
            "another folder"
        )
    script = script or folder.with_name(f"{folder.name}.slurm.sh")
    if send and shutil.which("sbatch") is None:
        raise UserError(
            "--submit: there is no sbatch on this machine; leave it out, and submit where there is"
        )
    options = sbatch_options(recipe, folder, nodes, time_limit, partition, account)
    lines = [
        "#!/usr/bin/env bash",
        f"{MARK}. Edit what your site needs; a second sbatch of it goes on with the run.",
    ]
    lines += [
        f"#SBATCH --{name}" + (f"={shlex.quote(value)}" if value else "")
        for name, value in options.items()
    ]
    # the script looks for checkpoints in this folder: the driver must not expand it anew elsewhere
    fixed = [f"run.folder={json.dumps(str(folder), ensure_ascii=False)}", f"cluster.nodes={nodes}"]
    lines += ["", *variables(recipe, path, [*overrides, *fixed], folder), ""]
    # without the directive for shellcheck
    text = "\n".join([*lines, BODY.read_text().partition("\n")[2]])
    try:
        if script.exists() and MARK not in script.read_text(errors="replace"):
            raise UserError(
                f"--script: {script} exists and is not a script of quatuor slurm; it would be "
                "replaced"
            )
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(text)
    except OSError as error:
        raise UserError(f"--script: {script} cannot be written: {error.strerror}") from None
    script.chmod(0o755)
    log = options["output"].replace("%%", "%")
    print(f"{script}: for {nodes} node{'s' * (nodes > 1)}, log in {log}")
    print(submit(script) if send else f"submit it with: sbatch {shlex.quote(str(script))}")


def sbatch_options(
    recipe: Recipe,
    folder: Path,
    nodes: int,
    time_limit: str,
    partition: str | None,
    account: str | None,
) -> dict[str, str]:
    """Return sbatch's long options. Whole machines; a signal to the script before the time limit,
    and the right to requeue.
    """
    limit = seconds(time_limit)
    notice = f"B:USR1@{min(600, limit // 2)}"  # enough for one step and its checkpoint
    gpus = (
        {"gpus-per-node": str(recipe.cluster.gpus_per_node)}
        if recipe.cluster.device == "cuda"
        else {}
    )
    wishes = {"partition": partition or "", "account": account or ""}
    return {
        "job-name": f"quatuor-{recipe.kind}",
        "nodes": str(nodes),
        "ntasks-per-node": "1",
        "exclusive": "",
        "mem": "0",
        **gpus,
        "time": time_limit,
        "signal": notice,
        "requeue": "",
        "open-mode": "append",
        "chdir": str(Path.cwd()),
        "output": f"{str(folder).replace('%', '%%')}.slurm-%j.log",
        **{name: value for name, value in wishes.items() if value},
    }


def variables(recipe: Recipe, path: Path, overrides: Sequence[str], folder: Path) -> list[str]:
    """Return the lines that set the variables of slurm.sh. Paths are absolute; relative ones inside
    the recipe count from the present folder.
    """
    programs = Path(sys.executable).parent
    for program in ("quatuor", "ray"):
        if not (programs / program).exists():
            raise UserError(
                f"there is no {programs / program}: install quatuor into this environment (make "
                "install)"
            )
    command = [recipe.kind, str(path.absolute()), *overrides]
    return [
        f"bin={shlex.quote(str(programs))}",
        f"command=({shlex.join(command)})",
        f"folder={shlex.quote(str(folder))}",
        f"least_cpus={least_cpus(recipe)}",
    ]


def submit(script: Path) -> str:
    done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"--submit: {done.stderr.strip() or 'sbatch failed'}")
    return done.stdout.strip()


def seconds(time_limit: str) -> int:
    """Return a time as Slurm writes it in seconds: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", time_limit):
        raise UserError(
            f"--time: {time_limit!r} is not a time: write hours:minutes:seconds or days-hours"
        )
    days, dash, rest = time_limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]  # without days the first number is minutes
    hours, minutes, secs = [*parts, 0, 0][:3]
    total = int(days or 0) * 86400 + hours * 3600 + minutes * 60 + secs
    if total < 60:
        raise UserError(
            f"--time: {time_limit!r}: Slurm counts in minutes, and a run needs at least one"
        )
    return total


def least_cpus(recipe: Recipe) -> int:
    """Return the logical CPUs that every node must offer, so that all bundles find room however few
    cores there are.

    On GPUs these decide which process goes where, and CPUs must never be in the way. Several CPU
    nodes have a bundle each.
    """
    sizes = [int(bundle["CPU"]) for bundle in layout(recipe.cluster, roles_of(recipe)).bundles]
    return (
        sum(sizes) if recipe.cluster.device == "cuda" or recipe.cluster.nodes == 1 else max(sizes)
    )


def wait_for_nodes(address: str, nodes: int, deadline_s: float) -> None:
    """Return once the Ray cluster answers and has so many living nodes; raise TimeoutError at the
    deadline.
    """
    until = time.monotonic() + deadline_s
    found = 0
    while time.monotonic() < until:
        found = living_nodes(address)
        if found >= nodes:
            return
        time.sleep(0.3)
    raise TimeoutError(f"{found} of {nodes} Ray nodes were there within {deadline_s:.0f} s")


def living_nodes(address: str) -> int:
    """Return how many nodes are alive, by their ids: two of them may share an address. 0 while the
    cluster does not answer.
    """
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
        import ray

        if not ray.is_initialized():
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        return len({node["NodeID"] for node in ray.nodes() if node["Alive"]})
    except OSError:  # ConnectionError among them
        return 0


if __name__ == "__main__":
    try:
        wait_for_nodes(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    except TimeoutError as error:
        sys.exit(f"error: {error}")
