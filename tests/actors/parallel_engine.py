"""A tensor-parallel engine that can be looked into, and whose workers can be disturbed one by
one.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from actors.engine.engine import GenerationEngine, in_loop
from actors.weights.proof import Receipt


class ParallelEngine(GenerationEngine):
    @in_loop
    def ask(self, function: str, *args: Any) -> list[Any]:
        """Call a function of this module in every worker, as the engine calls its own."""
        from actors.weights.parallel import call_workers

        return call_workers(self._engine, globals()[function], *args)

    @in_loop
    def give_each_its_own(self, updates: list[dict[str, Any]]) -> Receipt:
        """Take a full update of which every worker is given another one."""
        from contextlib import ExitStack

        from actors.weights.parallel import within_reach

        self.start_weight_update()
        with ExitStack() as readable:
            own = [readable.enter_context(within_reach(self._engine, u, 10.0)) for u in updates]
            self._worker("update_weights", own)
        return self.finish_weight_update("1")

    @in_loop
    def note_an_update(self, groups: list[dict[str, Any]]) -> Receipt:
        """Take a full update and note, as on GPUs, what the model is given."""
        from actors.weights.receiver import note_what_is_loaded

        self.start_weight_update()
        self._worker(load_by_load_weights)
        self._worker(note_what_is_loaded)
        self.update_weights({"groups": groups})
        receipt = self.finish_weight_update("1")
        self._worker(note_no_longer)
        return receipt

    def process(self) -> int:
        return os.getpid()

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def die_in_an_update(self, update: dict[str, Any]) -> None:
        from actors.weights.parallel import within_reach

        with within_reach(self._engine, update, 10.0):
            if shared_memory():
                self.kill(os.getpid())


def shared_memory() -> list[str]:
    """Return what of our shared memory there is on this node."""
    return [name for name in os.listdir("/dev/shm") if name.startswith("quatuor-")]


def shard(worker: Any) -> tuple[int, int, int, int]:
    """Return the process, its rank, and how many query and KV heads of a layer it has."""
    attention = worker.model_runner.model.model.layers[0].self_attn
    return os.getpid(), worker.rank, attention.num_heads, attention.num_kv_heads


def load_by_load_weights(worker: Any) -> None:
    """Load the next weights as vLLM's own receivers do it."""
    worker.weight_transfer_engine.loader._begin_reload()


def note_no_longer(worker: Any) -> None:
    """Leave the receiver as it was."""
    del worker.weight_transfer_engine.model.load_weights
    del worker.weight_transfer_engine.noted


def draw(worker: Any) -> list[float]:
    import torch

    return torch.rand(3).tolist()


def fail_once(worker: Any, rank: int) -> None:
    """Let one worker fail in the middle of the next update."""
    if worker.rank != rank:
        return
    loader = worker.weight_transfer_engine.loader

    def failing(weights: dict[str, Any]) -> Any:
        del loader.load
        loader.load(dict(list(weights.items())[::2]))
        raise ConnectionError(f"rank {rank} lost its way, {len(shared_memory())} groups left")

    loader.load = failing
