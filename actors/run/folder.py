"""The run folder: configuration, metrics, samples, timeline and checkpoints of one run, on disk."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from actors.run.progress import show_progress
from actors.settings import RunSettings
from learners.errors import UserError


class RunFolder:
    """One run on disk. Get it from `open`, `create` or `resume`; end it with `close` or `finish`.

    `config.yaml`, `config-until-step-*.yaml` (what a resume replaced in it), `metrics.jsonl` (one
    object per line: step, phase, time in Unix seconds, and the metrics by name), `alarms.jsonl`
    (one object per line: step, name, message), `samples/step-*.jsonl`, `timeline.json` (Chrome
    trace events), `tensorboard/`, `checkpoints/step-*/`.
    """

    def __init__(self, settings: RunSettings, config_yaml: str, first_step: int) -> None:
        """Open an existing folder, to log from `first_step` on."""
        self.settings = settings  # workers may stand elsewhere
        self.path = Path(settings.folder).resolve()
        self._keep_config(config_yaml, first_step - 1)
        self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        self._alarms = (self.path / "alarms.jsonl").open("a", encoding="utf-8")
        self._timeline = Timeline(self.path / "timeline.json")
        self._seconds: dict[int, dict[str, float]] = {}
        self._latest: dict[str, float] = {}
        self._alarmed: dict[str, int] = {}
        self._tensorboard = self._open_tensorboard(first_step) if settings.tensorboard else None
        self._wandb = self._open_wandb(settings.wandb_project) if settings.wandb_project else None

    @staticmethod
    def check(settings: RunSettings, resume: bool) -> None:
        """Raise UserError if `open` could not succeed, before anything has been started for it."""
        _check_wandb(settings)
        path = Path(settings.folder)
        if resume and not finished_checkpoints(path):
            raise UserError(f"run.folder: {path} has no finished checkpoint to resume from")
        if not resume and path.exists():
            raise UserError(
                f"run.folder: {path} exists: choose another folder, or --resume to go on with "
                "that run"
            )

    @classmethod
    def open(cls, settings: RunSettings, config_yaml: str, resume: bool) -> Self:
        return cls.resume(settings, config_yaml) if resume else cls.create(settings, config_yaml)

    @classmethod
    def create(cls, settings: RunSettings, config_yaml: str) -> Self:
        """Make the folder. Raises UserError if it exists, leaving everything as it was."""
        cls.check(settings, resume=False)
        path = Path(settings.folder)
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"run.folder: {path} cannot be made: {error.strerror}") from None
        return cls(settings, config_yaml, first_step=0)

    @classmethod
    def resume(cls, settings: RunSettings, config_yaml: str) -> Self:
        """Open the folder as it was at its newest checkpoint. Raises UserError if it has none."""
        cls.check(settings, resume=True)
        path = Path(settings.folder)
        step, checkpoint = finished_checkpoints(path)[-1]
        state = json.loads((checkpoint / "run_folder.json").read_text())
        for name, size in state["bytes"].items():
            os.truncate(path / name, size)
        return cls(settings, config_yaml, first_step=step + 1)

    def log(self, step: int, metrics: dict[str, float], phase: str = "train") -> None:
        """Record the metrics of a step. NaN and infinity become null in metrics.jsonl: JSON has no
        word for them.
        """
        line = {"step": step, "phase": phase, "time": round(time.time(), 3), **metrics}
        self._metrics.write(_json(line) + "\n")
        self._metrics.flush()
        self._latest |= metrics
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def alarm(self, step: int, name: str, message: str) -> None:
        """Keep an alarm, and print it unless the step before had it too."""
        self._alarms.write(_json({"step": step, "name": name, "message": message}) + "\n")
        self._alarms.flush()
        if self._alarmed.get(name, -2) < step - 1:
            print(f"alarm: step {step}: {name}: {message}", file=sys.stderr, flush=True)
        self._alarmed[name] = step

    def save_samples(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Keep the first `samples_per_step` rows every `samples_every_steps` steps; other steps
        keep nothing.
        """
        if not self.settings.samples_every_steps or step % self.settings.samples_every_steps:
            return
        folder = self.path / "samples"
        folder.mkdir(exist_ok=True)
        lines = [_json(row) + "\n" for row in rows[: self.settings.samples_per_step]]
        (folder / f"{_name(step)}.jsonl").write_text("".join(lines))

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """Yields a temporary folder to fill. It takes its final name only once complete and on
        disk, or disappears.
        """
        final = self.path / "checkpoints" / _name(step)
        draft = final.with_name(f"{final.name}.tmp")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            yield draft
            logs = (self._metrics, self._alarms)
            for log in logs:
                os.fsync(log.fileno())
            sizes = {Path(log.name).name: os.fstat(log.fileno()).st_size for log in logs}
            (draft / "run_folder.json").write_text(json.dumps({"bytes": sizes}))
            _fsync(draft)
            draft.rename(final)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        _fsync(final.parent)
        for _, old in finished_checkpoints(self.path)[: -self.settings.keep_checkpoints]:
            shutil.rmtree(old)

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """Step and folder of the newest finished checkpoint."""
        return next(reversed(finished_checkpoints(self.path)), None)

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Time one phase of a step, for the timeline and for `seconds`."""
        started = time.time()
        clock = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - clock
            of_step = self._seconds.setdefault(step, {})
            of_step[f"seconds/{name}"] = of_step.get(f"seconds/{name}", 0.0) + elapsed
            self._timeline.add(name, step, started, elapsed)

    def seconds(self, step: int) -> dict[str, float]:
        """`seconds/{phase}` of the phases of a step since they were last asked for."""
        return self._seconds.pop(step, {})

    def progress(self, steps: range, total: int, description: str) -> Iterator[int]:
        """Iterate over `steps` (1 to `total`), showing how far the run is and its main metrics."""
        if not self.settings.progress:
            return iter(steps)
        return show_progress(steps, total, description, self._latest)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json and close."""
        _replace(self.path / "summary.json", _json(summary, indent=2) + "\n")
        self.close()

    def discard(self) -> None:
        """Remove a run that never began."""
        self.close()
        shutil.rmtree(self.path)

    def close(self) -> None:
        """Close all writers; a second call does nothing."""
        self._metrics.close()
        self._alarms.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._tensorboard = self._wandb = None

    def _keep_config(self, text: str, done: int) -> None:
        """Write config.yaml. Another text that led to step `done` is kept beside it, under the name
        of that step; what was tried in vain since then is not.
        """
        path = self.path / "config.yaml"
        before = path.read_text(encoding="utf-8") if path.exists() else text
        kept = path.with_name(f"config-until-{_name(done)}.yaml")
        if before != text and not kept.exists():
            _replace(kept, before)
        _replace(path, text)

    def _open_tensorboard(self, first_step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.path / "tensorboard"), purge_step=first_step)

    def _open_wandb(self, project: str) -> Any:
        wandb = importlib.import_module("wandb")
        remembered = self.path / "wandb_id"  # the same run again after a resume
        if not remembered.exists():
            remembered.write_text(uuid.uuid4().hex)
        run_id = remembered.read_text()
        return wandb.init(
            project=project, name=self.path.name, dir=str(self.path), id=run_id, resume="allow"
        )


