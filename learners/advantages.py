"""From scores to advantages: KL penalties, dense rewards, GAE, group normalisation, whitening.

Shapes and conventions everywhere: tensors are [B, T], right-padded; `mask` (bool or 0/1) is 1 on
response tokens; any float dtype comes in, float32 goes out; a masked position influences nothing
and comes out as 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learners.kl import kl_estimate
from learners.logprobs import clean


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    beta: float,
    kl: str = "k1",
    score_clip: float | None = None,
) -> Tensor:
    """Return dense rewards: -beta * KL_t on every token, plus the sequence's score on its last
    response token.

    scores [B], the rest [B, T] -> [B, T]. `score_clip` clamps the score (not the KL) to ±score_clip
    first. An empty response has reward 0. A sequence whose score is NaN could not be scored: its
    rewards are 0 everywhere, since a KL penalty without the score it belongs to would only teach
    the Actor to be the Reference. Source: Ziegler et al. (2019), "Fine-Tuning Language Models from
    Human Preferences". Raises ValueError when shapes do not match.
    """
    if scores.shape != mask.shape[:1]:
        raise ValueError(
            f"one score per sequence expected: [{mask.shape[0]}], not {list(scores.shape)}"
        )
    mask = mask.bool() & ~scores.isnan().unsqueeze(1)
    scores = scores.float()
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    # The last token is the valid one with no valid token after it. Its column is not the length
    # minus one: the mask may have gaps. `where`, not a product with 0/1, keeps an infinite score
    # off the other tokens.
    valid_from_here = mask.flip(1).cumsum(1).flip(1)
    last = mask & (valid_from_here == 1)
    penalty = -beta * kl_estimate(logprobs, ref_logprobs, kl, mask)
    return torch.where(last, penalty + scores.unsqueeze(1), penalty)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Estimate advantages by GAE: A_t = delta_t + gamma lam A_next, delta_t = r_t + gamma V_next -
    V_t.

    rewards, values, mask [B, T] -> (advantages, returns), both [B, T], where returns = advantages +
    values. `next` is the next *valid* token: tokens masked out in the middle are skipped as if they
    were absent. After the last valid token value and advantage are 0. Source: Schulman et al.
    (2016), "High-Dimensional Continuous Control Using Generalized Advantage Estimation".
    """
    mask, rewards, values = clean(mask, rewards, values)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        advantages[:, t] = advantage
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, advantages + values


def value_targets(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float, kind: str
) -> Tensor:
    """Return the Critic's label, [B, T] -> [B, T].

    "mc" is the discounted sum of the rewards to come, "td" is r_t + gamma V_next, "gae" is the
    lambda-return A_t + V_t that lies between them. `lam` matters to "gae" alone. Raises ValueError
    for another kind.
    """
    match kind:
        case "mc":
            # with lambda = 1 the values cancel; leaving them out cancels them without rounding
            return gae(rewards, torch.zeros_like(values), mask, gamma=gamma, lam=1.0)[1]
        case "td":
            return gae(rewards, values, mask, gamma=gamma, lam=0.0)[1]
        case "gae":
            return gae(rewards, values, mask, gamma=gamma, lam=lam)[1]
    raise ValueError(f"unknown critic label {kind!r}: choose mc, td or gae")


def group_advantages(
    scores: Tensor, group_size: int, *, kind: str = "grpo", eps: float = 1e-6
) -> Tensor:
    """Compare every sample with the other samples of its prompt.

    scores [N], where each run of `group_size` neighbours is one group -> advantages [N]. With the
    group's mean: "grpo" is (r - mean) / (std + eps), std with n - 1 (Shao et al. 2024,
    DeepSeekMath); "dr_grpo" is r - mean (Liu et al. 2025, "Understanding R1-Zero-Like Training");
    "rloo" is r - mean of the others (Ahmadian et al. 2024, "Back to Basics"). A score that is not
    finite is left out of the statistics and gets 0; so does every sample in a group without spread,
    or with a single finite score: it has nothing to be compared with. Raises ValueError when N is
    not a multiple of group_size, and for another kind.
    """
    if group_size < 1 or scores.numel() % group_size:
        raise ValueError(f"{scores.numel()} scores cannot be cut into groups of {group_size}")
    # in float32, scores far from 0 would lose the digits in which they differ
    groups = scores.double().reshape(-1, group_size)
    finite = groups.isfinite()
    n = finite.sum(1, keepdim=True)
    groups = groups.masked_fill(~finite, 0.0)

    # Equal scores are recognised by comparison: the rounding error of their mean, divided by an
    # equally small std, would otherwise turn a group that teaches nothing into advantages of order
    # 1.
    highest = groups.masked_fill(~finite, -math.inf).amax(1, keepdim=True)
    lowest = groups.masked_fill(~finite, math.inf).amin(1, keepdim=True)
    informative = finite & (highest > lowest)

    mean = groups.sum(1, keepdim=True) / n.clamp(min=1)
    advantages = (groups - mean).masked_fill(~informative, 0.0)
    others = (n - 1).clamp(min=1)
    match kind:
        case "grpo":
            variance = advantages.square().sum(1, keepdim=True) / others
            advantages = advantages / (variance.sqrt() + eps)
        case "dr_grpo":
            pass
        case "rloo":  # r - (sum - r) / (n - 1) = (r - mean) * n / (n - 1)
            advantages = advantages * n / others
        case _:
            raise ValueError(f"unknown group advantage {kind!r}: choose grpo, dr_grpo or rloo")
    return advantages.reshape(scores.shape).float()


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Return (x - mean) / sqrt(var + eps), with mean and population variance over all valid tokens.

    x, mask [B, T] -> [B, T]. `shift_mean=False` adds the mean back: only the scale changes. With
    nothing valid the result is 0. Source: the PPO of Ziegler et al. (2019).
    """
    mask, x = clean(mask, x)
    n = mask.sum().clamp(min=1)
    mean = x.sum() / n
    centred = (x - mean).masked_fill(~mask, 0.0)
    # A second pass removes the rounding error of the mean, which the division magnifies when x is
    # constant.
    centred = (centred - centred.sum() / n).masked_fill(~mask, 0.0)
    whitened = centred * torch.rsqrt(centred.square().sum() / n + eps)
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0.0)
