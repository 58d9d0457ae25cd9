"""Rewards, advantages and returns against numbers worked out by hand."""

import math

import pytest
import torch

from learners.advantages import gae, group_advantages, token_rewards, value_targets, whiten
from learners.kl import AdaptiveKL, kl_estimate

NAN = math.nan
INF = math.inf
GARBAGE = (NAN, INF, -INF)
MASK_TYPES = [torch.bool, torch.int64, torch.float32]


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float32)


def assert_only_valid_gradients(gradient, mask):
    assert gradient.isfinite().all()
    assert (gradient[~mask.bool()] == 0).all()
    assert (gradient[mask.bool()] != 0).any()


# --- KL -------------------------------------------------------------------------------------------


# d = lp - ref = log 2 on the first token, -log 2 on the second
@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("k1", math.log(2), -math.log(2)),
        ("k2", math.log(2) ** 2 / 2, math.log(2) ** 2 / 2),
        ("k3", 0.5 + math.log(2) - 1, 2 - math.log(2) - 1),  # exp(-d) + d - 1
    ],
)
def test_kl_estimates(kind, first, second):
    logprobs = row(-1.0, -1.0)
    ref = row(-1.0 - math.log(2), -1.0 + math.log(2))
    torch.testing.assert_close(kl_estimate(logprobs, ref, kind), row(first, second))


# derivatives by logprobs at d = log 2: 1, d, and 1 - exp(-d) = 1/2
@pytest.mark.parametrize(("kind", "slope"), [("k1", 1.0), ("k2", math.log(2)), ("k3", 0.5)])
def test_kl_gradients(kind, slope):
    logprobs = row(-1.0).requires_grad_()
    kl_estimate(logprobs, row(-1.0 - math.log(2)), kind).sum().backward()
    torch.testing.assert_close(logprobs.grad, row(slope))


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_ignores_what_is_masked(kind, garbage):
    logprobs = row(-1.0, garbage).requires_grad_()
    mask = torch.tensor([[1, 0]])
    estimate = kl_estimate(logprobs, row(-2.0, garbage), kind, mask)
    assert estimate[0, 1] == 0
    estimate.sum().backward()
    assert_only_valid_gradients(logprobs.grad, mask)


def test_k3_is_never_negative_and_never_infinite():
    difference = torch.cat([torch.linspace(-1e-3, 1e-3, 101), torch.tensor([-1e4, 1e4])])[None]
    k3 = kl_estimate(difference, torch.zeros_like(difference), "k3")
    assert (k3 >= 0).all()
    # d clamped to -20 and 20
    torch.testing.assert_close(k3[0, -2:], torch.tensor([math.exp(20) - 21, 19.0]))
    # exp(x) - 1 - x in plain float32 would be wrong in the first digit here: the true value is d²/2
    torch.testing.assert_close(kl_estimate(row(1e-3), row(0.0), "k3"), row(5e-7), rtol=1e-2, atol=0)


def test_kl_of_bf16_is_computed_in_float32():
    # bf16 keeps 8 bits: 200.0 - 1.5 would be rounded to 198 or 199
    estimate = kl_estimate(row(200.0).bfloat16(), row(1.5).bfloat16(), "k1")
    assert estimate.dtype == torch.float32
    assert estimate.item() == 198.5


def test_an_unknown_kl_names_the_choices():
    with pytest.raises(ValueError, match="'k4'.*k1, k2 or k3"):
        kl_estimate(row(0.0), row(0.0), "k4")