class Timeline:
    """Chrome trace events, as chrome://tracing and Perfetto open them; valid JSON after every
    event.
    """

    END = b"\n]\n"

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            head = {
                "name": "process_name",
                "ph": "M",
                "pid": 0,
                "tid": 0,
                "args": {"name": "driver"},
            }
            path.write_bytes(b"[\n" + json.dumps(head).encode() + self.END)

    def add(self, name: str, step: int, started: float, seconds: float) -> None:
        """One phase: `started` in Unix seconds."""
        when = {"ts": round(started * 1e6), "dur": round(seconds * 1e6)}  # microseconds
        event = {"name": name, "ph": "X", "pid": 0, "tid": 0, **when, "args": {"step": step}}
        with self.path.open("r+b") as file:
            file.seek(-len(self.END), os.SEEK_END)
            file.write(b",\n" + json.dumps(event).encode() + self.END)


def finished_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Steps and folders, oldest first: those named exactly step-<digits>, which a checkpoint is
    called once it is complete. A copy that somebody put beside them has another name.
    """
    found = (run / "checkpoints").glob("step-*")
    return sorted(
        (int(p.name.removeprefix("step-")), p)
        for p in found
        if re.fullmatch("step-[0-9]+", p.name) and p.is_dir()
    )


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _check_wandb(settings: RunSettings) -> None:
    if settings.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "run.wandb_project: wandb is not installed: pip install wandb, or remove the key"
        )


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """The same with None in place of NaN and infinity."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, text: str) -> None:
    """Write a file through a draft: whenever the process dies, there is the old text or the new
    one, never a part.
    """
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    _fsync(draft)
    draft.rename(path)


def _fsync(path: Path) -> None:
    """Force a file, or a folder and all it holds, to disk."""
    for inside in path.iterdir() if path.is_dir() else ():
        _fsync(inside)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
