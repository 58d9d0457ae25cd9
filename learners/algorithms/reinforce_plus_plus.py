"""REINFORCE++: no critic and no groups, one baseline over the whole batch (Hu et al. 2025,
"REINFORCE++: An Efficient RLHF Algorithm with Robustness to Both Prompt and Reward Models").
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from learners.algorithms.base import Algorithm, AlgorithmSettings
from learners.algorithms.ppo import mean, sequence_kl, std
from learners.settings import Fraction

if TYPE_CHECKING:
    from learners.experience import Experience


class ReinforcePlusPlusSettings(AlgorithmSettings):
    """REINFORCE++: returns whitened over all tokens of the step; the KL is in the reward."""

    kind: str = "reinforce_plus_plus"
    gamma: Fraction = Field(1.0, description="discount per token")
    kl: Literal["k1", "k2", "k3"] = Field("k1", description="KL estimate in the reward")
    kl_beta: float = Field(
        0.01, ge=0, description="weight of the KL penalty per token; 0: no Reference is started"
    )

    @property
    def needs_reference(self) -> bool:
        return self.kl_beta > 0


class ReinforcePlusPlus(Algorithm[ReinforcePlusPlusSettings]):
    """Policy gradient with token rewards; its baseline is the mean return of the batch."""

    Settings = ReinforcePlusPlusSettings

    def advantages(self, batch: Experience) -> tuple[Experience, dict[str, float]]:
        """Fill `advantages` [B,T]: discounted sums of the rewards to come, whitened over the batch.

        The whitening's mean is the baseline. Metrics are returned beside them.
        """
        from learners.advantages import token_rewards, value_targets, whiten

        s = self.settings
        mask = batch.loss_mask
        assert batch.scores is not None and batch.old_logprobs is not None
        reference = batch.old_logprobs if batch.ref_logprobs is None else batch.ref_logprobs
        rewards = token_rewards(
            batch.scores, batch.old_logprobs, reference, mask, beta=s.kl_beta, kl=s.kl
        )
        returns = value_targets(rewards, rewards, mask, gamma=s.gamma, lam=1.0, kind="mc")
        metrics = {
            "reward/per_sequence": mean(rewards.sum(1), mask.any(1)),
            "return/mean": mean(returns, mask),
            "advantage/std": std(returns, mask),
        }
        if batch.ref_logprobs is not None:
            metrics["kl/sequence"] = sequence_kl(batch)
        return replace(batch, advantages=whiten(returns, mask)), metrics