# --- rewards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", MASK_TYPES)
def test_rewards_are_the_kl_penalty_and_the_score_on_the_last_token(dtype):
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, NAN]])
    ref = torch.tensor([[-2.0, -2.0, -2.0], [-1.5, -0.5, INF]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).to(dtype)
    rewards = token_rewards(torch.tensor([4.0, -2.0]), logprobs, ref, mask, beta=0.1)
    # k1: 1, 0, -1 and 0.5, -0.5; the scores join on tokens 2 and 1
    expected = torch.tensor([[-0.1, 0.0, 0.1 + 4.0], [-0.05, 0.05 - 2.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_rewards_use_the_chosen_kl():
    rewards = token_rewards(
        torch.zeros(1), row(-1.0), row(-4.0), torch.ones(1, 1), beta=0.5, kl="k2"
    )
    assert rewards.item() == -0.5 * 4.5  # k2 = 3²/2


def test_the_score_finds_the_last_token_behind_gaps():
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 1]])
    zeros = torch.zeros(2, 5)
    rewards = token_rewards(torch.tensor([3.0, 7.0]), zeros, zeros, mask, beta=1.0)
    assert rewards.tolist() == [[0, 0, 3, 0, 0], [0, 0, 0, 0, 7]]


def test_an_empty_response_has_no_reward_whatever_its_score():
    mask = torch.tensor([[0, 0], [1, 0]])
    rewards = token_rewards(
        torch.tensor([INF, 1.0]), torch.full((2, 2), -1.0), torch.zeros(2, 2), mask, beta=0.1
    )
    torch.testing.assert_close(rewards, torch.tensor([[0.0, 0.0], [1.1, 0.0]]))


def test_no_tokens_at_all():
    empty = torch.zeros(2, 0)
    assert token_rewards(torch.ones(2), empty, empty, empty, beta=0.1).shape == (2, 0)


@pytest.mark.parametrize(("score", "expected"), [(9.0, 5.0), (-9.0, -5.0), (INF, 5.0), (4.0, 4.0)])
def test_score_clip_bounds_the_score_and_not_the_kl(score, expected):
    rewards = token_rewards(
        torch.tensor([score]), row(100.0), row(0.0), torch.ones(1, 1), beta=1.0, score_clip=5.0
    )
    assert rewards.item() == expected - 100.0


def test_an_infinite_score_touches_the_last_token_alone():
    rewards = token_rewards(
        torch.tensor([INF]), row(-1.0, -1.0), row(0.0, 0.0), torch.ones(1, 2), beta=1.0
    )
    assert rewards.tolist() == [[1.0, INF]]


@pytest.mark.parametrize("clip", [None, 5.0])
def test_an_unscorable_sample_gets_zero_and_leaves_the_others_alone(clip):
    logprobs = torch.full((2, 2), -1.0)
    ref = torch.zeros(2, 2)
    mask = torch.ones(2, 2)
    rewards = token_rewards(
        torch.tensor([NAN, 2.0]), logprobs, ref, mask, beta=0.5, score_clip=clip
    )
    assert rewards.tolist() == [[0.0, 0.0], [0.5, 2.5]]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_rewards_have_clean_gradients(garbage):
    logprobs = row(-1.0, -1.0, garbage).requires_grad_()
    mask = torch.tensor([[1, 1, 0]])
    token_rewards(
        torch.tensor([1.0]), logprobs, row(0.0, 0.0, garbage), mask, beta=0.5, kl="k3"
    ).sum().backward()
    assert_only_valid_gradients(logprobs.grad, mask)


def test_rewards_of_bf16_are_float32():
    zeros = torch.zeros(1, 1).bfloat16()
    rewards = token_rewards(
        torch.tensor([1.5]).bfloat16(), zeros, zeros, torch.ones(1, 1), beta=0.1
    )
    assert rewards.dtype == torch.float32
    assert rewards.item() == 1.5


def test_scores_must_be_one_per_sequence():
    with pytest.raises(ValueError, match="one score per sequence"):
        token_rewards(
            torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 1), torch.ones(2, 1), beta=0.1
        )


# --- GAE ------------------------------------------------------------------------------------------

# rewards 1, 0, 2; values 0.5, 1, 1.5; gamma 0.5, lambda 0.5 (so gamma lambda = 1/4)
#   delta_2 = 2 + 0     - 1.5 =  0.5      A_2 =  0.5
#   delta_1 = 0 + 0.75  - 1   = -0.25     A_1 = -0.25 + 0.125    = -0.125
#   delta_0 = 1 + 0.5   - 0.5 =  1        A_0 =  1    - 0.03125  =  0.96875
REWARDS = (1.0, 0.0, 2.0)
VALUES = (0.5, 1.0, 1.5)
ADVANTAGES = (0.96875, -0.125, 0.5)
RETURNS = (1.46875, 0.875, 2.0)
HALVES = {"gamma": 0.5, "lam": 0.5}


