"""The losses, their gradients and their statistics against numbers worked out by hand."""

import math

import pytest
import torch

from learners.losses import aggregate, pairwise_loss, policy_loss, rollout_correction, value_loss

NAN = math.nan
INF = math.inf
GARBAGE = (NAN, INF, -INF)
MASK_TYPES = [torch.bool, torch.int64, torch.float32]
ONES = torch.ones(1, 4)


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float32)


def logs(*ratios):
    """Log-probabilities whose ratios to old log-probabilities of 0 are the given numbers."""
    return row(*ratios).log().requires_grad_()


def assert_stat(stat, total, count):
    assert all(part.dim() == 0 and not part.requires_grad for part in stat)
    assert stat[0].item() == pytest.approx(total, rel=1e-5)
    assert stat[1].item() == count


# --- policy ---------------------------------------------------------------------------------------


def test_policy_loss_by_hand():
    # ratios 0.5, 1, 1.5 for good tokens (A = 2), then for bad ones (A = -2); the range is 0.9 ...
    # 1.3 good: min(1, 1.8) = 1     min(2, 2) = 2      min(3, 2.6) = 2.6  clipped bad:  min(-1,
    # -1.8) = -1.8 clipped           min(-2, -2) = -2   min(-3, -2.6) = -3
    logprobs = logs(0.5, 1.0, 1.5, 0.5, 1.0, 1.5)
    advantages = row(2.0, 2.0, 2.0, -2.0, -2.0, -2.0)
    loss, stats = policy_loss(
        logprobs, torch.zeros(1, 6), advantages, torch.ones(1, 6), clip_low=0.1, clip_high=0.3
    )
    torch.testing.assert_close(loss, row(-1.0, -2.0, -2.6, 1.8, 2.0, 3.0))
    loss.sum().backward()
    # d(-ratio A)/d logprob = -ratio A where the clip does not hold, 0 where it does
    torch.testing.assert_close(logprobs.grad, row(-1.0, -2.0, 0.0, 0.0, 2.0, 3.0))
    assert_stat(stats["clip_fraction"], 2, 6)
    assert_stat(stats["ratio"], 6.0, 6)
    assert "dual_clip_fraction" not in stats


def test_approx_kl_is_k3_of_old_against_new():
    # the token was sampled from old: ratio - 1 - log(ratio), here 2 - 1 - log 2 and 0.5 - 1 + log 2
    _, stats = policy_loss(logs(2.0, 0.5), row(0.0, 0.0), row(1.0, 1.0), torch.ones(1, 2))
    assert_stat(stats["approx_kl"], 0.5, 2)
    _, stats = policy_loss(logs(2.0), row(0.0), row(1.0), torch.ones(1, 1))
    assert_stat(stats["approx_kl"], 1 - math.log(2), 1)


def test_in_the_first_minibatch_the_ratio_is_one_and_the_gradient_is_not_zero():
    logprobs = row(-1.3, -0.2).requires_grad_()
    # old not even detached
    loss, stats = policy_loss(logprobs, logprobs, row(1.5, -0.5), torch.ones(1, 2))
    assert loss.tolist() == [[-1.5, 0.5]]
    loss.sum().backward()
    assert logprobs.grad.tolist() == [[-1.5, 0.5]]
    assert_stat(stats["ratio"], 2.0, 2)
    assert_stat(stats["approx_kl"], 0.0, 2)
    assert_stat(stats["clip_fraction"], 0, 2)


def test_dual_clip_bounds_the_loss_of_a_bad_token_alone():
    # c = 3, A = -1: ratios 2 and 5 would cost 2 and 5, the bound is 3. A = 1: clipped at 1.2 as
    # always
    logprobs = logs(2.0, 5.0, 5.0, 0.5)
    loss, stats = policy_loss(
        logprobs, torch.zeros(1, 4), row(-1.0, -1.0, 1.0, -1.0), ONES, dual_clip=3.0
    )
    torch.testing.assert_close(loss, row(2.0, 3.0, -1.2, 0.8))
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, row(2.0, 0.0, 0.0, 0.0))
    assert_stat(stats["dual_clip_fraction"], 1, 4)
    assert_stat(stats["clip_fraction"], 2, 4)


