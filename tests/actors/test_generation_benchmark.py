"""The benchmark of generation measures what it says, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/generation.py"


@pytest.mark.engines
def test_both_engines_do_the_same_work(tmp_path: Path) -> None:
    """With the same seeds even token by token."""
    out = tmp_path / "numbers.json"
    subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--json", out], check=True, capture_output=True
    )
    unseeded = json.loads(out.read_text())
    seeded = unseeded.pop("seeded")
    for result, kind in ((unseeded, "unseeded"), (seeded, "seeded")):
        assert result["work"] == f"tiny: 64 responses of 16 tokens, {kind}, cpu"
        assert result["ratio"] == pytest.approx(result["reference"] / result["ours"], rel=0.01)
        assert result["ours_tokens_per_s"] == pytest.approx(64 * 16 / result["ours"], rel=0.01)
        assert result["spread"] >= 0 and result["disturbed"] >= 0
    assert seeded["same_tokens"] and not unseeded["same_tokens"]