def test_gae_by_hand():
    advantages, returns = gae(row(*REWARDS), row(*VALUES), torch.ones(1, 3), **HALVES)
    assert advantages.tolist() == [list(ADVANTAGES)]
    assert returns.tolist() == [list(RETURNS)]


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("dtype", MASK_TYPES)
def test_gae_steps_over_gaps_and_padding_as_if_they_were_absent(dtype, garbage):
    mask = torch.tensor([[1, 0, 1, 0, 0, 1, 0]]).to(dtype)
    rewards = row(REWARDS[0], garbage, REWARDS[1], garbage, garbage, REWARDS[2], garbage)
    values = row(VALUES[0], garbage, VALUES[1], garbage, garbage, VALUES[2], garbage)
    advantages, returns = gae(rewards, values, mask, **HALVES)
    assert advantages.tolist() == [[ADVANTAGES[0], 0, ADVANTAGES[1], 0, 0, ADVANTAGES[2], 0]]
    assert returns.tolist() == [[RETURNS[0], 0, RETURNS[1], 0, 0, RETURNS[2], 0]]


def test_gae_treats_every_row_alone():
    rewards = torch.tensor([REWARDS, (3.0, NAN, NAN), (NAN, NAN, NAN)])
    values = torch.tensor([VALUES, (1.0, NAN, NAN), (NAN, NAN, NAN)])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    advantages, returns = gae(rewards, values, mask, **HALVES)
    assert advantages.tolist() == [list(ADVANTAGES), [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert returns.tolist() == [list(RETURNS), [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_gae_has_clean_gradients(garbage):
    rewards = row(1.0, garbage, 2.0, garbage).requires_grad_()
    values = row(0.5, garbage, 1.5, garbage).requires_grad_()
    mask = torch.tensor([[1, 0, 1, 0]])
    gae(rewards, values, mask, **HALVES)[0].sum().backward()
    # A_0 + A_1 = (r_0 + V_1/2 - V_0 + (r_1 - V_1)/4) + (r_1 - V_1)
    assert rewards.grad.tolist() == [[1.0, 0.0, 1.25, 0.0]]
    assert values.grad.tolist() == [[-1.0, 0.0, -0.75, 0.0]]


def test_gae_of_no_tokens():
    advantages, returns = gae(
        torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0), gamma=1.0, lam=1.0
    )
    assert advantages.shape == returns.shape == (2, 0)


def test_gae_of_bf16_is_computed_in_float32():
    # 256 + 1 is not a bf16 number
    advantages, returns = gae(
        row(1.0, 256.0).bfloat16(), row(0, 0).bfloat16(), torch.ones(1, 2), gamma=1, lam=1
    )
    assert advantages.dtype == returns.dtype == torch.float32
    assert advantages.tolist() == [[257.0, 256.0]]


def test_gae_refuses_a_bootstrap_column():
    with pytest.raises(ValueError, match="shape"):
        gae(torch.zeros(1, 3), torch.zeros(1, 4), torch.ones(1, 3), gamma=1.0, lam=1.0)


# mc: 2; 0 + 2/2 = 1; 1 + 1/2 = 1.5        td: 2; 0 + 1.5/2 = 0.75; 1 + 1/2 = 1.5
CRITIC_LABELS = {"mc": (1.5, 1.0, 2.0), "td": (1.5, 0.75, 2.0), "gae": RETURNS}


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("kind", CRITIC_LABELS)
def test_value_targets_by_hand_with_a_gap(kind, garbage):
    mask = torch.tensor([[1, 1, 0, 1, 0]])
    rewards = row(REWARDS[0], REWARDS[1], garbage, REWARDS[2], garbage)
    values = row(VALUES[0], VALUES[1], garbage, VALUES[2], garbage)
    targets = value_targets(rewards, values, mask, **HALVES, kind=kind)
    first, second, third = CRITIC_LABELS[kind]
    torch.testing.assert_close(targets, row(first, second, 0.0, third, 0.0))


@pytest.mark.parametrize("kind", CRITIC_LABELS)
def test_value_targets_have_clean_gradients(kind):
    rewards = row(1.0, NAN, 2.0, INF).requires_grad_()
    mask = torch.tensor([[1, 0, 1, 0]])
    targets = value_targets(rewards, row(0.5, NAN, 1.5, INF), mask, **HALVES, kind=kind)
    targets.sum().backward()
    assert_only_valid_gradients(rewards.grad, mask)


def test_an_unknown_critic_label_names_the_choices():
    with pytest.raises(ValueError, match="'lambda'.*mc, td or gae"):
        value_targets(row(0.0), row(0.0), torch.ones(1, 1), **HALVES, kind="lambda")


# --- groups ---------------------------------------------------------------------------------------

# group (1, 2, 6): mean 3, deviations -2, -1, 3, sum of squares 14, sample std sqrt(14 / 2) =
# sqrt(7) the means of the others are 4, 3.5 and 1.5
GROUP_ADVANTAGES = {
    "grpo": [-2 / math.sqrt(7), -1 / math.sqrt(7), 3 / math.sqrt(7)],
    "dr_grpo": [-2.0, -1.0, 3.0],
    "rloo": [-3.0, -1.5, 4.5],
}
KINDS = list(GROUP_ADVANTAGES)


@pytest.mark.parametrize("kind", KINDS)
def test_group_advantages_by_hand(kind):
    # the second group: shifted and reversed
    scores = torch.tensor([1.0, 2.0, 6.0, 106.0, 102.0, 101.0])
    expected = torch.tensor(GROUP_ADVANTAGES[kind] + GROUP_ADVANTAGES[kind][::-1])
    torch.testing.assert_close(group_advantages(scores, 3, kind=kind), expected)


def test_eps_is_added_to_the_std():
    # scores 0, 2: mean 1, sample std sqrt(2)
    scale = 1 / (math.sqrt(2) + 0.5)
    torch.testing.assert_close(
        group_advantages(torch.tensor([0.0, 2.0]), 2, eps=0.5), torch.tensor([-scale, scale])
    )


@pytest.mark.parametrize("lost", GARBAGE)
@pytest.mark.parametrize("kind", KINDS)
def test_an_unscorable_sample_is_out_of_the_statistics(kind, lost):
    scores = torch.tensor([1.0, lost, 2.0, 6.0])
    first, second, third = GROUP_ADVANTAGES[kind]
    torch.testing.assert_close(
        group_advantages(scores, 4, kind=kind), torch.tensor([first, 0.0, second, third])
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", [0.1, -0.7, 1e6 + 0.1, 0.0])
@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_a_group_without_spread_gets_exactly_zero(kind, score, size):
    assert (group_advantages(torch.full((size,), score), size, kind=kind) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_to_compare_with_gets_zero(kind):
    assert group_advantages(torch.tensor([5.0, NAN]), 1, kind=kind).tolist() == [0.0, 0.0]
    assert (
        group_advantages(torch.tensor([NAN, 5.0, NAN, NAN, NAN, NAN]), 3, kind=kind).tolist()
        == [0.0] * 6
    )


def test_a_tiny_spread_is_still_a_spread():
    advantages = group_advantages(torch.tensor([0.5, 0.5 + 1e-3]), 2)
    torch.testing.assert_close(
        advantages.abs(), torch.full((2,), 1 / math.sqrt(2)), rtol=5e-3, atol=0
    )


def test_bf16_scores_and_no_scores():
    advantages = group_advantages(torch.tensor([1.0, 2.0, 6.0]).bfloat16(), 3, kind="rloo")
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == [-3.0, -1.5, 4.5]
    assert group_advantages(torch.zeros(0), 8).shape == (0,)


@pytest.mark.parametrize("size", [4, 0, -1])
def test_scores_must_fill_whole_groups(size):
    with pytest.raises(ValueError, match=rf"6 scores .* {size}"):
        group_advantages(torch.zeros(6), size)


def test_an_unknown_group_advantage_names_the_choices():
    with pytest.raises(ValueError, match="'mean'.*grpo, dr_grpo or rloo"):
        group_advantages(torch.zeros(2), 2, kind="mean")


# --- whitening ------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("dtype", MASK_TYPES)
def test_whiten_by_hand(dtype, garbage):
    # valid: 1, 3, 5, 7 over both rows. mean 4, population variance (9 + 1 + 1 + 9) / 4 = 5
    x = torch.tensor([[1.0, garbage, 3.0], [5.0, 7.0, garbage]])
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]]).to(dtype)
    expected = torch.tensor([[-3.0, 0.0, -1.0], [1.0, 3.0, 0.0]]) / math.sqrt(5)
    torch.testing.assert_close(whiten(x, mask), expected)
    torch.testing.assert_close(whiten(x, mask, eps=4.0), expected * math.sqrt(5) / 3)  # sqrt(5 + 4)
    torch.testing.assert_close(whiten(x, mask, shift_mean=False), expected + 4.0 * mask)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_with_nothing_valid_is_zero(shift_mean):
    assert whiten(row(NAN, INF), torch.zeros(1, 2), shift_mean=shift_mean).tolist() == [[0.0, 0.0]]


def test_whiten_does_not_blow_up_rounding():
    # the float32 mean of these is off by rounding, and sqrt(eps) = 1e-4 would magnify it ten
    # thousand times
    x = torch.full((7, 11), 1000.1)
    assert whiten(x, torch.ones(7, 11)).abs().max() < 1e-4


@pytest.mark.parametrize("garbage", GARBAGE)
def test_whiten_has_clean_gradients(garbage):
    x = row(1.0, 2.0, 4.0, garbage).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0]])
    whiten(x, mask).square()[0, 0].backward()
    assert_only_valid_gradients(x.grad, mask)


