"""Verified sync with everything real: Actor ranks under every ZeRO stage, one engine and two, tied
and untied heads.

Processes start once per kind of model; a rank is given another Actor by starting it anew in the
same process.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from actors.cluster.groups import WorkerError, WorkerGroup
from actors.cluster.placement import environment
from actors.cluster.rows import gather_rows, scatter_rows
from actors.cluster.sharing import GpuSharing
from actors.rollouts.generator import Engines
from actors.settings import GenerationSettings, RLRecipe, rl_recipe
from actors.weights.agreement import check_engine_agrees
from actors.weights.proof import SyncError
from actors.weights.sync import WeightSync
from learners.algorithms.grpo import GRPO, GRPOSettings
from learners.data.rows import Prompt
from learners.errors import DisagreementError
from learners.experience import Experience, PromptRequest, Rollout
from learners.settings import LearnerSettings, ModelSettings, OptimizerSettings

pytestmark = [pytest.mark.engines, pytest.mark.timeout(400)]

BOUND = 1e-4
DEADLINE = 120.0
PROBE = [1, *range(3, 34)]
TEMPERATURE = 0.8


@dataclass
class Stage:
    """Two engines and two Actor ranks, all serving the same files."""

    engines: Engines
    actor: WorkerGroup
    path: str
    tied: bool
    parts: frozenset[str] = frozenset({"gather", "send", "receive", "load", "probe"})

    def connect(self, zero_stage: int, engines: int, learning_rate: float = 0.1) -> Engines:
        """A new Actor under `zero_stage`, and the engines it sends to."""
        self.start_actor(zero_stage, learning_rate)
        chosen = copy.copy(self.engines)
        chosen.handles = self.engines.handles[:engines]
        chosen.nodes = self.engines.nodes[:engines]
        self.actor.call("connect", chosen.handles, DEADLINE, phase="sync", deadline_s=DEADLINE)
        return chosen

    def start_actor(self, zero_stage: int, learning_rate: float = 0.1) -> None:
        """Put a new Actor into the same processes."""
        settings = LearnerSettings(
            model=ModelSettings(path=self.path),
            zero_stage=zero_stage,  # type: ignore[arg-type]
            micro_batch_tokens=40,
            optimizer=OptimizerSettings(kind="sgd", learning_rate=learning_rate),
        )
        arguments = {
            "settings": settings,
            "algorithm": GRPO(GRPOSettings(), 2),
            "temperature": TEMPERATURE,
            "max_response_tokens": 16,
            "total_steps": 100,
        }
        self.actor.gather(
            self.actor.start(arguments, DEADLINE, distributed=("cpu", DEADLINE)), "start", DEADLINE
        )

    def sync(self, engines: Engines, version: int, deadline_s: float = DEADLINE) -> float:
        """Send the Actor's weights and prove them, within the bounds of float32 (BOUND)."""
        recipe = recipe_of(self.path, deadline_s)
        assert recipe.max_logprob_diff == recipe.mean_logprob_diff == BOUND
        sharing = GpuSharing()
        metrics = WeightSync(self.actor, engines, sharing, PROBE, recipe).sync(version)
        timed = {span.name: span.seconds for span in sharing.stopwatch.take()}
        assert timed.keys() == self.parts
        assert min(timed.values()) > 0
        assert metrics.keys() == {"sync/probe_difference"}
        return metrics["sync/probe_difference"]

    def learn(self) -> None:
        """One step that moves every weight."""
        draw = torch.Generator().manual_seed(0)
        ids = [torch.randint(3, 64, (n,), generator=draw).tolist() for n in (2, 9, 5, 12)]
        batch = Experience.from_ids([i[:2] for i in ids], [[*i, 2] for i in ids])
        old = gather_rows(scatter_rows(self.actor, "infer", batch), batch, "score", DEADLINE)
        batch = replace(batch, old_logprobs=old, advantages=torch.randn(old.shape, generator=draw))
        self.actor.gather(scatter_rows(self.actor, "train", batch).refs, "learn", DEADLINE)

    def mismatch(self, rollouts: list[Rollout]) -> float:
        """Largest difference between the engines' log-probs and those of the Actor."""
        batch = Experience.from_rollouts(rollouts)
        ours = gather_rows(scatter_rows(self.actor, "infer", batch), batch, "score", DEADLINE)
        assert batch.rollout_logprobs is not None
        return float((ours - batch.rollout_logprobs)[batch.loss_mask].abs().max())


