"""Every family of docs/models.md in the plan: parameters against Transformers', experts, and what
an engine keeps of a sequence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from actors.settings import ClusterSettings, GenerationSettings
from launch import cli
from launch.plan.batches import Load
from launch.plan.memory import kv_room, training_activations
from launch.plan.plan import make_plan
from launch.plan.shapes import Model, Shape, find_shape, read_shape, uneven
from launch.recipe.read import load_recipe
from learners.experience import Experience
from learners.forward import response_logprobs
from learners.settings import ModelSettings

pytestmark = pytest.mark.models

SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = {**SMALL, "head_dim": 16}
OLD = {k: v for k, v in SMALL.items() if k not in ("intermediate_size", "num_key_value_heads")}
GPT = {"vocab_size": 96, "n_embd": 48, "n_layer": 4, "n_head": 6, "n_positions": 40}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = {"shared_expert_intermediate_size": 32}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 6,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
CONVS = {
    "layer_types": ["conv", "full_attention", "conv", "conv"],
    "block_auto_adjust_ff_dim": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "opt": {**OLD, "ffn_dim": 80, "word_embed_proj_dim": 24},
    "gpt_neox": {**OLD, "intermediate_size": 80},
    "llama": SMALL,
    "mistral": SMALL,
    "gemma": WIDE,
    "gemma2": WIDE,
    "gemma3_text": WIDE,
    "phi": SMALL,
    "phi3": SMALL,
    "qwen2": SMALL,
    "qwen3": WIDE,
    "qwen2_moe": {**SMALL, **MOE, **SHARED, "mlp_only_layers": [0]},
    "qwen3_moe": {**WIDE, **MOE, "decoder_sparse_step": 2},
    "mixtral": {**SMALL, "num_local_experts": 8, "num_experts_per_tok": 2},
    "olmo2": SMALL,
    "granite": SMALL,
    "cohere": SMALL,
    "stablelm": SMALL,
    "falcon": {**OLD, "ffn_hidden_size": 80},
    "gpt_bigcode": GPT,
    "smollm3": SMALL,
    "glm4": WIDE,
    "deepseek_v3": {**SMALL, **MLA},
    "lfm2": {**SMALL, **CONVS},
    "qwen3_next": {**WIDE, **MOE, **SHARED, **DELTA},
    "gpt_oss": {**WIDE, "num_local_experts": 8, "num_experts_per_tok": 2},
    "bloom": {"vocab_size": 96, "hidden_size": 48, "n_layer": 4, "n_head": 6},
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt_neo": {
        **OLD,
        "num_layers": 4,
        "num_heads": 6,
        "attention_types": [[["global", "local"], 2]],
    },
    "mamba": {**OLD, "state_size": 4},
}
FAMILIES["gpt_neo"] = {k: v for k, v in FAMILIES["gpt_neo"].items() if "num_att" not in k}


RECIPES = Path(__file__).parents[2] / "launch" / "recipes"


def shape_of(config: Any, folder: Path) -> Shape:
    config.save_pretrained(folder)
    return find_shape(str(folder))


def meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_family_is_counted(family: str, tmp_path: Path) -> None:
    """Tensor by tensor, with the language model's head and with ours: a score, or a value."""
    config = CONFIG_MAPPING[family](**FAMILIES[family])
    shape = shape_of(config, tmp_path)
    model = meta(config)
    whole = [p.numel() for p in model.parameters()]
    assert sorted(shape.tensors("lm").elements()) == sorted(whole)
    assert shape.parameters("lm") == sum(whole)
    backbone = sum(p.numel() for p in model.base_model.parameters())
    width = model.get_output_embeddings().weight.shape[1]
    assert shape.parameters("score") == backbone + width
    assert shape.parameters("value") == backbone + width + 1
    assert shape.layers == 4 and not shape.encoder


@pytest.mark.engines  # these take longer to build
@pytest.mark.parametrize("family", FAMILIES)
def test_models_as_large_as_published_ones_are_counted(family: str, tmp_path: Path) -> None:
    """With the sizes that Transformers gives a family, most of them a published model's."""
    config = CONFIG_MAPPING[family]()
    counted = shape_of(config, tmp_path).tensors("lm")
    assert sorted(counted.elements()) == sorted(p.numel() for p in meta(config).parameters())


# --- experts --------------------------------------------------------------------------------------