def test_whiten_of_bf16_is_float32():
    assert whiten(row(1.0, 3.0).bfloat16(), torch.ones(1, 2)).tolist() == [[-1.0, 1.0]]


# --- adaptive KL ----------------------------------------------------------------------------------


# target 5, 100 of 1000 sequences
@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (5.5, 1.01),
        (4.5, 0.99),
        (50.0, 1.02),
        (0.0, 0.98),
        (-3.0, 0.98),
        (5.0, 1.0),
        (torch.tensor(5.5), 1.01),
    ],
)
def test_adaptive_kl_by_hand(kl, factor):
    controller = AdaptiveKL(0.1, 5.0, 1000)
    controller.update(kl, 100)
    assert controller.beta == pytest.approx(0.1 * factor, rel=1e-9)
    controller.update(kl, 100)
    assert controller.beta == pytest.approx(0.1 * factor**2, rel=1e-9)


@pytest.mark.parametrize("kl", GARBAGE)
def test_adaptive_kl_ignores_what_is_not_a_number(kl):
    controller = AdaptiveKL(0.1, 5.0, 1000)
    controller.update(kl, 100)
    assert controller.beta == 0.1


@pytest.mark.parametrize("name", ["beta", "target", "horizon"])
@pytest.mark.parametrize("value", [0.0, -1.0, NAN])
def test_adaptive_kl_refuses_what_cannot_control(name, value):
    with pytest.raises(ValueError, match=name):
        AdaptiveKL(**{"beta": 0.1, "target": 5.0, "horizon": 100.0, name: value})


def test_adaptive_kl_never_turns_the_penalty_into_a_reward():
    controller = AdaptiveKL(0.1, 5.0, 100)
    with pytest.raises(ValueError, match="500 sequences"):
        controller.update(0.0, 500)  # factor 1 - 0.2 * 500 / 100 = 0
    controller.update(100.0, 500)
    assert controller.beta == pytest.approx(0.2)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_scores_far_from_zero_keep_their_differences(kind):
    near = group_advantages(torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64), 3, kind=kind)
    far = group_advantages(torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64) + 1e9, 3, kind=kind)
    assert far.dtype == torch.float32
    torch.testing.assert_close(far, near)


def test_a_broken_token_does_not_spread_behind_the_mask_when_whitened():
    whitened = whiten(torch.tensor([[math.nan, 1.0, 2.0]]), torch.tensor([[1, 1, 0]]))
    assert whitened[0, 2] == 0
