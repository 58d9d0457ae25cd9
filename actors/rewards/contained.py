"""Calls of user code that may raise, exit, fork or set an alarm without harm to our process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

LONGEST_WORDS = 500


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Keep what user code leaves behind from the rest of this process: a child that it forked and
    that runs out of it ends there, an alarm that it set and forgot is off.
    """
    process = os.getpid()
    alarm_is_ours = signal.getitimer(signal.ITIMER_REAL)[0] > 0
    try:
        yield
    except BaseException as error:
        if os.getpid() != process:
            end_child(error)
        raise
    else:
        if os.getpid() != process:
            end_child(None)
    finally:
        if not alarm_is_ours:
            signal.setitimer(signal.ITIMER_REAL, 0)


def end_child(error: BaseException | None) -> NoReturn:
    """End a forked child as Python ends a process that runs out of its code, but without the exit
    hooks of the parent, whose connections it shares.
    """
    code: Any = error.code if isinstance(error, SystemExit) else error
    silent = code is None or isinstance(code, int)
    try:
        if not silent:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit((code or 0) & 0xFF if silent else 1)


def is_interrupt(error: BaseException) -> bool:
    """Tell Ctrl-C, and Ray's way of ending a process, from what user code raises by itself."""
    return isinstance(error, KeyboardInterrupt) or hasattr(error, "ray_terminate_msg")


def kind_and_words(error: BaseException) -> str:
    """Return an error as one line, not too long."""
    name = type(error).__name__
    try:
        text = " ".join(str(error).split())
    except Exception:  # a class of the user's own may fail at that too
        text = "it cannot say what is wrong"
    return f"{name}: {text}"[:LONGEST_WORDS] if text else name
