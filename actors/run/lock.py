"""The lock of a run folder: one run at a time reads and writes there, whatever machine it runs on.

The file names the run that has the folder, and that run rewrites it every few seconds. On the same
machine its process tells whether it lives; on another one only these signs of life can. The file
is written in place, because other machines see a new file under an old name late.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Self

import psutil  # type: ignore[import-untyped]

from actors.run.progress import say
from learners.errors import UserError

FILE = "run.lock"
SIZE = 512  # bytes of the file, always: it is rewritten in one piece
BEAT_S = 4.0  # between two signs of life
PATIENCE_S = 20.0  # without one, a run on another machine is dead
SAME_START_S = 1.5  # how far two readings of one process's start may lie apart


class Displaced(SystemExit):
    """Another run has taken the folder over.

    A SystemExit, because whatever answers errors writes into the folder, which is no longer ours.
    """

    def __init__(self, folder: Path, by: str) -> None:
        super().__init__(1)
        self.reason = f"run.folder: {folder} was taken over by {by}; this run stops"

    def __str__(self) -> str:
        return f"error: {self.reason}"


@dataclass(frozen=True)
class Holder:
    """The run that has a folder. `started` counts seconds from the machine's boot to the start of
    its process, `beats` its signs of life.
    """

    run: str
    machine: str
    host: str
    pid: int
    started: float
    beats: int = 0

    @classmethod
    def this_process(cls) -> Self:
        """Return a new run of this process."""
        pid = os.getpid()
        return cls(uuid.uuid4().hex, this_machine(), platform.node(), pid, started(pid))

    @property
    def here(self) -> bool:
        """True where its process id means something to this process."""
        return self.machine == this_machine() != ""

    @property
    def dead(self) -> bool:
        """True when its process is known to have ended."""
        if not self.here:
            return False
        try:
            zombie = psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
            return zombie or abs(started(self.pid) - self.started) > SAME_START_S
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:  # somebody else's, and that is all we may know
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_machine() -> str:
    """Return what is the same for two processes only if they share their process ids: boot, process
    namespace and host name. Empty where nobody can tell.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {platform.node()}"
    except OSError:
        return ""


def started(pid: int) -> float:
    """Return when a process began, in seconds since boot, which no clock that is set can move."""
    return psutil.Process(pid).create_time() - psutil.boot_time()


class RunLock:
    """The lock of one run folder, held from `with` to its end. Makes the folder if need be, and
    removes what it made where nothing was written.
    """

    def __init__(self, folder: Path, take_over: bool = False) -> None:
        """Name the folder; `take_over` takes it from a run that lives."""
        self.folder = folder
        self.path = folder.absolute() / FILE
        self.take_over = take_over
        self.holder = Holder.this_process()
        self._made: list[Path] = []  # folders, innermost first
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="run-lock", daemon=True)

    def __enter__(self) -> Self:
        """Take the folder. Raises UserError when it belongs to a run that lives, or cannot be
        written.
        """
        try:
            folder = self.path.parent
            self._made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            self._unmake()
            reason = error.strerror or error
            raise UserError(f"run.folder: {self.folder} cannot be written: {reason}") from None
        self._beating.start()
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        """Leave the folder. Raises Displaced in place of an error when another run has it: that
        run may have caused the error, and nothing of ours belongs there any more.
        """
        self._ended.set()
        self._beating.join()
        try:
            with suppress(OSError), self._ours():
                self.path.unlink()
        except Displaced:
            # a folder that somebody removed is another matter
            if kind is not None and issubclass(kind, Exception) and self.path.parent.is_dir():
                raise
        self._unmake()

    def _unmake(self) -> None:
        """Remove the folders we made and nobody wrote anything into."""
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()

    def check(self) -> None:
        """Give a sign of life. Raises Displaced when another run has taken the folder over."""
        with self._ours() as file:
            self.holder = replace(self.holder, beats=self.holder.beats + 1)
            _write(file, self.holder)

    @contextmanager
    def _ours(self) -> Iterator[int]:
        """Open the file as `_alone` does, or raise Displaced."""
        try:
            with _alone(self.path) as file:
                holder = _read(file)
                if holder is None or holder.run != self.holder.run:
                    raise Displaced(self.folder, f"the run of {holder}")
                yield file
        except FileNotFoundError:  # taken over, and that run has ended
            raise Displaced(self.folder, "another run, which has ended") from None

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with suppress(OSError):  # a beat is missed; whoever then takes the folder is noticed
                try:
                    self.check()
                except Displaced:
                    return

    def _take(self) -> None:
        """Write ourselves into the file, if nobody there lives."""
        silent: Holder | None = None  # of another machine, without a sign of life for long
        while True:
            with _alone(self.path, os.O_CREAT) as file:
                holder = _read(file)
                free = holder is None or holder.dead or holder == silent
                if holder is None or free or self.take_over:
                    _write(file, self.holder)
                    break
            if holder.here:
                raise self._taken(holder)
            silent = self._watch(holder)
        if not free:
            say(f"run.folder: {self.folder}: taken over from {holder}")

    def _watch(self, holder: Holder) -> Holder | None:
        """Return a holder that gives no sign of life for `PATIENCE_S`, None when it has left
        meanwhile; raise UserError when it lives.
        """
        say(
            f"run.folder: {self.folder} belongs to {holder}: waiting {PATIENCE_S:.0f} s for a sign "
            "of life from there"
        )
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            time.sleep(BEAT_S / 4)
            with _alone(self.path, os.O_CREAT) as file:
                now = _read(file)
            if now is not None and now.run == holder.run and now.beats != holder.beats:
                raise self._taken(holder)
            if now != holder:
                return None
        say(f"run.folder: {self.folder}: none came: going on")
        return holder

    def _taken(self, holder: Holder) -> UserError:
        return UserError(
            f"run.folder: {self.folder} belongs to a run that is going on, {holder}: wait for it, "
            "end it, or take the folder from it with --resume --take-over"
        )


def only_locked(folder: Path) -> bool:
    """Tell whether a folder holds a lock and nothing else: a run began there and was killed, or is
    beginning.
    """
    return folder.is_dir() and [path.name for path in folder.iterdir()] == [FILE]


@contextmanager
def _alone(path: Path, create: int = 0) -> Iterator[int]:
    """Open a lock file while no other process has it open like this. Where the file system knows no
    flock, there is a chance in a million that two do; they notice it later.
    """
    while True:
        file = os.open(path, os.O_RDWR | create, 0o666)
        try:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            if _still_there(file, path):
                yield file
                return
        finally:
            os.close(file)


def _still_there(file: int, path: Path) -> bool:
    """Tell whether the open file is the one at the path, and was not removed meanwhile."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _read(file: int) -> Holder | None:
    """Return who is in the file; None for nobody."""
    try:
        written = json.loads(os.pread(file, SIZE, 0))
        return Holder(**{field.name: written[field.name] for field in fields(Holder)})
    except (ValueError, KeyError, TypeError):
        return None


def _write(file: int, holder: Holder) -> None:
    os.pwrite(file, json.dumps(asdict(holder)).encode().ljust(SIZE), 0)
