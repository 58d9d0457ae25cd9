"""PPO: dense rewards, GAE, clipped Actor loss (Schulman et al. 2017; for language models Ziegler et
al. 2019).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from learners.advantages import gae, token_rewards, value_targets, whiten
from learners.experience import Experience
from learners.kl import AdaptiveKL, kl_estimate
from learners.losses import aggregate, policy_loss, rollout_correction
from learners.settings import PPOSettings


class PPO:
    """The driver calls `advantages` once a step, and `after_step` unless the step is skipped; the
    Actor's ranks call `actor_loss` on every micro-batch.
    """

    def __init__(self, settings: PPOSettings) -> None:
        self.settings = settings
        self.beta = settings.kl_beta

    def advantages(self, batch: Experience) -> tuple[Experience, dict[str, float]]:
        """Fill `advantages` and `returns` [B,T] from `scores`, log-probs and `values`; returns
        metrics beside them.
        """
        s = self.settings
        mask = batch.loss_mask
        assert batch.scores is not None and batch.old_logprobs is not None
        assert batch.ref_logprobs is not None and batch.values is not None
        rewards = token_rewards(
            batch.scores, batch.old_logprobs, batch.ref_logprobs, mask, beta=self.beta, kl=s.kl
        )
        advantages, returns = gae(rewards, batch.values, mask, gamma=s.gamma, lam=s.lam)
        if s.critic_target != "gae":
            returns = value_targets(
                rewards, batch.values, mask, gamma=s.gamma, lam=s.lam, kind=s.critic_target
            )
        sequences = mask.any(1)  # an unscorable or empty response counts in no mean
        metrics = {
            "kl/sequence": _sequence_kl(batch),
            "kl/beta": self.beta,
            "reward/per_sequence": _mean(rewards.sum(1), sequences),
            "advantage/std": _std(advantages, mask),
            "value/mean": _mean(batch.values, mask),
            "return/mean": _mean(returns, mask),
            "value/explained_variance": _explained_variance(batch.values, returns, mask),
        }
        if s.whiten_advantages:
            advantages = whiten(advantages, mask)
        return replace(batch, advantages=advantages, returns=returns), metrics

    def after_step(self, batch: Experience) -> None:
        """The step was learned from: with a target for the KL, beta follows it."""
        s = self.settings
        sequences = int(batch.loss_mask.any(1).sum())
        if s.kl_target is not None and sequences:
            controller = AdaptiveKL(self.beta, s.kl_target, s.kl_horizon)
            controller.update(_sequence_kl(batch), sequences)
            self.beta = controller.beta

    def actor_loss(
        self, logprobs: Tensor, batch: Experience, denominator: float
    ) -> tuple[Tensor, dict]:
        """Clipped policy loss of a micro-batch, divided by the mini-batch's `denominator`; and its
        statistics.
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
        )
        if s.rollout_correction is not None:
            correction = s.rollout_correction.model_dump()
            weights, more = rollout_correction(
                batch.old_logprobs, batch.rollout_logprobs, mask, **correction
            )
            per_token = per_token * weights
            stats = stats | more
        return aggregate(per_token, mask, how=s.loss_aggregation, denominator=denominator), stats

    def state(self) -> dict[str, float]:
        """What a checkpoint must keep."""
        return {"kl_beta": self.beta}

    def load_state(self, state: dict[str, float]) -> None:
        self.beta = state["kl_beta"]


def _sequence_kl(batch: Experience) -> float:
    """The mean over sequences of the KL summed over a sequence."""
    assert batch.old_logprobs is not None and batch.ref_logprobs is not None
    kl = kl_estimate(batch.old_logprobs, batch.ref_logprobs, "k1", batch.loss_mask)
    return _mean(kl.sum(1), batch.loss_mask.any(1))


def _mean(x: Tensor, mask: Tensor) -> float:
    return float(x[mask].mean()) if mask.any() else 0.0


def _std(x: Tensor, mask: Tensor) -> float:
    return float(x[mask].std(correction=0)) if mask.any() else 0.0


def _explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(return - value) / Var(return): 1 when the critic foresees every return, 0 when it
    knows nothing.
    """
    variance = returns[mask].var(correction=0) if mask.any() else torch.zeros(())
    return float(1 - (returns - values)[mask].var(correction=0) / variance) if variance > 0 else 0.0