def recipe_of(path: str, sync_deadline_s: float) -> RLRecipe:
    model = {"path": path}
    return rl_recipe("grpo", "grpo").model_validate(
        {
            "run": {"folder": "unused"},
            "step": {},
            "actor": {"model": model},
            "rewards": [{"name": "unused", "kind": "model", "model": model}],
            "prompts": {"path": "unused"},
            "generation": {"temperature": TEMPERATURE, "max_new_tokens": 12},
            "sync": {"deadline_s": sync_deadline_s},
        }
    )


def generate(engines: Engines, seed: int = 0) -> list[Rollout]:
    seeds = tuple(range(seed, seed + 2))
    requests = [PromptRequest(i, i, [1, 5 + i, 9], 2, TEMPERATURE, 12, seeds) for i in range(4)]
    return engines.generate(requests, DEADLINE)


@pytest.fixture(scope="module", params=["tied", "untied"])
def stage(
    request: pytest.FixtureRequest, cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    import ray

    from tests.actors.tiny_models import EOS, MAX_TOKENS, save_model

    path = tmp_path_factory.mktemp("model")
    save_model(path, seed=0, tied=request.param == "tied")
    options = [{"num_cpus": 1, "runtime_env": {"env_vars": environment("cpu", 1)}}] * 2
    engines = Engines("engine", "tests.actors.faulty:FaultyEngine", options)
    actor = WorkerGroup("actor", "tests.actors.faulty:FaultyActor", options)
    generation = GenerationSettings(threads=1, kv_cache_gib=0.125, max_concurrent=64)
    arguments = {
        "model": ModelSettings(path=str(path)),
        "generation": generation,
        "device": "cpu",
        "max_model_tokens": MAX_TOKENS,
        "stop_token_ids": [EOS],
    }
    engines.gather(engines.start(arguments, DEADLINE), "start", DEADLINE)
    yield Stage(engines, actor, str(path), request.param == "tied")
    for handle in (*engines.handles, *actor.handles):
        ray.kill(handle)


@pytest.mark.parametrize("count", [1, 2], ids=["one-engine", "two-engines"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_after_a_sync_every_engine_serves_the_actor(
    stage: Stage, zero_stage: int, count: int
) -> None:
    engines = stage.connect(zero_stage, count)
    # they may still serve what a test before this one sent
    stage.sync(engines, 1)
    stage.learn()
    assert stage.mismatch(generate(engines)) > 0.01, (
        "the Actor has not moved: a sync could not be told from none"
    )
    assert stage.sync(engines, 2) <= BOUND
    rollouts = generate(engines)
    assert {r.weight_versions for r in rollouts} == {(2, 2)} and len(rollouts) == 8
    assert stage.mismatch(rollouts) <= BOUND


def test_engines_that_serve_other_weights_are_refused_before_step_1(stage: Stage) -> None:
    recipe = recipe_of(stage.path, DEADLINE)
    prompts = [Prompt(i, [1, 5 + i, 9], "", {}) for i in range(3)]
    engines = stage.connect(2, 2)
    stage.sync(engines, 1)
    assert 0 < check_engine_agrees(engines, stage.actor, prompts, recipe) <= BOUND
    stage.learn()
    with pytest.raises(DisagreementError) as refused:
        check_engine_agrees(engines, stage.actor, prompts, recipe)
    what, where, causes = refused.value.problems
    assert (
        "0.0001 (sync.max_logprob_diff)" in what
        and "engine[" in where
        and "the engine serves other weights" in causes
    )
    hotter = recipe.model_copy(
        update={"generation": recipe.generation.model_copy(update={"temperature": 2.0})}
    )
    # sound again, but the Actor reads at another temperature
    stage.sync(engines, 2)
    with pytest.raises(DisagreementError, match="its sampler changes the distribution"):
        check_engine_agrees(engines, stage.actor, prompts, hotter)


def test_twenty_syncs_at_learning_rate_0_leave_the_mismatch_flat(stage: Stage) -> None:
    engines = stage.connect(2, 2, learning_rate=0.0)
    seen = []
    for version in range(1, 21):
        stage.learn()
        probe = stage.sync(engines, version)
        rollouts = generate(engines)
        assert {r.weight_versions for r in rollouts} == {(version, version)}
        seen.append((probe, stage.mismatch(rollouts), [r.response_ids for r in rollouts]))
    assert seen == [seen[0]] * 20
    assert seen[0][0] <= BOUND and seen[0][1] <= BOUND


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("a missing name", r"parameters arrived, \d+ expected; missing \['model.norm.weight'\]"),
        ("a corrupted bucket", "group 0 arrived with digest"),
        ("a head left stale", "differ by .* nats on the probe.*allowed are 1e-04"),
        ("an update cut off halfway", "the sender is gone"),
    ],
)
def test_a_broken_sync_leaves_the_engines_stale_until_a_full_one_passes(
    stage: Stage, fault: str, said: str
) -> None:
    engines = stage.connect(2, 2)
    stage.sync(engines, 1)
    stage.learn()
    if (
        fault == "a head left stale" and stage.tied
    ):  # then no head is sent: it is the engine that must see to it
        engines.call("forget_the_head", phase="test", deadline_s=DEADLINE)
    else:
        stage.actor.call("break_next", fault, phase="test", deadline_s=DEADLINE)
    with pytest.raises((SyncError, WorkerError), match=said):
        stage.sync(engines, 2)
    assert [one["stale"] for one in engines.call("status", phase="test", deadline_s=DEADLINE)] == [
        True,
        True,
    ]
    with pytest.raises(WorkerError, match="engine is STALE"):
        generate(engines)
    stage.sync(engines, 2)
    assert stage.mismatch(generate(engines)) <= BOUND


def test_a_rank_that_waits_too_long_tells_what_the_engine_said(stage: Stage) -> None:
    """As in nccl, where the sender waits for engines that have failed: it is they who are named,
    with their words.
    """
    engines = stage.connect(2, 2)
    stage.sync(engines, 1)
    stage.actor.call("break_next", "a sender that hears nothing", phase="test", deadline_s=DEADLINE)
    with pytest.raises(WorkerError) as late:
        stage.sync(engines, 2, 8.0)
    said = str(late.value)
    assert "actor[0] on node" in said and "did not answer within 8 s; engine[0] on node" in said
    assert "arrived with digest" in said.partition("engine[0]")[2]
    stage.sync(engines, 2)


def test_the_engine_that_is_late_is_named_before_the_rank_that_waits_for_it(stage: Stage) -> None:
    engines = stage.connect(2, 2)
    stage.sync(engines, 1)
    engines.call("dawdle", 8.0, phase="test", deadline_s=DEADLINE)
    stage.actor.call("connect", engines.handles, 5.0, phase="sync", deadline_s=DEADLINE)
    with pytest.raises(
        WorkerError, match=r"SyncError.*engine\[0\], engine\[1\] did not answer within"
    ):
        stage.sync(engines, 2, 5.0)
    stage.actor.call("connect", engines.handles, DEADLINE, phase="sync", deadline_s=DEADLINE)
    stage.sync(engines, 2)
