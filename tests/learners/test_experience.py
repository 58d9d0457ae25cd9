from dataclasses import replace
from itertools import chain

import pytest
import torch

from learners.experience import PER_TOKEN, Experience, Rollout, map_rows, mini_batches
from learners.forward import attention_mask, response_part

NAN = float("nan")
PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
RESPONSES = [[20, 1], [21, 22, 23, 1], [], [24]]


@pytest.fixture
def batch():
    return Experience.from_ids(PROMPTS, RESPONSES)


def of_lengths(*lengths):
    """A batch of sequences with one-token prompts."""
    return Experience.from_ids([[1]] * len(lengths), [[2] * (n - 1) for n in lengths])


def rollout(prompt, response, logprobs):
    return Rollout(0, 0, 0, prompt, response, logprobs, "stop", (0, 0))


def test_masks_come_from_lengths(batch):
    assert batch.input_ids.tolist() == [
        [5, 6, 7, 20, 1],
        [8, 21, 22, 23, 1],
        [9, 10, 0, 0, 0],
        [11, 12, 13, 14, 24],
    ]
    assert batch.lengths.tolist() == [5, 5, 2, 5]
    assert attention_mask(batch).tolist() == [[1] * 5, [1] * 5, [1, 1, 0, 0, 0], [1] * 5]
    assert batch.loss_mask.int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [0, 0, 0, 0],
        [1, 0, 0, 0],
    ]
    # ids that look like padding are tokens all the same
    zeros = Experience.from_ids([[0, 0]], [[0, 0, 0]])
    assert attention_mask(zeros).all() and zeros.loss_mask.all()


def test_the_loss_mask_takes_single_tokens_out(batch):
    mask = batch.loss_mask.clone()
    mask[1, 2] = mask[3, 0] = False
    masked = replace(batch, loss_mask=mask)
    assert masked.loss_mask.int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 1],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]
    assert masked.loss_denominator("token_mean") == 5
    assert masked.loss_denominator("sequence_mean") == 2
    assert masked.loss_denominator("constant", 7) == 14


def test_the_response_part_is_what_was_read_before_each_token(batch):
    values = torch.arange(5).expand(4, 5)  # entry i of [B,L] was read at position i
    assert response_part(batch, values)[0, :2].tolist() == [2, 3]
    assert response_part(batch, values)[1].tolist() == [0, 1, 2, 3]
    assert response_part(batch, values)[3, :1].tolist() == [3]
    of_next = batch.input_ids[:, 1:]  # entry i of [B,L-1] is about token i + 1
    for row, response in enumerate(RESPONSES):
        assert response_part(batch, of_next)[row, : len(response)].tolist() == response


def test_rollouts_keep_their_logprobs_beside_their_tokens():
    batch = Experience.from_rollouts(
        [rollout([5, 6], [7], [-0.5]), rollout([5], [8, 9, 1], [-1.0, -2.0, -3.0])]
    )
    assert batch.rollout_logprobs.tolist() == [[-0.5, 0, 0], [-1, -2, -3]]
    assert batch.rollout_logprobs.shape == batch.loss_mask.shape


def test_a_rollout_may_hold_tokens_that_the_policy_did_not_write():
    ids = [8, 9, 10, 1]
    written = (True, False, False, True)
    told = Rollout(0, 0, 0, [5], ids, [-1.0, NAN, NAN, -2.0], "stop", (0, 0), written)
    batch = Experience.from_rollouts([rollout([5, 6], [7], [-0.5]), told])
    assert batch.loss_mask.int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 1]]
    assert batch.rollout_logprobs.tolist() == [[-0.5, 0, 0, 0], [-1, 0, 0, -2]]
    assert batch.input_ids[1].tolist() == [5, *ids] and attention_mask(batch)[1].all()
    assert batch.loss_denominator("token_mean") == 3
    assert batch.select([1]).loss_mask.tolist() == [list(written)]
    with pytest.raises(ValueError, match="4 tokens has 3 entries"):
        replace(told, loss_mask=written[1:])


