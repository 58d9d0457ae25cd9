"""GRPO with LoRA on two ranks under ZeRO-2: the Actor without its adapter is the Reference, and the
engines get merged weights or the adapter alone.
"""

from __future__ import annotations

import json
import shutil

import pytest

from tests.e2e.conftest import Run, Workshop

pytestmark = [pytest.mark.engines, pytest.mark.models, pytest.mark.timeout(400)]


def run_lora(name: str, workshop: Workshop, sft: Run, *overrides: str, resume: bool = False) -> Run:
    size = ["step.steps=2", "step.prompts_per_step=8", "step.mini_batch_size=32"]
    lora = ["actor.model.lora.rank=4", "actor.optimizer.learning_rate=2.0e-3"]
    lora += ["actor.optimizer.warmup_steps=0", "algorithm.kl_beta=0.02"]
    few = ["evaluation.prompts=null", "evaluation.test_prompts=null", "evaluation.function=null"]
    few += ["evaluation.every_steps=0", "run.checkpoint_every_steps=1"]
    return workshop.reinforce("grpo", name, sft, *size, *lora, *few, *overrides, resume=resume)


@pytest.fixture(scope="session")
def merged(workshop: Workshop, sft: Run) -> Run:
    return run_lora("lora_merged", workshop, sft)


@pytest.fixture(scope="session")
def alone(workshop: Workshop, sft: Run) -> Run:
    return run_lora("lora_alone", workshop, sft, "sync.lora=adapter")


def test_the_actor_is_its_own_reference(merged: Run) -> None:
    placement = json.loads((merged.folder / "placement.json").read_text())
    assert placement.keys() == {"engine", "actor", "reward exact_match"}
    first, second = merged.steps
    assert first["kl/sequence"] == pytest.approx(0, abs=1e-4)  # B is zero
    assert abs(second["kl/sequence"]) > 1e-3
    things = json.loads((merged.folder / "checkpoints/step-000002/things.json").read_text())
    assert things["actor.model.path"]["frozen weights of the actor"]


def test_both_ways_of_sending_learn_the_same(merged: Run, alone: Run) -> None:
    for one, other in zip(merged.figures, alone.figures, strict=True):
        for run in (one, other):
            assert run["mismatch/max"] <= 1e-4 and run["sync/probe_difference"] <= 1e-4
            assert run["sync/adapter_decidable"] == 1 and run["sync/adapter_effect"] > 1e-3
            assert run["actor/max_ratio_deviation_first"] <= 1e-4
        for name in ("actor/loss", "actor/grad_norm", "score/mean", "sync/adapter_effect"):
            assert one[name] == pytest.approx(other[name], rel=1e-2, abs=1e-5), name
    assert {tuple(row["weight_versions"]) for row in alone.samples(2)} == {(1, 1)}


def test_a_run_that_sends_adapters_resumes_as_if_it_had_never_stopped(
    workshop: Workshop, sft: Run, alone: Run
) -> None:
    shutil.copytree(alone.folder, workshop.folder / "lora_resumed")
    shutil.rmtree(workshop.folder / "lora_resumed/checkpoints/step-000002")
    again = run_lora("lora_resumed", workshop, sft, "sync.lora=adapter", resume=True)
    for key, value in alone.figures[1].items():
        assert again.steps[1][key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