def test_sequence_ratio_is_the_geometric_mean_over_the_valid_tokens():
    # row 0: log-ratios log 4 and 0 -> mean log 2 -> ratio 2; row 1: log 1.1 alone; row 2: empty
    logprobs = torch.tensor([[math.log(4), NAN, 0.0], [math.log(1.1), INF, NAN], [NAN, NAN, NAN]])
    logprobs.requires_grad_()
    mask = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 0]])
    advantages = torch.tensor([[-1.0, NAN, -3.0], [1.0, NAN, NAN], [NAN, NAN, NAN]])
    loss, stats = policy_loss(logprobs, torch.zeros(3, 3), advantages, mask, ratio="sequence")
    torch.testing.assert_close(
        loss, torch.tensor([[2.0, 0.0, 6.0], [-1.1, 0.0, 0.0], [0.0, 0.0, 0.0]])
    )
    loss.sum().backward()
    # row 0: the loss is -ratio (A_0 + A_2) = 4 ratio, and each token moves the log-ratio by 1/2: 4
    # * 2 / 2
    torch.testing.assert_close(
        logprobs.grad, torch.tensor([[4.0, 0.0, 4.0], [-1.1, 0.0, 0.0], [0.0, 0.0, 0.0]])
    )
    assert_stat(stats["ratio"], 2.0 + 2.0 + 1.1, 3)


def test_sequence_ratio_is_clipped_as_one():
    logprobs = logs(4.0, 1.0)  # ratio 2 on both tokens, although the second one did not move
    loss, stats = policy_loss(
        logprobs, row(0.0, 0.0), row(1.0, 1.0), torch.ones(1, 2), ratio="sequence"
    )
    torch.testing.assert_close(loss, row(-1.2, -1.2))
    loss.sum().backward()
    assert logprobs.grad.tolist() == [[0.0, 0.0]]
    assert_stat(stats["clip_fraction"], 2, 2)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_log_ratios_are_bounded_before_exp(ratio):
    logprobs = row(1e4, 1e4).requires_grad_()
    loss, stats = policy_loss(
        logprobs, row(0.0, 0.0), row(-1.0, -1.0), torch.ones(1, 2), ratio=ratio
    )
    torch.testing.assert_close(loss, row(math.exp(20), math.exp(20)))
    loss.sum().backward()
    assert logprobs.grad.isfinite().all()
    assert stats["approx_kl"][0].isfinite()


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("dtype", MASK_TYPES)
@pytest.mark.parametrize("options", [{}, {"dual_clip": 2.0}, {"ratio": "sequence"}])
def test_policy_loss_ignores_what_is_masked(options, dtype, garbage):
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]]).to(dtype)

    def run(hidden):
        hide = (~mask.bool(), hidden)
        logprobs = torch.full((2, 4), -1.0).masked_fill(*hide).requires_grad_()
        old = torch.full((2, 4), -1.1).masked_fill(*hide)
        advantages = torch.full((2, 4), 0.7).masked_fill(*hide)
        loss, stats = policy_loss(logprobs, old, advantages, mask, **options)
        loss.sum().backward()
        return loss, logprobs.grad, stats

    (loss, gradient, stats) = run(garbage)
    (clean_loss, clean_gradient, clean_stats) = run(0.0)
    assert torch.equal(loss, clean_loss)
    assert torch.equal(gradient, clean_gradient)
    assert (loss[~mask.bool()] == 0).all()
    assert (gradient[~mask.bool()] == 0).all()
    assert (gradient[mask.bool()] != 0).all()
    for name, (total, count) in stats.items():
        assert total == clean_stats[name][0]
        assert count == 2


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_broken_token_does_not_spread_behind_the_mask(ratio):
    loss, _ = policy_loss(
        row(NAN, 0.0, 0.0), row(0.0, 0.0, 0.0), row(1.0, 1.0, 1.0), row(1, 1, 0), ratio=ratio
    )
    assert loss[0, 0].isnan() and loss[0, 2] == 0


