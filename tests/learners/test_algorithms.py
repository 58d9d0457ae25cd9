"""What PPO and GRPO make of a small batch, against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from learners.algorithms.grpo import GRPO, GRPOSettings
from learners.algorithms.ppo import PPO, PPOSettings
from learners.experience import Experience

NAN = math.nan
INF = math.inf


def ppo(**changes):
    """PPO with undiscounted, unwhitened numbers that can be followed by hand."""
    plain = {"gamma": 1.0, "lam": 1.0, "kl_beta": 0.5, "whiten_advantages": False}
    return PPO(PPOSettings(**{**plain, **changes}))


def grpo(group_size=2, **changes):
    return GRPO(GRPOSettings(**changes), group_size)


def batch_of(*lengths, **known):
    """A batch of responses of the given lengths behind two-token prompts, with the given fields."""
    batch = Experience.from_ids([[5, 6]] * len(lengths), [[7] * n for n in lengths])
    return replace(batch, **{name: torch.tensor(x) for name, x in known.items()})


@pytest.fixture
def samples():
    """Two responses; what lies behind the second one's end is garbage.

    KL per token (k1, old - ref): 1, 0, -0.5 and 0.2. At beta 0.5 and with scores 2 and -1 on the
    last tokens the rewards are -0.5, 0, 2.25 and -1.1.
    """
    return batch_of(
        3,
        1,
        scores=[2.0, -1.0],
        old_logprobs=[[-1.0, -2.0, -1.5], [-0.3, NAN, INF]],
        ref_logprobs=[[-2.0, -2.0, -1.0], [-0.5, NAN, -INF]],
        values=[[1.0, 0.5, 2.0], [0.4, NAN, NAN]],
    )


def close(a, b):
    torch.testing.assert_close(a, torch.tensor(b), atol=1e-6, rtol=0)


# --- PPO ------------------------------------------------------------------------------------------


def test_ppo_by_hand_with_lambda_one(samples):
    batch, metrics = ppo().advantages(samples)
    # returns are the sums of the rewards to come, advantages what they exceed the values by
    close(batch.returns, [[1.75, 2.25, 2.25], [-1.1, 0.0, 0.0]])
    close(batch.advantages, [[0.75, 1.75, 0.25], [-1.5, 0.0, 0.0]])
    assert metrics == pytest.approx(
        {
            "kl/sequence": (0.5 + 0.2) / 2,
            "kl/beta": 0.5,
            "reward/per_sequence": (1.75 - 1.1) / 2,
            "advantage/std": math.sqrt(
                (0.75**2 + 1.75**2 + 0.25**2 + 1.5**2) / 4 - (1.25 / 4) ** 2
            ),
            "value/mean": 3.9 / 4,
            "return/mean": 5.15 / 4,
            # the returns' squares sum to 3.0625 + 5.0625 + 5.0625 + 1.21, the errors are the
            # advantages
            "value/explained_variance": 1
            - ((0.75**2 + 1.75**2 + 0.25**2 + 1.5**2) / 4 - (1.25 / 4) ** 2)
            / (14.3975 / 4 - (5.15 / 4) ** 2),
        }
    )


def test_ppo_by_hand_with_discounts(samples):
    # deltas at gamma 0.5: -0.5 + 0.25 - 1 = -1.25, 0 + 1 - 0.5 = 0.5, 2.25 - 2 = 0.25; gamma lambda
    # = 0.25
    batch, _ = ppo(gamma=0.5, lam=0.5).advantages(samples)
    close(batch.advantages, [[-1.25 + 0.25 * 0.5625, 0.5 + 0.25 * 0.25, 0.25], [-1.5, 0.0, 0.0]])
    close(batch.returns, [[-1.109375 + 1.0, 0.5625 + 0.5, 2.25], [-1.1, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("mc", [-0.5 + 0.25 * 2.25, 1.125, 2.25]),
        ("td", [-0.25, 1.0, 2.25]),
        ("gae", [-0.109375, 1.0625, 2.25]),
    ],
)
def test_the_critics_label_leaves_the_advantages_alone(samples, kind, first):
    plain, _ = ppo(gamma=0.5, lam=0.5).advantages(samples)
    batch, metrics = ppo(gamma=0.5, lam=0.5, critic_target=kind).advantages(samples)
    close(batch.returns, [first, [-1.1, 0.0, 0.0]])
    assert torch.equal(batch.advantages, plain.advantages)
    assert metrics["return/mean"] == pytest.approx((sum(first) - 1.1) / 4)


def test_the_kl_in_the_reward_is_the_one_asked_for(samples):
    batch, metrics = ppo(kl="k2").advantages(samples)  # half the squares: 0.5, 0, 0.125 and 0.02
    close(batch.returns, [[-0.25 + 1.9375, 1.9375, 1.9375], [-1.01, 0.0, 0.0]])
    assert metrics["kl/sequence"] == pytest.approx(0.35), (
        "reported as k1, which is unbiased, whatever is penalised"
    )


def test_ppo_whitens_once_after_the_returns_are_taken(samples):
    plain, before = ppo().advantages(samples)
    batch, metrics = ppo(whiten_advantages=True).advantages(samples)
    assert torch.equal(batch.returns, plain.returns) and metrics == before
    valid = batch.advantages[batch.loss_mask]
    assert valid.mean().item() == pytest.approx(0, abs=1e-6)
    assert valid.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert batch.advantages[0, 0].item() == pytest.approx(
        (0.75 - 1.25 / 4) / before["advantage/std"], rel=1e-5
    )
    assert not batch.advantages[~batch.loss_mask].any()


def with_unscorable(samples):
    """The two samples and between them one whose score is NaN, taken out as the driver does."""
    three = batch_of(
        3,
        2,
        1,
        scores=[2.0, NAN, -1.0],
        **{
            name: [x[0], [-4.0, 3.0, NAN], x[1]]
            for name in ("old_logprobs", "ref_logprobs", "values")
            if (x := getattr(samples, name).tolist())
        },
    )
    return replace(three, loss_mask=three.loss_mask & ~three.scores.isnan()[:, None])


def with_gap(samples):
    """The same, with two tokens inside the first response that the policy did not write."""
    known = {}
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs", "values"):
        known[name] = torch.full((2, 5), NAN)
        known[name][:, [0, 3, 4]] = getattr(samples, name)
    mask = torch.tensor([[1, 0, 0, 1, 1], [1, 0, 0, 0, 0]]).bool()
    return replace(batch_of(5, 1), scores=samples.scores, loss_mask=mask, **known)


@pytest.mark.parametrize(
    "algorithm",
    [
        ppo(gamma=0.5, lam=0.5, whiten_advantages=True),
        ppo(loss_aggregation="sequence_mean", critic_target="td"),
        grpo(ratio="sequence", kl_beta=0.1),
        grpo(
            loss_aggregation="constant",
            rollout_correction={"kind": "sequence_truncate", "cap": 1.2},
        ),
    ],
)
def test_a_gap_trains_as_if_its_tokens_were_not_there(samples, algorithm):
    samples = replace(samples, rollout_logprobs=samples.ref_logprobs)
    losses = []
    gradients = []
    for given in (samples, with_gap(samples)):
        batch, metrics = algorithm.advantages(given)
        mask = batch.loss_mask
        logprobs = torch.where(mask, batch.old_logprobs + 0.1 * batch.values, NAN).requires_grad_()
        denominator = batch.loss_denominator(algorithm.settings.loss_aggregation, 3)
        loss, stats = algorithm.actor_loss(logprobs, batch, denominator)
        loss.backward()
        for x in (logprobs.grad, batch.advantages, batch.returns):
            assert x is None or not x[~mask].any()
        learned = [x[mask] for x in (batch.advantages, batch.returns) if x is not None]
        losses.append((metrics, {n: (float(x), float(k)) for n, (x, k) in stats.items()}))
        gradients.append(torch.stack([logprobs.grad[mask], *learned, loss.detach().expand(4)]))
    assert losses[1][0] == pytest.approx(losses[0][0])
    for name, pair in losses[0][1].items():
        assert losses[1][1][name] == pytest.approx(pair)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("whiten", [False, True])
def test_an_unscorable_sample_changes_nothing_in_ppo(samples, whiten):
    algorithm = ppo(whiten_advantages=whiten)
    plain, expected = algorithm.advantages(samples)
    batch, metrics = algorithm.advantages(with_unscorable(samples))
    assert not batch.advantages[1].any() and not batch.returns[1].any()
    for name in ("advantages", "returns"):
        torch.testing.assert_close(getattr(batch, name)[[0, 2]], getattr(plain, name))
    assert metrics == pytest.approx(expected)


def test_a_batch_that_could_not_be_scored_at_all_is_zero_and_finite(samples):
    nothing = replace(
        samples, scores=torch.tensor([NAN, NAN]), loss_mask=torch.zeros(2, 3, dtype=torch.bool)
    )
    algorithm = ppo(kl_target=1.0)
    batch, metrics = algorithm.advantages(nothing)
    assert not batch.advantages.any() and not batch.returns.any()
    assert all(math.isfinite(x) for x in metrics.values())
    algorithm.after_step(batch)
    assert algorithm.beta == 0.5, "nothing was measured"


@pytest.mark.parametrize("field", ["scores", "old_logprobs", "ref_logprobs", "values"])
def test_ppo_needs_all_four_models(samples, field):
    with pytest.raises(AssertionError):
        ppo().advantages(replace(samples, **{field: None}))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[1.75, 2.25, 2.25], [-1.1, 0.0, 0.0]], 1.0),  # foresees every return
        ([[2.75, 3.25, 3.25], [-0.1, 0.0, 0.0]], 1.0),  # a constant offset is not variance
        ([[0.7, 0.7, 0.7], [0.7, 0.0, 0.0]], 0.0),  # knows nothing
        (
            [[-1.75, -2.25, -2.25], [1.1, 0.0, 0.0]],
            -3.0,
        ),  # the wrong way round: four times the variance
    ],
)
def test_explained_variance(samples, values, expected):
    _, metrics = ppo().advantages(replace(samples, values=torch.tensor(values)))
    assert metrics["value/explained_variance"] == pytest.approx(expected, abs=1e-5)


def test_returns_without_variance_explain_nothing():
    flat = batch_of(
        1,
        1,
        scores=[1.0, 1.0],
        old_logprobs=[[0.0]] * 2,
        ref_logprobs=[[0.0]] * 2,
        values=[[0.3], [0.9]],
    )
    assert ppo().advantages(flat)[1]["value/explained_variance"] == 0


def test_adaptive_kl_moves_after_the_step_and_survives_a_checkpoint(samples):
    adaptive = {"kl_target": 0.1, "kl_horizon": 10}
    algorithm = ppo(**adaptive)
    # KL 0.35 is far above the target: the largest step up
    batch, metrics = algorithm.advantages(samples)
    close(batch.returns, [[1.75, 2.25, 2.25], [-1.1, 0.0, 0.0]])
    assert metrics["kl/beta"] == 0.5 == algorithm.beta, "a step that is skipped moves nothing"
    algorithm.after_step(batch)
    assert algorithm.beta == pytest.approx(0.5 * (1 + 0.2 * 2 / 10))

    state = algorithm.state()
    resumed = ppo(**adaptive)
    resumed.load_state(state)
    again = resumed.advantages(samples)
    expected = algorithm.advantages(samples)
    for one, (learned, _) in ((resumed, again), (algorithm, expected)):
        one.after_step(learned)
    assert again[1] == expected[1] and again[1]["kl/beta"] == pytest.approx(0.52)
    assert torch.equal(again[0].returns, expected[0].returns)
    assert resumed.state() == algorithm.state() != state


def test_a_fixed_kl_stays(samples):
    algorithm = ppo()
    algorithm.after_step(algorithm.advantages(samples)[0])
    assert algorithm.state() == {"kl_beta": 0.5}


# --- GRPO -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("grpo", [-(0.5**0.5), 0.5**0.5, 0.0, 0.0]),
        ("dr_grpo", [-1.0, 1.0, 0.0, 0.0]),
        ("rloo", [-2.0, 2.0, 0.0, 0.0]),
    ],
)
def test_grpo_by_hand(kind, expected):
    # groups (1, 3) with mean 2 and sample std sqrt(2), and (5, 5) that teaches nothing
    batch, metrics = grpo(advantage=kind).advantages(
        batch_of(1, 3, 2, 1, scores=[1.0, 3.0, 5.0, 5.0])
    )
    a, b, *_ = expected
    torch.testing.assert_close(
        batch.advantages,
        torch.tensor([[a, 0.0, 0.0], [b, b, b], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        atol=1e-5,
        rtol=0,
    )
    std = math.sqrt(2 * b**2 / 3)
    assert metrics == pytest.approx({"group/with_spread": 0.5, "advantage/std": std}, abs=1e-5)
    assert batch.returns is None


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0], 1.0),
        ([1.0, 1.0, 2.0, 2.0], 0.0),
        ([1.0, 1.0, 0.0, 1.0], 0.5),
        ([NAN, 1.0, 0.0, 1.0], 0.5),  # a single score has nobody to be compared with
        ([NAN, NAN, 0.0, 1.0], 0.5),
        ([NAN, NAN, NAN, NAN], 0.0),
        ([INF, 1.0, -INF, 1.0], 0.0),  # not finite is not a score
    ],
)
def test_groups_with_spread(scores, expected):
    batch, metrics = grpo().advantages(batch_of(1, 1, 1, 1, scores=scores))
    assert metrics["group/with_spread"] == expected
    assert batch.advantages.isfinite().all() and math.isfinite(metrics["advantage/std"])


def test_an_unscorable_sample_is_left_out_of_its_group():
    scores = [1.0, NAN, 3.0]
    batch = batch_of(2, 2, 1, scores=scores)
    batch = replace(batch, loss_mask=batch.loss_mask & ~batch.scores.isnan()[:, None])
    result, metrics = grpo(3, advantage="dr_grpo").advantages(batch)
    close(result.advantages, [[-1.0, -1.0], [0.0, 0.0], [1.0, 0.0]])
    assert metrics["group/with_spread"] == 1 and result.loss_denominator("sequence_mean") == 2


def test_grpo_reports_the_kl_only_with_a_reference(samples):
    assert "kl/sequence" not in grpo().advantages(replace(samples, ref_logprobs=None))[1]
    assert grpo().advantages(samples)[1]["kl/sequence"] == pytest.approx(0.35)
    three = with_unscorable(samples)
    assert grpo(3).advantages(three)[1]["kl/sequence"] == pytest.approx(0.35)


def test_grpo_needs_scores_in_whole_groups(samples):
    with pytest.raises(AssertionError):
        grpo().advantages(replace(samples, scores=None))
    with pytest.raises(ValueError, match="groups of 3"):
        grpo(3).advantages(samples)


def test_grpo_has_no_state():
    algorithm = grpo()
    assert algorithm.state() == {}
    algorithm.load_state({})


# --- Actor losses ---------------------------------------------------------------------------------


def test_ppo_actor_loss_by_hand(samples):
    # ratios 1, 2, 0.5 and 1 at advantages 1, 1, -1 and 3: objectives 1, 1.2 (clipped), -0.8
    # (clipped) and 3
    batch = replace(samples, advantages=torch.tensor([[1.0, 1.0, -1.0], [3.0, NAN, NAN]]))
    new = (
        batch.old_logprobs + torch.tensor([[1.0, 2.0, 0.5], [1.0, 1.0, 1.0]]).log()
    ).requires_grad_()
    loss, stats = ppo().actor_loss(new, batch, denominator=8.0)
    assert loss.item() == pytest.approx(-(1 + 1.2 - 0.8 + 3) / 8)
    assert [float(x) for x in stats["clip_fraction"]] == [2, 4]
    loss.backward()
    torch.testing.assert_close(new.grad, torch.tensor([[-1 / 8, 0.0, 0.0], [-3 / 8, 0.0, 0.0]]))


def test_grpo_actor_loss_adds_k3_inside_each_sequence(samples):
    batch = replace(samples, advantages=torch.tensor([[1.0, 1.0, 1.0], [-2.0, NAN, NAN]]))
    loss, stats = grpo(kl_beta=0.1).actor_loss(batch.old_logprobs, batch, denominator=2.0)
    k3 = [math.exp(-d) + d - 1 for d in (1.0, 0.0, -0.5, 0.2)]
    assert loss.item() == pytest.approx(
        ((-3 + 0.1 * sum(k3[:3])) / 3 + 2 + 0.1 * k3[3]) / 2, rel=1e-5
    )
    assert [float(x) for x in stats["kl"]] == pytest.approx([sum(k3), 4], rel=1e-5)


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        ({"kind": "token_truncate", "cap": 2.0}, [2.0, 0.5]),
        ({"kind": "token_mask", "cap": 2.0}, [0.0, 0.5]),
        ({"kind": "sequence_truncate", "cap": 1.25}, [1.25, 1.25]),
        ({"kind": "sequence_mask", "cap": 1.25}, [0.0, 0.0]),
    ],
)
@pytest.mark.parametrize("algorithm", [PPO, GRPO])
def test_the_policy_loss_is_weighed_and_its_denominator_stays(algorithm, correction, expected):
    """One response of two tokens, ratio 1: the loss of a token is -advantage, here -1. Weights
    exp(old - rollout).
    """
    weighed = {"rollout_correction": correction, "loss_aggregation": "token_mean"}
    made = PPO(PPOSettings(**weighed)) if algorithm is PPO else GRPO(GRPOSettings(**weighed), 2)
    old = torch.tensor([[-1.0, -1.0]])
    # the engine found token 0 three times less likely
    rollout = old - torch.tensor([[3.0, 0.5]]).log()
    batch = Experience.from_ids([[1]], [[2, 3]])
    batch = replace(batch, old_logprobs=old, rollout_logprobs=rollout, advantages=torch.ones(1, 2))
    loss, stats = made.actor_loss(old.clone().requires_grad_(), batch, denominator=2.0)
    assert loss.item() == pytest.approx(-sum(expected) / 2, rel=1e-5)
    assert stats["rollout_weight"][0].item() == pytest.approx(sum(expected), rel=1e-5)
    assert stats["rollout_capped"][0].item() == (
        2 if correction["kind"].startswith("sequence") else 1
    )


@pytest.mark.parametrize("make", [ppo, grpo])
def test_every_key_of_the_policy_loss_reaches_it(make):
    """Two responses whose tokens have ratio 3, at advantages -1 and 1; each key changes a number of
    its own.
    """
    batch = batch_of(
        2, 1, old_logprobs=[[0.0, 0.0], [0.0, 0.0]], advantages=[[-1.0, -1.0], [1.0, 0.0]]
    )
    new = batch.old_logprobs + math.log(3)

    def loss(denominator=3.0, **keys):
        return (
            make(loss_aggregation="token_mean", **keys)
            .actor_loss(new, batch, denominator)[0]
            .item()
            * denominator
        )

    # the bad tokens count in full, the good one is clipped at 1.2
    assert loss() == pytest.approx(3 + 3 - 1.2)
    assert loss(clip_high=0.5) == pytest.approx(3 + 3 - 1.5)
    assert loss(dual_clip=2.0) == pytest.approx(2 + 2 - 1.2)
    assert make(loss_aggregation="sequence_mean").actor_loss(new, batch, 2.0)[
        0
    ].item() == pytest.approx((3 - 1.2) / 2)
    assert make(loss_aggregation="constant").actor_loss(new, batch, 20.0)[
        0
    ].item() == pytest.approx((6 - 1.2) / 20)
    low = make(loss_aggregation="token_mean", clip_low=0.5)
    loss_below = low.actor_loss(-new, batch, 3.0)[0].item()  # ratio 1/3: bad tokens are held at 0.5
    assert loss_below == pytest.approx((0.5 + 0.5 - 1 / 3) / 3)


def test_the_sequence_ratio_is_grpos_to_choose():
    batch = batch_of(2, old_logprobs=[[0.0, 0.0]], advantages=[[-1.0, -1.0]])
    new = torch.tensor([[math.log(4), 0.0]])
    loss, _ = grpo(ratio="sequence").actor_loss(new, batch, 1.0)
    # exp of the mean log-ratio; per token it would be (4 + 1) / 2
    assert loss.item() == pytest.approx(2)


def test_the_correction_does_not_weigh_grpos_kl():
    correction = {"kind": "token_truncate", "cap": 0.5}
    batch = batch_of(
        1, old_logprobs=[[0.0]], rollout_logprobs=[[0.0]], ref_logprobs=[[1.0]], advantages=[[1.0]]
    )
    loss, _ = grpo(kl_beta=0.1, rollout_correction=correction).actor_loss(
        torch.zeros(1, 1), batch, 1.0
    )
    assert loss.item() == pytest.approx(-0.5 + 0.1 * (math.e - 2))


def test_grpo_without_kl_needs_no_reference(samples):
    batch = replace(samples, ref_logprobs=None, advantages=torch.ones(2, 3))
    loss, stats = grpo().actor_loss(batch.old_logprobs, batch, denominator=2.0)
    assert loss.item() == pytest.approx(-1) and "kl" not in stats
