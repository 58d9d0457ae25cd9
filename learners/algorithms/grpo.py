"""GRPO: scores normalised inside each group instead of a critic, KL in the loss (Shao et al. 2024,
DeepSeekMath).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from learners.algorithms.base import Aggregation, Algorithm, AlgorithmSettings

if TYPE_CHECKING:
    from torch import Tensor

    from learners.experience import Experience
    from learners.losses import Stats


class GRPOSettings(AlgorithmSettings):
    """GRPO and its relatives Dr. GRPO, RLOO and GSPO: no critic, the KL is in the loss."""

    compares_groups: ClassVar[bool] = True

    kind: str = "grpo"
    ratio: Literal["token", "sequence"] = Field(
        "token", description="importance ratio per token or per sequence"
    )
    advantage: Literal["grpo", "dr_grpo", "rloo"] = Field(
        "grpo", description="how scores are normalised in a group"
    )
    kl_beta: float = Field(
        0.0, ge=0, description="weight of the k3 KL in the loss; 0: no Reference is started"
    )
    loss_aggregation: Aggregation = Field(
        "sequence_mean", description="how the losses of tokens become one number"
    )

    @property
    def needs_reference(self) -> bool:
        return self.kl_beta > 0


class GRPO(Algorithm[GRPOSettings]):
    """Group relative policy optimisation."""

    Settings = GRPOSettings

    def advantages(self, batch: Experience) -> tuple[Experience, dict[str, float]]:
        """Fill `advantages` [B,T] (the same on every token of a response); return metrics beside
        them.
        """
        from learners.advantages import group_advantages
        from learners.kl import kl_estimate

        assert batch.scores is not None
        per_sequence = group_advantages(batch.scores, self.group_size, kind=self.settings.advantage)
        with_spread = per_sequence.reshape(-1, self.group_size).any(1)
        metrics = {
            "group/with_spread": float(with_spread.float().mean()),
            "advantage/std": float(per_sequence.std()),
        }
        if batch.ref_logprobs is not None and batch.old_logprobs is not None:
            kl = kl_estimate(batch.old_logprobs, batch.ref_logprobs, "k1", batch.loss_mask)
            metrics["kl/sequence"] = float(kl.sum() / batch.loss_mask.any(1).sum().clamp(min=1))
        return replace(batch, advantages=per_sequence[:, None] * batch.loss_mask.float()), metrics

    def policy_objective(
        self, logprobs: Tensor, batch: Experience, ratio: str = "token"
    ) -> tuple[Tensor, Stats]:
        """Return the clipped loss plus `kl_beta` times the k3 KL per token, and statistics."""
        from learners.kl import kl_estimate

        per_token, stats = super().policy_objective(logprobs, batch, self.settings.ratio)
        if self.settings.kl_beta > 0:
            assert batch.ref_logprobs is not None
            kl = kl_estimate(logprobs, batch.ref_logprobs, "k3", batch.loss_mask)
            per_token = per_token + self.settings.kl_beta * kl
            stats["kl"] = (kl.detach().sum(), batch.loss_mask.sum())
        return per_token, stats