def test_policy_gradient_reaches_the_new_logprobs_alone():
    old = row(0.0).requires_grad_()
    advantages = row(1.0).requires_grad_()
    policy_loss(logs(1.1), old, advantages, torch.ones(1, 1))[0].sum().backward()
    assert old.grad is None
    assert advantages.grad is None


def test_policy_loss_of_bf16_is_computed_in_float32():
    # -1.0078125 is the bf16 number next to -1: the ratio exp(0.0078125) would be rounded to
    # 1.0078125
    logprobs = row(-1.0).bfloat16().requires_grad_()
    loss, _ = policy_loss(
        logprobs, row(-1.0078125).bfloat16(), row(1.0).bfloat16(), torch.ones(1, 1)
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-math.exp(0.0078125), rel=1e-6)
    loss.sum().backward()
    assert logprobs.grad.dtype == torch.bfloat16


def test_policy_loss_names_what_is_wrong():
    arguments = (row(0.0), row(0.0), row(0.0), torch.ones(1, 1))
    with pytest.raises(ValueError, match="'group'.*token or sequence"):
        policy_loss(*arguments, ratio="group")
    with pytest.raises(ValueError, match="dual_clip"):
        policy_loss(*arguments, dual_clip=1.0)
    with pytest.raises(ValueError, match="shape"):  # [B] would broadcast along T when B == T
        policy_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2), torch.ones(2, 2))


# --- value ----------------------------------------------------------------------------------------


def test_value_loss_by_hand():
    # old values 0, clip 0.5 V 1    R 2   : clipped to 0.5 -> max(1, 2.25) / 2 = 1.125   moved far
    # enough: no gradient V 0.25 R 1   : inside         -> 0.75² / 2        = 0.28125 gradient V - R
    # = -0.75 V 1    R 0.25: clipped to 0.5 -> max(0.5625, 0.0625) / 2    gradient 0.75: the way
    # back is open V -1   R -2  : clipped to -0.5 -> max(1, 2.25) / 2          no gradient
    values = row(1.0, 0.25, 1.0, -1.0).requires_grad_()
    returns = row(2.0, 1.0, 0.25, -2.0)
    loss, stats = value_loss(values, torch.zeros(1, 4), returns, ONES, clip=0.5)
    assert loss.tolist() == [[1.125, 0.28125, 0.28125, 1.125]]
    loss.sum().backward()
    assert values.grad.tolist() == [[0.0, -0.75, 0.75, 0.0]]
    assert_stat(stats["clip_fraction"], 2, 4)
    assert_stat(stats["value"], 1.25, 4)
    assert_stat(stats["return"], 1.25, 4)


def test_value_loss_without_clip():
    values = row(1.0).requires_grad_()
    loss, stats = value_loss(values, row(0.0), row(3.0), torch.ones(1, 1), clip=None)
    assert loss.item() == 2.0
    loss.sum().backward()
    assert values.grad.item() == -2.0
    assert_stat(stats["clip_fraction"], 0, 1)


