"""A pool of real ranks for tests: processes that stay, joined by gloo, each running the same
function per case.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from learners.settings import Rank


class Ranks:
    """`Ranks(2).run(function, *arguments)` calls `function(rank, *arguments)` on every rank,
    returns all results.

    Processes start in the background, so several pools come up together. After a failure the other
    ranks may wait in a collective for ever: the pool is ended, and the next `run` starts a new one.
    `function` must be importable.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        self.start()

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = mp.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            rank = Rank(rank, self.world_size, "127.0.0.1", port, timeout_s=200)
            process = context.Process(target=_serve, args=(theirs, rank), daemon=True)
            process.start()
            theirs.close()  # the only other end is the rank's: when it dies, reading from ours ends
            self.pipes.append(ours)
            self.processes.append(process)

    def run(
        self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 240
    ) -> list[Any]:
        if not self.pipes:
            self.start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while missing := [rank for rank in range(self.world_size) if rank not in results]:
            ready = wait(
                [self.pipes[rank] for rank in missing], max(0.0, deadline - time.monotonic())
            )
            if not ready:
                self._fail(
                    f"ranks {missing} did not answer {function.__name__} within {timeout_s} s"
                )
            for rank in missing:
                if self.pipes[rank] in ready:
                    results[rank] = self._receive(rank)
        return [results[rank] for rank in range(self.world_size)]

    def _receive(self, rank: int) -> Any:
        try:
            ok, result = self.pipes[rank].recv()
        except EOFError:
            ok = False
            result = "the process ended without an answer"
        if not ok:
            self._fail(f"rank {rank} of {self.world_size}: {result}")
        return result

    def _fail(self, message: str) -> None:
        self.close()
        raise AssertionError(message)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.pipes = []
        self.processes = []


def _serve(pipe: Connection, rank: Rank) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")
    import gc

    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:  # the tests are over
            return
        try:
            pipe.send((True, function(rank, *arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
        del function, arguments
        gc.collect()  # an engine refers to itself in circles