# All parameters and those of one token, in billions: as the models' cards say, and the embeddings
# that some of them leave out.
PUBLISHED: dict[str, tuple[dict[str, int], float, float]] = {
    "mixtral": ({}, 46.7, 12.9),
    "deepseek_v3": ({}, 671, 37.5),
    "gpt_oss": ({}, 116.8, 5.7),
    "qwen3_moe": ({"num_hidden_layers": 48, "head_dim": 128}, 30.5, 3.3),
    "qwen3_next": ({}, 79.7, 3.9),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_token_passes_the_experts_it_is_sent_to(family: str) -> None:
    more, billions, active = PUBLISHED[family]
    shape = read_shape(CONFIG_MAPPING[family](**more).to_dict())
    assert shape.parameters("lm") / 1e9 == pytest.approx(billions, rel=0.01)
    assert shape.active("lm") / 1e9 == pytest.approx(active, rel=0.06)


def test_experts_count_whole_in_memory_and_as_passed_in_time(tmp_path: Path) -> None:
    """Against a model of the same parameters of which a token passes all."""
    few = CONFIG_MAPPING["qwen3_moe"](**{**FAMILIES["qwen3_moe"], "decoder_sparse_step": 1})
    every = CONFIG_MAPPING["qwen3_moe"](**{**few.to_dict(), "num_experts_per_tok": 8})
    plans = []
    for name, config in (("few", few), ("every", every)):
        config.save_pretrained(tmp_path / name)
        override = f"actor.model.path={tmp_path / name}"
        plans.append(make_plan(load_recipe(RECIPES / "demo_grpo.yaml", [override])))
    few_plan, every_plan = plans
    actors = [made.models["actor"] for made in plans]
    assert actors[0].parameters == actors[1].parameters == actors[1].active
    assert actors[0].active < actors[0].parameters
    weights = [made.memories[0].uses["learn"]["actor"]["weights"] for made in plans]
    assert weights[0] == weights[1]
    assert few_plan.sync == every_plan.sync
    assert few_plan.seconds["score"] < every_plan.seconds["score"]


def test_experts_are_cut_by_their_own_columns() -> None:
    shape = read_shape(CONFIG_MAPPING["qwen3_moe"](**FAMILIES["qwen3_moe"]).to_dict())
    assert uneven(shape, 2) == []
    assert uneven(shape, 5) == ["6 attention heads", "2 key-value heads", "24 MLP columns"]


# --- what an engine keeps -------------------------------------------------------------------------

KEPT = {  # elements of one token, and of one sequence
    "llama": (2 * 4 * 2 * 8, 0),
    "gemma3_text": (2 * 4 * 2 * 16, 0),  # windows count as if all were kept
    "falcon": (2 * 4 * 1 * 8, 0),  # one key and value for all heads
    "gpt_bigcode": (2 * 4 * 1 * 8, 0),
    "gpt_neox": (2 * 4 * 6 * 8, 0),
    "deepseek_v3": (4 * (12 + 8), 0),  # compressed, and what rotates
    "lfm2": (2 * 1 * 2 * 8, 3 * 48 * 3),
    "qwen3_next": (2 * 1 * 2 * 16, 3 * (4 * 8 * 8 + (2 * 16 + 32) * 4)),
    "mamba": (0, 4 * 96 * (4 + 4)),
}


@pytest.mark.parametrize("family", KEPT)
def test_what_an_engine_keeps_of_a_token_and_of_a_sequence(family: str) -> None:
    shape = read_shape(CONFIG_MAPPING[family](**FAMILIES[family]).to_dict())
    assert (shape.kv_elements, shape.state_elements) == KEPT[family]


@pytest.mark.parametrize(("family", "room"), [("mamba", 10922), ("deepseek_v3", 3276)])
def test_a_state_takes_the_same_however_long_a_sequence_is(family: str, room: int) -> None:
    """And a compressed cache is not cut among the GPUs of an engine."""
    recipe = load_recipe(RECIPES / "demo_grpo.yaml", [])
    shape = read_shape(CONFIG_MAPPING[family](**FAMILIES[family]).to_dict())
    role = make_plan(recipe).models["engine"].role
    model = Model(role, ModelSettings(path="x"), shape)
    one = GenerationSettings(kv_cache_gib=0.125)
    cluster = ClusterSettings()
    found = [kv_room(model, longest, one, cluster) for longest in (128, 1280)]
    assert found[0] == pytest.approx(room, rel=0.01)
    assert found[1] == (found[0] if family == "mamba" else pytest.approx(found[0] / 10, abs=1))
    cut = GenerationSettings(kv_cache_gib=0.125, tensor_parallel=2)
    assert kv_room(model, 128, cut, cluster) == found[0]


@pytest.mark.parametrize("family", ["mamba", "qwen3_next", "opt"])
def test_a_recipe_with_another_kind_of_model_is_planned(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG_MAPPING[family](**{**FAMILIES[family], "max_position_embeddings": 64})
    config.save_pretrained(tmp_path)
    recipe = str(RECIPES / "demo_grpo.yaml")
    assert cli.main(["plan", recipe, f"actor.model.path={tmp_path}"]) == 0
    assert f"{family} is not in the table" in capsys.readouterr().out


# --- activations ----------------------------------------------------------------------------------

LARGE = {
    **dict.fromkeys(("hidden_size", "n_embd"), 256),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size"), 640),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "kv_lora_rank"), 64),
    **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim"), 64),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "q_lora_rank"), 64),
    **dict.fromkeys(("moe_intermediate_size", "word_embed_proj_dim"), 128),
    "shared_expert_intermediate_size": 160,
    "qk_rope_head_dim": 32,
    "state_size": 16,
    "vocab_size": 512,
}
QUICK = ("gemma2", "qwen3_moe", "mamba")


def kept_by_autograd(config: Any, dtype: torch.dtype, kernel: str) -> int:
    """Bytes of one forward pass of 4 x 64 tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kernel).eval()
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        response_logprobs(model, Experience.from_ids([[1]] * 4, [[2] * 63] * 4), 1.0)
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in QUICK else pytest.mark.engines) for f in FAMILIES],
)
def test_activations_are_never_more_than_planned(family: str, dtype: Any) -> None:
    """With the kernel that auto chooses; at most 2.6 times as much is planned."""
    values = FAMILIES[family]
    large = values | {name: size for name, size in LARGE.items() if name in values}
    if family == "deepseek_v3":
        large |= {"num_key_value_heads": 4}
    config = CONFIG_MAPPING[family](**large)
    shape = read_shape(config.to_dict())
    kept = kept_by_autograd(config, getattr(torch, dtype), shape.auto)
    model = ModelSettings(path="x", dtype=dtype)
    planned = training_activations(shape, "lm", model, Load(4 * 64, 64))
    assert kept <= planned <= 2.6 * kept
    named = model.model_copy(update={"attention": shape.auto})
    assert training_activations(shape, "lm", named, Load(4 * 64, 64)) == planned
