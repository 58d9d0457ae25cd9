"""The loop of every training: resume, steps, evaluation, checkpoint, stop signal, skip limit."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

from actors.cluster.groups import WorkerGroup
from actors.export import Export, show_adapter
from actors.run.alarms import Alarm, AlarmLog
from actors.run.best import Best
from actors.run.folder import (
    MODEL_FILES,
    RunFolder,
    complete_or_absent,
    finished_checkpoints,
    to_disk,
)
from actors.run.outcome import EndError, disk_trouble, leave_at_the_end
from actors.run.progress import say
from actors.run.resume import (
    read_state,
    write_state,
)
from actors.run.room import bytes_needed, no_room
from actors.run.stop import interrupted, stepping, stop_requested
from actors.settings import Recipe
from learners.errors import UserError, in_a_line
from learners.spans import Span


class Training(Protocol):
    """One kind of training, as the loop calls it."""

    total_steps: int
    export: Export

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

    def complete_model(self) -> dict[str, float]:
        """Add to the trained model what belongs to its weights as they are now, a reward model's
        calibration, and return it as metrics. When this fails, the model is exported without.
        """

    def end(self, step: int) -> dict[str, Any]:
        """Do what the exported model of the last step does not depend on; return the end of the
        summary.
        """


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
        self.best = Best(recipe, folder, alarms)

    def run(self, resume: bool) -> dict[str, Any]:
        """Do all steps, evaluations and checkpoints; return the run's summary."""
        training = self.training
        total = training.total_steps
        first = self.restore() + 1 if resume else 1
        self.rehearse_end(range(first, total + 1))
        self.log_start(first - 1)
        summary = training.begin(first)
        self.best.judge(0, summary.get("before", {}), self.write_whole)
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
            if self.best.exhausted and step < total:
                idle = self.best.without_gain
                say(f"stopped after step {step} of {total}: {idle} evaluations without gain")
                summary["evaluations_without_gain"] = idle
                break
        last = step if first <= total else total
        self.folder.still_ours()
        summary |= {"steps": last} | self.end(last)
        self.log_seconds("wall", last)
        return summary

    def rehearse_end(self, steps: range) -> None:
        """Write what the end will write beside the weights, and look for room for these. Raises
        UserError where the end would fail.
        """
        export = self.training.export
        run = self.folder.path
        export.rehearse(run)
        settings = self.recipe.run
        there = len(finished_checkpoints(run))
        model, checkpoint = export.disk_bytes()
        needed = bytes_needed(model, checkpoint, settings, steps, there)
        needed += 2 * model if self.best.metric else 0  # the best so far, and a better one
        if wrong := no_room(run, needed):
            raise UserError(
                f"run.folder: {wrong} for the model and checkpoints: make room, choose another "
                "folder, or lower run.keep_checkpoints"
            )

    def end(self, step: int) -> dict[str, Any]:
        """Export the model before anything that may fail; return the end of the summary. Raises
        EndError that says what is left where something fails, and Left after a signal.
        """
        model = self.folder.path / "model"
        incomplete = ""
        figures: dict[str, float] = {}
        try:
            figures = self.training.complete_model()
        except Exception as error:
            incomplete = in_a_line(error)
        self.export(model, step)
        if incomplete:
            self.keep_last(step)
            raise EndError(f"{incomplete}: the model was exported uncalibrated, to {model}")
        leave_at_the_end(f"the model is complete, in {model}; its last evaluation is missing")
        summary: dict[str, Any] = {}
        failed: Exception | None = None
        try:
            show_adapter(model)
            summary = self.training.end(step)
            evaluated = summary.get("after", summary)
            self.best.judge(step, evaluated, lambda folder: self.copy(model, folder, figures))
            summary |= self.best.settle(step, model)
        except Exception as error:
            failed = error
        summary |= self.keep_last(step)
        if failed:
            raise EndError(f"{self.reason(failed)}: the model is complete, in {model}") from failed
        return summary

    def write_whole(self, folder: Path) -> dict[str, float]:
        """Write the model as it is between two steps; return what belongs to its weights alone."""
        figures = self.training.complete_model()
        self.training.export.write_model(folder)
        return figures

    def copy(self, model: Path, folder: Path, figures: dict[str, float]) -> dict[str, float]:
        """Copy an exported model."""
        with complete_or_absent(folder) as draft:
            shutil.copytree(model, draft, dirs_exist_ok=True)
        return figures

    def keep_last(self, step: int) -> dict[str, float]:
        """Save the last step, from which a longer run can go on; return the metrics of an alarm
        where that fails, as on a full disk: the model is there.
        """
        if not self.recipe.run.final_checkpoint:
            return {}
        if failed := self.save_last(step):
            what = f"{failed}: the model is complete, but --resume cannot go on from this step"
            return self.alarms.report(step, [Alarm("final_checkpoint", what)])
        return {}

    def save_last(self, step: int) -> str:
        """Save the last step unless it has a checkpoint; return in words why that failed."""
        if step in dict(finished_checkpoints(self.folder.path)):
            return ""
        try:
            with self.folder.phase("checkpoint", step), self.folder.checkpoint(step) as path:
                self.save(path, step)
        except Exception as error:
            return self.reason(error)
        return ""

    def export(self, model: Path, step: int) -> None:
        """Write the model or, when that fails, a checkpoint of it. Raises EndError that says where
        the weights are.
        """
        try:
            self.training.export.write_model(model)
        except Exception as error:
            kept = self.keep_weights(step)
            reason = self.reason(error)
            raise EndError(f"the model was not exported: {reason}; {kept}") from error

    def reason(self, error: Exception) -> str:
        """Return why something failed, with the remedy where the disk is at fault."""
        return disk_trouble(error, self.folder.path) or in_a_line(error)

    def keep_weights(self, step: int) -> str:
        """Save the last step as a checkpoint unless it is one; return in words where its weights
        are.
        """
        run = self.folder.path
        failed = self.save_last(step)
        failed = f"a checkpoint could not be saved either ({failed}); " if failed else ""
        if not (saved := finished_checkpoints(run)):
            return f"{failed}there is no earlier one: the weights are lost"
        newest, path = saved[-1]
        command = f"quatuor export {shlex.quote(str(path))} OUT"
        return f"{failed}the weights of step {newest} are safe: {command}"

    def log_start(self, step: int) -> None:
        """Log the time since the run began as `seconds/start`, and its parts."""
        seconds = time.perf_counter() - self.clock
        self.folder.timed(step, Span("start", time.time() - seconds, seconds))
        self.folder.log(step, self.folder.seconds(step), phase="start")

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
                metrics |= self.best.judge(step, metrics, self.write_whole)
        return metrics

    def record(self, step: int, metrics: dict[str, float], checkpoint: bool) -> None:
        """Log the step and save a checkpoint if wanted. The step's line, which says how long saving
        took, is part of the checkpoint.
        """
        with self.folder.checkpoint(step) if checkpoint else nullcontext() as path:
            try:
                if path is not None:
                    with self.folder.phase("checkpoint", step):
                        self.save(path, step)
            finally:
                self.folder.log(step, metrics | self.folder.seconds(step))

    def save(self, path: Path, step: int) -> None:
        """Write a checkpoint's files to disk: the training's, and what makes a model of them."""
        self.training.save(path, step)
        self.training.export.write_files(path / MODEL_FILES)
        state = {"total_steps": self.training.total_steps, "best": self.best.state()}
        write_state(path, state)
        to_disk(path)

    def restore(self) -> int:
        """Load the newest checkpoint and return its step."""
        step, path = finished_checkpoints(self.folder.path)[-1]  # RunFolder.check wants one
        self.training.load(path)
        self.best.load(read_state(path).get("best", {}))
        return step
