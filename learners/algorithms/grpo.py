"""GRPO: scores normalised inside each group instead of a critic, KL in the loss (Shao et al. 2024,
DeepSeekMath).
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from learners.advantages import group_advantages
from learners.experience import Experience
from learners.kl import kl_estimate
from learners.losses import aggregate, policy_loss, rollout_correction
from learners.settings import GRPOSettings


class GRPO:
    """The driver calls `advantages` once a step, and `after_step` unless the step is skipped; the
    Actor's ranks call `actor_loss` on every micro-batch.
    """

    def __init__(self, settings: GRPOSettings, group_size: int) -> None:
        self.settings = settings
        self.group_size = group_size

    def advantages(self, batch: Experience) -> tuple[Experience, dict[str, float]]:
        """Fill `advantages` [B,T] (the same on every token of a response); returns metrics beside
        them.
        """
        assert batch.scores is not None
        per_sequence = group_advantages(batch.scores, self.group_size, kind=self.settings.advantage)
        advantages = per_sequence[:, None] * batch.loss_mask.float()
        spread = per_sequence.reshape(-1, self.group_size).any(1)
        metrics = {
            "group/with_spread": float(spread.float().mean()),
            "advantage/std": float(per_sequence.std()),
        }
        if batch.ref_logprobs is not None and batch.old_logprobs is not None:
            kl = kl_estimate(batch.old_logprobs, batch.ref_logprobs, "k1", batch.loss_mask)
            metrics["kl/sequence"] = float(kl.sum() / batch.loss_mask.any(1).sum().clamp(min=1))
        return replace(batch, advantages=advantages), metrics

    def after_step(self, batch: Experience) -> None:
        """Nothing follows from a step but the Actor."""

    def actor_loss(
        self, logprobs: Tensor, batch: Experience, denominator: float
    ) -> tuple[Tensor, dict]:
        """Clipped policy loss plus `kl_beta` times the k3 KL, both divided by the mini-batch's
        `denominator`.
        """
        s = self.settings
        mask = batch.loss_mask
        per_token, stats = policy_loss(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            mask,
            clip_low=s.clip_low,
            clip_high=s.clip_high,
            dual_clip=s.dual_clip,
            ratio=s.ratio,
        )
        if s.rollout_correction is not None:
            correction = s.rollout_correction.model_dump()
            weights, more = rollout_correction(
                batch.old_logprobs, batch.rollout_logprobs, mask, **correction
            )
            per_token = per_token * weights
            stats = stats | more
        if s.kl_beta > 0:
            kl = kl_estimate(logprobs, batch.ref_logprobs, "k3", mask)
            per_token = per_token + s.kl_beta * kl
            stats["kl"] = (kl.detach().sum(), mask.sum())
        return aggregate(per_token, mask, how=s.loss_aggregation, denominator=denominator), stats

    def state(self) -> dict[str, float]:
        """What a checkpoint must keep: nothing."""
        return {}

    def load_state(self, state: dict[str, float]) -> None:
        assert not state
