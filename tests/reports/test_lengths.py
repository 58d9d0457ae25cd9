"""Lengths: how many positions a model really has, and who is told before anything starts.

One test per kind of report, with the project and number of a report of it elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actors.rollouts.sampling import sample_responses
from actors.run_data import RunData
from actors.settings import GenerationSettings, RLRecipe
from launch import cli
from launch.plan.plan import make_plan
from launch.recipe.read import load_recipe
from launch.tasks import unique_digits as task
from learners.checkpoints import load_causal_lm
from learners.errors import UserError
from learners.fits import kernel_problems, length_problems
from learners.kernels import dropped_by
from learners.positions import positions_of
from learners.settings import ModelSettings
from tests.launch.conftest import place  # noqa: F401  the fixture
from tests.launch.small_recipes import DECODER
from tests.launch.test_recipe import problems

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN_DECODER = {**DECODER, "rope_scaling": YARN}
GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_positions": 64}
GEMMA2 = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
N = 40  # positions that tiny models state


def write_config(folder: Path, config: dict[str, Any]) -> ModelSettings:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return ModelSettings(path=str(folder))


def rope(kind: str, factor: float, original: int | None = None) -> dict[str, Any]:
    known = {"rope_type": kind, "factor": factor, "rope_theta": 10000.0}
    return known | ({"original_max_position_embeddings": original} if original else {})


def stated(positions: int, **fields: Any) -> dict[str, Any]:
    return {"max_position_embeddings": positions, **fields}


LLAMA3 = rope("llama3", 8.0, 8192) | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = rope("longrope", 1.0, 4096) | {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
BY_LAYER = {"sliding_attention": rope("default", 1.0), "full_attention": rope("yarn", 8.0, 8192)}
RELATIVE = {"relative_attention": True, "position_biased_input": False}

POSITIONS = [
    # huggingface/open-r1 #645, modelscope/ms-swift #5146: YaRN is counted unscaled
    ("qwen2", stated(32768, rope_scaling=rope("yarn", 4.0, 32768)), 131072),
    ("qwen3", stated(40960, rope_scaling=rope("yarn", 4.0, 32768)), 131072),
    ("qwen3", stated(64, rope_scaling={"type": "yarn", "factor": 4.0}), 256),
    # vllm-project/vllm #53634: positions that are written as scaled are scaled again
    ("deepseek_v3", stated(163840, rope_scaling=rope("yarn", 40.0, 4096)), 163840),
    # vllm-project/vllm #2518: the key in config.json, with the positions as they were
    ("llama", stated(2048, rope_scaling={"type": "linear", "factor": 4.0}), 8192),
    ("llama", stated(2048, rope_parameters=rope("linear", 4.0)), 8192),
    ("gemma3_text", stated(131072, rope_scaling=rope("linear", 8.0)), 131072),
    # QwenLM/Qwen #401: dynamic NTK makes a row depend on the longest one of its batch
    ("llama", stated(2048, rope_scaling={"type": "dynamic", "factor": 2.0}), 2048),
    ("llama", stated(131072, rope_scaling=LLAMA3), 131072),
    ("phi3", stated(131072, rope_scaling=LONG, original_max_position_embeddings=4096), 131072),
    ("olmo3", stated(65536, rope_parameters=BY_LAYER), 65536),
    # vllm-project/vllm #3676: Command-R's length stands in another key
    ("cohere", stated(8192, model_max_length=131072), 131072),
    ("llama", stated(8192, model_max_length=512, seq_length=1024), 8192),
    ("kimi_linear", {"model_max_length": 4096}, 4096),
    # huggingface/trl #1867, #1031: GPT-2 has 1024, by another name
    ("gpt2", {"n_positions": 1024}, 1024),
    # vllm-project/vllm #447: MPT's ALiBi is made for max_seq_len by Transformers
    ("mpt", {"max_seq_len": 2048}, 2048),
    ("opt", stated(2048), 2048),
    ("falcon", stated(2048), 2048),
    ("falcon", stated(2048, alibi=True), None),
    ("bloom", {"seq_length": 2048}, None),
    # huggingface/transformers #14243, rinnakk/japanese-pretrained-models #3: 514 mean 512, or 510
    ("roberta", stated(514, pad_token_id=1), 512),
    ("roberta", stated(514, pad_token_id=3), 510),
    ("xlm-roberta", stated(514, pad_token_id=1), 512),
    ("longformer", stated(4098, pad_token_id=1), 4096),
    ("mpnet", stated(514, pad_token_id=3), 512),
    ("bert", stated(512), 512),
    ("deberta-v2", stated(512, **RELATIVE), None),
    ("deberta-v2", stated(512, relative_attention=True), 512),
    ("xlnet", {}, None),
    ("mamba", stated(2048), None),
    ("t5", {"n_positions": 512}, None),
]


@pytest.mark.parametrize(("kind", "fields", "expected"), POSITIONS)
def test_positions_by_config_json_and_by_transformers(
    kind: str, fields: dict[str, Any], expected: int | None
) -> None:
    """The reports stand beside the configs."""
    from transformers import AutoConfig

    assert positions_of({"model_type": kind, **fields}) == expected
    config = AutoConfig.for_model(kind, **json.loads(json.dumps(fields)))
    assert positions_of(config) == expected
    assert positions_of(config.to_dict()) == expected


def test_positions_of_what_is_written_otherwise() -> None:
    """Text models inside others; a pad token that is nowhere written; what is no number.

    No public report known to us.
    """
    text = {"model_type": "gemma3_text", **stated(1024)}
    assert positions_of({"model_type": "gemma3", "text_config": text}) == 1024
    assert positions_of({"model_type": "roberta", **stated(514)}) == 512
    for nonsense in ("64", None, True, 0, -1, 6.5, [64]):
        assert positions_of({"model_type": "llama", "max_position_embeddings": nonsense}) is None
    for factor in ("4", None, True, float("nan"), float("inf"), 0):
        config = stated(64, rope_scaling={"type": "linear", "factor": factor})
        assert positions_of({"model_type": "llama", **config}) == 64


DECODER_SIZES = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES = {**DECODER_SIZES, "hidden_size": 16, "intermediate_size": 16}
RUN = [
    ("bert", stated(N, **SIZES)),
    ("roberta", stated(N, **SIZES, pad_token_id=3)),
    ("mpnet", stated(N, **SIZES, pad_token_id=3)),
    ("deberta-v2", stated(N, **SIZES, **RELATIVE, pos_att_type=["c2p", "p2c"])),
    ("gpt2", {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": N}),
    ("opt", stated(N, **SIZES, ffn_dim=16, word_embed_proj_dim=16)),
    ("mpt", {"vocab_size": 64, "d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": N}),
    ("bloom", {"vocab_size": 64, "hidden_size": 16, "n_layer": 1, "n_head": 2, "seq_length": N}),
    ("falcon", stated(N, **SIZES, alibi=True)),
]


def slow(cases: list[tuple[Any, ...]], *quick: str) -> list[Any]:
    """The cases by name, with all but the quick ones for the runs that take their time."""
    names = [c[0] if isinstance(c[0], str) else c[0]["model_type"] for c in cases]
    marks: dict[bool, Any] = {True: (), False: pytest.mark.engines}
    return [
        pytest.param(*case, id=name, marks=marks[name in quick])
        for name, case in zip(names, cases, strict=True)
    ]


@pytest.mark.parametrize(("kind", "fields"), slow(RUN, "roberta", "mpnet", "gpt2"))
def test_models_read_exactly_as_many_tokens(kind: str, fields: dict[str, Any]) -> None:
    """huggingface/transformers #14243: the number in the config is not what the model reads."""
    import torch
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    from learners.checkpoints import is_encoder

    config = AutoConfig.for_model(kind, **fields)
    assert type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or is_encoder(config)
    auto = AutoModelForSequenceClassification if is_encoder(config) else AutoModelForCausalLM
    model = auto.from_config(config).eval()
    limit = positions_of(config)

    def read(tokens: int) -> None:
        ids = torch.full((1, tokens), 5)
        assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()

    with torch.no_grad():
        read(limit or 3 * N)
        if limit:
            with pytest.raises((IndexError, RuntimeError)):
                read(limit + 1)


