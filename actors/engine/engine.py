"""GenerationEngine: one vLLM engine and the loop thread that owns it.

All vLLM and torch work happens in the loop thread (OpenMP pools belong to threads). Other threads
leave commands, which the loop executes between two steps of the engine. So requests come in,
finished groups stream out and weights are replaced, also under running requests, without a second
process or a second design.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from actors.engine.adapter import Adapter, Adapters
from actors.engine.arguments import build_engine, engine_arguments
from actors.engine.collect import Finished, Group, Requests, Sample
from actors.engine.limits import engine_problem
from actors.seeds import derive_seed
from actors.settings import GenerationSettings
from actors.weights.proof import Receipt
from learners.checkpoints import load_config
from learners.errors import UserError
from learners.experience import PromptRequest, Rollout
from learners.fits import length_problems
from learners.settings import DeviceType, ModelSettings
from learners.spans import Span

P = ParamSpec("P")
R = TypeVar("R")


def in_loop(
    method: Callable[Concatenate[GenerationEngine, P], R],
) -> Callable[Concatenate[GenerationEngine, P], R]:
    """Run a method in the loop thread, while its caller in any thread waits; return its result or
    raise its error.
    """

    @wraps(method)
    def call(self: GenerationEngine, *args: P.args, **kwargs: P.kwargs) -> R:
        if threading.current_thread() is self._thread:
            return method(self, *args, **kwargs)
        future: Future[R] = Future()
        with self._end_lock:
            if self._end is not None:
                raise RuntimeError(f"the engine has ended: {self._end!r}") from self._end
            self._commands.put((future, partial(method, self, *args, **kwargs)))
        return future.result()

    return call


class GenerationEngine:
    """Generates with one set of weights at a time, whose version it knows.

    It starts with version 0, the weights in the model's files. From `start_weight_update` until
    `accept` it is STALE: it takes no prompts and holds those it has. Methods may be called from
    several threads. Once the loop has ended, by `close` or by an error, every call raises
    RuntimeError, also one that is waiting.
    """

    def __init__(
        self,
        model: ModelSettings,
        generation: GenerationSettings,
        device: DeviceType,
        max_model_tokens: int,
        stop_token_ids: Sequence[int],
        shared: bool = False,
        seed: int = 0,
        adapter_rank: int | None = None,
        swap: str = "always",
    ) -> None:
        """Start the engine and wait until it is ready; raise what vLLM raises if it cannot start.

        `max_model_tokens` bounds prompt + response. A response ends with one of `stop_token_ids`,
        which is its last id, or by its length. On `shared` GPUs the engine can `sleep`, unless
        `swap` is never, and weights arrive from an Actor rank on the same GPU. Requests without
        seeds draw from `seed` and the version of the weights. With an `adapter_rank` it takes LoRA
        adapters up to that rank in place of weights.
        """
        self.seed = seed
        self.version = 0
        self.device = device
        self.max_model_tokens = max_model_tokens
        self.stop_token_ids = list(stop_token_ids)
        self._stale = self._asleep = False
        self._weights_away = False
        self._update_open = False  # weights are half replaced: not even a probe may run
        self._failure = ""  # of the last update
        self._timeout_s = 0.0  # for bytes in Ray's object store
        self._spans: list[Span] = []  # of the last update
        self._adapters = Adapters()
        self._requests = Requests()
        self._commands: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = (
            queue.SimpleQueue()
        )
        self._end: Exception | None = None
        self._end_lock = threading.Lock()
        self._engine: Any = None
        self._thread = threading.Thread(target=self._loop, name="generation", daemon=True)
        self._thread.start()
        try:
            self._build(model, generation, shared, adapter_rank, swap)
        except BaseException:
            self.close()
            raise

    def generate(self, requests: list[PromptRequest]) -> Iterator[list[list[Rollout]]]:
        """Yield finished groups (all samples of one request, in sample order) until every request
        is done.

        Raises RuntimeError when the engine is STALE, when it ends, and when a refused weight update
        has spoilt running requests; ValueError when a prompt does not fit. Closing the generator
        aborts what is unfinished.
        """
        finished: Finished = queue.SimpleQueue()
        groups = [Group(request, finished) for request in requests]
        self._admit(groups)
        missing = len(groups)
        try:
            while missing:
                done: list[list[Rollout]] = []
                while not done or not finished.empty():
                    group = finished.get()
                    if isinstance(group, Exception):
                        raise RuntimeError(str(group)) from group
                    done.append(group)
                missing -= len(done)
                yield done
        finally:
            if missing and self._end is None:
                self._abort(groups)

    def probe_logprobs(self, ids: list[int]) -> list[float]:
        """Return log-probs of ids[1:] at temperature 1, computed anew with the weights the engine
        really holds.

        Works while STALE, but not while weights are half replaced. `ids` must be shorter than
        `max_model_tokens`.
        """
        return self._add_probe(ids).result()

    @in_loop
    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect to the trainer; `init_info` belongs to the transfer backend."""
        self._timeout_s = init_info.get("timeout_s", 0.0)
        self._worker("init_weight_transfer_engine", init_info)

    @in_loop
    def start_weight_update(self) -> None:
        """Begin a full update: the engine is STALE from here until `accept`. An interrupted update
        is cleared away.

        Requests still running from before a refused update are failed: what they sampled can no
        longer be trusted.
        """
        from actors.weights.receiver import clear_interrupted_update, note_what_is_loaded

        self._drain()
        if self._stale:
            self._fail_running(
                RuntimeError("the weights under these requests were replaced and never accepted")
            )
        if self._update_open:
            self._worker(clear_interrupted_update)
        self._stale = self._update_open = True
        self._failure = ""
        self._worker("start_weight_update")
        if self.device == "cuda":
            self._worker(note_what_is_loaded)

    @in_loop
    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive weights; `update_info` belongs to the transfer backend."""
        from actors.weights.parallel import within_reach

        try:
            with within_reach(self._engine, update_info, self._timeout_s) as readable:
                self._worker("update_weights", readable)
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
            raise

    @in_loop
    def finish_weight_update(self, weight_version: str | None = None) -> Receipt:
        """End the update and return its receipt. Tokens are sampled under `weight_version` from
        here on.
        """
        from actors.weights.parallel import call_workers
        from actors.weights.receiver import take_receipt, take_spans

        self._worker("finish_weight_update")
        self._update_open = False
        self._spans = self._worker(take_spans)
        self._serve_version(weight_version)
        first, *others = call_workers(self._engine, take_receipt)
        if any(other != first for other in others):
            raise RuntimeError(
                "the workers of a tensor-parallel engine were given different weights"
            )
        return first

    @in_loop
    def load_adapter(self, adapter: Adapter) -> Receipt:
        """Replace the adapter, all in one: the engine is STALE until `accept`. Requests under way
        fail: vLLM would finish them with the adapter before. Return the receipt.
        """
        self._drain()
        self._fail_running(RuntimeError("the adapter under these requests was replaced"))
        self._stale = self._update_open = True
        try:
            receipt = self._adapters.load(adapter, self._engine)
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
            raise
        self._update_open = False
        self._serve_version(str(adapter.version))
        return receipt

    def _serve_version(self, weight_version: str | None) -> None:
        if weight_version is not None:
            self._engine.set_weight_version(weight_version)
        if not self._requests.samples and not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset the prefix cache of an idle engine")

    @in_loop
    def accept(self, version: int) -> list[Span]:
        """Serve with the new weights, which are proved to be those of `version`; forget adapters
        that are not. Return what the parts of the update took here.
        """
        self._drain()
        if self._update_open:
            raise RuntimeError("engine is STALE: a weight update was begun and not finished")
        self._engine.set_weight_version(str(version))
        if self._adapters.serving:
            self._adapters.forget_others(self._engine)
        self.version = version
        self._stale = False
        self._draw_anew()
        spans = self._spans
        self._spans = []
        return spans

    def failure(self) -> str:
        """Return the error of the last update, or nothing. Answers also while the loop waits in a
        transfer.
        """
        return self._failure

    @in_loop
    def sleep(self, tier: str = "always") -> int:
        """Leave the GPUs: the KV cache is dropped and, with tier always, weights go to CPU memory.
        Return the bytes moved. Raises RuntimeError while anything is under way.

        Level 1, not 2, which would spare that CPU memory: so the engine wakes with the weights it
        fell asleep with. `version`, STALE, and a skipped step, which sends none, rely on that.
        """
        self._drain()
        if self._requests.samples or self._requests.probes or self._update_open:
            raise RuntimeError(
                "an engine with requests under way, or with weights half replaced, cannot sleep"
            )
        self._weights_away = tier == "always"
        self._engine.sleep(level=int(self._weights_away))  # level 0: nothing runs
        if not self._weights_away and self.device == "cuda":
            self._engine.release_kv_cache_memory()
        self._asleep = True
        return self._weight_bytes() if self._weights_away else 0

    @in_loop
    def wake(self, tags: list[str] | None = None) -> int:
        """Take the GPUs again; return the bytes moved. With `tags` ["weights"] only weights may
        arrive: no prompt and no probe yet.
        """
        self._asleep = not self._engine.wake_up(tags)
        moved = self._weight_bytes() if self._weights_away else 0
        self._weights_away = False
        return moved

    def _weight_bytes(self) -> int:
        """Return the bytes that really move: vLLM's CPU worker only pretends to sleep."""
        return sum(self._engine.collective_rpc(weight_bytes)) if self.device == "cuda" else 0

    @in_loop
    def status(self) -> dict[str, Any]:
        """Return `version`, `stale`, `running` (samples under way) and `threads` (CPU threads the
        loop computes with).
        """
        return {
            "version": self.version,
            "stale": self._stale,
            "running": len(self._requests.samples),
            "threads": torch.get_num_threads(),
        }

    def close(self) -> None:
        """Stop the loop and free the engine. Callers that wait get RuntimeError."""
        if self._end is None:
            self._stop()
        self._thread.join()

    # Only the loop thread runs what follows.

    def _loop(self) -> None:
        try:
            while self._end is None:
                if self._commands.empty() and self._may_step():
                    self._requests.step(self._engine)
                else:
                    self._execute(*self._commands.get())
        except BaseException as error:  # SystemExit too: no caller may wait for an ended loop
            self._end = (
                error
                if isinstance(error, Exception)
                else RuntimeError(f"the loop ended with {error!r}")
            )
        self._answer_everyone()
        if self._engine is not None:
            self._engine.engine_core.shutdown()

    def _execute(self, future: Future[Any], command: Callable[[], Any]) -> None:
        try:
            future.set_result(command())
        except BaseException as error:  # SystemExit too: the caller waits for an answer
            future.set_exception(error)

    def _may_step(self) -> bool:
        """Tell whether there is work that may run. A STALE engine holds its requests; the step of a
        probe is the exception, and takes them one token along.
        """
        under_way = self._requests
        return not self._update_open and bool(
            under_way.probes or (under_way.samples and not self._stale)
        )

    def _drain(self) -> None:
        """Read what was sampled with the weights as they are. An error ends the loop: tokens of
        requests that go on may be lost.
        """
        try:
            self._requests.drain(self._engine)
        except Exception as error:
            self._end = error
            raise

    def _answer_everyone(self) -> None:
        """Fail every caller that waits: the loop has ended, and new commands are refused."""
        failure = RuntimeError(f"the engine has ended: {self._end!r}")
        with self._end_lock:  # a command is either in the queue by now, or its caller sees the end
            while not self._commands.empty():
                self._commands.get()[0].set_exception(failure)
        for probe in self._requests.probes.values():
            probe.set_exception(failure)
        for finished in self._requests.waiting():
            finished.put(failure)

    @in_loop
    def _stop(self) -> None:
        self._end = RuntimeError("the engine was closed")

    @in_loop
    def _build(self, model: ModelSettings, generation: GenerationSettings, *others: Any) -> None:
        # vLLM has its own count of positions; ours holds (build_engine)
        key = "generation.max_model_tokens"
        if problems := length_problems(key, model, self.max_model_tokens):
            raise UserError(problems)
        if wrong := engine_problem(load_config(model), model.dtype, self.device):
            raise UserError(f"actor.model: {model.path}: {wrong}")
        arguments = engine_arguments(model, generation, self.device, self.max_model_tokens, *others)
        self._engine = build_engine(arguments, self.device, generation.threads)
        self._draw_anew()

    def _draw_anew(self) -> None:
        """Seed the requests without seeds from engine and version, so that a resumed run repeats no
        draws.
        """
        self._worker(draw_from, derive_seed(self.seed, "version", self.version))

    @in_loop
    def _admit(self, groups: list[Group]) -> None:
        if self._stale:
            raise RuntimeError(
                "engine is STALE: its weights are being replaced, or were not accepted"
            )
        try:
            for group in groups:
                for sample in range(group.request.group_size):
                    name = self._add_sample(group.request, sample)
                    self._requests.samples[name] = Sample(group, sample)
        except Exception:
            self._abort(groups)
            raise

    def _add_sample(self, request: PromptRequest, sample: int) -> str:
        return self._add(
            request.prompt_ids,
            salt=f"version {self.version}",
            temperature=request.temperature,
            max_tokens=request.max_new_tokens,
            seed=request.seeds[sample] if request.seeds else None,
            stop_token_ids=self.stop_token_ids,
            logprobs=0,  # of the sampled token alone
            **request.off_policy_sampling,
        )

    @in_loop
    def _add_probe(self, ids: list[int]) -> Future[list[float]]:
        if self._update_open:
            raise RuntimeError(
                "engine is STALE: its weights are half replaced, there is nothing to probe"
            )
        # A request for prompt log-probs reads nothing from the prefix cache; its salt keeps others
        # from reading it.
        probe: Future[list[float]] = Future()
        name = self._add(ids, salt=f"probe {self._requests.added}", max_tokens=1, prompt_logprobs=0)
        self._requests.probes[name] = probe
        return probe

    def _add(self, ids: list[int], salt: str, **params: Any) -> str:
        """Give vLLM a request; return its name. A salt never belongs to two weight versions."""
        if self._asleep:
            raise RuntimeError("engine is asleep: wake it first")
        if len(ids) >= self.max_model_tokens:
            raise ValueError(
                f"{len(ids)} tokens leave no room for another: prompt + response fit "
                f"{self.max_model_tokens}"
            )
        return self._requests.add(self._engine, ids, salt, self._adapters.serving, **params)

    @in_loop
    def _abort(self, groups: list[Group]) -> None:
        self._requests.abort(self._engine, groups)

    def _fail_running(self, error: Exception) -> None:
        waiting = self._requests.waiting()
        self._abort([sample.group for sample in self._requests.samples.values()])
        for finished in waiting:
            finished.put(error)

    def _worker(self, method: str | Callable[..., Any], *args: Any) -> Any:
        from actors.weights.parallel import call_workers

        return call_workers(self._engine, method, *args)[0]


def draw_from(worker: Any, seed: int) -> None:
    """Set every generator that a sampler of vLLM may draw from for requests without a seed: torch's
    on all devices (model runner V1) and numpy's (V2, on GPUs).
    """
    from vllm.utils.torch_utils import set_random_seed

    set_random_seed(seed)


def weight_bytes(worker: Any) -> int:
    """Return the bytes of the weights that one of vLLM's workers holds."""
    return sum(parameter.nbytes for parameter in worker.get_model().parameters())
