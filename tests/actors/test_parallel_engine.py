"""An engine of two tensor-parallel workers, spawned inside a Ray actor as on GPUs, under our
transfer backend with a real Actor. It starts once for all tests.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from actors.cluster.groups import WorkerError, WorkerGroup
from actors.cluster.placement import environment
from actors.rollouts.generator import Engines
from actors.seeds import derive_seed
from actors.settings import GenerationSettings
from learners.settings import ModelSettings
from tests.actors.parallel_engine import shared_memory
from tests.actors.test_verified_sync import DEADLINE, Stage, generate

pytestmark = [pytest.mark.engines, pytest.mark.timeout(400)]

BOUND = 1e-5


def test_what_gpu_workers_are_told_fits_them() -> None:
    """vLLM refuses an extension whose names its worker has, and pickles what it is to call."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc
    from vllm.v1.worker.gpu_worker import Worker

    from actors.engine.adapter import unused_parts
    from actors.engine.engine import draw_from
    from actors.weights.parallel import WorkerExtension
    from actors.weights.receiver import clear_interrupted_update, note_what_is_loaded, take_receipt

    names = [name for name in dir(WorkerExtension) if not name.startswith("__")]
    assert names == ["answer"] and not hasattr(Worker, "answer")
    inspect.signature(MultiprocExecutor.collective_rpc).bind(None, "answer", None, (), None)
    assert "getattr(self.worker, method)" in inspect.getsource(WorkerProc._execute_worker_rpc)
    inspect.signature(Worker.add_lora).bind(None, object())
    for function in (
        draw_from,
        unused_parts,
        clear_interrupted_update,
        note_what_is_loaded,
        take_receipt,
    ):
        assert pickle.loads(pickle.dumps(function)) is function


@pytest.fixture(scope="module")
def stage(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    import ray

    from tests.actors.tiny_models import EOS, MAX_TOKENS, save_model

    path = tmp_path_factory.mktemp("model")
    save_model(path, seed=0, tied=True, heads=4)
    options = [{"num_cpus": 1, "runtime_env": {"env_vars": environment("cpu", 1)}}]
    engines = Engines("engine", "tests.actors.parallel_engine:ParallelEngine", options)
    actor = WorkerGroup("actor", "tests.actors.faulty:FaultyActor", options)
    arguments = {
        "model": ModelSettings(path=str(path)),
        "generation": GenerationSettings(
            threads=1, kv_cache_gib=0.125, max_concurrent=64, tensor_parallel=2
        ),
        "device": "cpu",
        "max_model_tokens": MAX_TOKENS,
        "stop_token_ids": [EOS],
    }
    engines.gather(engines.start(arguments, DEADLINE), "start", DEADLINE)
    yield Stage(engines, actor, str(path), tied=True)
    for handle in (*engines.handles, *actor.handles):
        ray.kill(handle)


@pytest.fixture
def synced(stage: Stage) -> Iterator[Stage]:
    """Engine and Actor agree at version 1, and the Actor has moved on. No shared memory is left
    afterwards.
    """
    stage.connect(2, 1, learning_rate=3.0)
    stage.sync(stage.engines, 1)
    stage.learn()
    yield stage
    assert not shared_memory()


def call(stage: Stage, method: str, *args: Any) -> list[Any]:
    return stage.engines.call(method, *args, phase="test", deadline_s=DEADLINE)


def recovers(stage: Stage) -> None:
    assert call(stage, "status")[0]["stale"]
    with pytest.raises(WorkerError, match="engine is STALE"):
        generate(stage.engines)
    assert stage.sync(stage.engines, 2) <= BOUND
    assert stage.mismatch(generate(stage.engines)) <= BOUND


def test_after_a_sync_all_workers_serve_the_actor(synced: Stage) -> None:
    (engine,) = call(synced, "process")
    (shards,) = call(synced, "ask", "shard")
    assert [one[1:] for one in shards] == [(0, 2, 1), (1, 2, 1)]
    assert len({engine, *(pid for pid, *_ in shards)}) == 3
    assert synced.mismatch(generate(synced.engines)) > 1.0
    assert synced.sync(synced.engines, 2) <= BOUND
    rollouts = generate(synced.engines)
    assert {r.weight_versions for r in rollouts} == {(2, 2)} and len(rollouts) == 8
    assert synced.mismatch(rollouts) <= BOUND


def test_all_workers_draw_what_engine_and_version_say(synced: Stage) -> None:
    synced.sync(synced.engines, 7)
    expected = torch.Generator().manual_seed(derive_seed(0, "version", 7))
    assert call(synced, "ask", "draw") == [[torch.rand(3, generator=expected).tolist()] * 2]


def test_a_worker_that_is_given_other_weights_is_noticed(synced: Stage) -> None:
    from tests.actors.tiny_models import make_model, packed_groups

    one, other = ({"groups": packed_groups(make_model(s, True, heads=4))} for s in (1, 2))
    with pytest.raises(WorkerError, match="workers of a .* engine were given different weights"):
        call(synced, "give_each_its_own", [one, other])
    recovers(synced)
    call(synced, "give_each_its_own", [one, copy.deepcopy(one)])
    recovers(synced)


def test_spawned_workers_note_what_they_are_given_as_on_gpus(synced: Stage) -> None:
    from actors.weights.proof import bit_sums, checksums, verify
    from tests.actors.tiny_models import make_model, packed_groups

    new = make_model(1, True, heads=4)
    groups = packed_groups(new)
    (receipt,) = call(synced, "note_an_update", groups)
    ours = {group["name"] for group in groups}
    sent = [(n, checksums([bit_sums(p)])[0], [n]) for n, p in new.named_parameters()]
    verify(sent, [e for e in receipt if e[0] not in ours], [name for name, *_ in sent])
    recovers(synced)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("a corrupted bucket", "group 0 arrived with digest"),
        ("an update cut off halfway", "the sender is gone"),
    ],
)
def test_an_interrupted_update_is_repaired(synced: Stage, fault: str, said: str) -> None:
    synced.actor.call("break_next", fault, phase="test", deadline_s=DEADLINE)
    with pytest.raises(WorkerError, match=said):
        synced.sync(synced.engines, 2)
    recovers(synced)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_fails_alone_is_named_and_repaired(synced: Stage, rank: int) -> None:
    """vLLM itself would take the other's answer for that to the next call."""
    call(synced, "ask", "fail_once", rank)
    said = rf"worker {rank} of 2 in this engine failed: ConnectionError: rank {rank} lost its way"
    with pytest.raises(WorkerError, match=rf"{said}, [1-9]\d* groups left"):
        synced.sync(synced.engines, 2)
    recovers(synced)


def test_nobody_waits_for_a_worker_that_died_and_no_memory_outlives_an_engine(
    synced: Stage,
) -> None:
    """The last test: nothing repairs this engine."""
    from tests.actors.tiny_models import make_model, packed_groups

    (shards,) = call(synced, "ask", "shard")
    began = time.monotonic()
    call(synced, "kill", shards[1][0])
    with pytest.raises(WorkerError):
        synced.sync(synced.engines, 2)
    update = {"groups": packed_groups(make_model(1, True, heads=4))}
    with pytest.raises(WorkerError, match=r"engine\[0\] .* died"):
        call(synced, "die_in_an_update", update)
    while shared_memory() and time.monotonic() - began < 30:
        time.sleep(0.1)
    assert time.monotonic() - began < 30
