"""Groups of real Ray actors: what comes back, what fails, and what never answers."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayError

from actors.cluster.groups import WorkerError, WorkerGroup
from actors.cluster.layout import Demand
from actors.cluster.placement import Placement, environment
from actors.cluster.rows import gather_rows, scatter_rows
from actors.settings import ClusterSettings
from learners.errors import UserError
from learners.experience import Experience
from learners.settings import Rank

pytestmark = [pytest.mark.engines, pytest.mark.timeout(180)]


class Worker:
    """What the group hosts."""

    def __init__(self, factor: int, rank: Rank | None = None) -> None:
        self.factor = factor
        self.rank = rank

    def where(self) -> Rank | None:
        return self.rank

    def times(self, number: int) -> int:
        return self.factor * number

    def lengths(self, shard: Experience) -> torch.Tensor:
        return shard.lengths.float()

    def ids(self, shard: Experience) -> torch.Tensor:
        """[b,T]: the response's ids."""
        from learners.forward import response_part

        return response_part(shard, shard.input_ids[:, 1:]).float() * shard.loss_mask

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def refuse(self) -> None:
        raise UserError("model.path: nothing there; name a folder")

    def fail(self) -> None:
        raise ValueError("seven is not prime enough")

    def title(self) -> str:
        """What `ps` shows of this process."""
        return Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").decode()

    def die(self) -> None:
        os._exit(1)


def new_group() -> WorkerGroup:
    options = {"num_cpus": 1, "runtime_env": {"env_vars": environment("cpu", 1)}}
    group = WorkerGroup("tester", f"{__name__}:Worker", [options, options])
    group.gather(group.start({"factor": 3}, 60), "start", 60)
    return group


@pytest.fixture(scope="module")
def group(cluster: None) -> WorkerGroup:
    return new_group()


def test_every_worker_answers_in_order(group: WorkerGroup) -> None:
    assert group.call("times", 2, phase="test", deadline_s=30) == [6, 6]
    assert group.gather(group.scatter("times", [1, 2]), "test", 30) == [3, 6]


def test_rows_come_back_in_the_order_of_the_batch(group: WorkerGroup) -> None:
    batch = Experience.from_ids([[1], [1, 2], [1], [1, 2, 3]], [[4, 5, 6], [7], [8, 9], [4]])
    lengths = gather_rows(scatter_rows(group, "lengths", batch), batch, "test", 30)
    assert lengths.tolist() == batch.lengths.tolist()
    ids = gather_rows(scatter_rows(group, "ids", batch), batch, "test", 30)
    assert ids.tolist() == [[4, 5, 6], [7, 0, 0], [8, 9, 0], [4, 0, 0]]


def test_fewer_rows_than_workers(group: WorkerGroup) -> None:
    batch = Experience.from_ids([[1, 2]], [[3]])
    assert gather_rows(scatter_rows(group, "lengths", batch), batch, "test", 30).tolist() == [3]


def test_a_late_worker_is_named_with_its_phase(group: WorkerGroup) -> None:
    began = time.monotonic()
    with pytest.raises(
        WorkerError, match=r"nap: tester\[1\] on node \S+ \(\w{8}\) did not answer within 1 s"
    ):
        group.gather(group.scatter("sleep", [0, 4]), "nap", 1)
    assert time.monotonic() - began < 10


def test_a_failure_says_who_and_what(group: WorkerGroup) -> None:
    with pytest.raises(
        WorkerError, match=r"learn: tester\[\d\] on node \S+ \(\w{8}\) failed: .*seven is not prime"
    ):
        group.call("fail", phase="learn", deadline_s=30)


def test_bad_input_found_by_a_worker_stays_bad_input(group: WorkerGroup) -> None:
    with pytest.raises(UserError) as error:
        group.call("refuse", phase="start", deadline_s=30)
    assert error.value.problems == ["model.path: nothing there; name a folder"]


def test_a_dead_worker_is_named(cluster: None) -> None:
    with pytest.raises(WorkerError, match=r"learn: tester\[\d\] on node \S+ \(\w{8}\) died"):
        new_group().call("die", phase="learn", deadline_s=30)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OutOfMemoryError("Memory on the node was 62.1GB / 64GB."), "use fewer processes per node"),
        (
            ObjectLostError("ab" * 28, None, ""),
            "is lost: ObjectLostError Failed to retrieve object",
        ),
        (RayError("no such kind\nof error"), "is lost: RayError no such kind\n"),
    ],
)
def test_whatever_ray_raises_says_who(
    group: WorkerGroup, monkeypatch: pytest.MonkeyPatch, error: RayError, said: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    pending = group.submit("times", 2)
    with monkeypatch.context() as patch, pytest.raises(WorkerError) as caught:
        patch.setattr(ray, "get", fail)
        group.gather(pending, "score", 30)
    assert said in str(caught.value) and str(error) in str(caught.value)
    assert any(name in str(caught.value).splitlines()[0] for name in group.names())
    assert caught.value.__cause__ is error


def test_processes_and_nodes_go_by_their_names(group: WorkerGroup) -> None:
    assert group.call("title", phase="test", deadline_s=30) == [
        "ray::tester[0].call",
        "ray::tester[1].call",
    ]
    alive = [a for a in ray._private.state.actors().values() if a["State"] == "ALIVE"]
    assert {"tester[0]", "tester[1]"} <= {a["ActorClassName"] for a in alive}
    (node,) = ray.nodes()
    assert group.names()[1] == f"tester[1] on node {socket.gethostname()} ({node['NodeID'][:8]})"


def test_ranks_are_told_where_they_meet_and_the_group_keeps_it(cluster: None) -> None:
    options = {"num_cpus": 1, "runtime_env": {"env_vars": environment("cpu", 1)}}
    group = WorkerGroup("ranks", f"{__name__}:Worker", [options, options])
    group.gather(group.start({"factor": 1}, 60, distributed=("cpu", 12.0)), "start", 60)
    first, second = group.call("where", phase="test", deadline_s=30)
    assert (first.index, second.index, first.world_size, first.timeout_s) == (0, 1, 2, 12.0)
    assert (first.address, first.port) == (second.address, second.port)
    assert group.started_with == [{"factor": 1, "rank": first}, {"factor": 1, "rank": second}]


def test_what_cannot_fit_is_refused_by_arithmetic(cluster: None) -> None:
    began = time.monotonic()
    demands = {"actor": Demand(1000, 2), "engine": Demand(1, 1)}
    with pytest.raises(
        UserError, match=r"2001 CPUs are needed, Ray has 12 \(actor 1000, engine 1\)"
    ):
        Placement(ClusterSettings(), demands).__enter__()
    assert time.monotonic() - began < 10
    gpu = ClusterSettings(device="cuda")
    with pytest.raises(UserError, match="3 GPUs are needed"):
        Placement(gpu, {"actor": Demand(2, 1), "engine": Demand(1, 1)}).__enter__()


def test_placement_tells_each_process_its_threads(cluster: None) -> None:
    with Placement(ClusterSettings(), {"engine": Demand(1, 2), "actor": Demand(2, 1)}) as placement:
        (engine,) = placement.options("engine")
        actors = placement.options("actor")
    assert engine["environment"]["OMP_NUM_THREADS"] == "2"
    assert [a["scheduling_strategy"].placement_group_bundle_index for a in actors] == [1, 2]