def test_value_gradient_in_the_first_minibatch_is_the_plain_error():
    values = row(0.3, -0.7).requires_grad_()
    value_loss(values, values, row(1.0, 1.0), torch.ones(1, 2))[0].sum().backward()
    torch.testing.assert_close(values.grad, row(-0.7, -1.7))


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("dtype", MASK_TYPES)
@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss_ignores_what_is_masked(clip, dtype, garbage):
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]]).to(dtype)
    hide = (~mask.bool(), garbage)
    values = torch.full((2, 3), 0.1).masked_fill(*hide).requires_grad_()
    old = torch.zeros(2, 3).masked_fill(*hide)
    returns = torch.ones(2, 3).masked_fill(*hide)
    loss, stats = value_loss(values, old, returns, mask, clip=clip)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([[0.405, 0.0, 0.405], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(values.grad, torch.tensor([[-0.9, 0.0, -0.9], [0.0, 0.0, 0.0]]))
    assert_stat(stats["return"], 2.0, 2)
    assert_stat(stats["value"], 0.2, 2)


def test_value_gradient_reaches_the_new_values_alone():
    old = row(0.0).requires_grad_()
    returns = row(1.0).requires_grad_()
    value_loss(row(0.1).requires_grad_(), old, returns, torch.ones(1, 1))[0].sum().backward()
    assert old.grad is None
    assert returns.grad is None


def test_value_loss_of_bf16_is_computed_in_float32():
    # the error 256 - 0.5 is not a bf16 number
    loss, _ = value_loss(
        row(256.0).bfloat16(), row(256.0).bfloat16(), row(0.5).bfloat16(), torch.ones(1, 1)
    )
    assert loss.dtype == torch.float32
    assert loss.item() == 0.5 * 255.5**2


# --- rollout correction ---------------------------------------------------------------------------

# token weights old / rollout: 4, 0.5, 1.5 -> product 3; in the second row 0.5, 0.5 -> product 0.25
WEIGHTS = torch.tensor([[4.0, 0.5, 1.5], [0.5, 0.5, 1.0]])
WEIGHT_MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("dtype", MASK_TYPES)
@pytest.mark.parametrize(
    ("kind", "expected", "capped"),
    [
        ("token_truncate", [[2.0, 0.5, 1.5], [0.5, 0.5, 0.0]], 1),
        ("token_mask", [[0.0, 0.5, 1.5], [0.5, 0.5, 0.0]], 1),
        ("sequence_truncate", [[2.0, 2.0, 2.0], [0.25, 0.25, 0.0]], 3),
        ("sequence_mask", [[0.0, 0.0, 0.0], [0.25, 0.25, 0.0]], 3),
    ],
)
def test_rollout_correction_by_hand(kind, expected, capped, dtype, garbage):
    hide = (WEIGHT_MASK == 0, garbage)
    old = (WEIGHTS.log() - 1.0).masked_fill(*hide).requires_grad_()
    rollout = torch.full((2, 3), -1.0).masked_fill(*hide)
    weights, stats = rollout_correction(old, rollout, WEIGHT_MASK.to(dtype), kind=kind, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor(expected))
    assert not weights.requires_grad
    assert_stat(stats["rollout_weight"], sum(map(sum, expected)), 5)
    assert_stat(stats["rollout_capped"], capped, 5)
    # w - 1 - log w over the tokens, before any cap
    assert_stat(stats["rollout_kl"], sum(w - 1 - math.log(w) for w in (4.0, 0.5, 1.5, 0.5, 0.5)), 5)


def test_a_weight_equal_to_the_cap_is_kept():
    weights, stats = rollout_correction(
        row(0.0), row(0.0), torch.ones(1, 1), kind="token_mask", cap=1.0
    )
    assert weights.item() == 1.0
    assert_stat(stats["rollout_capped"], 0, 1)


@pytest.mark.parametrize("kind", ["token_truncate", "sequence_truncate"])
def test_log_weights_are_bounded_before_exp(kind):
    weights, _ = rollout_correction(
        row(50.0, 50.0), row(0.0, 0.0), torch.ones(1, 2), kind=kind, cap=1e30
    )
    torch.testing.assert_close(weights, row(math.exp(20), math.exp(20)))


def test_rollout_correction_of_empty_responses_and_bf16():
    weights, stats = rollout_correction(
        row(NAN).bfloat16(), row(1.0).bfloat16(), torch.zeros(1, 1), kind="sequence_mask", cap=2.0
    )
    assert weights.dtype == torch.float32
    assert weights.item() == 0.0
    assert_stat(stats["rollout_weight"], 0, 0)


def test_rollout_correction_names_what_is_wrong():
    with pytest.raises(ValueError, match="'token'.*token_truncate.*sequence_mask"):
        rollout_correction(row(0.0), row(0.0), torch.ones(1, 1), kind="token", cap=2.0)
    with pytest.raises(ValueError, match="cap"):
        rollout_correction(row(0.0), row(0.0), torch.ones(1, 1), kind="token_mask", cap=0.0)


# --- aggregation ----------------------------------------------------------------------------------

LOSSES = torch.tensor([[1.0, 2.0, 6.0], [5.0, NAN, 7.0], [NAN, INF, -INF]])
LOSS_MASK = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0]])


