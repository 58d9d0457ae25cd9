"""The output layer in float32: log-probs, gradients, and nothing else of the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from learners.checkpoints import load_causal_lm
from learners.errors import UserError
from learners.lora import attach, is_adapter
from learners.output_layer import _Float32Logits, compute_in_float32
from learners.settings import LoraSettings, ModelSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny decoder in float32, whose logits lie far from zero."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("model")
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(path)
    return str(path)


def load(folder: str, dtype: str = "bfloat16", head: str | None = None) -> torch.nn.Module:
    settings = ModelSettings.model_validate({"path": folder, "dtype": dtype, "head_dtype": head})
    model: torch.nn.Module = load_causal_lm(settings)
    return model


def test_logits_are_those_of_exact_products_and_the_weights_stay_what_they_were(
    folder: str,
) -> None:
    ids = torch.arange(12)[None]
    plain = load(folder)
    exact = load(folder, head="fp32")
    hidden = plain.model(ids).last_hidden_state
    expected = hidden.double() @ plain.lm_head.weight.double().t()
    logits = exact(ids).logits
    assert logits.dtype == torch.float32
    assert (
        (logits - expected).abs().max() < 1e-5 < 1e-3 < (plain(ids).logits - expected).abs().max()
    )
    assert exact.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(w, plain.state_dict()[n]) for n, w in exact.state_dict().items())
    assert exact.config.to_dict() == plain.config.to_dict()


def test_gradients_are_those_of_the_same_products() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 3, 8).bfloat16().requires_grad_()
    weight = torch.randn(5, 8).bfloat16().requires_grad_()
    upstream = torch.randn(2, 3, 5).bfloat16()
    got = torch.autograd.grad(_Float32Logits.apply(hidden, weight), (hidden, weight), upstream)
    expected = torch.autograd.grad(F.linear(hidden, weight), (hidden, weight), upstream)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_a_frozen_layer_has_no_gradient_and_its_input_has() -> None:
    hidden = torch.randn(1, 2, 4).bfloat16().requires_grad_()
    _Float32Logits.apply(hidden, torch.randn(3, 4).bfloat16()).sum().backward()
    assert hidden.grad is not None


def test_an_adapter_learns_below_it(folder: str) -> None:
    model = load(folder, head="float32")
    attach(model, LoraSettings(rank=2))
    model(torch.arange(12)[None]).logits.logsumexp(-1).sum().backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learned and all(is_adapter(name) for name in learned)


def test_a_bias_is_added_and_float32_models_stay_as_they_are(folder: str) -> None:
    class Biased(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(4, 3, dtype=torch.bfloat16)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

    model = Biased()
    compute_in_float32(model, "here")
    hidden = torch.randn(2, 4).bfloat16()
    expected = hidden.double() @ model.head.weight.double().t() + model.head.bias.double()
    torch.testing.assert_close(model.head(hidden).double(), expected, rtol=1e-5, atol=1e-5)
    exact = load(folder, dtype="float32", head="float32")
    assert "forward" not in vars(exact.get_output_embeddings())  # type: ignore[operator]


def test_a_model_without_a_linear_output_layer_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    model.lm_head = torch.nn.Embedding(8, 8)
    with pytest.raises(UserError, match="models/odd: GPT2LMHeadModel has no linear output layer"):
        compute_in_float32(model, "models/odd")


def test_the_call_on_gpus_is_one_that_torch_has() -> None:
    """Only the device keeps it from running here: shapes and dtypes are right."""
    hidden = torch.empty(2, 8, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(5, 8, dtype=torch.bfloat16, device="meta")
    logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    assert logits.dtype == torch.float32 and logits.shape == (2, 5)