def test_a_selection_is_trimmed_to_its_own_rows(batch):
    full = Experience(
        batch.input_ids,
        batch.prompt_lengths,
        batch.response_lengths,
        batch.loss_mask,
        **{name: torch.arange(16.0).reshape(4, 4) + 1 for name in PER_TOKEN},
        scores=torch.arange(4.0),
    )
    some = full.select([2, 0])
    assert some.input_ids.tolist() == [[9, 10, 0, 0, 0], [5, 6, 7, 20, 1]]
    assert some.loss_mask.shape == (2, 2)
    assert all(getattr(some, name).tolist() == [[9, 10], [1, 2]] for name in PER_TOKEN)
    assert some.scores.tolist() == [2, 0] and some.margins is None
    assert full.select([2]).input_ids.tolist() == [[9, 10]]
    assert len(full.select([])) == 0 and full.select([]).loss_denominator("sequence_mean") == 0


def test_a_placeholder_has_an_empty_mask():
    batch = Experience.placeholder(2)
    assert len(batch) == 2 and attention_mask(batch).any(1).all()
    assert not batch.loss_mask.any() and batch.loss_mask.shape == batch.values.shape
    assert [
        batch.loss_denominator(how, 9) for how in ("token_mean", "sequence_mean", "constant")
    ] == [0, 0, 0]


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shards_balance_tokens_keep_groups_and_drop_nothing(ranks, group):
    lengths = torch.randint(1, 60, (24,), generator=torch.Generator().manual_seed(ranks)).tolist()
    shares = of_lengths(*lengths).shard(ranks, group)
    assert len(shares) == ranks and sorted(chain(*shares)) == list(range(24))
    for share in shares:
        for first in range(0, len(share), group):
            assert share[first] % group == 0
            assert share[first : first + group] == list(range(share[first], share[first] + group))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(sum(lengths[i : i + group]) for i in range(0, 24, group))


def test_more_ranks_than_rows_leaves_some_without():
    assert of_lengths(4, 9).shard(3) == [[1], [0], []]
    assert of_lengths().shard(2) == [[], []]


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("budget", [1, 64, 100, 10_000])
def test_micro_batches_respect_the_budget(budget, group):
    lengths = torch.randint(2, 60, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = of_lengths(*lengths)
    micro_batches = batch.micro_batches(budget, group)
    assert sorted(chain(*micro_batches)) == list(range(24))
    for rows in micro_batches:
        assert len(rows) == group or batch.select(rows).input_ids.numel() <= budget
        assert all(rows[i + 1] == rows[i] + 1 for i in range(0, len(rows), group) if group == 2)
    if budget == 10_000:
        assert len(micro_batches) == 1


def test_micro_batches_put_similar_lengths_together():
    assert of_lengths(3, 9, 3, 9).micro_batches(18) == [[1, 3], [0, 2]]
    assert of_lengths().micro_batches(18) == []


def test_mapped_rows_come_back_in_order_and_padded():
    batch = of_lengths(4, 9, 2, 6, 9)
    lengths = map_rows(batch, 12, lambda b: b.lengths.float())
    assert lengths.tolist() == [4, 9, 2, 6, 9]
    per_token = map_rows(batch, 12, lambda b: b.loss_mask.float() * b.lengths[:, None])
    assert per_token.shape == (5, 8)
    assert torch.equal(per_token, batch.loss_mask * batch.lengths[:, None].float())


def test_mapping_has_no_gradient():
    weight = torch.ones(1, requires_grad=True)
    assert not map_rows(of_lengths(3, 4), 100, lambda b: b.lengths * weight).requires_grad


@pytest.mark.parametrize(("rounds", "placeholders"), [(0, 0), (2, 0), (5, 3)])
def test_surplus_rounds_compute_placeholders(rounds, placeholders):
    seen = []

    def compute(batch):
        seen.append(int(batch.response_lengths.sum()))
        return batch.lengths.float()

    assert map_rows(of_lengths(5, 9), 9, compute, rounds=rounds).tolist() == [5, 9]
    assert seen == [8, 4] + [0] * placeholders


def test_a_rank_without_rows_still_takes_part():
    calls = []
    assert map_rows(
        of_lengths(), 9, lambda b: calls.append(len(b)) or b.lengths, rounds=2
    ).shape == (0,)
    assert calls == [1, 1]


def test_mini_batches_cover_each_row_once_in_an_order_of_their_seed():
    def passes(seed):
        return list(mini_batches(10, 4, torch.Generator().manual_seed(seed)))

    assert [len(rows) for rows in passes(0)] == [4, 4, 2]
    assert sorted(chain(*passes(0))) == list(range(10))
    assert passes(0) == passes(0) != passes(1)
    generator = torch.Generator().manual_seed(0)
    assert list(mini_batches(10, 4, generator)) != list(mini_batches(10, 4, generator))