# sums 9 and 12 over 3 and 2 tokens: 21 / 5;  (3 + 6) / 2 sequences, the empty one does not count;
# 21 / 10
@pytest.mark.parametrize("dtype", MASK_TYPES)
@pytest.mark.parametrize(
    ("how", "denominator", "expected"),
    [
        ("token_mean", None, 4.2),
        ("sequence_mean", None, 4.5),
        ("constant", 10, 2.1),
        ("constant", 0.5, 42.0),
        ("token_mean", 42, 0.5),
        ("sequence_mean", torch.tensor(18), 0.5),
    ],
)
def test_aggregate_by_hand(how, denominator, expected, dtype):
    result = aggregate(LOSSES, LOSS_MASK.to(dtype), how=how, denominator=denominator)
    assert result.dim() == 0
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("how", "denominator", "expected"),
    [
        ("token_mean", None, [[0.2, 0.2, 0.2], [0.2, 0.0, 0.2], [0.0, 0.0, 0.0]]),
        ("sequence_mean", None, [[1 / 6, 1 / 6, 1 / 6], [1 / 4, 0.0, 1 / 4], [0.0, 0.0, 0.0]]),
        ("constant", 10.0, [[0.1, 0.1, 0.1], [0.1, 0.0, 0.1], [0.0, 0.0, 0.0]]),
    ],
)
def test_aggregate_gradients(how, denominator, expected):
    losses = LOSSES.clone().requires_grad_()
    aggregate(losses, LOSS_MASK, how=how, denominator=denominator).backward()
    torch.testing.assert_close(losses.grad, torch.tensor(expected))


@pytest.mark.parametrize("cuts", [[1, 1, 1, 1, 1, 1], [2, 4], [3, 1, 2]])
@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "constant"])
def test_microbatches_with_the_global_denominator_add_up_to_the_whole(how, cuts):
    torch.manual_seed(0)
    losses = torch.randn(6, 5, requires_grad=True)
    lengths = torch.tensor([5, 0, 1, 3, 2, 4])  # one microbatch of one sequence is empty
    mask = torch.arange(5) < lengths[:, None]
    denominator = {"token_mean": 15, "sequence_mean": 5, "constant": 6 * 5}[how]
    whole = aggregate(losses, mask, how=how, denominator=denominator if how == "constant" else None)
    (gradient,) = torch.autograd.grad(whole, losses)

    pieces = [
        aggregate(piece, piece_mask, how=how, denominator=denominator)
        for piece, piece_mask in zip(losses.split(cuts), mask.split(cuts), strict=True)
    ]
    torch.testing.assert_close(sum(pieces), whole)
    for piece in pieces:
        piece.backward()
    torch.testing.assert_close(losses.grad, gradient)


@pytest.mark.parametrize("denominator", [None, 0, 0.0, torch.tensor(0), 7])
@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "constant"])
def test_nothing_valid_gives_zero_with_a_graph(how, denominator):
    losses = row(NAN, INF).requires_grad_()
    if how == "constant" and denominator is None:
        denominator = 1
    result = aggregate(losses, torch.zeros(1, 2), how=how, denominator=denominator)
    assert result.item() == 0.0
    result.backward()
    assert losses.grad.tolist() == [[0.0, 0.0]]


