"""The benchmark of a sync runs, and writes what every comparison writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engines, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]


def test_the_benchmark_of_a_sync_says_how_fast_and_where_the_time_goes(tmp_path: Path) -> None:
    file = tmp_path / "sync.json"
    command = [sys.executable, "benchmarks/sync.py", "--quick", "--json", str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text())
    assert {"ratio", "spread", "ours", "reference", "work", "disturbed"} <= found.keys()
    assert 0 < found["reference"] < found["ours"] < 30
    assert found["seconds"].keys() == {"gather", "send", "receive", "load", "probe"}
    # gathering and sending, which contains receiving and loading, and the probe: one after another
    assert found["seconds"]["receive"] + found["seconds"]["load"] < found["seconds"]["send"]
    assert found["counts"] == {"copies": 3, "hashes": 2, "calls": 7}
