"""Distance of the policy from another one: estimates of the KL divergence, and the weight that
follows them.

Shapes and conventions as in `advantages`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from learners.logprobs import LOG_RATIO_LIMIT, clean


def kl_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, kind: str, mask: Tensor | None = None
) -> Tensor:
    """Estimate KL(policy || reference) per token, in nats, for tokens sampled from the policy.

    logprobs, ref_logprobs (and mask) of one shape -> the same shape. With d = logprobs -
    ref_logprobs: "k1" is d (unbiased, may be negative), "k2" is d²/2, "k3" is exp(-d) + d - 1
    (unbiased, never negative), with d clamped to ±20. Source: J. Schulman, "Approximating KL
    divergence" (2020). Raises ValueError for another kind.
    """
    if mask is None:
        mask = torch.ones_like(logprobs, dtype=torch.bool)
    _, logprobs, ref_logprobs = clean(mask, logprobs, ref_logprobs)
    difference = logprobs - ref_logprobs
    match kind:
        case "k1":
            return difference
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            ref_log_ratio = (-difference).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            # expm1, because exp(x) - 1 loses all its digits while the policies are close
            return ref_log_ratio.expm1() - ref_log_ratio
    raise ValueError(f"unknown KL estimate {kind!r}: choose k1, k2 or k3")


@dataclass
class AdaptiveKL:
    """Controller that moves `beta`, the weight of the KL penalty, so that the KL per sequence
    approaches `target` (nats).

    The proportional controller of Ziegler et al. (2019). `horizon` is counted in sequences: at the
    largest error, beta changes by a fifth per `horizon` of them. Raises ValueError unless all three
    are positive.
    """

    beta: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        for name in ("beta", "target", "horizon"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name} of the adaptive KL must be positive, not {getattr(self, name)}"
                )

    def update(self, sequence_kl: float | Tensor, n: int) -> None:
        """Multiply beta by 1 + clip(sequence_kl / target - 1, ±0.2) * n / horizon.

        `sequence_kl` is the mean over n sequences of the KL summed over a sequence. One that is not
        finite says nothing about the policy and leaves beta alone; clipped, an overflow would pass
        for the largest error. Raises ValueError when n is so large for the horizon that beta would
        stop being positive and reward divergence.
        """
        kl = float(sequence_kl)
        if not math.isfinite(kl):
            return
        factor = 1.0 + min(max(kl / self.target - 1.0, -0.2), 0.2) * n / self.horizon
        if factor <= 0.0:
            raise ValueError(
                f"a horizon of {self.horizon} is too short for updates of {n} sequences: "
                f"use more than {n / 5}"
            )
        self.beta *= factor
