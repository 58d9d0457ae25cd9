"""Placement on real raylets with logical devices: who gets which GPU, what each process sees, and
what cannot fit.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from actors.cluster.layout import Demand, layout, misfit
from actors.settings import ClusterSettings, RLRecipe, rl_recipe
from launch.recipe.combinations import combination_problems
from learners.errors import Problem, UserError
from learners.settings import LearnerSettings, ModelSettings, Rank, located

engines = pytest.mark.engines
SEPARATE, COLOCATED = (
    ClusterSettings(device="cuda", placement=p) for p in ("separate", "colocated")
)


# --- arithmetic -----------------------------------------------------------------------------------


def test_colocated_processes_share_the_gpus_from_the_first_on() -> None:
    need = {
        "engine": Demand(2, 1, 2),
        "actor": Demand(4, 1),
        "reference": Demand(2, 3),
        "judge": Demand(1, 1, 0),
    }
    plan = layout(COLOCATED, need)
    assert plan.bundles == [{"CPU": 9.0, "GPU": 2.0}, {"CPU": 3.0, "GPU": 2.0}, {"CPU": 1.0}]
    where = {
        role: [(s.bundle, s.gpus) for s in assignments]
        for role, assignments in plan.assignments.items()
    }
    assert where["engine"] == [(0, (0, 1)), (1, (0, 1))]
    assert where["actor"] == [(0, (0,)), (0, (1,)), (1, (0,)), (1, (1,))]
    assert where["reference"] == [(0, (0,)), (0, (1,))]
    assert where["judge"] == [(2, ())]


def test_on_cpus_both_placements_are_the_same() -> None:
    need = {"engine": Demand(1, 2), "actor": Demand(2, 1)}
    assert layout(ClusterSettings(placement="colocated"), need) == layout(ClusterSettings(), need)


def test_several_cpu_nodes_have_one_bundle_each_and_processes_take_them_in_turn() -> None:
    need = {"engine": Demand(1, 2), "actor": Demand(2, 1), "judge": Demand(1, 1, 0)}
    plan = layout(ClusterSettings(nodes=2), need)
    assert plan.bundles == [{"CPU": 3.0}, {"CPU": 2.0}]
    assert {
        role: [s.bundle for s in assignments] for role, assignments in plan.assignments.items()
    } == {
        "engine": [0],
        "actor": [1, 0],
        "judge": [1],
    }


@pytest.mark.parametrize(
    ("gpus", "nodes", "said"),
    [
        ([4, 4], [8], None),
        ([5, 5, 3, 3], [8, 8], None),
        ([1] * 9, [8], "9 GPUs are needed, Ray has 8"),
        ([16], [8, 8], "1 x 16 GPUs on one node are needed, nodes with 8, 8 have room for 0"),
        ([5, 5, 5], [8, 8], "3 x 5 GPUs on one node are needed, nodes with 8, 8 have room for 2"),
        ([1], [0], "1 GPUs are needed, Ray has 0"),
    ],
)
def test_what_can_never_fit_is_told_by_arithmetic(
    gpus: list[int], nodes: list[int], said: str | None
) -> None:
    bundles = [{"CPU": 1.0, "GPU": float(g)} for g in gpus]
    assert misfit(bundles, [{"CPU": 64.0, "GPU": float(n), "memory": 1e9} for n in nodes]) == said


def test_nodes_with_too_few_cpus_are_told_too() -> None:
    assert misfit([{"CPU": 8.0}] * 2, [{"CPU": 12.0}, {"CPU": 4.0}]) == (
        "2 x 8 CPUs on one node are needed, nodes with 12, 4 have room for 1"
    )


def ppo(**changes: Any) -> RLRecipe:
    model = {"path": "m"}
    recipe: dict[str, Any] = {
        "run": {"folder": "r"},
        "step": {},
        "actor": {"model": model},
        "critic": {"model": model},
        "rewards": [{"name": "exact", "kind": "function", "function": "a:b"}],
        "prompts": {"path": "p"},
        "cluster": {"device": "cuda", "placement": "colocated"},
    }
    return rl_recipe("ppo", "ppo").model_validate(recipe | changes)


def sharing_problems(recipe: RLRecipe) -> list[Problem]:
    return [p for p in combination_problems(recipe) if "colocated" in p.message]


def test_recipes_whose_roles_cannot_share_are_refused() -> None:
    assert not list(combination_problems(ppo()))
    bfloat16 = {"model": {"path": "m", "dtype": "bfloat16"}, "zero_stage": 1}
    offloaded = {"model": {"path": "m"}, "zero_stage": 3, "offload_parameters": True}
    broken = {"actor": bfloat16, "critic": offloaded, "generation": {"tensor_parallel": 2}}
    first, second, third = sharing_problems(ppo(**broken))
    assert (
        first.keys[0] == "actor.ranks"
        and "an Actor rank on each of the engines' 2 GPUs, not 1" in first.message
    )
    assert (second.keys[0], third.keys[0]) == ("actor.zero_stage", "critic.offload_optimizer")
    assert not list(sharing_problems(ppo(**broken, cluster={"device": "cuda"})))


def test_local_model_folders_become_absolute_and_hub_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert located(ModelSettings(path="models/mine")).path == str(tmp_path / "models" / "mine")
    assert located(ModelSettings(path="Qwen/Qwen3-8B")).path == "Qwen/Qwen3-8B"
    learner = located(LearnerSettings(model=ModelSettings(path="models/mine"), ranks=3))
    assert learner.model.path == str(tmp_path / "models" / "mine") and learner.ranks == 3
    (tmp_path / "chat.jinja").write_text("")
    for template, there in (("chat.jinja", str(tmp_path / "chat.jinja")), ("rag", "rag")):
        found = located(ModelSettings(path="Qwen/Qwen3-8B", template=template))
        assert (found.path, found.template) == ("Qwen/Qwen3-8B", there)


# --- real raylets ---------------------------------------------------------------------------------


class Witness:
    """Says where it is and what it sees."""

    def __init__(self, rank: Rank | None = None, model: ModelSettings | None = None) -> None:
        self.rank = rank
        self.model = model

    def look(self) -> dict[str, Any]:
        import ray

        return {
            "node": ray.get_runtime_context().get_node_id(),
            "devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "threads": os.environ["OMP_NUM_THREADS"],
            "model": self.model and self.model.path,
        }

    def add_up(self) -> float:
        """The sum of all ranks, through gloo."""
        import torch
        import torch.distributed as dist

        rank = self.rank
        assert rank is not None
        where = f"tcp://{rank.address}:{rank.port}"
        dist.init_process_group(
            "gloo", init_method=where, rank=rank.index, world_size=rank.world_size
        )
        total = torch.tensor([float(rank.index + 1)])
        dist.all_reduce(total)
        return float(total)


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Callable[..., Any]]:
    """Runs functions in a process of its own, joined to a Ray cluster of two raylets with eight
    logical GPUs each.
    """
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=_start_cluster
    ) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=150)
        pool.submit(_stop_cluster).result(timeout=60)


def _start_cluster() -> None:
    import ray
    from ray.cluster_utils import Cluster

    global nodes
    nodes = Cluster()
    for _ in range(2):
        nodes.add_node(num_cpus=16, num_gpus=8, include_dashboard=False)
    ray.init(nodes.address, log_to_driver=False)


def _stop_cluster() -> None:
    import ray

    ray.shutdown()
    nodes.shutdown()  # type: ignore[name-defined]


def look_around(
    cluster: ClusterSettings, need: dict[str, Demand], ranks: bool = False, **arguments: Any
) -> Any:
    """What every process of every role sees; with `ranks`, also what they make together."""
    from actors.cluster.groups import WorkerGroup
    from actors.cluster.placement import Placement

    with Placement(cluster, need) as placement:
        groups = {
            role: WorkerGroup(role, f"{__name__}:Witness", placement.options(role)) for role in need
        }
        distributed = ("cpu", 60.0) if ranks else None
        starting = {
            role: group.start(arguments, 60, distributed=distributed)
            for role, group in groups.items()
        }
        for role, pending in starting.items():
            groups[role].gather(pending, "start", 60)
        seen = {
            role: group.call("look", phase="test", deadline_s=60) for role, group in groups.items()
        }
        if ranks:
            return seen, {
                r: g.call("add_up", phase="test", deadline_s=60) for r, g in groups.items()
            }
        return seen


@engines
@pytest.mark.timeout(200)
def test_separate_every_process_has_gpus_of_its_own(two_nodes: Callable[..., Any]) -> None:
    need = {
        "engine": Demand(2, 2, 4),
        "actor": Demand(7, 1),
        "reward": Demand(1, 1),
        "function": Demand(1, 1, 0),
    }
    seen = two_nodes(look_around, SEPARATE, need)
    taken = [
        (p["node"], d) for role in need for p in seen[role] for d in p["devices"].split(",") if d
    ]
    assert len(taken) == len(set(taken)) == 16 and len({node for node, _ in taken}) == 2
    assert [len(p["devices"].split(",")) for p in seen["engine"]] == [4, 4]
    assert seen["function"][0]["devices"] == ""
    assert [p["threads"] for p in seen["engine"] + seen["actor"]] == ["2", "2", *"1111111"]


@engines
@pytest.mark.timeout(200)
def test_colocated_all_roles_see_the_same_gpus(two_nodes: Callable[..., Any]) -> None:
    need = {
        "engine": Demand(2, 1, 5),
        "actor": Demand(10, 1),
        "reference": Demand(2, 1),
        "judge": Demand(1, 1, 0),
    }
    seen = two_nodes(look_around, COLOCATED, need)
    # a node has eight GPUs: two engines of five need two nodes
    assert len({p["node"] for p in seen["engine"]}) == 2
    for i, actor in enumerate(seen["actor"]):
        engine = seen["engine"][i // 5]
        assert (actor["node"], actor["devices"]) == (
            engine["node"],
            engine["devices"].split(",")[i % 5],
        )
    assert seen["reference"] == seen["actor"][:2]
    assert seen["judge"][0]["devices"] == ""


def refused(
    cluster: ClusterSettings, need: dict[str, Demand], patience_s: float = 30.0
) -> tuple[str, float]:
    """The one line that refuses it, and after how many seconds."""
    from actors.cluster import placement

    placement.PATIENCE_S = patience_s
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        placement.Placement(cluster, need).__enter__()
    (line,) = error.value.problems
    return line, time.monotonic() - began


@engines
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("placement", "engine", "said"),
    [
        (SEPARATE, Demand(17, 1), "cluster: 17 GPUs are needed, Ray has 16 (engine 17): add nodes"),
        (
            SEPARATE,
            Demand(1, 1, 16),
            "cluster: 1 x 16 GPUs on one node are needed, nodes with 8, 8 have room for 0",
        ),
        (COLOCATED, Demand(4, 1, 4), None),
        (COLOCATED, Demand(2, 1, 8), None),
        (COLOCATED, Demand(3, 1, 6), "cluster: 18 GPUs are needed, Ray has 16"),
        (
            SEPARATE,
            Demand(3, 1, 5),
            "cluster: 3 x 5 GPUs on one node are needed, nodes with 8, 8 have room for 2",
        ),
        (SEPARATE, Demand(5, 8, 0), "cluster: 40 CPUs are needed, Ray has 32"),
        (ClusterSettings(nodes=3), Demand(4, 1, 0), "cluster.nodes: 3 are asked for, Ray has 2"),
        (
            SEPARATE,
            Demand(1, 17, 0),
            "cluster: 1 x 17 CPUs on one node are needed, nodes with 16, 16 have room for 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused_within_seconds(
    two_nodes: Callable[..., Any], placement: ClusterSettings, engine: Demand, said: str | None
) -> None:
    if said is None:
        assert (
            len(two_nodes(look_around, placement, {"engine": engine})["engine"]) == engine.processes
        )
        return
    line, seconds = two_nodes(refused, placement, {"engine": engine})
    assert line.startswith(said) and seconds < 5


def refused_while_in_use(need: dict[str, Demand]) -> tuple[str, float]:
    from actors.cluster.placement import Placement

    with Placement(SEPARATE, need):
        return refused(SEPARATE, need, patience_s=2)


@engines
@pytest.mark.timeout(200)
def test_a_cluster_in_use_is_told_from_one_that_is_too_small(two_nodes: Callable[..., Any]) -> None:
    line, seconds = two_nodes(refused_while_in_use, {"engine": Demand(9, 1)})
    assert line == (
        "cluster: no room within 2 s for 9 CPUs of 23 free, 9 GPUs of 7 free (engine 9); is the "
        "cluster in use?"
    )
    assert seconds < 10


def look_from(folder: str, need: dict[str, Demand], model: ModelSettings) -> Any:
    """As a user who stands in `folder`, with the code elsewhere."""
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    two = ClusterSettings(nodes=2)  # one would have room for all: it is the recipe that says two
    return look_around(two, need, ranks=True, model=model)


@engines
@pytest.mark.timeout(200)
def test_ranks_on_two_nodes_find_each_other_the_code_and_the_model(
    two_nodes: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    need = {"actor": Demand(4, 1)}
    seen, sums = two_nodes(look_from, str(tmp_path), need, ModelSettings(path="model"))
    assert len({p["node"] for p in seen["actor"]}) == 2
    assert sums["actor"] == [10.0] * 4
    assert {p["model"] for p in seen["actor"]} == {str(tmp_path / "model")}
    assert {p["devices"] for p in seen["actor"]} == {None}  # CPUs: nothing is said about GPUs
