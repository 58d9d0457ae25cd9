"""Precision of engine and Actor: what they are asked for, and how far apart they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actors.engine.arguments import engine_arguments, exact_products
from actors.settings import GenerationSettings
from benchmarks.precision import Case, difference, save_model
from launch.plan.batches import Load
from launch.plan.memory import training_activations
from launch.plan.shapes import find_shape
from launch.recipe.read import RecipeError, load_recipe
from learners.settings import ModelSettings

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
OFFSET = 0.5  # of every token's embedding along one direction: logits far from zero, as in practice


def test_the_engine_is_told_the_dtype_of_its_head_where_the_recipe_says_one() -> None:
    def overrides(head: str | None) -> object:
        model = ModelSettings.model_validate({"path": "m", "dtype": "bf16", "head_dtype": head})
        return engine_arguments(model, GenerationSettings(), "cpu", 8).get("hf_overrides")

    assert overrides("fp32") == {"head_dtype": "float32"}
    assert overrides(None) is None


def test_the_head_of_a_critic_or_a_reward_model_is_not_a_language_models() -> None:
    for key in ("critic", "rewards.0"):
        with pytest.raises(RecipeError, match=f"{key}.model.head_dtype: is of language models"):
            load_recipe(RECIPES / "demo_ppo.yaml", [f"{key}.model.head_dtype=float32"])
    load_recipe(RECIPES / "demo_ppo.yaml", ["actor.model.head_dtype=float32"])


def test_the_plan_counts_its_logits_in_their_dtype() -> None:
    shape = find_shape("Qwen/Qwen3-0.6B")
    load = Load(tokens=1000, longest=500)
    sizes = [
        training_activations(
            shape, "lm", ModelSettings.model_validate({"path": "m", "dtype": "bf16", **head}), load
        )
        for head in ({}, {"head_dtype": "float32"})
    ]
    assert sizes[1] - sizes[0] == 2 * shape.vocabulary * load.tokens


def test_triton_multiplies_float32_exactly_and_keeps_such_kernels_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars

    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32")
    exact_products("bfloat16")
    assert triton.knobs.language.fp32_default == "tf32"
    exact_products("float32")
    assert triton.knobs.language.fp32_default == "ieee"
    assert get_cache_invalidating_env_vars() == {"TRITON_F32_DEFAULT": "ieee"}


@pytest.mark.engines
def test_a_float32_head_brings_engine_and_actor_in_bfloat16_nearer(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = save_model("tiny", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(OFFSET)
    model.save_pretrained(path)
    plain = difference(path, Case("bfloat16"), "cpu", 16, 48)
    exact = difference(path, Case("bfloat16", "float32"), "cpu", 16, 48)
    assert min(plain["tokens"], exact["tokens"]) > 300
    assert exact["mean"] < 0.25 * plain["mean"]
