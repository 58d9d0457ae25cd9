"""The losses: the clipped objective of PPO and GRPO, the Critic's error, and their aggregation over
tokens.

Shapes and conventions as in `advantages`: [B, T], right-padded, float32 out, nothing behind the
mask counts. Per-token losses leave here unreduced, so that one global denominator can serve every
micro-batch and every rank. Statistics are (sum, count) pairs of detached scalars for the same
reason: sums and counts add up, means do not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from learners.kl import kl_estimate
from learners.logprobs import LOG_RATIO_LIMIT, clean

Stats = dict[str, tuple[Tensor, Tensor]]


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio: str = "token",
) -> tuple[Tensor, Stats]:
    """Return the clipped surrogate, -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) per
    token, and statistics; all [B, T].

    `ratio="token"` is exp(logprobs - old_logprobs) (Schulman et al. 2017, PPO); `"sequence"` is exp
    of its mean over the response, the same on every token (Zheng et al. 2025, GSPO). `dual_clip` c
    > 1 bounds the objective from below by c A where A < 0 (Ye et al. 2020), so that one token that
    became very likely cannot dominate a batch. Only `logprobs` gets a gradient. Raises ValueError
    for another ratio or a dual_clip not above 1.

    Statistics, over valid tokens: `clip_fraction`, tokens held by the clip, which get no gradient
    (the ratio is outside the range *and* the advantage pushes it further out); `dual_clip_fraction`
    (with dual_clip), tokens held by c A; `approx_kl`, k3 of KL(old || new); `ratio`.
    """
    if ratio not in ("token", "sequence"):
        raise ValueError(f"unknown ratio {ratio!r}: choose token or sequence")
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"dual_clip must be above 1, not {dual_clip}")
    mask, logprobs, old_logprobs, advantages = clean(
        mask, logprobs, old_logprobs.detach(), advantages.detach()
    )

    log_ratio = logprobs - old_logprobs
    if ratio == "sequence":
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = mean.expand_as(mask)
    ratios = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()

    surrogate = ratios * advantages
    clipped = ratios.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    objective = torch.minimum(surrogate, clipped)
    stats = {
        "clip_fraction": _stat(clipped < surrogate, mask),
        "approx_kl": _stat(kl_estimate(old_logprobs, logprobs.detach(), "k3"), mask),
        "ratio": _stat(ratios, mask),
    }
    if dual_clip is not None:
        floor = dual_clip * advantages
        held = (advantages < 0) & (objective < floor)
        objective = torch.where(held, floor, objective)
        stats["dual_clip_fraction"] = _stat(held, mask)
    # Under a sequence's ratio the NaN of one token reaches the columns behind the mask too.
    return -objective.masked_fill(~mask, 0.0), stats


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = 0.2
) -> tuple[Tensor, Stats]:
    """Return the clipped error, 0.5 * max((V - R)², (clip(V, old ± clip) - R)²) per token, and
    statistics; all [B, T].

    clip=None is the plain 0.5 * (V - R)². A value that already moved further than `clip` towards
    its return gets no more gradient. Only `values` gets one at all. Source: the PPO implementation
    of OpenAI Baselines; `clip` is in units of the value, not relative.

    Statistics, over valid tokens: `clip_fraction` (tokens without gradient), `value` and
    `return`.
    """
    mask, values, old_values, returns = clean(mask, values, old_values.detach(), returns.detach())
    squared = (values - returns).square()
    worst = squared
    if clip is not None:
        clipped = torch.clamp(values, old_values - clip, old_values + clip)
        worst = torch.maximum(squared, (clipped - returns).square())
    stats = {
        "clip_fraction": _stat(worst > squared, mask),
        "value": _stat(values, mask),
        "return": _stat(returns, mask),
    }
    return 0.5 * worst, stats


def rollout_correction(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, kind: str, cap: float
) -> tuple[Tensor, Stats]:
    """Weigh tokens sampled by an engine whose probabilities are not the learner's: importance
    weights [B, T], and statistics.

    w = exp(old_logprobs - rollout_logprobs), per token ("token_...") or its product over the
    response, the same on every token ("sequence_..."). "..._truncate" keeps min(w, cap); "..._mask"
    keeps w up to the cap and drops what lies above (weight 0). The weights multiply a per-token
    loss; its denominator stays as it is, so dropping a token never makes the others heavier.
    Source: Yao et al. (2025), "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training". No gradient. Raises ValueError for another kind or a cap that is not positive.

    Statistics, over valid tokens: `rollout_weight` (after the cap), `rollout_capped` (tokens whose
    w is above it), `rollout_kl`, k3 of KL(engine || learner).
    """
    level, _, treatment = kind.partition("_")
    if level not in ("token", "sequence") or treatment not in ("truncate", "mask"):
        raise ValueError(
            f"unknown rollout correction {kind!r}: choose token_truncate, token_mask, "
            "sequence_truncate or sequence_mask"
        )
    if not cap > 0.0:
        raise ValueError(f"the cap of the rollout correction must be positive, not {cap}")
    mask, old_logprobs, rollout_logprobs = clean(
        mask, old_logprobs.detach(), rollout_logprobs.detach()
    )

    log_weight = old_logprobs - rollout_logprobs
    if level == "sequence":
        log_weight = log_weight.sum(1, keepdim=True).expand_as(mask)
    weights = log_weight.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    above = weights > cap
    weights = weights.masked_fill(above, cap if treatment == "truncate" else 0.0).masked_fill(
        ~mask, 0.0
    )
    return weights, {
        "rollout_weight": _stat(weights, mask),
        "rollout_capped": _stat(above, mask),
        "rollout_kl": _stat(kl_estimate(rollout_logprobs, old_logprobs, "k3"), mask),
    }


def aggregate(
    per_token: Tensor, mask: Tensor, *, how: str, denominator: float | Tensor | None = None
) -> Tensor:
    """Make one number of a per-token loss [B, T].

    "token_mean" divides the sum over tokens by the count of valid tokens; "sequence_mean" divides
    the sum of the per-sequence means by the count of non-empty sequences; "constant" divides the
    sum by `denominator`, whatever the lengths are (Liu et al. 2025, Dr. GRPO). `denominator`
    replaces the local count: given the count of the whole mini-batch, the results of all
    micro-batches and ranks *add up* to the loss of the uncut mini-batch. Nothing valid gives 0 with
    a graph, so that a rank without tokens still takes part in backward. Raises ValueError for
    another `how`, and for "constant" without a denominator.
    """
    mask, per_token = clean(mask, per_token)
    lengths = mask.sum(1)
    counts: dict[str, Tensor | None] = {
        "token_mean": lengths.sum(),
        "sequence_mean": (lengths > 0).sum(),
        "constant": None,
    }
    if how not in counts:
        raise ValueError(
            f"unknown aggregation {how!r}: choose token_mean, sequence_mean or constant"
        )
    per_sequence = per_token.sum(1) / lengths.clamp(min=1)
    total = per_sequence.sum() if how == "sequence_mean" else per_token.sum()
    count = counts[how] if denominator is None else denominator
    if count is None:
        raise ValueError("aggregation 'constant' needs a denominator")
    divisor = torch.as_tensor(count, dtype=torch.float32, device=total.device)
    return total / divisor.masked_fill(divisor == 0, 1.0)  # a count of 0 comes with a total of 0


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: float | Tensor | None = None) -> Tensor:
    """Return -log sigmoid(chosen - rejected - margin), per pair; scores and margin of one shape,
    usually [B].

    The Bradley-Terry likelihood of the preference (Ouyang et al. 2022), with the margin of Touvron
    et al. (2023, Llama 2). Finite, in value and gradient, for any finite difference. Raises
    ValueError when chosen and rejected are not as many.
    """
    if chosen.shape != rejected.shape:
        raise ValueError(
            f"pairs expected, not chosen {list(chosen.shape)} and rejected {list(rejected.shape)}"
        )
    difference = chosen.float() - rejected.float()
    if margin is not None:
        difference = difference - torch.as_tensor(
            margin, dtype=torch.float32, device=difference.device
        )
    return -F.logsigmoid(difference)


def _stat(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sum over valid tokens, count of valid tokens), detached."""
    return x.detach().float().masked_fill(~mask, 0.0).sum(), mask.sum().float()
