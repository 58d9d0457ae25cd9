"""The script for a GPU (benchmarks/nccl.py), as far as it goes without one: what it says then, what
it asks of the card, and that nothing outlives it.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import nccl


def run(monkeypatch: pytest.MonkeyPatch, file: Path) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["nccl.py", "--json", str(file)])
    for name in nccl.ENVIRONMENT:
        monkeypatch.setenv(name, "")  # put back afterwards
    nccl.main()
    told: dict[str, Any] = json.loads(file.read_text())
    return told


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, tmp_path / "out.json") == {"ok": False, "why": "torch sees no GPU"}


@pytest.mark.engines
@pytest.mark.parametrize(("version", "possible"), [(22907, False), (23003, True)])
def test_an_nccl_that_is_too_old_is_named(
    monkeypatch: pytest.MonkeyPatch, version: int, possible: bool
) -> None:
    import torch
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(NCCLLibrary, "__init__", lambda _: None)
    monkeypatch.setattr(NCCLLibrary, "ncclGetRawVersion", lambda _: version)
    why = "two ranks on one card need NCCL 2.30, here is 2.29.7"
    assert nccl.impossible() == ("" if possible else why)


def silent(*_: Any) -> None:
    """Stand in for a process that ends without a word."""


def telling(calls: Any, found: Any, *_: Any) -> None:
    found.send({"ok": True})


def waiting(calls: Any, found: Any, *_: Any) -> None:
    found.send({"ok": True})
    time.sleep(60)


@pytest.mark.parametrize(
    ("sender", "expected"),
    [
        (silent, {"ok": False, "why": "the sender died"}),
        (telling, {"ok": True, "sender_of_a_dead_receiver": "it died too"}),
        (waiting, {"ok": True, "sender_of_a_dead_receiver": "nothing: it waits"}),
    ],
)
def test_the_script_ends_whatever_its_processes_do(
    monkeypatch: pytest.MonkeyPatch, sender: Any, expected: dict[str, Any]
) -> None:
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(nccl, "receive", silent)
    monkeypatch.setattr(nccl, "send", sender)
    monkeypatch.setattr(nccl, "DEATH_S", 0.0 if sender is waiting else 20.0)
    assert nccl.between_two_processes() == expected
