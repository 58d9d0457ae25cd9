"""Engines: the driver's view of all vLLM engines. Prompts in, finished rollouts out, weights synced
and verified.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray

from actors.cluster.groups import WorkerError, WorkerGroup
from actors.weights.transfer import check_probe, verify
from learners.experience import PromptRequest, Rollout

FAILURE_S = 10.0  # for an engine to say what an update failed with


class Engines(WorkerGroup):
    """A WorkerGroup of GenerationEngines."""

    def __init__(self, options: Sequence[dict[str, Any]]) -> None:
        # Commands (sync, probe) must reach an engine while a stream of it is being read.
        super().__init__("engine", "actors.engine.engine:GenerationEngine", options, concurrency=8)

    def generate(self, requests: Sequence[PromptRequest], deadline_s: float) -> list[Rollout]:
        """All responses, ordered by request and sample. Raises WorkerError when an engine fails or
        is too slow.
        """
        until = time.monotonic() + deadline_s
        shares = [list(requests[i :: len(self)]) for i in range(len(self))]
        streams = {stream: i for i, stream in enumerate(self.streams("generate", shares))}
        finished: dict[int, list[Rollout]] = {}
        while streams:
            ready, _ = ray.wait(
                list(streams), num_returns=1, timeout=max(0.0, until - time.monotonic())
            )
            if not ready:
                late = ", ".join(self._who(i) for i in streams.values())
                raise WorkerError(f"generate: {late} did not finish within {deadline_s:.0f} s")
            try:
                groups = self.fetch(next(ready[0]), streams[ready[0]], "generate")
            except StopIteration:
                del streams[ready[0]]
                continue
            for group in groups:
                finished[group[0].slot] = group
        if len(finished) != len(requests):
            raise WorkerError(
                f"generate: {len(requests) - len(finished)} of {len(requests)} groups never "
                "came back"
            )
        return [rollout for request in requests for rollout in finished[request.slot]]

    def sync(
        self,
        actor: WorkerGroup,
        version: int,
        probe: list[int],
        deadline_s: float,
        max_logprob_diff: float,
        mean_logprob_diff: float,
    ) -> float:
        """Give every engine the Actor's weights and prove it; until then they are STALE and serve
        nothing.

        Proof: digests and names of the received bytes agree with what was sent, and log-probs of
        `probe` agree within `gate`, and on average within `mean_logprob_diff`. Returns the largest
        probe difference (nats). Raises SyncError or WorkerError.
        """
        try:
            results = actor.call("send_weights", version, phase="sync", deadline_s=deadline_s)
        except WorkerError as error:
            raise WorkerError("; ".join([str(error), *self._failures()])) from error
        sent, received, names = results[0]
        for i, receipt in enumerate(received):
            verify(sent, receipt, names, self._who(i))
        waiting = actor.submit("probe", probe)
        theirs = self.call("probe_logprobs", probe, phase="sync", deadline_s=deadline_s)
        ours = actor.gather(waiting, "sync", deadline_s)[0]
        worst = max(
            check_probe(ours, one, max_logprob_diff, mean_logprob_diff, self._who(i))
            for i, one in enumerate(theirs)
        )
        self.call("accept", version, phase="sync", deadline_s=deadline_s)
        return worst

    def _failures(self) -> list[str]:
        """What went wrong in the engines: a rank that waits in a transfer never hears of it."""
        try:
            told = self.gather(self.submit_without_swap("failure"), "sync", FAILURE_S)
        except WorkerError as error:
            return [str(error)]
        return [f"{self._who(i)}: {failure}" for i, failure in enumerate(told) if failure]
