"""SFT and reward-model training with the real learners on two ranks, and what they export."""

from __future__ import annotations

import json

import pytest
import torch

from actors.cluster.groups import WorkerError
from actors.rewards.model import RewardWorker
from actors.rollouts.requests import Sample
from actors.run import metrics
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
