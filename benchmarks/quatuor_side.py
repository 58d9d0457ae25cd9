"""Quatuor's half of parity_trl.py: every case through the learners, with DeepSpeed ZeRO on one
rank.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from actors.reference import ReferenceWorker
from learners.actor import ActorLearner
from learners.advantages import group_advantages
from learners.algorithms.grpo import GRPO, GRPOSettings
from learners.experience import Experience
from learners.reward_model import RewardModelLearner
from learners.settings import (
    LearnerSettings,
    ModelSettings,
    OptimizerSettings,
    Rank,
    RewardModelSettings,
)

Report = list[dict[str, float]]


def train_case(
    folder: Path, case: dict[str, Any], inputs: dict[str, Any], zero_stage: int
) -> Report:
    """Train one case and return the reports of its optimizer steps; the weights after the last one
    go to FOLDER/quatuor/CASE.
    """
    torch.set_num_threads(1)
    model = ModelSettings(path=str(folder / ("policy" if case["kind"] == "grpo" else "reward")))
    settings = LearnerSettings(
        model=model,
        zero_stage=zero_stage,
        micro_batch_tokens=inputs["micro_batch_tokens"],
        optimizer=OptimizerSettings(**case["optimizer"][1]),
    )
    train = train_actor if case["kind"] == "grpo" else train_reward_model
    return train(folder, case, inputs, settings)


def train_actor(
    folder: Path, case: dict[str, Any], inputs: dict[str, Any], settings: LearnerSettings
) -> Report:
    """Take the driver's training step, with fixed responses instead of generated ones."""
    algorithm = GRPO(GRPOSettings(**case["quatuor"]), inputs["group_size"])
    longest = inputs["max_response_tokens"]
    temperature = inputs["temperature"]
    actor = ActorLearner(settings, algorithm, temperature, longest, inputs["steps"], single_rank())
    reference = ReferenceWorker(
        ModelSettings(path=str(folder / "reference")),
        temperature,
        settings.micro_batch_tokens,
        "cpu",
    )
    report = []
    for start in range(0, len(inputs["groups"]), inputs["groups_per_batch"]):
        groups = inputs["groups"][start : start + inputs["groups_per_batch"]]
        batch = to_batch(groups, case["gaps"])
        batch = replace(
            batch, old_logprobs=actor.infer(batch), ref_logprobs=reference.logprobs(batch)
        )
        batch = with_advantages(algorithm, batch, inputs["advantage_eps"])
        report += [actor.train(batch) for _ in range(inputs["epochs"])]
    actor.export(str(folder / "quatuor" / case["name"]))
    return report


def to_batch(groups: list[dict[str, Any]], gaps: bool) -> Experience:
    prompts = [group["prompt"] for group in groups for _ in group["responses"]]
    batch = Experience.from_ids(prompts, [ids for group in groups for ids in group["responses"]])
    valid = [torch.tensor(row) for group in groups for row in group["valid"]]
    with_gaps = pad_sequence(valid, batch_first=True).bool()
    return replace(
        batch,
        scores=torch.tensor([score for group in groups for score in group["scores"]]),
        loss_mask=with_gaps if gaps else batch.loss_mask,
    )


def with_advantages(algorithm: GRPO, batch: Experience, eps: float) -> Experience:
    """Fill in GRPO's advantages, with the other system's `eps` where they are divided by a standard
    deviation.
    """
    batch, _ = algorithm.advantages(batch)
    if algorithm.settings.advantage != "grpo":
        return batch
    assert batch.scores is not None
    per_sequence = group_advantages(batch.scores, algorithm.group_size, eps=eps)
    return replace(batch, advantages=per_sequence[:, None] * batch.loss_mask)


def train_reward_model(
    folder: Path, case: dict[str, Any], inputs: dict[str, Any], settings: LearnerSettings
) -> Report:
    head = RewardModelSettings(**case["quatuor"])
    learner = RewardModelLearner(settings, head, inputs["pad"], 0, inputs["steps"], single_rank())
    pairs = inputs["pairs"]
    prompts = [pair["prompt"] for pair in pairs for _ in range(2)]
    batch = Experience.from_ids(
        prompts, [pair[name] for pair in pairs for name in ("chosen", "rejected")]
    )
    if case["margins"]:
        batch = replace(
            batch, margins=torch.tensor([pair["margin"] for pair in pairs for _ in range(2)])
        )
    report = [learner.train(batch) for _ in range(inputs["steps"])]
    learner.export(str(folder / "quatuor" / case["name"]))
    return report


@cache
def single_rank() -> Rank:
    """Return one rank, on a free port. Cached: the process group starts once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Rank(0, 1, "127.0.0.1", probe.getsockname()[1])
