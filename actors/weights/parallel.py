"""The workers of an engine: one in its own process or, where they are tensor-parallel, processes
that vLLM spawns and that are not Ray's.

Importing this prepares a process for a worker of ours. Spawned ones do so because vLLM looks up
`WorkerExtension` in each of them before it loads the model. Imports vLLM.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.shared_memory import SharedMemory
from typing import Any
from uuid import uuid4

from torch._dynamo import config as compiler
from vllm.platforms import current_platform

import actors.weights.receiver  # noqa: F401  registers our transfer backend
from actors.engine.rotary import correct_rotary_positions
from actors.weights.packing import SHARED, Shared, fetch_group

if current_platform.is_cpu():
    # Compiling a helper of the sampler would hold the first token up by 6 s.
    compiler.disable = True
    correct_rotary_positions()


class WorkerExtension:
    """Becomes a base class of vLLM's worker (`worker_extension_cls`)."""

    def answer(self, method: str | Callable[..., Any], *args: Any) -> tuple[Any, str, str]:
        """Call the worker's `method`, or a function of a module with the worker as its first
        argument; return the result, or the error in a line and its traceback.
        """
        try:
            call = getattr(self, method) if isinstance(method, str) else partial(method, self)
            return call(*args), "", ""
        except Exception as error:
            return None, f"{type(error).__name__}: {error}", traceback.format_exc()


def call_workers(engine: Any, method: str | Callable[..., Any], *args: Any) -> list[Any]:
    """Call a method, or a function of a module, in every worker of a vLLM engine; return the
    results. Of several workers that fail, the first's error is raised, as a RuntimeError.

    All have answered by then: vLLM would raise it at once, and take the others' answers for those
    to the next call.
    """
    if engine.vllm_config.parallel_config.world_size == 1:
        return engine.collective_rpc(method, args=args)
    answers = engine.collective_rpc("answer", args=(method, *args))
    for rank, (_, error, details) in enumerate(answers):
        if error:
            failure = RuntimeError(
                f"worker {rank} of {len(answers)} in this engine failed: {error}"
            )
            failure.add_note(details)
            raise failure
    return [result for result, _, _ in answers]


@contextmanager
def within_reach(engine: Any, update: dict[str, Any], timeout_s: float) -> Iterator[dict[str, Any]]:
    """Give an update that all workers of `engine` can read. Bytes in Ray's object store are
    fetched once and copied to shared memory, which is there until the block ends.

    Should this process be killed meanwhile, Python's resource tracker, a process of its own,
    removes them. Raises SyncError if they are not those sent.
    """
    if engine.vllm_config.parallel_config.world_size == 1 or "groups" not in update:
        yield update
        return
    with ExitStack() as blocks:
        groups = []
        for group in update["groups"]:
            array = fetch_group(group, timeout_s)
            name = f"quatuor-{uuid4()}"
            block = SharedMemory(name, create=True, size=max(1, array.nbytes))
            blocks.callback(block.unlink)
            blocks.callback(block.close)
            # a file that no longer fits is an error, while a write to mapped memory is a crash
            with open(SHARED / name, "r+b") as file:
                file.write(array.data)
            groups.append({**group, "ref": Shared(name, array.nbytes)})
        yield {**update, "groups": groups}
