"""LoRA between Actor and engine: merged weights and the adapter alone, and an engine that never got
it.

One Actor on two ranks under ZeRO-2; one engine that takes weights, and one that takes adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from actors.cluster.groups import WorkerError, WorkerGroup
from actors.cluster.placement import environment
from actors.cluster.rows import gather_rows, scatter_rows
from actors.cluster.sharing import GpuSharing
from actors.rollouts.generator import Engines
from actors.settings import GenerationSettings, RLRecipe, rl_recipe
from actors.start import Workers
from actors.weights.proof import SyncError
from actors.weights.sync import WeightSync
from learners.algorithms.grpo import GRPO, GRPOSettings
from learners.experience import Experience, PromptRequest, Rollout

BOUND = 1e-4
DEADLINE = 120.0
PROBE = [1, *range(3, 34)]
TEMPERATURE = 0.8
RANK = 3

engines = pytest.mark.engines
pytestmark = pytest.mark.timeout(400)


def recipe_of(path: str, lora: str) -> RLRecipe:
    actor = {
        "model": {"path": path, "lora": {"rank": RANK}},
        "ranks": 2,
        "zero_stage": 2,
        "micro_batch_tokens": 40,
        "optimizer": {"kind": "adamw", "learning_rate": 0.02},
    }
    return rl_recipe("grpo", "grpo").model_validate(
        {
            "run": {"folder": "unused"},
            "step": {},
            "actor": actor,
            "rewards": [{"name": "unused", "kind": "function", "function": "a:b"}],
            "prompts": {"path": "unused"},
            "generation": {"temperature": TEMPERATURE, "max_new_tokens": 12},
            "sync": {"deadline_s": DEADLINE, "lora": lora},
        }
    )


@dataclass
class Stage:
    """An engine for each way of sending, and an Actor. Versions go up from 1."""

    engines: dict[str, Engines]
    actor: WorkerGroup
    path: str
    how: str = ""
    version: int = 0

    def start_anew(self, how: str = "") -> None:
        """Give the ranks an Actor that has learned nothing, and connect it if it is to send."""
        arguments = {
            "settings": recipe_of(self.path, "merged").actor,
            "algorithm": GRPO(GRPOSettings(), 2),
            "temperature": TEMPERATURE,
            "max_response_tokens": 16,
            "total_steps": 100,
        }
        refs = self.actor.start(arguments, DEADLINE, distributed=("cpu", DEADLINE))
        self.actor.gather(refs, "start", DEADLINE)
        self.how = how
        if how:
            self.weights.connect(0)

    @property
    def weights(self) -> WeightSync:
        recipe = recipe_of(self.path, self.how)
        return WeightSync(self.actor, self.engines[self.how], GpuSharing(), PROBE, recipe)

    def sync(self) -> dict[str, float]:
        self.version += 1
        return self.weights.sync(self.version)

    def learn(self) -> None:
        draw = torch.Generator().manual_seed(0)
        ids = [torch.randint(3, 64, (n,), generator=draw).tolist() for n in (2, 9, 5, 12)]
        batch = Experience.from_ids([i[:2] for i in ids], [[*i, 2] for i in ids])
        old = self.read("infer", batch)
        batch = replace(batch, old_logprobs=old, advantages=torch.randn(old.shape, generator=draw))
        self.actor.gather(scatter_rows(self.actor, "train", batch).refs, "learn", DEADLINE)

    def read(self, method: str, batch: Experience) -> torch.Tensor:
        return gather_rows(scatter_rows(self.actor, method, batch), batch, "score", DEADLINE)

    def mismatch(self, rollouts: list[Rollout], method: str = "infer") -> float:
        """Largest difference between the engine's log-probs and the Actor's."""
        batch = Experience.from_rollouts(rollouts)
        assert batch.rollout_logprobs is not None
        gaps = self.read(method, batch) - batch.rollout_logprobs
        return float(gaps[batch.loss_mask].abs().max())

    def generate(self) -> list[Rollout]:
        requests = [PromptRequest(i, i, [1, 5 + i, 9], 2, TEMPERATURE, 12, (0, 1)) for i in (0, 1)]
        return self.engines[self.how].generate(requests, DEADLINE)

    def tell(self, group: WorkerGroup, method: str, *args: Any) -> Any:
        return group.call(method, *args, phase="test", deadline_s=DEADLINE)[0]


@pytest.fixture(scope="module")
def stage(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    import ray

    from learners.settings import ModelSettings
    from tests.actors.tiny_models import EOS, MAX_TOKENS, save_model

    folder = tmp_path_factory.mktemp("model")
    path = str(folder)
    save_model(folder, seed=0, tied=True)
    options = [{"num_cpus": 1, "runtime_env": {"env_vars": environment("cpu", 1)}}]
    arguments = {
        "model": ModelSettings(path=path),
        "generation": GenerationSettings(threads=1, kv_cache_gib=0.125, max_concurrent=64),
        "device": "cpu",
        "max_model_tokens": MAX_TOKENS,
        "stop_token_ids": [EOS],
    }
    made = {
        how: Engines("engine", "tests.actors.faulty:FaultyEngine", options)
        for how in ("merged", "adapter")
    }
    ranks = {"merged": None, "adapter": RANK}
    starting = [
        (group, group.start(arguments | {"adapter_rank": ranks[how]}, DEADLINE))
        for how, group in made.items()
    ]
    for group, refs in starting:
        group.gather(refs, "start", DEADLINE)
    actor = WorkerGroup("actor", "tests.actors.faulty:FaultyActor", options * 2)
    yield Stage(made, actor, path)
    for group in (*made.values(), actor):
        for handle in group.handles:
            ray.kill(handle)


@engines
@pytest.mark.parametrize("how", ["merged", "adapter"])
def test_the_engine_serves_the_actor_with_its_adapter(stage: Stage, how: str) -> None:
    stage.start_anew(how)
    before = stage.sync()
    assert before["sync/adapter_decidable"] == before["sync/adapter_effect"] == 0  # B is 0
    assert stage.mismatch(stage.generate(), "base_infer") <= BOUND
    for _ in range(2):
        stage.learn()
        assert stage.mismatch(stage.generate()) > 0.01  # else none could be told from a sync
        metrics = stage.sync()
        assert metrics["sync/probe_difference"] <= BOUND < metrics["sync/adapter_effect"]
        assert metrics["sync/adapter_decidable"] == 1
        rollouts = stage.generate()
        assert {r.weight_versions for r in rollouts} == {(stage.version, stage.version)}
        assert stage.mismatch(rollouts) <= BOUND
        assert stage.mismatch(rollouts, "base_infer") > 0.01


@engines
def test_every_adapter_has_a_name_of_its_own_and_the_old_one_is_removed(stage: Stage) -> None:
    engine = stage.engines["adapter"]
    stage.start_anew("adapter")
    numbers = []
    names = set()
    for _ in range(3):
        stage.sync()
        (number,), name = stage.tell(engine, "adapters")
        assert name == f"version {stage.version}, load {number}"
        numbers.append(number)
        names.add(name)
    assert numbers == sorted(set(numbers)) and len(names) == 3


@engines
@pytest.mark.parametrize(
    ("how", "fault", "said"),
    [
        ("adapter", "", "serves the base model without the adapter"),
        ("merged", "an adapter left out", "serves the base model without the adapter"),
        ("adapter", "a corrupted bucket", "the adapter arrived with digest"),
        ("adapter", "a part for no layer", "vLLM has no layer for 7 parts of the adapter"),
    ],
)
def test_an_engine_without_the_adapter_is_found_and_takes_no_prompt(
    stage: Stage, how: str, fault: str, said: str
) -> None:
    engine = stage.engines[how]
    stage.start_anew(how)
    stage.sync()
    stage.learn()
    if fault:
        stage.actor.call("break_next", fault, phase="test", deadline_s=DEADLINE)
    else:
        stage.tell(engine, "drop_the_next_adapter")
    with pytest.raises((SyncError, WorkerError), match=said):
        stage.sync()
    assert stage.tell(engine, "status")["stale"]
    with pytest.raises(WorkerError, match="engine is STALE"):
        stage.generate()
    stage.sync()
    assert stage.mismatch(stage.generate()) <= BOUND


@engines
def test_an_adapter_that_cannot_be_served_is_refused_before_step_1(stage: Stage) -> None:
    stage.start_anew("adapter")
    stage.actor.call("break_next", "a part for no layer", phase="test", deadline_s=DEADLINE)
    with pytest.raises(WorkerError, match="sync.lora: merged sends them within the weights"):
        stage.weights.connect(0)
    stage.weights.connect(0)
    assert stage.mismatch(stage.generate()) <= BOUND


@engines
def test_a_base_that_changed_below_its_adapter_is_noticed(stage: Stage) -> None:
    stage.start_anew()
    workers: Any = object.__new__(Workers)
    workers.deadline_s = DEADLINE
    workers.frozen = {"actor": (stage.actor, "base_fingerprint")}
    workers.loaded = workers.fingerprints()
    stage.learn()
    workers.check_frozen()
    stage.tell(stage.actor, "disturb_the_base")
    with pytest.raises(WorkerError, match=r"a frozen model \(actor\) changed during the run"):
        workers.check_frozen()
