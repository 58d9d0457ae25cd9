"""The run folder: configuration, metrics, samples, timeline and checkpoints of one run, on disk."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from actors.run.lock import Displaced, RunLock
from actors.run.progress import say, show_progress
from actors.run.trial import no_new_folder, unwritable, wandb_problem
from actors.settings import RunSettings
from learners.errors import UserError, in_a_line
from learners.spans import Span, Stopwatch

MODEL_FILES = "model_files"  # of a checkpoint: what makes a model of its weights
THINGS_FILE = "things.json"  # in a checkpoint: what it is made of (actors/run/things.py)


class RunFolder:
    """One run on disk. Get it from `open`; end it with `close` or `finish`.

    `config.yaml`, `config-until-step-*.yaml` (replaced by a resume), `metrics.jsonl` (one
    object per line: step, phase, time in Unix seconds, and the metrics by name), `alarms.jsonl`
    (one object per line: step, name, message), `samples/step-*.jsonl` (of training) and
    `samples/<evaluation|test>-step-*-<sampled|greedy>.jsonl` (every answer to the held-out or the
    test prompts), `timeline.json` (Chrome trace events), `tensorboard/`, `model_files/`,
    `checkpoints/step-*/`, `best/step-*/` (with `run.keep_best`), `model/`, `summary.json`.
    """

    def __init__(
        self,
        settings: RunSettings,
        config_yaml: str,
        first_step: int,
        lock: RunLock | None = None,
    ) -> None:
        """Open an existing folder, to log from `first_step` on."""
        self.settings = settings
        self.path = Path(settings.folder).resolve()  # workers may run in another directory
        self.lock = lock
        self.things: dict[str, Any] = {}  # what the checkpoints are made of
        self.begun = first_step > 0  # a step is finished: what the folder holds is worth keeping
        self.made: list[Path] = []  # it and the folders above it that were made for it
        self._keep_config(config_yaml, first_step - 1)
        self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        self._alarms = (self.path / "alarms.jsonl").open("a", encoding="utf-8")
        self._timeline = Timeline(self.path / "timeline.json")
        self._seconds: dict[int, dict[str, float]] = {}
        self.stopwatch = Stopwatch()  # of the parts of a phase
        self._latest: dict[str, float] = {}
        self._alarmed: dict[str, int] = {}
        self._tensorboard = self._open_tensorboard(first_step) if settings.tensorboard else None
        self._wandb = self._open_wandb(settings.wandb_project) if settings.wandb_project else None

    @staticmethod
    def check(settings: RunSettings, resume: bool) -> None:
        """Raise UserError if `open` could not succeed, before anything has been started for it."""
        if settings.wandb_project and (wrong := wandb_problem()):
            raise UserError(f"run.wandb_project: {wrong}")
        path = Path(settings.folder)
        if resume and not finished_checkpoints(path):
            raise UserError(f"run.folder: {path} has no finished checkpoint to resume from")
        if wrong := unwritable(path) if resume else no_new_folder(path):
            raise UserError(f"run.folder: {path} {wrong}")

    @classmethod
    def open(
        cls,
        settings: RunSettings,
        config_yaml: str,
        resume: bool = False,
        lock: RunLock | None = None,
    ) -> Self:
        """Make the folder, or with `resume` open it as it was at its newest checkpoint. `lock` is
        the run's own, None where nobody else can want the folder.

        Raises UserError, leaving everything as it was, if it cannot be made or opened with all that
        the settings want, if it exists already or, with `resume`, has no checkpoint.
        """
        cls.check(settings, resume)
        path = Path(settings.folder)
        if resume:
            step, checkpoint = finished_checkpoints(path)[-1]
            state = json.loads((checkpoint / "run_folder.json").read_text())
            for name, size in state["bytes"].items():
                os.truncate(path / name, size)
            return cls(settings, config_yaml, step + 1, lock)
        path = path.absolute()
        made = [path, *(above for above in path.parents if not above.exists())]
        try:
            path.mkdir(parents=True, exist_ok=True)  # the lock is there already
            folder = cls(settings, config_yaml, 0, lock)
            folder.made = made
            return folder
        except OSError as error:
            remove(made)
            raise UserError(f"run.folder: {path} cannot be made: {error.strerror}") from error
        except BaseException:  # a signal too: nothing may block the next try
            remove(made)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Close; a run that ended before it had finished its first step leaves nothing, unless the
        folder is another's by now.
        """
        if kind is None or self.begun or kind is Displaced:
            self.close()
        else:
            self.discard()

    def still_ours(self) -> None:
        """Raise Displaced when another run has taken the folder over: write nothing then."""
        if self.lock is not None:
            self.lock.check()

    def log(self, step: int, metrics: dict[str, float], phase: str = "train") -> None:
        """Record the metrics of a step. NaN and infinity become null in metrics.jsonl: JSON has no
        word for them.
        """
        self.still_ours()
        line = {"step": step, "phase": phase, "time": round(time.time(), 3), **metrics}
        self._metrics.write(_json(line) + "\n")
        self._metrics.flush()
        self.begun |= phase == "train"
        self._latest |= metrics
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def alarm(self, step: int, name: str, message: str) -> None:
        """Keep an alarm, and print it unless the step before had it too."""
        self.still_ours()
        self._alarms.write(_json({"step": step, "name": name, "message": message}) + "\n")
        self._alarms.flush()
        if self._alarmed.get(name, -2) < step - 1:
            say(f"alarm: step {step}: {name}: {message}")
        self._alarmed[name] = step

    def keep_notices(self, notices: Sequence[str]) -> None:
        """Keep what was said about files and texts when the run was started."""
        text = "".join(f"{line}\n" for line in notices)
        (self.path / "notices.txt").write_text(text, "utf-8", "backslashreplace")

    def save_samples(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Keep `samples_per_step` rows of every `samples_every_steps`-th step, nothing of the
        others. They are spread evenly: neighbours answer the same prompt.
        """
        every = self.settings.samples_every_steps
        if every and step % every == 0:
            count = min(len(rows), self.settings.samples_per_step)
            kept = [rows[i * len(rows) // count] for i in range(count)]
            self._write_samples(_name(step), kept)

    def save_answers(self, name: str, step: int, kind: str, rows: Sequence[dict[str, Any]]) -> None:
        """Keep all answers of the evaluation `name` after a step: `kind` is sampled or greedy."""
        if self.settings.samples_every_steps:
            self._write_samples(f"{name}-{_name(step)}-{kind}", rows)

    def _write_samples(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        folder = self.path / "samples"
        folder.mkdir(exist_ok=True)
        text = "".join(_json(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """Yield a temporary folder to fill. It takes its final name only once complete and on
        disk, or disappears.
        """
        self.still_ours()
        final = self.path / "checkpoints" / _name(step)
        for left in final.parent.glob("step-*.tmp"):  # by runs that were killed
            shutil.rmtree(left, ignore_errors=True)
        # a name of its own: a run that was displaced may still be writing its draft of this step
        draft = final.with_name(f"{final.name}.{uuid.uuid4().hex[:8]}.tmp")
        draft.mkdir(parents=True)
        try:
            yield draft
            logs = (self._metrics, self._alarms)
            for log in logs:
                os.fsync(log.fileno())
            sizes = {Path(log.name).name: os.fstat(log.fileno()).st_size for log in logs}
            (draft / "run_folder.json").write_text(json.dumps({"bytes": sizes}))
            (draft / THINGS_FILE).write_text(_json(self.things, indent=1) + "\n")
            to_disk(draft)
            self.still_ours()
            draft.rename(final)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        to_disk(final.parent)
        for _, old in finished_checkpoints(self.path)[: -self.settings.keep_checkpoints]:
            shutil.rmtree(old)

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Time one phase of a step, for the timeline and for `seconds`, and with it the parts that
        were timed meanwhile.
        """
        started = time.time()
        clock = time.perf_counter()
        try:
            yield
        finally:
            self.timed(step, Span(name, started, time.perf_counter() - clock))

    def timed(self, step: int, phase: Span) -> None:
        """Keep a phase that is over, with the parts that were timed meanwhile."""
        parts = [s._replace(name=f"{phase.name}/{s.name}") for s in self.stopwatch.take()]
        of_step = self._seconds.setdefault(step, {})
        for span in (phase, *parts):
            key = f"seconds/{span.name}"
            of_step[key] = of_step.get(key, 0.0) + span.seconds
            self._timeline.add(span.name, step, span.started, span.seconds)

    def seconds(self, step: int) -> dict[str, float]:
        """Return `seconds/{phase}` of the phases of a step, and forget them."""
        return self._seconds.pop(step, {})

    def progress(self, steps: range, total: int, description: str) -> Iterator[int]:
        """Iterate over `steps` (of 1 to `total`), showing progress and the main metrics."""
        if not self.settings.progress:
            return iter(steps)
        return show_progress(steps, total, description, self._latest)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json and close."""
        self.still_ours()
        _replace(self.path / "summary.json", _json(summary, indent=2) + "\n")
        self.close()

    def discard(self) -> None:
        """Remove the folder of a run that never began, and those above that were made for it."""
        with suppress(OSError):  # a full disk may refuse the last words
            self.close()
        remove(self.made)

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
        of that step; a text with which no step was saved since then is not.
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
        kept = self.path / "wandb_id"  # the same run again after a resume
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex)
        try:
            return wandb.init(
                project=project,
                name=self.path.name,
                dir=str(self.path),
                id=kept.read_text(),
                resume="allow",
            )
        except Exception as error:  # of the network, of the account, of wandb
            raise UserError(
                f"run.wandb_project: Weights & Biases does not take the run: {in_a_line(error)}; "
                "WANDB_MODE=offline keeps it here"
            ) from error


class Timeline:
    """Chrome trace events, as chrome://tracing and Perfetto open them; valid JSON after every
    event.
    """

    END = b"\n]\n"

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            process = {"pid": 0, "tid": 0, "args": {"name": "driver"}}
            head = {"name": "process_name", "ph": "M", **process}
            path.write_bytes(b"[\n" + json.dumps(head).encode() + self.END)

    def add(self, name: str, step: int, started: float, seconds: float) -> None:
        """Write one phase; `started` is in Unix seconds."""
        when = {"ts": round(started * 1e6), "dur": round(seconds * 1e6)}  # microseconds
        event = {"name": name, "ph": "X", "pid": 0, "tid": 0, **when, "args": {"step": step}}
        with self.path.open("r+b") as file:
            file.seek(-len(self.END), os.SEEK_END)
            file.write(b",\n" + json.dumps(event).encode() + self.END)


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` to fill. Once complete and on disk it takes that
    name, in place of what was there; otherwise it disappears.
    """
    draft = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
    try:
        draft.mkdir(parents=True)
        yield draft
        to_disk(draft)
        if folder.exists():
            old = folder.with_name(f"{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            draft.rename(folder)
            shutil.rmtree(old)
        else:
            draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def remove(folders: Sequence[Path]) -> None:
    """Remove the first folder with all it holds, and the others as far as nothing else is there."""
    for folder in folders[:1]:
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        for folder in folders[1:]:
            folder.rmdir()


def finished_checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Return steps and folders of checkpoints, oldest first: those named exactly step-<digits>. A
    checkpoint gets that name once it is complete; a copy beside it has another name.
    """
    return sorted(
        (int(p.name.removeprefix("step-")), p)
        for p in (run / "checkpoints").glob("step-*")
        if re.fullmatch("step-[0-9]+", p.name) and p.is_dir()
    )


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """Return the same value with None in place of NaN and infinity."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, text: str) -> None:
    """Write a file by way of a draft: whenever the process dies, the file has the old text or the
    new one, never a part.
    """
    draft = path.with_name(f"{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    to_disk(draft)
    draft.rename(path)


def to_disk(path: Path) -> None:
    """Force a file, or a folder and all it holds, to disk."""
    for inside in path.iterdir() if path.is_dir() else ():
        to_disk(inside)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