def test_beyond_what_is_written_dynamic_ntk_mixes_rows() -> None:
    """QwenLM/Qwen #401: which is why those positions are not counted."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    scaling = rope("dynamic", 4.0)
    config = AutoConfig.for_model("llama", **stated(N, **SIZES, rope_parameters=scaling))
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 60, (2, 2 * N))
    with torch.no_grad():
        alone = model(ids[:1, :10]).logits[0]
        for columns, same in ((N, True), (2 * N, False)):
            mask = (torch.arange(columns) < torch.tensor([[10], [columns]])).long()
            beside = model(ids[:, :columns], attention_mask=mask).logits[0, :10]
            assert torch.allclose(alone, beside, atol=1e-6) == same


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "tokens", "told"),
    [
        (YARN_DECODER, 256, ""),
        (YARN_DECODER, 257, "257 is more than the model's 256 positions"),
        (GPT2, 64, ""),
        (GPT2, 65, "65 is more than the model's 64 positions"),
        ({"model_type": "mpt", "max_seq_len": 64}, 65, "65 is more than the model's 64 positions"),
        ({"model_type": "bloom", "seq_length": 64}, 4096, ""),
    ],
)
def test_check_knows_the_actors_positions(
    place: Path,  # noqa: F811
    config: dict[str, Any],
    tokens: int,
    told: str,
) -> None:
    """huggingface/open-r1 #645, huggingface/trl #1867: refused, or found by the engine."""
    write_config(place / "decoder", config)
    found = problems("grpo.yaml", f"generation.max_model_tokens={tokens}")
    assert found == ([f"command line: generation.max_model_tokens: {told}"] if told else [])


