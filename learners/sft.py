"""SFTLearner: supervised fine-tuning; the loss is on the answer's tokens only."""

from __future__ import annotations

from torch import Tensor, nn

from learners.checkpoints import load_causal_lm
from learners.experience import Experience
from learners.forward import response_logprobs
from learners.learner import Learner
from learners.losses import Stats, aggregate
from learners.settings import LearnerSettings, Rank


class SFTLearner(Learner):
    """One rank of SFT: the mean negative log-likelihood per answer token of the mini-batch."""

    def __init__(
        self, settings: LearnerSettings, total_steps: int, rank: Rank, seed: int = 0
    ) -> None:
        super().__init__(lambda: load_causal_lm(settings.model), settings, rank, total_steps, seed)

    def forward(self, model: nn.Module, batch: Experience) -> Tensor:
        return response_logprobs(model, batch, 1.0)

    def loss(self, outputs: Tensor, batch: Experience, denominator: float) -> tuple[Tensor, Stats]:
        mask = batch.loss_mask
        loss = aggregate(-outputs, mask, how="token_mean", denominator=denominator)
        return loss, {"loss": (-outputs.detach()[mask].sum(), mask.sum())}
