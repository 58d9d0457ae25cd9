"""Models that no engine can run, told from the text of installed packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.recipe.served import no_adapters, not_served, registered_names
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


WITH_ADAPTERS = ("LlamaForCausalLM", "OPTForCausalLM", "MistralForCausalLM", "GPTNeoXForCausalLM")


@pytest.mark.parametrize("name", [*WITH_ADAPTERS, "GPT2LMHeadModel", "BloomForCausalLM"])
def test_who_takes_no_adapters_is_told_without_importing_it(name: str) -> None:
    assert bool(no_adapters({"architectures": [name]})) == (name not in WITH_ADAPTERS)


def test_check_refuses_an_adapter_that_no_engine_would_serve(place: Path) -> None:  # noqa: F811
    config = {**DECODER, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    make_model(place / "gpt", config)
    adapted = ["actor.model.path=./gpt", "actor.model.lora.rank=4"]
    assert problems("grpo.yaml", *adapted) == []
    (line,) = problems("grpo.yaml", *adapted, "sync.lora=adapter")
    assert "sync.lora: ./gpt: vLLM serves no adapters for GPT2LMHeadModel: use merged" in line


@pytest.mark.engines
def test_what_is_said_of_adapters_is_what_vllms_classes_say() -> None:
    from vllm.model_executor.models import supports_lora
    from vllm.model_executor.models.registry import ModelRegistry

    for name in ("GPT2LMHeadModel", "BloomForCausalLM", "FalconForCausalLM", "MambaForCausalLM"):
        assert no_adapters({"architectures": [name]})
        assert not supports_lora(ModelRegistry._try_load_model_cls(name))


@pytest.mark.engines  # importing vLLM takes seconds
def test_the_names_read_are_those_of_vllms_registry() -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    assert registered_names() == frozenset(ModelRegistry.get_supported_archs())
