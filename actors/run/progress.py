"""Progress of a run: a bar in a terminal, a line now and then elsewhere, each with the main
metrics.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping

from actors.run.metrics import headlines

LINE_EVERY_S = 15.0


def say(line: str) -> None:
    """Print a line for whoever started the run, beside its results."""
    print(line, file=sys.stderr, flush=True)


def show_progress(
    steps: range, total: int, description: str, latest: Mapping[str, float]
) -> Iterator[int]:
    """Iterate over `steps` (of 1 to `total`), showing the metrics in `latest` after each."""
    return (_bar if sys.stderr.isatty() else _lines)(steps, total, description, latest)


def _bar(steps: range, total: int, description: str, latest: Mapping[str, float]) -> Iterator[int]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, completed=steps.start - 1, figures="")
        for step in steps:
            yield step
            bar.update(task, completed=step, figures=_figures(latest))


def _lines(
    steps: range, total: int, description: str, latest: Mapping[str, float]
) -> Iterator[int]:
    printed = -math.inf
    for step in steps:
        yield step
        if time.monotonic() - printed >= LINE_EVERY_S or step == steps[-1]:
            printed = time.monotonic()
            say(f"{description} {step}/{total}  {_figures(latest)}")


def _figures(latest: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {latest[name]:.3g}" for name in headlines() if name in latest)
