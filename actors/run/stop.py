"""Signals that stop a run: SIGUSR1, SIGTERM and SIGHUP.

Batch systems and terminals send them before they end a process. The run then finishes its step,
saves a checkpoint and ends with exit code 75; `--resume` goes on from there. Before the first step
there is nothing to save: SIGTERM and SIGHUP end the run at once, with exit code 128 + signal, and
so does a second one. SIGUSR1 always waits for a step: who sends it leaves time.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)
# `timeout` and others signal a process and its whole group: the same signal twice
ECHO_S = 2.0
WATCH_S = 60.0


class Interrupted(SystemExit):
    """The run was stopped by a signal and has saved its checkpoint.

    A SystemExit, because nothing failed: code that catches errors must let it pass.
    """

    def __init__(self, step: int, by: signal.Signals = signal.SIGUSR1) -> None:
        super().__init__(os.EX_TEMPFAIL)
        self.step = step
        self.by = by

    def __str__(self) -> str:
        return (
            f"stopped after step {self.step} ({self.by.name}); checkpoint saved; continue with "
            "--resume"
        )


class Left(SystemExit):
    """The run was ended by a signal without a checkpoint of its own; `state` says what is left."""

    def __init__(self, by: signal.Signals, state: str = "") -> None:
        super().__init__(128 + by)
        self.by = by
        self.state = state

    def __str__(self) -> str:
        return "; ".join(filter(None, [f"stopped by {self.by.name}", self.state]))


@dataclass
class _Answer:
    """Handler of the signals: what has come, and whether there is a step to finish."""

    requested: signal.Signals | None = None
    at: float = 0.0  # time.monotonic
    stepping: bool = False
    leaving: signal.Signals | None = None
    held: bool = False  # it may not be answered now
    ended: Callable[[], bool] = bool  # tells whether the run has lost what it needs for a step

    def __call__(self, number: int, _: Any) -> None:
        came = signal.Signals(number)
        again = self.requested is not None
        lost = again and self.ended()
        if self.leaving or (again and not lost and time.monotonic() - self.at < ECHO_S):
            return
        if not lost and (came == signal.SIGUSR1 or (self.stepping and not again)):
            if not again:  # the script of a batch job repeats SIGUSR1 every second
                self.requested = came
                self.at = time.monotonic()
                threading.Thread(target=self._watch, daemon=True).start()
            return
        self.leaving = self.requested if lost else came
        if not self.held:
            # what waits inside Ray passes this one on, and would abort the process for any other
            raise KeyboardInterrupt

    def _watch(self) -> None:
        """Signal again once the run cannot finish its step: all processes of a batch job may have
        got the signal, Ray's among them.
        """
        while not self.leaving and time.monotonic() < self.at + WATCH_S:
            time.sleep(0.2)
            if self.ended() and _answer is self:  # else the run has ended meanwhile
                os.kill(os.getpid(), signal.SIGTERM)
                return


_answer: _Answer | None = None


@contextmanager
def catch_stop_signals() -> Iterator[None]:
    """Answer the signals until the end of the block, or of the one it lies in. One that was ignored
    stays so (nohup). Raises Left in place of what a signal cut short.

    Signals reach the main thread alone; in another nothing is done.
    """
    global _answer
    outermost = _answer is None and threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    if outermost:
        _answer = _Answer()
        answer_signals()
    elif _answer is not None:
        _answer.stepping = False  # a run within: it has not begun
    try:
        yield
    except KeyboardInterrupt:
        if by := leaving():
            raise Left(by) from None
        raise
    finally:
        if outermost:
            _answer = None
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


def answer_signals() -> None:
    for number in STOP_SIGNALS if _answer is not None else ():
        ignored = number != signal.SIGUSR1 and signal.getsignal(number) == signal.SIG_IGN
        signal.signal(number, signal.SIG_IGN if ignored else _answer)


@contextmanager
def hold_signals() -> Iterator[None]:
    """Answer signals after the block, for code that puts handlers of its own in place and is broken
    by an exception from ours. What it prints on stderr is dropped when one has come: a trace.
    """
    if _answer is None:
        yield
        return
    _answer.held = True
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as told:
        os.dup2(told.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            answer_signals()
            _answer.held = False
            if not _answer.leaving:
                told.seek(0)
                sys.stderr.write(told.read().decode(errors="replace"))
    if _answer.leaving:
        raise KeyboardInterrupt


def stepping() -> None:
    """Tell that the first step begins: from now on a signal waits for the end of a step."""
    if _answer is not None:
        _answer.stepping = True


def need(ended: Callable[[], bool]) -> None:
    """Leave at once when `ended` becomes true after a signal: no step can be finished then."""
    if _answer is not None:
        _answer.ended = ended


def stop_requested() -> signal.Signals | None:
    """Return the signal after which the run must stop with this step, if one has come."""
    return None if _answer is None else _answer.requested


def leaving() -> signal.Signals | None:
    """Return the signal that ends the run at once, if one does."""
    return None if _answer is None else _answer.leaving


def interrupted(step: int, by: signal.Signals) -> Interrupted:
    """Return what ends the run after its step; signals that come now change nothing any more."""
    if _answer is not None:
        _answer.leaving = by
    return Interrupted(step, by)
