"""RewardModelLearner: a score per sequence, trained so that the chosen answer beats the rejected
one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from learners.checkpoints import (
    Calibration,
    forget_calibration,
    load_reward_model,
    write_calibration,
)
from learners.experience import Experience
from learners.forward import sequence_scores
from learners.learner import Learner
from learners.losses import Stats, pairwise_loss
from learners.settings import LearnerSettings, Rank, RewardModelSettings


class RewardModelLearner(Learner):
    """One rank of reward-model training. Batches hold pairs: row 2i is chosen, row 2i+1 rejected.

    The loss is the Bradley-Terry negative log-likelihood (Ouyang et al. 2022), optionally plus
    `centring` · (chosen + rejected)² (Eisenstein et al. 2023). `infer` gives raw scores [B].
    """

    rows_per_unit = 2
    has_head = True

    def __init__(
        self,
        settings: LearnerSettings,
        reward_model: RewardModelSettings,
        pad_token_id: int,
        seed: int,
        total_steps: int,
        rank: Rank,
    ) -> None:
        self.reward_model = reward_model
        torch.manual_seed(seed)  # draws the new head, the same on every rank
        super().__init__(
            lambda: load_reward_model(settings.model, pad_token_id),
            settings,
            rank,
            total_steps,
            seed,
        )
        forget_calibration(self.model.config)

    def forward(self, model: nn.Module, batch: Experience) -> Tensor:
        return sequence_scores(model, batch, self.reward_model.padding_side)

    def loss(self, outputs: Tensor, batch: Experience, denominator: float) -> tuple[Tensor, Stats]:
        chosen, rejected = outputs.reshape(-1, 2).unbind(1)
        # placeholders weigh nothing
        real = (batch.response_lengths > 0).reshape(-1, 2).all(1).float()
        margin = None if batch.margins is None else batch.margins[::2]
        per_pair = (
            pairwise_loss(chosen, rejected, margin)
            + self.reward_model.centring * (chosen + rejected) ** 2
        )
        difference = (chosen - rejected).detach()
        return (per_pair * real).sum() / max(denominator, 1.0), {
            "loss": ((per_pair.detach() * real).sum(), real.sum()),
            "accuracy": (((difference > 0) * real).sum(), real.sum()),  # a tie is not a win
            "margin": ((difference * real).sum(), real.sum()),
        }

    def loss_denominator(self, shard: Experience) -> float:
        return len(shard) / 2

    def train(self, shard: Experience) -> dict[str, float]:
        """Take one optimizer step. A calibration belongs to the weights as they were before."""
        forget_calibration(self.model.config)
        return super().train(shard)

    def remember_tokenizer(self, digest: str) -> None:
        """Store the digest of the tokenizer in the model's config: an evaluator compares it with
        that of its own texts.
        """
        self.model.config.tokenizer_digest = digest

    def calibrate(self, mean: float, std: float) -> None:
        """Store the scores' mean and std in the model's config; our workers then report (score -
        mean) / std.
        """
        write_calibration(self.model.config, Calibration(mean, std))
