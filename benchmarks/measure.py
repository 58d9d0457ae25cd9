"""How two ways of doing the same work are compared: by turns, in medians, with an eye on what else
the machine does.

Every benchmark that gives a ratio writes the same keys: `ratio` (of the medians, above 1 where ours
is quicker), `spread` (of the ratios of single rounds: largest less smallest, as a share of the
median), `ours` and `reference` (seconds, medians), `work` (in words), and `disturbed` (rounds that
others' processes disturbed; they were repeated where that helped).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil

# cores that others may use on average during a round before it counts as disturbed
QUIET = 0.15
REPEATS = 2  # of rounds that were disturbed, as many as there are rounds


def compare(
    ours: Callable[[], float], reference: Callable[[], float], work: str, rounds: int = 5
) -> dict[str, Any]:
    """Run both by turns and return the comparison; each does its work once and returns the seconds
    that count. Both must be warm.
    """
    quiet: list[tuple[float, float]] = []
    disturbed: list[tuple[float, float]] = []
    others: list[float] = []
    while len(quiet) < rounds and len(quiet) + len(disturbed) < rounds * (1 + REPEATS):
        watch = Machine()
        pair = (ours(), reference())
        others.append(watch.others())
        (quiet if others[-1] <= QUIET else disturbed).append(pair)
    pairs = (quiet + disturbed)[:rounds]
    single = [reference / ours for ours, reference in pairs]
    mine = median(pair[0] for pair in pairs)
    theirs = median(pair[1] for pair in pairs)
    ratio = theirs / mine
    return {
        "ratio": round(ratio, 4),
        "spread": round((max(single) - min(single)) / ratio, 4),
        "ours": mine,
        "reference": theirs,
        "work": work,
        "disturbed": max(0, rounds - len(quiet)),
        "rounds": rounds,
        "others_cpu": round(median(others), 3),
    }


def options(description: str | None) -> argparse.Namespace:
    """Return what the command line says of a comparison on a model of random weights; `model` is
    the shape's name, tiny where it is to be quick.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="file for the numbers")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=("27m", "0.6b", "1.7b"), default="27m")
    found = parser.parse_args()
    found.model = "tiny" if found.quick else found.model
    return found


class Machine:
    """The machine's CPU time from now on, apart from what this process and its children use."""

    def __init__(self) -> None:
        self.clock = time.perf_counter()
        self.busy = _busy()
        self.own = _own()

    def others(self) -> float:
        """Return the cores that others have used on average."""
        elapsed = time.perf_counter() - self.clock
        return max(0.0, (_busy() - self.busy) - (_own() - self.own)) / elapsed


def _busy() -> float:
    times = psutil.cpu_times()
    return sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq"))


def _own() -> float:
    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:  # it has ended; its parent counts it
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total
