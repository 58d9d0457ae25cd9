"""Requests under way in vLLM's core, and what has come of them so far.

They go to the core itself, and what it hands out is gathered here, in plain lists. vLLM's own front
end would make text, ranks and several objects of every token, in the one thread that also keeps the
GPU busy; nobody here reads them.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from learners.experience import PromptRequest, Rollout

Finished = queue.SimpleQueue[list[Rollout] | Exception]


@dataclass(eq=False)
class Group:
    """The samples of one request: those finished so far, and the queue that gets the whole group
    after the last one.
    """

    request: PromptRequest
    finished: Finished
    rollouts: dict[int, Rollout] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Sample:
    """A response under way: its ids, their log-probs, and the versions of the weights that sampled
    its first and its latest token.
    """

    group: Group
    index: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    first_version: str = ""
    last_version: str = ""

    def rollout(self, finish_reason: str) -> Rollout:
        """Return the finished response."""
        request = self.group.request
        return Rollout(
            prompt_index=request.prompt_index,
            slot=request.slot,
            sample_index=self.index,
            prompt_ids=request.prompt_ids,
            response_ids=self.ids,
            logprobs=self.logprobs,
            finish_reason=finish_reason,
            weight_versions=(int(self.first_version), int(self.last_version)),
        )


class Requests:
    """The samples and the probes under way in one vLLM engine, by the names it knows them by."""

    def __init__(self) -> None:
        self.samples: dict[str, Sample] = {}
        self.probes: dict[str, Future[list[float]]] = {}
        self.added = 0

    def add(
        self, engine: Any, ids: list[int], salt: str, adapter: Any = None, **params: Any
    ) -> str:
        """Give the core a request; return its name. Only requests of the same salt share cached
        prefixes. Whatever ends it is seen by the core: stop tokens and length, no text.
        """
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        self.added += 1
        name = str(self.added)
        request = engine.input_processor.process_inputs(
            name,
            tokens_input(ids, cache_salt=salt),
            SamplingParams(**params, detokenize=False),
            supported_tasks=engine.get_supported_tasks(),
            lora_request=adapter,
        )
        engine.engine_core.add_request(request)
        return name

    def step(self, engine: Any) -> None:
        """Let the core take a step, and take what it hands out: tokens of this step or, where
        batches queue, of one before. They were sampled with the weights that the outputs name.
        """
        outputs = engine.engine_core.get_output()
        version = outputs.weight_version
        for output in outputs.outputs:
            sample = self.samples.get(output.request_id)
            if sample is None:
                prompt = output.new_prompt_logprobs_tensors.logprobs
                self.probes.pop(output.request_id).set_result(prompt[:, 0].tolist())
                continue
            if not sample.ids:
                sample.first_version = version
            sample.last_version = version
            sample.ids += output.new_token_ids
            sample.logprobs += output.new_logprobs.logprobs[:, 0].tolist()
            if output.finish_reason is not None:
                self._finish(output.request_id, str(output.finish_reason))

    def _finish(self, name: str, reason: str) -> None:
        sample = self.samples.pop(name)
        group = sample.group
        group.rollouts[sample.index] = sample.rollout(reason)
        if len(group.rollouts) == group.request.group_size:
            group.finished.put([group.rollouts[k] for k in range(group.request.group_size)])

    def drain(self, engine: Any) -> None:
        """Take what was sampled and not yet read, without starting anything new; what is
        unfinished stays under way.

        With asynchronous scheduling, as on GPUs, the core begins a batch before it reads the one
        before: between two steps, tokens of the present weights wait in its queue. Read later, they
        would get the label of later weights.
        """
        from vllm.v1.core.sched.interface import PauseState

        core = engine.engine_core.engine_core
        before = core.scheduler.pause_state
        core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        # while paused, only finished requests that the worker has not yet heard of count
        while core.batch_queue or core.scheduler.has_requests():
            self.step(engine)
        core.scheduler.set_pause_state(before)

    def abort(self, engine: Any, groups: Sequence[Group]) -> None:
        """Take the unfinished samples of these groups from the core."""
        mine = set(groups)
        names = [name for name, sample in self.samples.items() if sample.group in mine]
        engine.engine_core.abort_requests(names)
        for name in names:
            del self.samples[name]

    def waiting(self) -> set[Finished]:
        """Return the queues in which callers wait for samples."""
        return {sample.group.finished for sample in self.samples.values()}
