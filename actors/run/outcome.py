"""The one line that a run ends with when it does not reach its end: what a disk refused, or which
signal came, and from which step `--resume` goes on.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray.exceptions import RayError

from actors.cluster.groups import WorkerError
from actors.run.folder import finished_checkpoints
from actors.run.stop import Left, catch_stop_signals, leaving, stop_requested
from learners.errors import UserError, in_a_line

# What libraries say in place of the system's words.
IN_OTHER_WORDS = re.compile(
    r"PytorchStreamWriter failed|unexpected pos \d+|"
    r"(No space left on device|Disk quota exceeded|File too large|Read-only file system)"
)
CLOSED = (errno.EACCES, errno.EPERM, errno.ENOENT)
REMEDIES = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        "free some space there, or raise its quota or limit ({free})",
    ),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "see its permissions, and how its disk is mounted",
    ),
    errno.EIO: "see the disk, or the connection to it",
    errno.ENOENT: "was it removed while the run wrote there?",
}


class StorageError(RuntimeError):
    """A file could not be written; the message says which, why, and what to do."""


class EndError(WorkerError):
    """Something failed after the last step; the message says what, and what is left."""


@contextmanager
def accounted_for(folder: str) -> Iterator[None]:
    """Answer signals, and give what ends the run in `folder` its line.

    Raises Left for a run that a signal ended, also by ending its processes, and StorageError for
    one whose files could not be written.
    """
    path = Path(folder)
    with catch_stop_signals():
        try:
            yield
        except KeyboardInterrupt:
            if by := leaving():
                raise Left(by, what_is_left(path)) from None
            raise
        except (UserError, EndError):
            raise
        except Exception as error:
            if isinstance(error, WorkerError) and (by := stop_requested()):
                # everything that belongs to the run got the signal, not its driver alone
                how = in_a_line(error)
                raise Left(
                    by, f"it ended the run's processes ({how}); {what_is_left(path)}"
                ) from error
            if trouble := disk_trouble(error, path):
                raise StorageError(f"{trouble}; {what_is_left(path)}") from error
            raise


def leave_at_the_end(left: str) -> None:
    """Raise Left when a signal has come during the last step or since. SIGUSR1 leaves time."""
    by = stop_requested()
    if by and by != signal.SIGUSR1:
        raise Left(by, left)


def what_is_left(folder: Path) -> str:
    """Say what a run that ends now leaves behind."""
    if not folder.is_dir():
        return "it had not begun, and nothing is left of it"
    saved = finished_checkpoints(folder)
    return f"--resume goes on from step {saved[-1][0]}" if saved else "no checkpoint was saved"


def disk_trouble(error: BaseException, folder: Path) -> str:
    """Return who met it, path, reason and remedy if the error is of a file in the folder that could
    not be written, or of any other that a full or broken disk refused, also in a worker; else
    nothing.
    """
    who = f"{str(error).split(' failed: ')[0]}: " if isinstance(error, WorkerError) else ""
    chain = list(causes(error))
    for one in chain:
        if isinstance(one, OSError) and one.errno in REMEDIES:
            file = Path(os.fsdecode(one.filename or folder))
            ours = one.filename is not None and file.is_relative_to(folder.absolute())
            if ours or one.errno not in CLOSED:
                return f"{who}{file}: {one.strerror}: {remedy(one.errno, file)}"
    # What passes on another's words (ours, Ray's) is not searched: a file of any folder may stand
    # in them.
    first_hand = [e for e in chain if not isinstance(e, (OSError, WorkerError, RayError))]
    for one in first_hand:
        if found := IN_OTHER_WORDS.search(str(one)):
            said = found[1] or "a file could not be written to its end"
            return f"{who}{folder}: {said}: {remedy(errno.ENOSPC, folder)}"
    return ""


def remedy(number: int, file: Path) -> str:
    """Say what helps against an error number of the system's, with what is free where it arose."""
    with suppress(OSError):
        there = next(path for path in (file, *file.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(there).free / 2**20
        return REMEDIES[number].format(free=f"{free:,.0f} MiB are free")
    return REMEDIES[number].format(free="how much is free cannot be told")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those it comes from, a worker's own among them."""
    while error is not None:
        yield error
        inner = getattr(error, "cause", None)  # of Ray's
        error = inner if isinstance(inner, BaseException) else error.__cause__
