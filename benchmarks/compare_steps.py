"""Compare how long a step of RL takes in two checkouts: the same recipe, run by turns.

    python benchmarks/compare_steps.py OTHER_CHECKOUT ppo launch/recipes/demo_ppo.yaml KEY=VALUE ...

Runs the recipe `--rounds` times in OTHER_CHECKOUT and in this one, alternately, on this Python's
packages, and prints the median seconds of every phase in both, and their ratio. Step 1, which warms
up, does not count. Models and data must be there: `make demo` makes those of the demo.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

PHASES = ("generate", "score", "advantages", "learn", "sync")
HERE = Path(__file__).resolve().parents[1]

Seconds = dict[str, list[float]]
"""Phase -> seconds of every step that counts."""


def run(checkout: Path, kind: str, recipe: Path, overrides: list[str], seconds: Seconds) -> None:
    """Run the recipe with the code of a checkout and add what its steps took."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "run"
        command = [sys.executable, "-m", "launch", kind, str(recipe), *overrides]
        quiet = [f"run.folder={where}", "run.progress=false", "run.tensorboard=false"]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        subprocess.run([*command, *quiet], check=True, cwd=checkout, env=environment)
        rows = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
    for row in (row for row in rows if row["phase"] == "train" and row["step"] > 1):
        taken = {phase: row[f"seconds/{phase}"] for phase in PHASES}
        for phase, value in (taken | {"step": sum(taken.values())}).items():
            seconds.setdefault(phase, []).append(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the steps of two checkouts.")
    parser.add_argument("other", type=lambda path: Path(path).resolve())
    parser.add_argument("kind")
    parser.add_argument("recipe", type=lambda path: Path(path).resolve())
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    found: dict[Path, Seconds] = {options.other: {}, HERE: {}}
    for _ in range(options.rounds):
        for checkout, seconds in found.items():
            run(checkout, options.kind, options.recipe, options.overrides, seconds)
    print(f"{'phase':<12}{'other':>9}{'this':>9}{'ratio':>9}")
    for phase in (*PHASES, "step"):
        other = median(found[options.other][phase])
        this = median(found[HERE][phase])
        print(f"{phase:<12}{other:>8.3f}s{this:>8.3f}s{this / other:>9.3f}")


if __name__ == "__main__":
    main()
