"""What only GPUs do in an engine: a batch is under way while the one before is read, and requests
without seeds draw from numpy.

vLLM schedules so on CPUs too when it is not told otherwise: its scheduler, its queue of batches and
its model runner are the real ones here, and only CUDA's streams and events are stand-ins.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.engine.engine import GenerationEngine, draw_from
from learners.experience import PromptRequest, Rollout
from tests.actors.tiny_models import (
    Served,
    logprobs,
    make_model,
    save_model,
    start_engine,
    transfer,
)

pytestmark = pytest.mark.engines
STEPS = 6  # until something happens to the engine


class Instant:
    """A stream or an event of CUDA where everything is done at once."""

    def __init__(self, **_: Any) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    import vllm.v1.worker.cpu.shm  # noqa: F401  has stand-ins of its own, which stay
    from vllm.platforms.cpu import CpuPlatform

    settle = CpuPlatform.check_and_update_config

    def schedule_ahead(config: Any) -> None:
        settle(config)
        config.scheduler_config.async_scheduling = True

    folder = tmp_path_factory.mktemp("model")
    model = save_model(folder, seed=0, tied=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", staticmethod(schedule_ahead))
        for name, stand_in in (
            ("Event", Instant),
            ("Stream", Instant),
            ("current_stream", Instant),
            ("stream", nullcontext),
        ):
            patch.setattr(torch.cuda, name, stand_in)
        engine = start_engine(folder)
        engine.init_weight_transfer_engine({"timeout_s": 10.0})
        assert core_of(engine).batch_queue_size == 2
        yield Served(engine, model, folder)
        engine.close()


@pytest.fixture
def engine(served: Served) -> GenerationEngine:
    transfer(served.engine, served.model)
    served.engine.accept(0)
    return served.engine


def core_of(engine: GenerationEngine) -> Any:
    return engine._engine.engine_core.engine_core


def asked(tokens: int, slot: int = 0) -> PromptRequest:
    return PromptRequest(slot, slot, [1, 5 + slot, 9], 4, 1.0, tokens, tuple(range(20, 24)))


def sampled(engine: GenerationEngine, requests: list[PromptRequest]) -> list[Rollout]:
    return [sample for groups in engine.generate(requests) for group in groups for sample in group]


def after_steps(
    engine: GenerationEngine,
    requests: list[PromptRequest],
    act: Callable[[], Any],
    read: Callable[[], Any] | None = None,
) -> list[Rollout]:
    """The samples of these requests, where `act` happens to the engine as soon as its core has
    begun STEPS batches of them: the last one is computed and not yet read. `read`, if given,
    replaces the core's reading from then on.
    """
    client = engine._engine.engine_core
    real = client.get_output
    reached = threading.Event()
    commanded = threading.Event()
    calls: list[None] = []

    def get_output() -> Any:
        calls.append(None)
        if read and len(calls) > STEPS:
            return read()
        outputs = real()
        if len(calls) == STEPS:
            reached.set()
            assert commanded.wait(20)
        return outputs

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as threads:
        patch.setattr(client, "get_output", get_output)
        samples = threads.submit(sampled, engine, requests)
        assert reached.wait(20) and len(core_of(engine).batch_queue) == 1
        acting = threads.submit(act)
        while engine._commands.empty():
            time.sleep(0.01)
        commanded.set()
        acting.result(60)
        return samples.result(60)


def replaced(engine: GenerationEngine, model: Any) -> None:
    transfer(engine, model, 1)
    engine.accept(1)


def test_what_was_sampled_before_an_update_keeps_its_version(
    engine: GenerationEngine, served: Served
) -> None:
    """Requests that run go on; those whose last token was computed and not read end before."""
    new = make_model(seed=1, tied=True)
    samples = after_steps(engine, [asked(STEPS), asked(40, 1)], partial(replaced, engine, new))
    for sample in samples:
        of_old = logprobs(served.model, sample.prompt_ids + sample.response_ids)
        gaps = (of_old[-len(sample.logprobs) :] - torch.tensor(sample.logprobs)).abs()
        old = (gaps < 1e-4).long()
        assert old.cumprod(0).sum() == old.sum() == min(STEPS, len(old))
        assert sample.weight_versions == (0, int(len(old) > STEPS))
    assert {len(s.response_ids) > STEPS for s in samples} == {False, True}


def test_a_version_that_is_accepted_counts_from_the_next_batch(engine: GenerationEngine) -> None:
    samples = after_steps(engine, [asked(STEPS), asked(40, 1)], partial(engine.accept, 5))
    assert {(len(s.response_ids) > STEPS, s.weight_versions) for s in samples} == {
        (False, (0, 0)),
        (True, (0, 5)),
    }


def test_an_adapter_fails_only_what_is_unfinished(
    engine: GenerationEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._adapters, "load", lambda adapter, engine: [])
    adapter: Any = SimpleNamespace(version=7)
    samples = after_steps(engine, [asked(STEPS)], partial(engine.load_adapter, adapter))
    assert {s.weight_versions for s in samples} == {(0, 0)}
    engine.accept(7)
    with pytest.raises(RuntimeError, match="adapter under these requests"):
        after_steps(engine, [asked(STEPS + 1)], partial(engine.load_adapter, adapter))


def test_an_engine_that_sleeps_has_nothing_left_to_read(engine: GenerationEngine) -> None:
    before = sampled(engine, [asked(STEPS)])
    assert core_of(engine).batch_queue  # scheduled before the last token was known to be it
    for fall_asleep in (
        engine.sleep,
        lambda: after_steps(engine, [asked(STEPS)], engine.sleep),
    ):
        fall_asleep()
        # vLLM gives up its KV cache in no other state
        assert not core_of(engine).batch_queue and not core_of(engine).scheduler.has_requests()
        engine.wake()
        assert sampled(engine, [asked(STEPS)]) == before


def test_unseeded_requests_of_a_gpu_draw_from_engine_and_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sampler's own states (model runner V2), in plain arrays."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.sample import states

    class Plain:
        def __init__(self, size: int, dtype: torch.dtype) -> None:
            self.np = torch.zeros(size, dtype=dtype).numpy()

        def copy_to_uva(self) -> None: ...

    monkeypatch.setattr(states, "UvaBackedTensor", Plain)
    sampler = states.SamplingStates(4, 64)

    def drawn(seed: int) -> list[int]:
        draw_from(None, seed)
        for request in range(4):
            sampler.add_request(request, SamplingParams())
        return sampler.seeds.np.tolist()

    first = drawn(1)
    assert len(set(first)) == 4 and drawn(1) == first
    assert not set(first) & set(drawn(2))


def test_an_error_in_what_was_not_read_ends_the_engine(engine: GenerationEngine) -> None:
    """Ends it for the tests that follow, too: none does."""

    def read() -> None:
        raise MemoryError("no more memory")

    with pytest.raises(RuntimeError, match="no more memory"):
        with pytest.raises(MemoryError):
            after_steps(engine, [asked(40)], engine.start_weight_update, read)
        engine.status()
