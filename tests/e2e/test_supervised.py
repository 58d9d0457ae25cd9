"""SFT and reward-model training with the real learners on two ranks, and what they export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.cluster.groups import WorkerError
from actors.rewards.model import RewardWorker
from actors.rollouts.sample import Sample
from actors.run import metrics
from launch.export import export_model
from learners.settings import ModelSettings
from tests.e2e.conftest import Run, Workshop

pytestmark = pytest.mark.engines


def test_sft_learns_the_answers(sft: Run) -> None:
    assert sft.steps[-1]["loss"] < 0.5 * sft.steps[0]["loss"]
    assert sft.summary["held_out/loss"] < 0.5 * sft.steps[0]["loss"]
    assert (sft.folder / "notices.txt").read_text() == ""  # nothing is wrong with its texts


def test_training_that_blew_up_stops_with_a_checkpoint(workshop: Workshop) -> None:
    """The first update throws every weight out of float32's useful range; after it nothing is
    finite.
    """
    base = workshop.folder / "base"
    data = workshop.folder / "data" / "sft.jsonl"
    with pytest.raises(
        WorkerError, match="stopped after step 3: in 2 steps .*for learner_(loss|gradient)_not"
    ):
        workshop.run(
            "sft",
            "blown_up",
            f"learner.model.path={base}",
            f"data.path={data}",
            "train.steps=9",
            "held_out=null",
            "learner.optimizer.learning_rate=1e30",
            "learner.optimizer.warmup_steps=0",
            "train.evaluate_every=0",
            "run.max_skipped_steps=2",
        )
    run = Run(workshop.folder / "blown_up", {})
    assert [step["skipped_updates"] for step in run.steps] == [0, 1, 1]
    assert [row["step"] for row in run.alarms] == [2, 3]
    assert [p.name for p in (run.folder / "checkpoints").iterdir()] == ["step-000003"]


def test_an_adapter_is_trained_saved_and_exported(workshop: Workshop, tmp_path: Path) -> None:
    """The run that was stopped and resumed ends with the same bytes, and so does an export of its
    checkpoint; the model without the adapter is the base.
    """
    base = workshop.folder / "base"
    overrides = [
        f"learner.model.path={base}",
        "learner.model.lora={rank: 8}",
        "learner.optimizer.learning_rate=0.01",
        f"data.path={workshop.folder / 'data' / 'sft.jsonl'}",
        "held_out=null",
        "train.evaluate_every=0",
        "run.checkpoint_every_steps=2",
        "run.keep_checkpoints=5",
    ]
    whole = workshop.run("sft", "adapter", *overrides, "train.steps=4")
    assert whole.steps[-1]["loss"] < whole.steps[0]["loss"]
    stopped = workshop.run("sft", "adapter_again", *overrides, "train.steps=2")
    workshop.run("sft", "adapter_again", *overrides, "train.steps=4", resume=True)
    export_model(whole.folder, tmp_path / "exported")
    files = ("model.safetensors", "adapter/adapter_model.safetensors")
    for model in (stopped.model, tmp_path / "exported"):
        for name in files:
            assert (model / name).read_bytes() == (whole.model / name).read_bytes()
    adapter = load_file(whole.folder / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in adapter.values())
    merged = load_file(whole.model / "model.safetensors")
    before = load_file(base / "model.safetensors")
    kept = [name for name in before if torch.equal(before[name], merged[name])]
    assert 0 < len(kept) == len(before) - len(adapter) / 2


def test_the_decoder_reward_model_wins_held_out_pairs(reward_model: Run) -> None:
    assert reward_model.summary["held_out/accuracy"] > 0.8
    assert reward_model.summary["held_out/margin"] > 0


def test_the_encoder_reward_model_learns(encoder_reward_model: Run) -> None:
    losses = [step["loss"] for step in encoder_reward_model.steps]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def test_calibration_is_saved_with_the_model(reward_model: Run) -> None:
    config = json.loads((reward_model.model / "config.json").read_text())
    assert config["score_mean"] == pytest.approx(reward_model.summary["calibration/mean"])
    assert config["score_std"] == pytest.approx(reward_model.summary["calibration/std"])


@pytest.mark.parametrize("which", ["reward_model", "encoder_reward_model"])
def test_our_worker_and_plain_transformers_give_the_same_score(
    which: str, sft: Run, request: pytest.FixtureRequest
) -> None:
    """The exported folder alone, head included, is the reward model."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run: Run = request.getfixturevalue(which)
    worker = RewardWorker(
        ModelSettings(path=str(run.model)), ModelSettings(path=str(sft.model)), 1000, "cpu"
    )
    actor = AutoTokenizer.from_pretrained(sft.model)
    texts = [("uniq:800299=", "0289"), ("uniq:5111=", "15"), ("uniq:1234567890=", "0123456789")]
    samples = [
        Sample(
            actor(prompt)["input_ids"],
            [*actor(answer, add_special_tokens=False)["input_ids"], 2],
            prompt,
            answer,
            "stop",
            {},
        )
        for prompt, answer in texts
    ]
    values = torch.tensor([score.value for score in worker.scores(samples)])
    ours = values * worker.calibration.std + worker.calibration.mean

    model, info = AutoModelForSequenceClassification.from_pretrained(
        run.model, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    end = "" if which == "encoder_reward_model" else tokenizer.eos_token
    inputs = tokenizer([p + a + end for p, a in texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        plain = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits[:, 0]
    assert torch.allclose(ours, plain, atol=1e-4)


def test_every_metric_is_registered(
    workshop: Workshop, sft: Run, reward_model: Run, encoder_reward_model: Run
) -> None:
    logged = workshop.logged()
    assert {"loss", "held_out/loss", "calibration/std"} <= logged
    assert not {name for name in logged if metrics.find(name) is None}
