"""Shapes against Transformers: every parameter of every family, on the meta device; activations
against autograd.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from benchmarks.family_shapes import SHAPES
from launch import cli
from launch.plan.adapters import adapter_tensors
from launch.plan.batches import Load
from launch.plan.memory import layer_activations, training_activations
from launch.plan.shapes import find_shape, model_table, read_shape
from launch.tasks.unique_digits import make_model
from learners.errors import UserError
from learners.experience import Experience
from learners.forward import response_logprobs
from learners.settings import LoraSettings, ModelSettings

SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
}
GPT2 = {"vocab_size": 96, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 40, "n_inner": 80}
CONFIGS = [
    ("qwen3", {**SMALL, "head_dim": 16}),
    ("qwen3", {**SMALL, "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    ("qwen2", SMALL),
    ("qwen2", {**SMALL, "tie_word_embeddings": True}),
    ("llama", SMALL),
    (
        "llama",
        {
            **SMALL,
            "head_dim": 10,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    ("mistral", SMALL),
    ("gpt2", GPT2),
    ("gpt2", {**GPT2, "n_inner": None, "tie_word_embeddings": False}),
]
PUBLISHED = {  # parameters in the models' own safetensors index or card
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-chat-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-2-9b-it": 9_241_705_984,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": 30_532_122_624,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46_702_792_704,
    "openai/gpt-oss-20b": 20_914_757_184,
    "gpt2": 124_439_808,
}


def meta(auto: Any, config: Any) -> Any:
    with torch.device("meta"):
        return auto.from_config(config)


def sizes(model: Any) -> list[int]:
    return sorted(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "values"), CONFIGS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_every_parameter_of_a_decoder_is_counted(
    family: str, values: dict[str, Any], tmp_path: Path
) -> None:
    """With every head, from the config.json that Transformers writes."""
    config = CONFIG_MAPPING[family](**values)
    config.save_pretrained(tmp_path)
    shape = find_shape(str(tmp_path))
    config.num_labels = 1
    for head, auto in (
        ("lm", AutoModelForCausalLM),
        ("score", AutoModelForSequenceClassification),
        ("value", AutoModelForTokenClassification),
    ):
        assert sorted(shape.tensors(head).elements()) == sizes(meta(auto, config)), head


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_every_parameter_of_an_encoder_is_counted(family: str, tmp_path: Path) -> None:
    config = CONFIG_MAPPING[family](
        **{k: v for k, v in SMALL.items() if "key_value" not in k}, type_vocab_size=2
    )
    config.save_pretrained(tmp_path)
    config.num_labels = 1
    found = sizes(meta(AutoModelForSequenceClassification, config))
    assert sorted(find_shape(str(tmp_path)).tensors("score").elements()) == found


@pytest.mark.parametrize(
    "name", [name for name, entry in model_table().items() if isinstance(entry, dict)]
)
def test_the_table_makes_models_that_transformers_builds(name: str) -> None:
    entry = dict(model_table()[name])
    config = CONFIG_MAPPING[entry.pop("model_type")](**entry)
    assert sorted(find_shape(name).tensors("lm").elements()) == sizes(
        meta(AutoModelForCausalLM, config)
    )


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_published_parameter_counts(name: str, parameters: int) -> None:
    assert find_shape(name).parameters("lm") == parameters


def test_the_demos_shape_is_that_of_the_model_it_makes(tmp_path: Path) -> None:
    make_model(tmp_path / "base", 0)
    assert find_shape(str(tmp_path / "base")) == find_shape("runs/demo/sft/model")


def test_what_cannot_be_counted_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))

    def told(config: dict[str, Any]) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError) as error:
            find_shape(str(tmp_path))
        return error.value.problems[0]

    with pytest.raises(UserError, match="some/model: its shape is not known here"):
        find_shape("some/model")
    assert "model_type funnel cannot be planned" in told({"model_type": "funnel"})
    assert "config.json: hidden_size must be a whole number from 1 to" in told(
        {"model_type": "qwen3"}
    )


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("qwen3", "hidden_size", "48"),
        ("qwen2", "hidden_size", None),
        ("llama", "max_position_embeddings", None),
        ("mistral", "num_hidden_layers", 0),
        ("qwen3", "vocab_size", -96),
        ("qwen3", "num_key_value_heads", 0),
        ("llama", "head_dim", 16.0),
        ("qwen2", "intermediate_size", True),
        ("bert", "num_attention_heads", []),
        ("roberta", "type_vocab_size", 10**400),
        ("gpt2", "n_layer", 0),
        ("gpt2", "n_inner", -1),
    ],
)
def test_a_size_that_makes_no_sense_is_one_line(
    family: str, key: str, value: Any, tmp_path: Path
) -> None:
    config = GPT2 if family == "gpt2" else {**SMALL, "head_dim": 8, "type_vocab_size": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **config, key: value}))
    with pytest.raises(UserError) as error:
        find_shape(str(tmp_path))
    (line,) = error.value.problems
    assert (
        line.startswith(f"{tmp_path}: config.json: {key} must be a whole number from 1 to")
        and "\n" not in line
    )


def test_heads_wider_than_the_model_are_refused(tmp_path: Path) -> None:
    for family, config in (("qwen2", {**SMALL, "hidden_size": 4}), ("gpt2", {**GPT2, "n_embd": 4})):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **config}))
        with pytest.raises(UserError, match="config.json: head_dim must be"):
            find_shape(str(tmp_path))


def test_the_hubs_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models--some--model/snapshots/abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **GPT2}))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert find_shape("some/model") == read_shape({"model_type": "gpt2", **GPT2})


# --- activations ----------------------------------------------------------------------------------


def saved_bytes(config: Any, dtype: torch.dtype, checkpointing: bool) -> int:
    """What autograd keeps of one forward pass of 4 x 64 tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.train(checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        response_logprobs(model, Experience.from_ids([[1]] * 4, [[2] * 63] * 4), 1.0)
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "gpt2"])
def test_activations_are_what_autograd_keeps(family: str, dtype: str) -> None:
    """Of one layer within 1 %; of a whole model never less, and at most half as much again."""
    values = {
        "n_embd": 256,
        "n_head": 4,
        "n_inner": 640,
        "vocab_size": 512,
        "n_positions": 64,
    } | dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0)
    if family != "gpt2":
        values = {
            **SMALL,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "intermediate_size": 640,
            "vocab_size": 512,
            "max_position_embeddings": 64,
            "head_dim": 64,
        }
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    two, three = (
        CONFIG_MAPPING[family](**{**values, layers: n}, bos_token_id=1, eos_token_id=2)
        for n in (2, 3)
    )
    shape = read_shape({**three.to_dict()})
    tokens = 4 * 64
    torch_dtype = getattr(torch, dtype)
    whole = saved_bytes(three, torch_dtype, False)
    layer = (whole - saved_bytes(two, torch_dtype, False)) / tokens
    assert layer == pytest.approx(layer_activations(shape, dtype), rel=0.01)
    model = ModelSettings(path="x", dtype=dtype)
    load = Load(tokens, 64)
    assert whole <= training_activations(shape, "lm", model, load) <= 1.5 * whole
    checkpointed = ModelSettings(path="x", dtype=dtype, gradient_checkpointing=True)
    inputs = saved_bytes(three, torch_dtype, True)
    assert inputs + tokens * layer <= 1.01 * training_activations(shape, "lm", checkpointed, load)


