"""Engines: the driver's view of all vLLM engines. Requests in, finished rollouts out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ray

from actors.cluster.groups import WorkerError, WorkerGroup, fetch

if TYPE_CHECKING:  # it starts the processes before torch is there
    from learners.experience import PromptRequest, Rollout


class Engines(WorkerGroup):
    """A WorkerGroup of GenerationEngines."""

    concurrency = 8  # commands (sync, probe) must reach an engine while its stream is being read

    def generate(self, requests: Sequence[PromptRequest], deadline_s: float) -> list[Rollout]:
        """Return all responses, ordered by request and sample. Raises WorkerError when an engine
        fails or is too slow.
        """
        until = time.monotonic() + deadline_s
        shares = [list(requests[i :: len(self)]) for i in range(len(self))]
        streams = dict(zip(self.streams("generate", shares), self.names(), strict=True))
        finished: dict[int, list[Rollout]] = {}
        while streams:
            ready, _ = ray.wait(list(streams), timeout=max(0.0, until - time.monotonic()))
            if not ready:
                late = ", ".join(streams.values())
                raise WorkerError(f"generate: {late} did not finish within {deadline_s:.0f} s")
            try:
                groups = fetch(next(ready[0]), streams[ready[0]], "generate")
            except StopIteration:
                del streams[ready[0]]
                continue
            finished |= {group[0].slot: group for group in groups}
        if missing := len(requests) - len(finished):
            raise WorkerError(f"generate: {missing} of {len(requests)} groups never came back")
        return [rollout for request in requests for rollout in finished[request.slot]]
