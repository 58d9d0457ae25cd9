"""CriticLearner: values of states, trained on returns by the clipped squared error."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from learners.checkpoints import load_critic
from learners.experience import Experience
from learners.forward import response_values
from learners.learner import Learner
from learners.losses import Stats, aggregate, value_loss
from learners.settings import LearnerSettings, Rank


class CriticLearner(Learner):
    """One rank of the Critic. `infer` gives `values` [B,T]: row t is read before response
    token t.
    """

    has_head = True

    def __init__(
        self,
        settings: LearnerSettings,
        value_clip: float | None,
        total_steps: int,
        rank: Rank,
        seed: int = 0,
    ) -> None:
        self.value_clip = value_clip
        super().__init__(lambda: load_critic(settings.model), settings, rank, total_steps, seed)

    def forward(self, model: nn.Module, batch: Experience) -> Tensor:
        return response_values(model, batch)

    def loss(self, outputs: Tensor, batch: Experience, denominator: float) -> tuple[Tensor, Stats]:
        assert batch.values is not None and batch.returns is not None
        per_token, stats = value_loss(
            outputs, batch.values, batch.returns, batch.loss_mask, clip=self.value_clip
        )
        loss = aggregate(per_token, batch.loss_mask, how="token_mean", denominator=denominator)
        return loss, {
            **stats,
            "loss": (loss.detach() * denominator, torch.tensor(self.loss_denominator(batch))),
        }
