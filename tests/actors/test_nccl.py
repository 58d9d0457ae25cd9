"""Transfers by nccl as far as CPUs can show them: our sender, vLLM's trainer and receivers and two
whole engines, with gloo in NCCL's place (tests/actors/gloo.py). Processes start once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from actors.cluster.groups import WorkerError, WorkerGroup
from actors.cluster.placement import environment
from actors.rollouts.generator import Engines
from actors.settings import GenerationSettings
from learners.settings import ModelSettings
from tests.actors.test_verified_sync import BOUND, DEADLINE, Stage, generate

pytestmark = [pytest.mark.engines, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def stage(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    import ray

    from tests.actors.tiny_models import EOS, MAX_TOKENS, save_model

    path = tmp_path_factory.mktemp("model")
    save_model(path, seed=0, tied=False)  # vLLM's receivers leave a tied head's CPU copy stale
    options = [{"num_cpus": 1, "runtime_env": {"env_vars": environment("cpu", 1)}}] * 2
    engines = Engines("engine", "tests.actors.gloo:GlooEngine", options)
    actor = WorkerGroup("actor", "tests.actors.gloo:GlooActor", options[:1])
    arguments = {
        "model": ModelSettings(path=str(path)),
        "generation": GenerationSettings(threads=1, kv_cache_gib=0.125, max_concurrent=64),
        "device": "cpu",
        "max_model_tokens": MAX_TOKENS,
        "stop_token_ids": [EOS],
    }
    engines.gather(engines.start(arguments, DEADLINE), "start", DEADLINE)
    # what vLLM's own receivers do has no parts
    yield Stage(engines, actor, str(path), tied=False, parts=frozenset({"send", "probe"}))
    for handle in (*engines.handles, *actor.handles):
        ray.kill(handle)


def connect(stage: Stage, deadline_s: float = DEADLINE) -> None:
    """A new group of the sender and both engines."""
    names = stage.engines.names()
    meeting = stage.actor.free_address(DEADLINE)
    arguments = (stage.engines.handles, deadline_s, 1, "nccl", meeting, names)
    stage.actor.call("connect", *arguments, phase="sync", deadline_s=DEADLINE)


def call(stage: Stage, method: str, *args: Any) -> list[Any]:
    return stage.engines.call(method, *args, phase="test", deadline_s=DEADLINE)


def break_the_second(stage: Stage, how: str) -> None:
    handle = stage.engines.handles[1]
    stage.engines.gather([handle.call.remote("break_in_the_middle", how)], "test", DEADLINE)


@pytest.fixture
def ready(stage: Stage) -> Stage:
    """An Actor that has moved away from the engines. The group is a new one: that of an update
    which failed is broken.
    """
    stage.start_actor(2)
    connect(stage)
    stage.sync(stage.engines, 1)
    stage.learn()
    assert stage.mismatch(generate(stage.engines)) > 0.01
    return stage


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
def test_weights_arrive_in_both_engines_each_with_a_rank_of_its_own(
    ready: Stage, packed: bool
) -> None:
    ready.actor.call("pack", packed, phase="test", deadline_s=DEADLINE)
    connect(ready)
    assert call(ready, "rank_in_transfer") == [1, 2]
    assert ready.sync(ready.engines, 2) <= BOUND
    rollouts = generate(ready.engines)
    assert {r.weight_versions for r in rollouts} == {(2, 2)}
    assert ready.mismatch(rollouts) <= BOUND


def test_an_engine_that_fails_in_the_middle_is_named_at_once(ready: Stage) -> None:
    break_the_second(ready, "fail")
    began = time.monotonic()
    said = r"SyncError.*engine\[1\] on node .* failed: MemoryError\('no room for this one'\)"
    with pytest.raises(WorkerError, match=said):
        ready.sync(ready.engines, 2)
    assert time.monotonic() - began < 10
    assert [one["stale"] for one in call(ready, "status")] == [True, True]


def test_a_sender_that_waits_for_a_dead_engine_is_not_waited_for(ready: Stage) -> None:
    """The last test: packed transfers wait in the sender's own process, which never hears of it;
    the driver's deadline ends that, and the engine is named all the same.
    """
    connect(ready, 4.0)
    ready.actor.call("be_patient", phase="test", deadline_s=DEADLINE)
    break_the_second(ready, "die")
    began = time.monotonic()
    with pytest.raises(WorkerError) as late:
        ready.sync(ready.engines, 2, 4.0)
    assert time.monotonic() - began < 4 + 10
    said = str(late.value)
    assert "actor[0] on node" in said and "did not answer within 4 s" in said
    assert "engine[1] on node" in said and "died" in said


def test_the_benchmark_of_two_ranks_on_one_card_sends_what_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both of its processes as threads, and gloo in place of the card."""
    import multiprocessing
    import socket
    import threading

    from actors.weights import senders
    from benchmarks import nccl
    from tests.actors.gloo import GlooSender, stand_in

    stand_in(monkeypatch.setattr)
    monkeypatch.setattr(GlooSender, "packed", True)
    monkeypatch.setitem(senders.SENDERS, "nccl", GlooSender)
    shape = {"vocabulary": 64, "hidden": 32, "intermediate": 48, "heads": 64, "layers": 3}
    calls, answers = multiprocessing.Pipe()
    result, found = multiprocessing.Pipe()
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(nccl.os, "_exit", lambda _: (_ for _ in ()).throw(EOFError("it died")))
    threading.Thread(target=nccl.receive, args=(answers, "cpu"), daemon=True).start()
    nccl.send(calls, found, port, shape, "cpu")
    told = result.recv()
    assert told["ok"] and len(told["rounds"]) == nccl.ROUNDS, told
    assert told["bytes"] == 2 * (64 * 32 + 3 * (32 * (64 + 32 + 32 + 64 + 3 * 48) + 32))
    assert "the receiver failed in update: EOFError: it died" in result.recv()
    calls.close()
