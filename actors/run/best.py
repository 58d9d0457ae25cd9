"""The best model so far by a metric of the evaluations: kept while training goes on, exported at
the end; and the end of a run that has long been without a better one.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.run.alarms import Alarm, AlarmLog
from actors.run.folder import RunFolder, complete_or_absent, finished_checkpoints
from actors.run.metrics import find
from actors.run.progress import say
from actors.run.resume import read_state
from actors.settings import Recipe
from learners.errors import in_a_line

CLEARLY = 0.1  # of the best value, or of what it had gained: a fall that is said

Write = Callable[[Path], dict[str, float]]
"""Writes the model as it is now to a folder; returns what only this model has, its calibration."""


@dataclass(frozen=True)
class Kept:
    """A model that was kept: of which step, its value, and figures that belong to it alone."""

    step: int
    value: float
    figures: dict[str, float]


class Best:
    """The best model of one run. Without `metric` nothing is judged and nothing kept."""

    def __init__(self, recipe: Recipe, folder: RunFolder, alarms: AlarmLog) -> None:
        self.metric = recipe.run.keep_best if recipe.evaluates else None
        self.patience = recipe.run.patience
        self.folder = folder
        self.alarms = alarms
        self.kept: Kept | None = None
        self.first: float | None = None  # value of the first evaluation
        self.without_gain = 0  # evaluations since the best one
        self.judged = -1  # the last step that was

    @property
    def exhausted(self) -> bool:
        """True when the run has been without a better model for as long as it may."""
        return self.patience is not None and self.without_gain >= self.patience

    def path(self, step: int) -> Path:
        return self.folder.path / "best" / f"step-{step:06d}"

    def judge(self, step: int, metrics: Mapping[str, float], write: Write) -> dict[str, float]:
        """Keep the model of this step, as `write` writes it, if its evaluation is the best so far;
        return metrics of alarms.
        """
        value = metrics.get(self.metric) if self.metric else None
        if value is None or self.judged == step:
            return {}
        self.folder.still_ours()
        self.judged = step
        self.first = value if self.first is None else self.first
        if not self.gains(value):
            self.without_gain += 1
            return self.alarms.report(step, self._fallen(value))
        self.without_gain = 0
        try:
            self._note(Kept(step, value, write(self.path(step))))
        except Exception as error:  # training goes on, and its end exports a model in any case
            what = f"{self.metric} {value:.4g}: the model was not kept: {in_a_line(error)}"
            return self.alarms.report(step, [Alarm("best_not_kept", what)])
        return {}

    def gains(self, value: float) -> bool:
        """Tell whether this is better than the best so far."""
        return math.isfinite(value) and (self.kept is None or self._fall(value) < 0)

    def settle(self, step: int, model: Path) -> dict[str, Any]:
        """Put the best model in the place of that of the last `step`, if it is another one's;
        return what the summary says of it.
        """
        kept = self.kept
        if kept is None:
            return {}
        if kept.step != step:
            with complete_or_absent(model) as draft:
                shutil.copytree(self.path(kept.step), draft, dirs_exist_ok=True)
            say(f"notice: {model} is that of step {kept.step}, the best by {self.metric}")
        return {"model": {"step": kept.step, str(self.metric): kept.value}} | kept.figures

    def state(self) -> dict[str, Any]:
        """Return what a resumed run must know."""
        kept = asdict(self.kept) if self.kept else None
        return {
            "metric": self.metric,
            "kept": kept,
            "first": self.first,
            "without_gain": self.without_gain,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, a checkpoint's. Models that were kept after it are removed; what was
        judged by another metric is forgotten.
        """
        kept = Kept(**state["kept"]) if state.get("kept") else None
        if self.metric and state.get("metric") == self.metric:
            if kept is not None and not self.path(kept.step).is_dir():
                say(f"notice: {self.path(kept.step)} is gone: the best model is looked for anew")
            else:
                self.kept = kept
                self.first = state["first"]
                self.without_gain = state["without_gain"]
        self.prune()

    def prune(self) -> None:
        """Remove kept models that neither this run nor one resumed from a checkpoint could need."""
        states = [read_state(path).get("best", {}) for _, path in finished_checkpoints(self.run)]
        wanted = {state["kept"]["step"] for state in states if state.get("kept")}
        wanted |= {self.kept.step} if self.kept else set()
        for folder in (self.run / "best").glob("step-*"):
            if folder.name not in {self.path(step).name for step in wanted}:
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def run(self) -> Path:
        return self.folder.path

    def _note(self, kept: Kept) -> None:
        self.kept = kept
        what = {"step": kept.step, "metric": self.metric, "value": kept.value}
        (self.path(kept.step) / "best.json").write_text(json.dumps(what) + "\n")
        self.prune()

    def _fall(self, value: float) -> float:
        """Return how far a value lies behind the best one; below 0 when it is better."""
        assert self.kept is not None and self.metric is not None
        metric = find(self.metric)
        down = self.kept.value - value
        return -down if metric is not None and metric.better == "lower" else down

    def _fallen(self, value: float) -> list[Alarm]:
        """Return an alarm when a value lies clearly behind the best one."""
        if self.kept is None or self.first is None or not math.isfinite(value):
            return []
        best = self.kept.value
        if self._fall(value) <= CLEARLY * max(abs(best), abs(best - self.first)):
            return []
        what = f"{self.metric} is {value:.4g}, the best was {best:.4g} at step {self.kept.step}"
        return [Alarm("fallen", what)]
