"""token_logprobs against numbers worked out by hand."""

import math

import pytest
import torch

from learners.logprobs import clean, token_logprobs

# Logits chosen so that softmax is exact: the odds at position 0 are 1:1:2, at position 1 they are
# 1:3:4.
LOGITS = torch.tensor([[[0.0, 0.0, math.log(2)], [0.0, math.log(3), math.log(4)], [9.0, 9.0, 9.0]]])
IDS = torch.tensor([[0, 2, 1]])


def test_each_column_is_the_logprob_of_the_next_token():
    # id 2 at position 0: 2/4; id 1 at position 1: 3/8. The logits after the last token predict
    # nothing.
    expected = torch.tensor([[math.log(2 / 4), math.log(3 / 8)]])
    torch.testing.assert_close(token_logprobs(LOGITS, IDS), expected)


def test_temperature_divides_the_logits():
    # temperature 1/2 squares the odds: 1:1:4 and 1:9:16
    expected = torch.tensor([[math.log(4 / 6), math.log(9 / 26)]])
    torch.testing.assert_close(token_logprobs(LOGITS, IDS, temperature=0.5), expected)


def test_gradient_is_onehot_minus_softmax_over_temperature():
    logits = LOGITS.clone().requires_grad_()
    token_logprobs(logits, IDS, temperature=0.5).sum().backward()
    # (onehot - p) / 0.5 with p = (1, 1, 4)/6 and (1, 9, 16)/26
    expected = (
        torch.tensor([[[-1 / 6, -1 / 6, 2 / 6], [-1 / 26, 17 / 26, -16 / 26], [0.0, 0.0, 0.0]]]) * 2
    )
    torch.testing.assert_close(logits.grad, expected)


def test_every_row_of_a_batch_is_treated_like_a_batch_of_one():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 7)
    ids = torch.randint(7, (3, 5))
    rows = [token_logprobs(logits[i : i + 1], ids[i : i + 1], 0.7) for i in range(3)]
    torch.testing.assert_close(token_logprobs(logits, ids, 0.7), torch.cat(rows))
    whole = torch.log_softmax(logits / 0.7, -1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(token_logprobs(logits, ids, 0.7), whole)


def test_bf16_logits_are_upcast_before_the_sum():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 1000).bfloat16()
    ids = torch.randint(1000, (2, 4))
    result = token_logprobs(logits, ids)
    assert result.dtype == torch.float32
    # equal to the float32 result of the same (rounded) logits; summing in bf16 would be off by
    # about 1e-2
    torch.testing.assert_close(result, token_logprobs(logits.float(), ids), rtol=0, atol=0)


def test_large_logits_and_banned_tokens_stay_finite():
    logits = torch.tensor([[[1e4, 0.0, -math.inf], [0.0, 0.0, 0.0]]], requires_grad=True)
    result = token_logprobs(logits, torch.tensor([[0, 0]]))
    result.sum().backward()
    assert result.item() == 0.0
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 1)])
def test_nothing_to_predict(batch, length):
    ids = torch.zeros(batch, length, dtype=torch.long)
    assert token_logprobs(torch.zeros(batch, length, 4), ids).shape == (batch, length - 1)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(LOGITS, IDS, temperature)


@pytest.mark.parametrize(
    "ids", [torch.zeros(1, 2, dtype=torch.long), torch.zeros(3, dtype=torch.long)]
)
def test_shapes_that_do_not_belong_together_are_refused(ids):
    with pytest.raises(ValueError, match=r"\[1, 3, 3\]"):
        token_logprobs(LOGITS, ids)


def test_clean_fills_upcasts_and_blocks_gradients():
    x = torch.tensor([[1.0, math.nan, math.inf]], dtype=torch.bfloat16, requires_grad=True)
    mask, cleaned = clean(torch.tensor([[1, 0, 0]]), x)
    assert mask.dtype == torch.bool
    assert cleaned.dtype == torch.float32
    assert cleaned.tolist() == [[1.0, 0.0, 0.0]]
    cleaned.square().sum().backward()
    assert x.grad.tolist() == [[2.0, 0.0, 0.0]]


def test_clean_never_broadcasts():
    with pytest.raises(ValueError, match=r"\[3\].*\[3, 3\]"):
        clean(torch.ones(3, 3), torch.zeros(3))
