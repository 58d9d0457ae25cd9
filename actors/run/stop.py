"""Leaving early, on request: SIGUSR1 asks a run to finish its step, save a checkpoint and end with
exit code 75.

Batch systems send such a signal before a time limit; `--resume` goes on from the checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_requested = threading.Event()


class Interrupted(SystemExit):
    """The run was asked to leave and has saved its checkpoint.

    A SystemExit, because nothing failed: nobody who catches errors may take it for one.
    """

    def __init__(self, step: int) -> None:
        super().__init__(os.EX_TEMPFAIL)
        self.step = step

    def __str__(self) -> str:
        return (
            f"left after step {self.step} on SIGUSR1; its checkpoint is saved: --resume goes on "
            "from here"
        )


@contextmanager
def catch_stop_signal() -> Iterator[None]:
    """Take note of SIGUSR1, which would end the process otherwise. Signals reach the main thread
    alone.
    """
    _requested.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Any = signal.signal(signal.SIGUSR1, lambda *_: _requested.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def stop_requested() -> bool:
    """Whether the run shall leave after this step."""
    return _requested.is_set()