def test_aggregate_of_bf16_is_summed_in_float32():
    # in bf16, 256 + 1 stays 256
    losses = torch.ones(1, 1000).bfloat16()
    assert aggregate(losses, torch.ones(1, 1000), how="constant", denominator=1).item() == 1000.0


def test_aggregate_names_what_is_wrong():
    with pytest.raises(ValueError, match="'mean'.*token_mean, sequence_mean or constant"):
        aggregate(LOSSES, LOSS_MASK, how="mean")
    with pytest.raises(ValueError, match="denominator"):
        aggregate(LOSSES, LOSS_MASK, how="constant")


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean"])
def test_from_logprobs_to_one_number_nothing_masked_leaks(how):
    """The whole chain at once, with the corrections multiplied in, as an algorithm uses it."""
    logprobs = torch.tensor([[-1.0, NAN, -2.0], [NAN, NAN, NAN]], requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]])
    hidden = torch.tensor([[-1.0, INF, -2.0], [NAN, -INF, NAN]])
    weights, _ = rollout_correction(hidden, hidden, mask, kind="sequence_truncate", cap=2.0)
    loss, _ = policy_loss(
        logprobs, hidden, torch.full((2, 3), 3.0).masked_fill(mask == 0, NAN), mask
    )
    total = aggregate(loss * weights, mask, how=how)
    assert total.item() == pytest.approx(-3.0)
    total.backward()
    assert logprobs.grad.tolist() == [[-1.5, 0.0, -1.5], [0.0, 0.0, 0.0]]


# --- pairs ----------------------------------------------------------------------------------------


def test_pairwise_loss_by_hand():
    # differences log 3, 0 and -log 3: sigmoids 3/4, 1/2 and 1/4
    chosen = torch.tensor([math.log(3), 2.0, 0.0]).requires_grad_()
    rejected = torch.tensor([0.0, 2.0, math.log(3)])
    loss = pairwise_loss(chosen, rejected)
    torch.testing.assert_close(loss, -torch.tensor([0.75, 0.5, 0.25]).log())
    loss.sum().backward()
    torch.testing.assert_close(chosen.grad, torch.tensor([-0.25, -0.5, -0.75]))  # sigmoid - 1


@pytest.mark.parametrize(
    "margin", [math.log(3), torch.full((1,), math.log(3), dtype=torch.float64)]
)
def test_the_margin_is_what_chosen_must_win_by(margin):
    chosen = torch.tensor([2 * math.log(3)])
    rejected = torch.tensor([0.0])
    loss = pairwise_loss(chosen, rejected, margin)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, -torch.tensor([0.75]).log())


def test_pairs_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"pairs expected, not chosen \[3, 1\] and rejected \[3\]"):
        pairwise_loss(torch.zeros(3, 1), torch.zeros(3))


def test_pairwise_loss_is_stable_at_a_thousand():
    chosen = torch.tensor([1000.0, -1000.0, 0.0]).requires_grad_()
    rejected = torch.tensor([0.0, 0.0, 0.0]).requires_grad_()
    loss = pairwise_loss(chosen, rejected, torch.tensor([0.0, 0.0, 1000.0]))
    assert loss.tolist() == [0.0, 1000.0, 1000.0]
    loss.sum().backward()
    assert chosen.grad.tolist() == [0.0, -1.0, -1.0]
    assert rejected.grad.tolist() == [0.0, 1.0, 1.0]


def test_pairwise_loss_of_bf16_is_computed_in_float32():
    # 256 - (-1) = 257 is not a bf16 number
    loss = pairwise_loss(torch.tensor([256.0]).bfloat16(), torch.tensor([-1.0]).bfloat16(), 257.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
