"""Models that no engine can run, told from the text of installed packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.recipe.served import not_served, registered_names
from tests.launch.conftest import place  # noqa: F401  the fixture
from tests.launch.small_recipes import DECODER, make_model
from tests.launch.test_recipe import problems

SERVED = {
    "bloom": "BloomForCausalLM",
    "falcon": "FalconForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",  # through Transformers' own class
    "mamba": "MambaForCausalLM",
    "opt": "OPTForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "helium": "HeliumForCausalLM",  # in no registry, but its attention can be exchanged
    "nosuch": "NoSuchForCausalLM",  # nobody knows
}
NOT = {
    "gpt_neo": "GPTNeoForCausalLM",
    "codegen": "CodeGenForCausalLM",
    "xglm": "XGLMForCausalLM",
    "rwkv": "RwkvForCausalLM",
}


@pytest.mark.parametrize("kind", [*SERVED, *NOT])
def test_what_vllm_cannot_run_is_told_without_importing_it(kind: str) -> None:
    name = (SERVED | NOT)[kind]
    config = {"model_type": kind, "architectures": [name]}
    wrong = not_served(config)
    assert wrong.startswith(f"vLLM cannot run {name}") if kind in NOT else not wrong
    assert not_served({**config, "auto_map": {"AutoModelForCausalLM": "own.Own"}}) == ""
    assert not_served({"model_type": kind}) == ""


def test_check_refuses_it_for_sampling_alone(place: Path) -> None:  # noqa: F811
    config = {**DECODER, "model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"]}
    make_model(place / "neo", config)
    (line,) = problems("grpo.yaml", "actor.model.path=./neo")
    assert "actor.model.path: ./neo: vLLM cannot run GPTNeoForCausalLM" in line
    assert problems("sft.yaml", "learner.model.path=./neo") == []


@pytest.mark.engines  # importing vLLM takes seconds
def test_the_names_read_are_those_of_vllms_registry() -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    assert registered_names() == frozenset(ModelRegistry.get_supported_archs())
