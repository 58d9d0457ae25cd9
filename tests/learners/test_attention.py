"""The kernel that `auto` chooses against eager Transformers, one sequence after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from learners.checkpoints import load_causal_lm, load_reward_model
from learners.experience import Experience
from learners.fits import kernel_notices, kernel_problems
from learners.forward import response_logprobs, sequence_scores
from learners.kernels import NO_ATTENTION, SINKS, WITHOUT_SDPA, resolve_attention
from learners.settings import ModelSettings

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
RESPONSES = [[14, 15, 16, 17, 2], [18, 19, 2], [20, 2]]
SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENDS = {name: SMALL[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
OLD = {**ENDS, "pad_token_id": 0, "initializer_range": 0.5}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
NEO = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
EAGER = {  # types for which sdpa is not to be had, or would compute something else
    "gemma2": {**SMALL, "attn_logit_softcapping": 2.0, "sliding_window": 4},
    "vaultgemma": {**SMALL, "attn_logit_softcapping": 2.0, "sliding_window": 4},
    "gpt_oss": {**SMALL, **MOE},
    "bloom": {**OLD, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "gptj": {**OLD, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "rotary_dim": 4},
    "gpt_neo": {**OLD, **NEO, "hidden_size": 16, "max_position_embeddings": 32, "window_size": 4},
}
SDPA = {
    "qwen3": SMALL,
    "gemma2": {**SMALL, "attn_logit_softcapping": None},
    "gemma3_text": {**SMALL, "sliding_window": 4},
}


def make(kind: str, values: dict[str, Any], folder: Path) -> tuple[ModelSettings, Any]:
    """A random model on disk, and itself as eager Transformers has it."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    return ModelSettings(path=str(folder)), model.eval()


def one_by_one(model: Any) -> torch.Tensor:
    """Log-probs of every response token, row after row."""
    found = []
    with torch.no_grad():
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
            ids = torch.tensor([prompt + response])
            logprobs = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            found.append(logprobs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0])
    return torch.cat(found)


@pytest.mark.parametrize("kind", EAGER)
def test_auto_keeps_what_the_model_was_trained_with(kind: str, tmp_path: Path) -> None:
    """Of a padded batch, whatever the family: log-probs, and scores with padding on both sides."""
    settings, plain = make(kind, EAGER[kind], tmp_path)
    assert settings.attention == "auto"
    assert resolve_attention(settings, plain.config) == "eager"
    assert kernel_problems("actor.model", settings) == []
    (notice,) = kernel_notices({"actor.model": settings})
    assert notice.startswith(f"actor.model.attention: auto is eager for {tmp_path}: ")
    batch = Experience.from_ids(PROMPTS, RESPONSES)
    with torch.no_grad():
        ours = response_logprobs(load_causal_lm(settings), batch, 1.0)[batch.loss_mask]
    torch.testing.assert_close(ours, one_by_one(plain), rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "bloom", "gptj", "gpt_neo"])
def test_scores_with_auto_do_not_depend_on_the_paddings_side(kind: str, tmp_path: Path) -> None:
    settings, plain = make(kind, EAGER[kind], tmp_path)
    batch = Experience.from_ids(PROMPTS, RESPONSES)
    model = load_reward_model(settings, 0)
    with torch.no_grad():
        head = model.score.weight[0]
        rows = [torch.tensor([p + r]) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
        expected = torch.stack([plain.base_model(ids)[0][0, -1] @ head for ids in rows])
        for side in ("left", "right"):
            ours = sequence_scores(model, batch, side)
            torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", SDPA)
def test_auto_is_sdpa_where_it_keeps_everything(kind: str, tmp_path: Path) -> None:
    settings, plain = make(kind, SDPA[kind], tmp_path)
    assert resolve_attention(settings, plain.config) == "sdpa"
    assert kernel_notices({"actor.model": settings}) == []
    model = load_causal_lm(settings)
    assert model.config._attn_implementation == "sdpa"
    batch = Experience.from_ids(PROMPTS, RESPONSES)
    with torch.no_grad():
        ours = response_logprobs(model, batch, 1.0)[batch.loss_mask]
    torch.testing.assert_close(ours, one_by_one(plain), rtol=0, atol=5e-6)


def test_a_model_without_attention_is_not_refused_for_it(tmp_path: Path) -> None:
    values = {**OLD, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    settings, plain = make("mamba", values, tmp_path)
    assert kernel_problems("actor.model", settings) == []
    assert kernel_notices({"actor.model": settings}) == []
    batch = Experience.from_ids(PROMPTS, RESPONSES)
    with torch.no_grad():
        ours = response_logprobs(load_causal_lm(settings), batch, 1.0)[batch.loss_mask]
    torch.testing.assert_close(ours, one_by_one(plain), rtol=0, atol=5e-6)


def test_a_models_own_code_gets_eager_unless_the_recipe_names_another(tmp_path: Path) -> None:
    config = {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Own"}}
    own = ModelSettings(path=str(tmp_path), trust_remote_code=True)
    assert resolve_attention(own, config) == "eager"
    assert resolve_attention(own.model_copy(update={"attention": "sdpa"}), config) == "sdpa"
    assert resolve_attention(ModelSettings(path=str(tmp_path)), config) == "sdpa"


@pytest.mark.parametrize(
    ("attention", "values", "told"),
    [
        ("sdpa", {"model_type": "gptj"}, "gptj has no sdpa in Transformers; use eager, or auto"),
        ("sdpa", {"model_type": "gemma2"}, "sdpa drops the cap on gemma2's attention scores"),
        (
            "flash_attention_2",
            {"model_type": "gpt_oss"},
            "flash_attention_2 has no attention sinks, which gpt_oss was trained with; use eager",
        ),
        (
            "flash_attention_2",
            {"model_type": "falcon", "alibi": True},
            "flash_attention_2 has no ALiBi, which this falcon needs; use sdpa or eager",
        ),
    ],
)
def test_a_named_kernel_that_cannot_serve_is_answered_with_one_that_can(
    attention: Any, values: dict[str, Any], told: str, tmp_path: Path
) -> None:
    CONFIG_MAPPING[values["model_type"]](**values).save_pretrained(tmp_path)
    settings = ModelSettings(path=str(tmp_path), attention=attention)
    (line,) = kernel_problems("actor.model", settings)
    assert line.startswith(f"actor.model.attention: {tmp_path}: {told}")
    assert kernel_problems("a", settings.model_copy(update={"attention": "auto"})) == []


@pytest.mark.engines  # it takes seconds to import them all
def test_the_types_without_sdpa_are_those_of_transformers() -> None:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    found = {
        kind: getattr(transformers, name)._supports_sdpa
        for names in (
            auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        )
        for kind, name in names.items()
    }
    missing = {kind for kind, sdpa in found.items() if not sdpa}
    assert missing | {"openai_privacy_filter"} == WITHOUT_SDPA
    assert WITHOUT_SDPA.issuperset(SINKS) and WITHOUT_SDPA >= NO_ATTENTION
