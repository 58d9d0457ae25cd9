"""PPO: dense rewards, GAE, clipped Actor loss (Schulman et al. 2017; for language models Ziegler et
al. 2019).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from learners.algorithms.base import Algorithm, AlgorithmSettings
from learners.errors import Problem
from learners.settings import Fraction, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor

    from learners.experience import Experience


class PPOSettings(AlgorithmSettings):
    """PPO with a critic: the KL is in the reward."""

    needs_critic: ClassVar[bool] = True

    kind: str = "ppo"
    gamma: Fraction = Field(1.0, description="discount per token")
    lam: Fraction = Field(0.95, description="GAE lambda")
    critic_target: Literal["mc", "td", "gae"] = Field("gae", description="the critic's label")
    value_clip: float | None = Field(
        0.2, gt=0, description="largest change of a value per step; null: unclipped"
    )
    kl: Literal["k1", "k2", "k3"] = Field("k1", description="KL estimate in the reward")
    kl_beta: float = Field(0.1, ge=0, description="weight of the KL penalty per token")
    kl_target: float | None = Field(
        None, gt=0, description="adapt kl_beta towards this KL per sequence, nats"
    )
    kl_horizon: PositiveInt = Field(10_000, description="sequences over which kl_beta adapts")
    whiten_advantages: bool = Field(
        True, description="whiten advantages over all tokens of the step"
    )

    @property
    def needs_reference(self) -> bool:
        """Always true: without a penalty too, the KL to the Reference is a metric."""
        return True

    def critic_arguments(self) -> dict[str, Any]:
        return {"value_clip": self.value_clip}

    def problems(self, sequences: int) -> Iterator[Problem]:
        if self.kl_target is None:
            return
        if self.kl_beta == 0:
            message = "adapts kl_beta by factors, so kl_beta must start above 0"
            yield Problem(("algorithm.kl_target", "algorithm.kl_beta"), message)
        if self.kl_horizon < sequences:
            message = f"{self.kl_horizon} is less than one step of {sequences} sequences"
            yield Problem(("algorithm.kl_horizon",), f"{message}; take several steps")


class PPO(Algorithm[PPOSettings]):
    """Proximal policy optimisation with a critic and, if asked, an adaptive KL penalty."""

    Settings = PPOSettings

    def __init__(self, settings: PPOSettings, group_size: int = 1) -> None:
        super().__init__(settings, group_size)
        self.beta = settings.kl_beta

    def advantages(self, batch: Experience) -> tuple[Experience, dict[str, float]]:
        """Fill `advantages` and `returns` [B,T] from `scores`, log-probs and `values`; return
        metrics beside them.
        """
        from learners.advantages import gae, token_rewards, value_targets, whiten

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
        metrics = {
            "kl/sequence": sequence_kl(batch),
            "kl/beta": self.beta,
            # an unscorable or empty response counts in no mean
            "reward/per_sequence": mean(rewards.sum(1), mask.any(1)),
            "advantage/std": std(advantages, mask),
            "value/mean": mean(batch.values, mask),
            "return/mean": mean(returns, mask),
            "value/explained_variance": _explained_variance(batch.values, returns, mask),
        }
        if s.whiten_advantages:
            advantages = whiten(advantages, mask)
        return replace(batch, advantages=advantages, returns=returns), metrics

    def after_step(self, batch: Experience) -> None:
        """Let beta follow the KL towards its target, if there is one."""
        from learners.kl import AdaptiveKL

        s = self.settings
        sequences = int(batch.loss_mask.any(1).sum())
        if s.kl_target is not None and sequences:
            controller = AdaptiveKL(self.beta, s.kl_target, s.kl_horizon)
            controller.update(sequence_kl(batch), sequences)
            self.beta = controller.beta

    def state(self) -> dict[str, float]:
        return {"kl_beta": self.beta}

    def load_state(self, state: dict[str, float]) -> None:
        self.beta = state["kl_beta"]


def sequence_kl(batch: Experience) -> float:
    """Return the mean over sequences of the KL to the Reference summed over a sequence, nats."""
    from learners.kl import kl_estimate

    assert batch.old_logprobs is not None and batch.ref_logprobs is not None
    kl = kl_estimate(batch.old_logprobs, batch.ref_logprobs, "k1", batch.loss_mask)
    return mean(kl.sum(1), batch.loss_mask.any(1))


def mean(x: Tensor, mask: Tensor) -> float:
    """Return the mean of the selected entries; 0 where the mask selects none."""
    return float(x[mask].mean()) if mask.any() else 0.0


def std(x: Tensor, mask: Tensor) -> float:
    """Return the population standard deviation of the selected entries; 0 where there are none."""
    return float(x[mask].std(correction=0)) if mask.any() else 0.0


def _explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return 1 - Var(return - value) / Var(return): 1 when the critic foresees every return, 0 when
    it knows nothing.
    """
    if not mask.any() or not (variance := returns[mask].var(correction=0)) > 0:
        return 0.0
    return float(1 - (returns - values)[mask].var(correction=0) / variance)
