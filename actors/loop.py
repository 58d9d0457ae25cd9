"""The loop of every training: resume, steps, evaluation, checkpoint, stop signal, skip limit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

from actors.cluster.groups import WorkerGroup
from actors.cluster.placement import Placement
from actors.roles import roles_of
from actors.run.alarms import AlarmLog
from actors.run.folder import RunFolder, finished_checkpoints, to_disk
from actors.run.outcome import accounted_for
from actors.run.stop import interrupted, stepping, stop_requested
from actors.settings import Recipe

R = TypeVar("R", bound=Recipe)
D = TypeVar("D")  # the data of a kind of training
W = TypeVar("W")  # its workers


class Training(Protocol):
    """One kind of training, as the loop calls it."""

    total_steps: int

    @property
    def groups(self) -> Mapping[str, WorkerGroup]: ...

    def begin(self, first: int) -> dict[str, Any]:
        """Prepare for step `first`; return the beginning of the summary."""

    def step(self, step: int) -> tuple[dict[str, float], int]:
        """Train one step; return its metrics and the number of tokens it learned from."""

    def evaluation_due(self, step: int) -> bool: ...

    def evaluate(self, step: int) -> dict[str, float]:
        """Return metrics of the held-out data."""

    def save(self, folder: Path, step: int) -> None:
        """Write all that a resumed run needs."""

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""

    def end(self) -> dict[str, Any]:
        """Export the model; return the end of the summary."""


def conduct(
    recipe: R,
    resume: bool,
    config_yaml: str | None,
    *,
    read: Callable[[R], D],
    start: Callable[[R, D, Placement], W],
    training: Callable[[R, D, W, RunFolder, AlarmLog], Training],
) -> dict[str, Any]:
    """Run a recipe from its data to its summary, and return that.

    `read` reads and checks the data before anything starts, `start` starts the processes, and
    `training` is made of all of them. `config_yaml` is the recipe's own text, kept with the run for
    its comments.
    """
    clock = time.perf_counter()
    RunFolder.check(recipe.run, resume)
    with accounted_for(recipe.run.folder), ExitStack() as stack:
        data = read(recipe)

        def opened() -> RunFolder:
            text = config_yaml or recipe.to_yaml()
            return stack.enter_context(RunFolder.open(recipe.run, text, resume))

        # what a new run needs is tried before anything starts; the folder of one to resume stays
        # as it is until everything has
        early = None if resume else opened()
        placement = stack.enter_context(Placement(recipe.cluster, roles_of(recipe)))
        workers = start(recipe, data, placement)
        folder = early or opened()
        alarms = AlarmLog(folder, recipe.run.max_skipped_steps)
        made = training(recipe, data, workers, folder, alarms)
        nodes = {name: [node.id for node in group.nodes] for name, group in made.groups.items()}
        (folder.path / "placement.json").write_text(json.dumps(nodes, indent=2))
        summary = Loop(recipe, made, folder, alarms, clock).run(resume)
        folder.finish(summary)
    return summary


class Loop:
    """One run of a training; `clock` is time.perf_counter at its beginning."""

    def __init__(
        self, recipe: Recipe, training: Training, folder: RunFolder, alarms: AlarmLog, clock: float
    ) -> None:
        self.recipe = recipe
        self.training = training
        self.folder = folder
        self.alarms = alarms
        self.clock = clock

    def run(self, resume: bool) -> dict[str, Any]:
        """Do all steps, evaluations and checkpoints; return the run's summary."""
        training = self.training
        total = training.total_steps
        first = self.restore() + 1 if resume else 1
        self.log_seconds("start", first - 1)
        summary = training.begin(first)
        stepping()
        for step in self.folder.progress(range(first, total + 1), total, self.recipe.kind):
            metrics = self.step(step)
            stopping = stop_requested()
            every = self.recipe.run.checkpoint_every_steps
            due = bool(every) and step % every == 0
            self.record(step, metrics, checkpoint=due or bool(stopping) or self.alarms.full)
            if self.alarms.full:
                raise self.alarms.stop(step)
            if stopping:
                raise interrupted(step, stopping)
        summary |= training.end()
        self.log_seconds("wall", total)
        return summary

    def log_seconds(self, name: str, step: int) -> None:
        """Log the time since the run began, as `seconds/{name}`."""
        seconds = time.perf_counter() - self.clock
        self.folder.log(step, {f"seconds/{name}": seconds}, phase=name)

    def step(self, step: int) -> dict[str, float]:
        """Train one step, evaluate if that is due, and return the metrics of both."""
        began = time.perf_counter()
        metrics, tokens = self.training.step(step)
        seconds = time.perf_counter() - began
        metrics |= {"seconds/step": seconds, "throughput/tokens_per_second": tokens / seconds}
        if self.training.evaluation_due(step):
            with self.folder.phase("evaluate", step):
                metrics |= self.training.evaluate(step)
        return metrics

    def record(self, step: int, metrics: dict[str, float], checkpoint: bool) -> None:
        """Log the step and save a checkpoint if wanted. The step's line, which says how long saving
        took, is part of the checkpoint.
        """
        with self.folder.checkpoint(step) if checkpoint else nullcontext() as path:
            try:
                if path is not None:
                    with self.folder.phase("checkpoint", step):
                        self.training.save(path, step)
                        to_disk(path)
            finally:
                self.folder.log(step, metrics | self.folder.seconds(step))

    def restore(self) -> int:
        """Load the newest checkpoint and return its step."""
        step, path = finished_checkpoints(self.folder.path)[-1]  # RunFolder.check wants one
        self.training.load(path)
        return step
