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
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from actors.run.progress import show_progress
from actors.settings import RunSettings
from learners.errors import UserError

TRIAL_BYTES = 64 * 1024
# each of them says how a run reaches Weights & Biases, or that it need not
WANDB_VARIABLES = (
    "WANDB_API_KEY",
    "WANDB_MODE",
    "WANDB_IDENTITY_TOKEN_FILE",
)


class RunFolder:
    """One run on disk. Get it from `open`; end it with `close` or `finish`.

    `config.yaml`, `config-until-step-*.yaml` (replaced by a resume), `metrics.jsonl` (one
    object per line: step, phase, time in Unix seconds, and the metrics by name), `alarms.jsonl`
    (one object per line: step, name, message), `samples/step-*.jsonl`, `timeline.json` (Chrome
    trace events), `tensorboard/`, `checkpoints/step-*/`.
    """

    def __init__(self, settings: RunSettings, config_yaml: str, first_step: int) -> None:
        """Open an existing folder, to log from `first_step` on."""
        self.settings = settings
        self.path = Path(settings.folder).resolve()  # workers may run in another directory
        self.begun = first_step > 0  # a step is finished: what the folder holds is worth keeping
        self.made: list[Path] = []  # it and the folders above it, as far as they are this run's
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
        if settings.wandb_project and (wrong := wandb_problem()):
            raise UserError(f"run.wandb_project: {wrong}")
        path = Path(settings.folder)
        if resume and not finished_checkpoints(path):
            raise UserError(f"run.folder: {path} has no finished checkpoint to resume from")
        if wrong := unwritable(path) if resume else no_new_folder(path):
            raise UserError(f"run.folder: {path} {wrong}")

    @classmethod
    def open(cls, settings: RunSettings, config_yaml: str, resume: bool = False) -> Self:
        """Make the folder, or with `resume` open it as it was at its newest checkpoint.

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
            return cls(settings, config_yaml, first_step=step + 1)
        path = path.absolute()
        made = [one for one in (path, *path.parents) if not one.exists()]
        try:
            path.mkdir(parents=True)
            folder = cls(settings, config_yaml, first_step=0)
            folder.made = made
            return folder
        except OSError as error:
            remove(made)
            raise UserError(f"run.folder: {path} cannot be made: {error.strerror}") from error
        except Exception:
            remove(made)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Close; a run that ended before it had finished its first step leaves nothing."""
        if kind is None or self.begun:
            self.close()
        else:
            self.discard()

    def log(self, step: int, metrics: dict[str, float], phase: str = "train") -> None:
        """Record the metrics of a step. NaN and infinity become null in metrics.jsonl: JSON has no
        word for them.
        """
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
        self._alarms.write(_json({"step": step, "name": name, "message": message}) + "\n")
        self._alarms.flush()
        if self._alarmed.get(name, -2) < step - 1:
            print(f"alarm: step {step}: {name}: {message}", file=sys.stderr, flush=True)
        self._alarmed[name] = step

    def save_samples(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Keep the first `samples_per_step` rows of every `samples_every_steps`-th step, nothing of
        the others.
        """
        if not self.settings.samples_every_steps or step % self.settings.samples_every_steps:
            return
        folder = self.path / "samples"
        folder.mkdir(exist_ok=True)
        lines = [_json(row) + "\n" for row in rows[: self.settings.samples_per_step]]
        (folder / f"{_name(step)}.jsonl").write_text("".join(lines))

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """Yield a temporary folder to fill. It takes its final name only once complete and on
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
            to_disk(draft)
            draft.rename(final)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        to_disk(final.parent)
        for _, old in finished_checkpoints(self.path)[: -self.settings.keep_checkpoints]:
            shutil.rmtree(old)

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
        """Return `seconds/{phase}` of the phases of a step, and forget them."""
        return self._seconds.pop(step, {})

    def progress(self, steps: range, total: int, description: str) -> Iterator[int]:
        """Iterate over `steps` (of 1 to `total`), showing progress and the main metrics."""
        if not self.settings.progress:
            return iter(steps)
        return show_progress(steps, total, description, self._latest)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json and close."""
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
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"run.wandb_project: Weights & Biases does not take the run: {reason}; "
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


def no_new_folder(path: Path) -> str:
    """Return why no new folder can be made and written there; nothing when one can. Leaves nothing
    behind.
    """
    where = ""
    try:
        if os.path.exists(path):
            return "exists: choose another folder, or --resume to go on with that run"
        if link := next((p for p in (path, *path.absolute().parents) if dangling(p)), None):
            return f"cannot be made: {link} is a link to {os.readlink(link)}, which does not exist"
        above = next(parent for parent in path.absolute().parents if os.path.exists(parent))
        if not above.is_dir():
            return f"cannot be made: {above} is a file"
        where = f"{above}: "
        # permissions alone do not tell: the disk may be read-only or full, the user root, or the
        # name too long
        with tempfile.TemporaryDirectory(dir=above) as trial:
            inside = Path(trial, path.absolute().relative_to(above))
            inside.mkdir(parents=True)
            write_trial(inside)
    except (OSError, ValueError) as error:
        return f"cannot be made: {where}{getattr(error, 'strerror', None) or error}"
    return ""


def unwritable(path: Path) -> str:
    """Return why nothing can be written in a folder; nothing when it can."""
    try:
        write_trial(path)
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return ""


def write_trial(folder: Path) -> None:
    """Write a file there that is gone at once. Raises OSError."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(TRIAL_BYTES))
        file.flush()
        os.fsync(file.fileno())


def dangling(path: Path) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def wandb_problem() -> str:
    """Return why Weights & Biases cannot take a run; nothing when it can, as far as that is known
    without asking it.
    """
    if importlib.util.find_spec("wandb") is None:
        return "wandb is not installed: pip install wandb, or remove the key"
    if any(os.environ.get(name) for name in WANDB_VARIABLES):
        return ""
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    places = ("wandb", os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb")
    said = {os.environ.get("NETRC") or "~/.netrc": re.escape(server), "~/_netrc": re.escape(server)}
    said |= {os.path.join(place, "settings"): "mode|api_key" for place in places}
    for file, word in said.items():
        with suppress(OSError):
            if re.search(word, Path(file).expanduser().read_text(errors="replace")):
                return ""
    return (
        "no key for Weights & Biases is here: wandb login, or set WANDB_API_KEY, or "
        "WANDB_MODE=offline"
    )


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
