"""A pool of real ranks for tests: processes that stay, joined by gloo, each running the same function per case."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from learners.settings import Place


class Ranks:
    """`Ranks(2).run(function, *arguments)` calls `function(place, *arguments)` on every rank, returns all results."""

    def __init__(self, world_size: int) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            place = Place(rank, world_size, "127.0.0.1", port, timeout_s=120)
            process = context.Process(target=_serve, args=(theirs, place), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results = []
        for pipe in self.pipes:
            assert pipe.poll(timeout_s), f"{function.__name__} did not answer within {timeout_s} s"
            ok, result = pipe.recv()
            assert ok, result
            results.append(result)
        return results

    def close(self) -> None:
        for process in self.processes:
            process.terminate()


def _serve(pipe: Any, place: Place) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((True, function(place, *arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