@pytest.mark.parametrize("key", ["critic", "reference"])
def test_check_knows_the_positions_of_those_beside_the_actor(place: Path, key: str) -> None:  # noqa: F811
    """nebuly-ai/optimate #289: models of one run have different positions."""
    write_config(place / "decoder", YARN_DECODER)
    write_config(place / "short", DECODER)
    longer = ["generation.max_new_tokens=100", "critic.model.path=./decoder"]
    assert problems("ppo.yaml", *longer) == []
    (found,) = problems("ppo.yaml", *longer, f"{key}.model.path=./short")
    assert found.startswith(f"command line: {key}.model.path: its 64 positions leave no room")
    assert "generation.max_new_tokens 100" in found


def test_plan_counts_as_the_checks_do(place: Path, tmp_path: Path) -> None:  # noqa: F811
    """huggingface/transformers #14243 and huggingface/open-r1 #645, in a plan."""
    sizes = {**SIZES, "num_key_value_heads": 2, "type_vocab_size": 2}
    write_config(place / "encoder", {"model_type": "roberta", **sizes, **stated(514)})
    overrides = ["learner.model.path=./encoder", "data.max_tokens=600"]
    assert make_plan(load_recipe("rm.yaml", overrides)).longest == 512
    write_config(place / "decoder", YARN_DECODER | sizes)
    made = make_plan(load_recipe("grpo.yaml", ["generation.max_model_tokens=256"]))
    assert (made.longest, made.problems) == (256, [])
    longer = ["generation.max_new_tokens=40", "generation.max_model_tokens=257"]
    made = make_plan(load_recipe("grpo.yaml", longer))
    assert made.problems[0].endswith("257 is more than the model's 256 positions")
    alibi = {"model_type": "bloom", "hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64}
    write_config(place / "decoder", alibi)
    longer = ["generation.max_model_tokens=9000", "generation.max_new_tokens=8000"]
    assert make_plan(load_recipe("grpo.yaml", longer)).longest == 9000


# --- data -----------------------------------------------------------------------------------------


@pytest.fixture
def run_place(place: Path) -> Path:  # noqa: F811
    """The working directory with a tokenizer of one token per character; three prompts, of 5, 9 and
    5 tokens.
    """
    for name in ("decoder", "reward_model"):
        task.make_tokenizer(place / name)
    task.write_rows(
        place / "prompts.jsonl",
        [{"prompt": text, "answer": "2"} for text in ("1+1=", "111+111=", "2+2=")],
    )
    return place


def load(place: Path, *overrides: str, kind: str = "grpo") -> RunData:  # noqa: F811
    recipe = load_recipe(place / f"{kind}.yaml", overrides)
    assert isinstance(recipe, RLRecipe)
    return RunData.load(recipe)


EVALUATED = [
    "evaluation.prompts={path: prompts.jsonl, answer_columns: [answer]}",
    "evaluation.function=rewards_of_test:exact",
]


def test_a_prompt_that_leaves_no_room_is_named_before_anything_starts(run_place: Path) -> None:
    """huggingface/trl #3180, unslothai/unsloth #1642, agentscope-ai/Trinity-RFT #287: the step that
    meets such a prompt dies.
    """
    small = ["generation.max_new_tokens=4", "generation.max_model_tokens=9"]
    with pytest.raises(UserError) as refused:
        load(run_place, *small, "prompts.long_prompts=refuse")
    assert str(refused.value) == (
        "prompts.jsonl: row 2: the prompt has 9 tokens, too many for generation.max_model_tokens "
        "9, answer included; raise it, or set long_prompts: drop"
    )
    with pytest.raises(UserError, match="1 of 3 prompts are too long for generation.max_model_tok"):
        load(run_place, *small)
    data = load(run_place, *small, "prompts.max_dropped=0.4")
    assert [p.index for p in data.prompts] == [0, 2]
    assert data.prompts.dropped == {"too long": 1}
    with pytest.raises(UserError, match="no row can be used: 3 too long"):
        load(run_place, "generation.max_new_tokens=4", "generation.max_model_tokens=5")
    # one token of an answer is an answer: it ends by its length
    assert len(load(run_place, *small[:1], "generation.max_model_tokens=10").prompts) == 3


def test_prompts_of_the_evaluation_too(run_place: Path) -> None:
    """verl-project/verl #2069: a filter that some prompts do not pass through."""
    small = ["generation.max_new_tokens=4", "generation.max_model_tokens=9", *EVALUATED]
    with pytest.raises(UserError, match="1 of 3 prompts are too long"):
        load(run_place, *small, "prompts.max_dropped=0.4")
    dropped = ["prompts.max_dropped=0.4", "evaluation.prompts.max_dropped=0.4"]
    assert [p.index for p in load(run_place, *small, *dropped).held_out] == [0, 2]


def test_without_max_model_tokens_the_data_decide(run_place: Path) -> None:
    """No public report known to us."""
    recipe = load_recipe("grpo.yaml", [])
    assert isinstance(recipe, RLRecipe)
    assert RunData.load(recipe).facts(recipe)["max_model_tokens"] == 9 + 16


def test_hub_models_are_measured_before_the_engine_starts(run_place: Path) -> None:
    """vllm-project/vllm #3676: `max_model_tokens` above the positions was vLLM's traceback. Files
    are not looked at by the recipe's checks, as with a hub's name.
    """
    with pytest.raises(UserError) as refused:
        load(run_place, "generation.max_model_tokens=65")
    assert refused.value.problems == [
        "generation.max_model_tokens: 65 is more than the model's 64 positions"
    ]
    write_config(run_place / "decoder", YARN_DECODER)
    assert load(run_place, "generation.max_model_tokens=256", "generation.max_new_tokens=200")


def test_a_critic_with_fewer_positions_than_the_actor(run_place: Path) -> None:
    """nebuly-ai/optimate #289, huggingface/trl #1867: one model reads what another cannot. Only
    what it is handed counts: short data fit a short critic, and the evaluation's are not handed.
    """
    write_config(run_place / "decoder", YARN_DECODER)
    roomy = ["generation.max_model_tokens=200", "rewards.0.model.path=./decoder"]
    with pytest.raises(UserError) as refused:
        load(run_place, *roomy, "generation.max_new_tokens=60", kind="ppo")
    (problem,) = [p for p in refused.value.problems if p.startswith("critic")]
    assert "has 64 positions, prompt + response need up to 69" in problem
    assert load(run_place, *roomy, "generation.max_new_tokens=50", kind="ppo")
    task.write_rows(run_place / "long.jsonl", [{"prompt": "1" * 99 + "=", "answer": "2"}])
    longer = [EVALUATED[0].replace("prompts.jsonl", "long.jsonl"), EVALUATED[1]]
    assert load(run_place, *roomy, *longer, "generation.max_new_tokens=50", kind="ppo")
    # but where no function judges them, the rewards do
    judged = [roomy[0], longer[0], "generation.max_new_tokens=50"]
    with pytest.raises(UserError, match=r"^rewards\.0\.model: .* 64 positions, .* up to 151"):
        load(run_place, *judged, kind="ppo")


def test_rows_of_an_encoder_reward_model(tmp_path: Path) -> None:
    """huggingface/transformers #14243: 513 tokens fit 514 positions on paper alone."""
    model = write_config(tmp_path / "roberta", {"model_type": "roberta", **stated(514)})
    (problem,) = length_problems("learner.model", model, 513)
    assert "has 512 positions" in problem
    assert length_problems("learner.model", model, 512) == []


def test_sampling_asks_before_engines_start(tmp_path: Path) -> None:
    """huggingface/open-r1 #645: lengths are met by the engine, prompt after prompt."""
    write_config(tmp_path / "model", DECODER)
    task.make_tokenizer(tmp_path / "model")
    generation = GenerationSettings(max_new_tokens=62)
    with pytest.raises(UserError, match="has 64 positions, prompt \\+ response need up to 65"):
        sample_responses(str(tmp_path / "model"), ["1="], generation, seed=0)


# --- kernels --------------------------------------------------------------------------------------


def capped(kind: str, cap: float | None) -> dict[str, Any]:
    sizes = {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.5}
    return {"model_type": kind, **sizes, **stated(64), "attn_logit_softcapping": cap}


KERNELS = [
    # tdrussell/qlora-pipe #18, vllm-project/vllm-metal #665: the cap on attention is dropped
    (capped("gemma2", 2.0), True),
    (capped("vaultgemma", 2.0), True),
    (capped("gemma2", None), False),
    (capped("gemma3_text", None), False),
    ({**capped("qwen3", None), "use_sliding_window": True, "sliding_window": 8}, False),
    ({**capped("mistral", None), "sliding_window": 8}, False),
    ({**capped("olmo2", None)}, False),
]


@pytest.mark.parametrize(("config", "differs"), slow(KERNELS, "gemma2"))
def test_sdpa_is_refused_where_it_computes_another_model(
    config: dict[str, Any], differs: bool
) -> None:
    """Compare the log-probs of both kernels, and what is said of them.

    The reports stand beside the configs.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    logprobs = {}
    state: dict[str, Any] = {}
    for attention in ("eager", "sdpa"):
        known = AutoConfig.for_model(**json.loads(json.dumps(config)))
        model = AutoModelForCausalLM.from_config(known, attn_implementation=attention).eval()
        state = state or model.state_dict()
        model.load_state_dict(state)
        with torch.no_grad():
            logits = model(torch.arange(3, 35)[None]).logits
        logprobs[attention] = logits.log_softmax(-1)
        refused = differs and attention == "sdpa"
        assert bool(dropped_by(attention, config)) == bool(dropped_by(attention, known)) == refused
    difference = (logprobs["eager"] - logprobs["sdpa"]).abs().max().item()
    assert (difference > 1e-2) if differs else (difference < 1e-4)


@pytest.mark.engines
def test_a_window_that_is_in_the_mask_alone_is_not_for_flash_attention() -> None:
    """huggingface/transformers #29623: kernels differ in their window. Flash attention reads the
    window it is handed, not the mask; these two hand it none.
    """
    import torch
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    handed: list[Any] = []

    def recording(*args: Any, **kwargs: Any) -> Any:
        handed.append(kwargs.get("sliding_window"))
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("recording", recording)
    AttentionMaskInterface.register("recording", sdpa_mask)
    moe = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    small = {**capped("", None), **moe, "moe_intermediate_size": 8, "sliding_window": 8}
    windowed = {"use_sliding_window": True, "max_window_layers": 2, "num_hidden_layers": 2}
    for kind, more, dropped in [
        ("qwen2_moe", {**windowed, "shared_expert_intermediate_size": 8}, True),
        ("phimoe", {}, True),
        ("mistral", {}, False),
        ("qwen2", {**windowed, "max_window_layers": 0}, False),
    ]:
        config = {**small, "model_type": kind, **more}
        known = AutoConfig.for_model(**config)
        model = AutoModelForCausalLM.from_config(known, attn_implementation="recording")
        handed.clear()
        model(torch.arange(3, 35)[None])
        assert (8 not in handed) == dropped
        assert bool(dropped_by("flash_attention_2", config)) == dropped
        assert bool(dropped_by("flash_attention_2", known)) == dropped
        assert not dropped_by("sdpa", config) and not dropped_by("eager", config)
    off = {**small, "model_type": "qwen2_moe"}  # the usual: a window that is not used
    assert not dropped_by("flash_attention_2", off)
    assert not dropped_by("flash_attention_2", AutoConfig.for_model(**off))


@pytest.mark.parametrize("kind", ["grpo", "ppo", "sft", "rm"])
def test_check_refuses_a_dropped_cap_and_names_the_key(place: Path, kind: str) -> None:  # noqa: F811
    """huggingface/transformers #32390: Gemma-2 with the default kernel. Its cap is 50 where
    config.json does not say.
    """
    write_config(place / "decoder", GEMMA2)
    key = "actor.model" if kind in ("grpo", "ppo") else "learner.model"
    (found,) = problems(f"{kind}.yaml", f"{key}.attention=sdpa")
    assert f"{key}.attention: ./decoder: sdpa drops the cap on gemma2's attention scores" in found
    assert "use eager, which is what auto chooses" in found
    assert problems(f"{kind}.yaml", f"{key}.attention=eager") == []
    assert problems(f"{kind}.yaml") == []
    write_config(place / "decoder", {**GEMMA2, "attn_logit_softcapping": None})
    assert problems(f"{kind}.yaml", f"{key}.attention=sdpa") == []


def test_check_says_which_kernel_auto_is(
    place: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """huggingface/transformers #32390: nothing told users of Gemma-2 which kernel they had."""
    write_config(place / "decoder", GEMMA2)
    assert cli.main(["sft", "sft.yaml", "--check"]) == 0
    line = "notice: learner.model.attention: auto is eager for ./decoder: sdpa drops the cap on"
    assert line in capsys.readouterr().err
    assert cli.main(["sft", "sft.yaml", "--check", "learner.model.attention=eager"]) == 0
    assert "notice" not in capsys.readouterr().err


def test_a_dropped_cap_is_refused_at_load_too(run_place: Path) -> None:
    """As with a hub's model, whose config.json no recipe check has read.

    huggingface/transformers #32390.
    """
    model = write_config(run_place / "decoder", GEMMA2)
    with pytest.raises(UserError, match="sdpa drops the cap"):
        load_causal_lm(model.model_copy(update={"attention": "sdpa"}))
    (notice,) = load(run_place).notices
    assert notice.startswith("actor.model.attention: auto is eager for ./decoder: sdpa drops")
    with pytest.raises(UserError) as refused:
        load(run_place, "actor.model.attention=sdpa")
    (problem,) = refused.value.problems
    assert problem.startswith("actor.model.attention: ./decoder: sdpa drops the cap")


def test_a_kernel_that_transformers_does_not_have_is_named_before_load(tmp_path: Path) -> None:
    """No public report known to us: Bloom's own refusal asks for an issue at Transformers."""
    model = write_config(tmp_path / "bloom", {"model_type": "bloom"})
    assert kernel_problems("actor.model", model.model_copy(update={"attention": "sdpa"})) == [
        f"actor.model.attention: {model.path}: bloom has no sdpa in Transformers; use eager, or "
        "auto"
    ]
    assert kernel_problems("a", model.model_copy(update={"attention": "eager"})) == []
    assert kernel_problems("a", model) == []
    for sound in (DECODER, GPT2, {"model_type": "bert"}):
        assert kernel_problems("a", write_config(tmp_path / "sound", sound)) == []


# --- the engine -----------------------------------------------------------------------------------


@pytest.mark.engines
@pytest.mark.parametrize(
    ("kind", "fields", "limit"),
    [
        ("qwen3", {"rope_parameters": {**YARN, "rope_theta": 10000.0}}, 256),
        ("gemma2", {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 1}, 64),
    ],
)
def test_the_engine_reads_what_we_count(
    tmp_path: Path, kind: str, fields: dict[str, Any], limit: int
) -> None:
    """modelscope/ms-swift #5146, NovaSky-AI/SkyRL #561: vLLM counts YaRN unscaled. All log-probs
    up to the last position are those of Transformers; one more position is refused in a line.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from actors.engine.engine import GenerationEngine
    from learners.experience import PromptRequest
    from tests.actors.tiny_models import logprobs

    sizes = {**SIZES, "hidden_size": 64, "num_key_value_heads": 1, "head_dim": 32}
    ids = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = AutoConfig.for_model(
        kind, **stated(64, **sizes, **ids, initializer_range=0.2), **fields
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    settings = ModelSettings(path=str(tmp_path), attention="eager")
    generation = GenerationSettings(threads=1, kv_cache_gib=0.125, max_concurrent=8)
    with pytest.raises(UserError, match=f"generation.max_model_tokens: .* has {limit} positions"):
        GenerationEngine(settings, generation, "cpu", limit + 1, [])
    engine = GenerationEngine(settings, generation, "cpu", limit, [])
    request = PromptRequest(0, 0, [1, 5, 9], 2, 1.0, limit, (3, 4))
    (samples,) = [group for groups in engine.generate([request]) for group in groups]
    engine.close()
    model = load_causal_lm(settings)
    for sample in samples:
        assert len(sample.prompt_ids + sample.response_ids) == limit
        expected = logprobs(model, sample.prompt_ids + sample.response_ids)[2:]
        assert torch.allclose(torch.tensor(sample.logprobs), expected, atol=1e-4)