def test_the_kv_cache_of_a_token() -> None:
    """Qwen3-8B: keys and values of 36 layers, 8 heads of 128: 144 KiB in bfloat16."""
    assert 2 * find_shape("Qwen/Qwen3-8B").kv_elements == 144 * 1024


# --- types that are not in the table --------------------------------------------------------------

OTHERS = [
    ("gemma2", {**SMALL, "head_dim": 16}),
    ("phi3", {**SMALL, "pad_token_id": 0}),
    ("gpt_neox", {k: v for k, v in SMALL.items() if "key_value" not in k}),
    ("phi", SMALL),  # its language-model head has a bias
]


@pytest.mark.parametrize(
    ("family", "values"), OTHERS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_other_types_are_counted_on_the_meta_device(
    family: str, values: dict[str, Any], tmp_path: Path
) -> None:
    """With every head, against models that are really made."""
    config = CONFIG_MAPPING[family](**values)
    config.save_pretrained(tmp_path)
    shape = find_shape(str(tmp_path))
    config.num_labels = 1
    for head, auto in (
        ("lm", AutoModelForCausalLM),
        ("score", AutoModelForSequenceClassification),
        ("value", AutoModelForTokenClassification),
    ):
        assert sorted(shape.tensors(head).elements()) == sizes(auto.from_config(config)), head
    assert (shape.hidden, shape.layers, shape.heads, shape.intermediate) == (48, 3, 6, 80)
    assert (shape.vocabulary, shape.positions) == (96, 40)
    assert shape.kv_heads == (6 if family == "gpt_neox" else 2)
    assert shape.head_dim == (16 if family == "gemma2" else 8)
    assert shape.tied == (family == "gemma2") and not shape.encoder
    assert len(shape.embedding) == 1


def test_another_encoder_is_counted_on_the_meta_device(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["electra"](
        **{k: v for k, v in SMALL.items() if "key_value" not in k}, embedding_size=24
    )
    config.save_pretrained(tmp_path)
    config.num_labels = 1
    found = sizes(AutoModelForSequenceClassification.from_config(config))
    shape = find_shape(str(tmp_path))
    assert sorted(shape.tensors("score").elements()) == found and shape.encoder


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"model_type": "nosuch"}, "Unrecognized model identifier: nosuch"),
        ({"model_type": "gemma2", "hidden_size": "48"}, "Validation error for field"),
        ({"model_type": "mamba", "vocab_size": 0}, "vocab_size must be a whole number from 1 to"),
        ({"model_type": "funnel"}, "it is not made of 12 layers"),
    ],
)
def test_a_type_that_cannot_be_planned_is_one_line(
    values: dict[str, Any], told: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as error:
        find_shape(str(tmp_path))
    (line,) = error.value.problems
    assert f"model_type {values['model_type']} cannot be planned: {told}" in line
    assert "\n" not in line and len(line) < 300


def test_plan_says_that_a_type_takes_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CONFIG_MAPPING["gemma2"](**SMALL, head_dim=16).save_pretrained(tmp_path)
    recipe = Path(__file__).parents[2] / "launch" / "recipes" / "demo_sft.yaml"
    assert cli.main(["plan", str(recipe), f"learner.model.path={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "gemma2 is not in the table: counted on torch's meta device, which takes seconds" in out


ENCODER = {k: v for k, v in SMALL.items() if "key_value" not in k}
ADAPTED = [
    *CONFIGS,
    *((family, ENCODER) for family in ("bert", "roberta", "xlm-roberta", "electra")),
    *(
        (str(SHAPES[name]["model_type"]), SHAPES[name])
        for name in (
            "gpt2",
            "opt (word_embed_proj)",
            "mixtral",
            "qwen3_moe",
            "qwen3_next",
            "deepseek_v3",
            "lfm2",
        )
    ),
    # more experts than some layers have columns
    ("qwen3_moe", {**SHAPES["qwen3_moe"], "num_experts": 128, "num_experts_per_tok": 8}),
]


@pytest.mark.parametrize(
    ("family", "values"), ADAPTED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_an_adapter_is_counted_as_peft_makes_it(family: str, values: dict[str, Any]) -> None:
    """Of every layer, and of those that `targets` names: by the last part of the name or by more,
    and one layer alone.
    """
    from learners.lora import attach, head_of, is_adapter, linear_layers

    config = CONFIG_MAPPING[family](**{k: v for k, v in values.items() if k != "model_type"})
    config.num_labels = 1
    shape = read_shape({k: v for k, v in config.to_dict().items() if k != "dtype"})
    auto = AutoModelForSequenceClassification if shape.encoder else AutoModelForCausalLM
    model = meta(auto, config)
    head = head_of(model) if shape.encoder else ()
    names = linear_layers(model, head)
    last = names[-1]
    assert [layer.name for layer in shape.linear] == names
    for targets in ("all-linear", (last.split(".")[-1],), (".".join(last.split(".")[-2:]), last)):
        lora = LoraSettings(rank=2, targets=targets)
        with torch.device("meta"):
            adapted = auto.from_config(config)
            attach(adapted, lora, head)
        made = Counter(p.numel() for name, p in adapted.named_parameters() if is_adapter(name))
        assert adapter_tensors(shape, lora) == made, targets
