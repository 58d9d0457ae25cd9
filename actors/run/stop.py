"""The stop signal: after SIGUSR1 a run finishes its step, saves a checkpoint and ends with exit
code 75.

Batch systems send such a signal before a time limit; `--resume` continues from the checkpoint.
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
    """The run was stopped by the signal and has saved its checkpoint.

    A SystemExit, because nothing failed: code that catches errors must let it pass.
    """

    def __init__(self, step: int) -> None:
        super().__init__(os.EX_TEMPFAIL)
        self.step = step

    def __str__(self) -> str:
        return f"stopped after step {self.step} (SIGUSR1); checkpoint saved; continue with --resume"


@contextmanager
def catch_stop_signal() -> Iterator[None]:
    """Note SIGUSR1, which would end the process otherwise. Signals reach the main thread alone."""
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
    """Tell whether the run must stop after this step."""
    return _requested.is_set()
