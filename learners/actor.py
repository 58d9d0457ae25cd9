"""ActorLearner: the policy. Log-probs of responses, and the algorithm's loss on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from learners.algorithms.base import Algorithm
from learners.checkpoints import load_causal_lm
from learners.experience import Experience
from learners.forward import response_logprobs
from learners.learner import Learner
from learners.lora import without_adapter
from learners.losses import Stats
from learners.settings import LearnerSettings, Rank


class ActorLearner(Learner):
    """One rank of the Actor. `infer` gives `old_logprobs` [B,T] at the sampling temperature,
    `train` takes a step.

    `max_response_tokens` is the constant that "constant" loss aggregation divides each sequence by.
    """

    def __init__(
        self,
        settings: LearnerSettings,
        algorithm: Algorithm[Any],
        temperature: float,
        max_response_tokens: int,
        total_steps: int,
        rank: Rank,
        seed: int = 0,
    ) -> None:
        self.algorithm = algorithm
        self.temperature = temperature
        self.max_response_tokens = max_response_tokens
        super().__init__(lambda: load_causal_lm(settings.model), settings, rank, total_steps, seed)

    def forward(self, model: nn.Module, batch: Experience) -> Tensor:
        return response_logprobs(model, batch, self.temperature)

    def loss(self, outputs: Tensor, batch: Experience, denominator: float) -> tuple[Tensor, Stats]:
        loss, stats = self.algorithm.actor_loss(outputs, batch, denominator)
        mask = batch.loss_mask
        # The bound on log-ratios would make an infinite log-prob look like a large one.
        loss = loss * torch.where(outputs.detach()[mask].isfinite().all(), 1.0, torch.nan)
        assert batch.old_logprobs is not None
        drift = torch.where(mask, outputs.detach() - batch.old_logprobs, 0.0)
        return loss, {
            **stats,
            "loss": (loss.detach() * denominator, torch.tensor(self.loss_denominator(batch))),
            # an estimate, from the sampled tokens
            "entropy": (-outputs.detach()[mask].sum(), mask.sum()),
            "log_ratio": (drift.abs().sum(), mask.sum()),  # its size, whatever its sign
            "max_log_ratio": (drift.abs().amax(), mask.sum()),
            "max_ratio_deviation": (drift.expm1().abs().amax(), mask.sum()),
        }

    def probe(self, ids: list[int]) -> list[float]:
        """Return log-probs of ids[1:] at temperature 1, for the proof of a weight sync. Call on
        every rank.
        """
        temperature = self.temperature
        self.temperature = 1.0
        try:
            return self.infer(Experience.from_ids([ids[:1]], [ids[1:]]))[0].tolist()
        finally:
            self.temperature = temperature

    def base_infer(self, shard: Experience) -> Tensor:
        """Return `infer` of the base, without the adapter: a Reference's log-probs. Call on every
        rank.
        """
        with without_adapter(self.model):
            return self.infer(shard)

    def base_probe(self, ids: list[int]) -> list[float]:
        """Return `probe` of the base, without the adapter. Call on every rank."""
        with without_adapter(self.model):
            return self.probe(ids)

    def loss_denominator(self, shard: Experience) -> float:
        return shard.loss_denominator(
            self.algorithm.settings.loss_aggregation, self.max_response_tokens
        )
