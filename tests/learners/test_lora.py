"""LoRA: against autograd on the merged weights, against plain Transformers and PEFT, and on ranks
against one process; each trap with a test that fails without its guard.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    GPT2Config,
    Lfm2Config,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from learners.checkpoints import load_reward_model
from learners.errors import UserError
from learners.experience import Experience
from learners.export import export_saved
from learners.lora import (
    adapter_config,
    attach,
    base_digest,
    base_name,
    fused_experts,
    head_of,
    is_adapter,
    left_out,
    merged,
    peft_name,
    target_problems,
    without_adapter,
    without_dropout,
)
from learners.settings import LearnerSettings, LoraSettings, ModelSettings, OptimizerSettings
from learners.weights import _merged_into, export_adapter, read_saved
from tests.learners.ranks import Ranks
from tests.learners.test_learner import PAD, in_order, learner, plain_outputs, share

SIZE = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SHARED = {"intermediate_size": 48, "num_key_value_heads": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS = {
    "qwen3": Qwen3Config(**SIZE, **SHARED, head_dim=16, tie_word_embeddings=True),
    "gpt2": GPT2Config(
        vocab_size=40, n_embd=32, n_layer=2, n_head=2
    ),  # whose weights lie [in, out]
    "opt": OPTConfig(
        **SIZE, ffn_dim=48, word_embed_proj_dim=16
    ),  # linear layers outside the layers
    "lfm2": Lfm2Config(**SIZE, **SHARED, layer_types=["conv", "full_attention"]),
    "mamba": MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=8),
    "mixtral": MixtralConfig(**SIZE, **SHARED, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZE, **SHARED, **EXPERTS, head_dim=16),
    "qwen2_moe": Qwen2MoeConfig(**SIZE, **SHARED, **EXPERTS, shared_expert_intermediate_size=16),
}
LORA = LoraSettings(rank=4)
IDS = torch.tensor([[5, 9, 3, 31, 8, 12, 4]])


def tiny(family, auto=AutoModelForCausalLM, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = type(CONFIGS[family])(**{**CONFIGS[family].to_dict(), **changes})
    config.pad_token_id = PAD
    return auto.from_config(config, dtype=dtype).eval()


def move_adapter(model, std=0.2):
    """Make B what it may be after some steps."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- one adapter ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_merged_weights_are_the_adapted_model_and_the_base_stays(family):
    model = tiny(family)
    plain = weights(model)
    base = model(IDS).logits
    attach(model, LORA)
    assert torch.equal(model(IDS).logits, base), "the first step is not the base's"
    move_adapter(model)
    adapted = model(IDS).logits
    assert (adapted - base).abs().max() > 0.05
    with without_adapter(model):
        assert torch.equal(model(IDS).logits, base)
    assert torch.equal(model(IDS).logits, adapted)

    for _ in range(2):  # a scale that was folded into W or B would count twice
        names, tensors = merged(model, dict(model.named_parameters()))
        assert names == list(plain)
        assert all(t.dtype == plain[n].dtype for n, t in zip(names, tensors, strict=True))
        other = tiny(family)
        other.load_state_dict(dict(zip(names, tensors, strict=True)), strict=False)
        torch.testing.assert_close(other(IDS).logits, adapted, atol=1e-6, rtol=0)
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            assert torch.equal(parameter, plain[base_name(name)]), f"{name} has changed"


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_its_gradient_is_that_of_the_merged_weights_projected(family):
    """d B = scale · dW Aᵀ and d A = scale · Bᵀ dW."""
    model = tiny(family).double()
    attach(model, LoraSettings(rank=4, alpha=6))
    move_adapter(model)
    model(IDS, labels=IDS).loss.backward()
    full = tiny(family).double()
    names, tensors = merged(model, dict(model.named_parameters()))
    full.load_state_dict(dict(zip(names, (t.double() for t in tensors), strict=True)), strict=False)
    full(IDS, labels=IDS).loss.backward()
    compared = 0
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        down = module.lora_A["default"].weight
        up = module.lora_B["default"].weight
        whole = full.get_submodule(name).weight.grad
        whole = whole.T if family == "gpt2" else whole
        torch.testing.assert_close(up.grad, 1.5 * whole @ down.T, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(down.grad, 1.5 * up.T @ whole, atol=1e-6, rtol=1e-5)
        compared += 1
    assert compared == (14 if family == "qwen3" else 8)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert all(model.get_parameter(name).grad is None for name in frozen)
    assert not any(map(is_adapter, frozen))


@torch.no_grad()
def test_a_bfloat16_sum_is_rounded_once():
    model = tiny("qwen3", dtype=torch.bfloat16)
    attach(model, LORA)
    move_adapter(model, 0.02)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    layer = model.model.layers[0].mlp.up_proj
    weight = layer.base_layer.weight
    up = layer.lora_B["default"].weight
    down = layer.lora_A["default"].weight
    names, tensors = merged(model, dict(model.named_parameters()))
    ours = dict(zip(names, tensors, strict=True))["model.layers.0.mlp.up_proj.weight"]
    exact = weight.double() + 2 * up.double() @ down.double()
    assert ours.dtype == torch.bfloat16
    assert (ours - exact.bfloat16()).ne(0).double().mean() < 1e-3  # a tie of float32
    twice = weight + 2 * (up @ down)
    assert (twice - exact.bfloat16()).ne(0).double().mean() > 0.02, "the trap would not show"


def test_the_start_depends_on_the_seed_alone():
    drawn = []
    for seed, noise in ((1, 3), (1, 4), (2, 3)):
        model = tiny("qwen3")
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        attach(model, LORA, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append([p for name, p in model.named_parameters() if is_adapter(name)])
    first, again, other = drawn
    assert all(map(torch.equal, first, again)) and not any(
        torch.equal(a, b) for a, b in zip(first, other, strict=True) if a.any()
    )


@pytest.mark.parametrize(
    ("family", "adapted"),
    [
        ("qwen3", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
        ("mixtral", "k_proj o_proj q_proj v_proj"),
        ("qwen3_moe", "k_proj o_proj q_proj v_proj"),
    ],
)
def test_all_linear_leaves_out_the_output_layer_and_experts(family, adapted):
    model = tiny(family)
    attach(model, LORA, path="here")
    config = adapter_config(model)
    assert config["target_modules"] == adapted.split()
    assert (config["lora_alpha"], config["base_model_name_or_path"]) == (8, "here")
    assert json.dumps(config)
    found = fused_experts(model)
    assert bool(found) == (family != "qwen3") and all("experts" in name for name in found)


@pytest.mark.parametrize(
    ("config", "left"),
    [
        (CONFIGS["mamba"], "mixer.out_proj"),
        (
            Qwen3NextConfig(**SIZE, **SHARED, **EXPERTS, head_dim=16, mlp_only_layers=[0]),
            "mlp.gate_proj",
        ),
    ],
)
def test_what_peft_takes_for_other_layers_is_left_out_aloud(config, left):
    model = AutoModelForCausalLM.from_config(config)
    attach(model, LORA)
    found = left_out(model)
    assert any(name.endswith(left) for name in found)
    assert not any("lora_" in name or "q_proj" in name for name in found)


def test_targets_are_looked_for_before_anything_is_loaded():
    def wrong(*targets):
        model = ModelSettings(path="here", lora=LoraSettings(rank=2, targets=targets))
        return target_problems("actor.model", model, CONFIGS["qwen3"])

    assert wrong("q_proj", "layers.1.mlp.up_proj") == []
    (line,) = wrong("q_porj", "v_proj")
    assert line.startswith("actor.model.lora.targets: here has no linear layer 'q_porj'")
    assert "k_proj" in line and wrong("lm_head")


def test_a_base_that_grew_for_a_pad_is_the_same_in_every_process(tmp_path):
    tiny("qwen3").save_pretrained(tmp_path)
    digests = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = load_reward_model(ModelSettings(path=str(tmp_path)), SIZE["vocab_size"])
        attach(model, LORA, head_of(model))
        assert model.get_input_embeddings().weight.shape[0] == SIZE["vocab_size"] + 1
        digests.add(base_digest(model))
    assert len(digests) == 1


@torch.no_grad()
def test_a_checkpoints_adapter_is_merged_as_a_whole_or_refused(tmp_path):
    """Also of a reward model that grew for its PAD, and of a kernel that is not here."""
    tiny("qwen3").save_pretrained(tmp_path)
    settings = ModelSettings(path=str(tmp_path), lora=LORA)
    pad = SIZE["vocab_size"]
    model = load_reward_model(settings, pad)
    head = head_of(model)
    attach(model, LORA, head)
    move_adapter(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    base = {"digest": base_digest(model), "head": head, "pad_token_id": pad}
    base["model"] = settings.model_dump(mode="json") | {"attention": "flash_attention_2"}
    whole = _merged_into(base, trained)
    for name, tensor in zip(*merged(model, dict(model.named_parameters())), strict=True):
        assert torch.equal(whole[name], tensor)
    other = {name.replace("lora_B", "lora_C"): p for name, p in trained.items()}
    with pytest.raises(UserError, match="the adapter does not fit: .*lora_C"):
        _merged_into(base, other)


def test_a_target_that_is_not_there_is_answered_with_those_that_are():
    for family in ("qwen3", "mixtral"):
        with pytest.raises(UserError) as caught:
            attach(tiny(family), LoraSettings(rank=2, targets=("q_proj", "w1")), path="models/x")
        assert str(caught.value).startswith("models/x: no linear layer to adapt is called 'w1'")
        assert "k_proj" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="'lm_head'"):
        attach(tiny("qwen3"), LoraSettings(rank=2, targets=("lm_head",)))
    model = tiny("qwen3")
    attach(model, LoraSettings(rank=2, targets=("q_proj", "layers.1.mlp.up_proj")))
    adapted = {
        name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name
    }
    assert adapted == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }


def encoder():
    torch.manual_seed(0)
    config = BertConfig(**SIZE, intermediate_size=48, num_labels=1)
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (partial(tiny, "qwen3", AutoModelForSequenceClassification), ["score"]),
        (partial(tiny, "qwen3", AutoModelForTokenClassification), ["score"]),
        (encoder, ["bert.pooler", "classifier"]),
    ],
    ids=["decoder", "critic", "encoder"],
)
def test_a_head_is_trained_whole_and_has_no_adapter(make, head):
    model = make()
    attach(model, LORA, head_of(model))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    whole = [name for name in trained if not is_adapter(name)]
    assert whole and whole == head_of(model)
    assert adapter_config(model)["modules_to_save"] == head
    assert not any(name.startswith(tuple(head)) for name in trained if is_adapter(name))


def test_dropout_is_in_training_alone():
    model = tiny("qwen3")
    attach(model, LoraSettings(rank=4, dropout=0.5))
    move_adapter(model)
    expected = model(IDS).logits
    model.train()
    assert not torch.equal(model(IDS).logits, expected)
    with without_dropout(model):
        assert torch.equal(model(IDS).logits, expected)
    assert not torch.equal(model(IDS).logits, expected)


def test_the_digest_sees_every_bit_and_place_of_the_base():
    model = tiny("qwen3")
    attach(model, LORA)
    before = base_digest(model)
    move_adapter(model)
    assert base_digest(model) == before
    weight = model.model.layers[1].mlp.down_proj.base_layer.weight.data
    last = weight[-1, -1].clone()
    weight[-1, -1] = torch.nextafter(last, torch.tensor(torch.inf))
    changed = base_digest(model)
    weight[-1, -1] = last
    assert changed != before and base_digest(model) == before
    weight[[0, 1]] = weight[[1, 0]]
    assert base_digest(model) not in (before, changed)


# --- on ranks -------------------------------------------------------------------------------------

AUTO = {
    "ppo": AutoModelForCausalLM,
    "sft": AutoModelForCausalLM,
    "critic": AutoModelForTokenClassification,
    "reward": AutoModelForSequenceClassification,
}


def train_an_adapter(rank, role, settings, batch, folder):
    """Two steps and all that comes of them: checkpoint, export, and the third step of a learner
    that goes on from the checkpoint.
    """
    made = partial(learner, rank, role, settings)
    engine = made()
    shard = share(rank, role, batch)
    digest = engine.base_fingerprint()
    seen = {"start": engine.infer(shard)}
    if role == "ppo":
        seen["base"] = engine.base_infer(shard)
        seen["probe"] = engine.base_probe([5, 9, 3]) == engine.probe([5, 9, 3])
    seen["metrics"] = [engine.train(shard) for _ in range(2)]
    seen["live"] = engine.infer(shard)
    if role == "ppo":
        seen["later"] = engine.base_infer(shard)
        seen["probe"] = (seen["probe"], engine.base_probe([5, 9, 3]) != engine.probe([5, 9, 3]))
    seen["groups"] = [(names, [t.clone() for t in ts]) for names, ts in engine.iter_groups()]
    seen["names"] = [name for name, _, _ in engine.metadata()]
    seen["adapter"] = engine.adapter()
    engine.save(f"{folder}/learner")
    engine.export_config(f"{folder}/model_files")
    engine.export(f"{folder}/model")
    engine.export(f"{folder}/again")
    seen["disk"] = engine.disk_bytes()
    seen["digest"] = (digest, engine.base_fingerprint())
    seen["next"] = engine.train(shard)
    other = made()
    other.load(f"{folder}/learner")
    seen["resumed"] = other.train(shard)
    ours = engine.adapter()
    theirs = other.adapter()
    seen["same"] = all(torch.equal(ours[name], theirs[name]) for name in ours)
    return seen


def load_onto(rank, settings, folder):
    engine = learner(rank, "ppo", settings)
    try:
        engine.load(folder)
    except ValueError as error:
        return str(error)


@pytest.fixture(scope="module")
def pools():
    found = {n: Ranks(n) for n in (1, 2)}
    yield found
    for pool in found.values():
        pool.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("base"))
    tiny("qwen3", initializer_range=0.05).save_pretrained(folder)
    return folder


def batch_of(role):
    draw = torch.Generator().manual_seed(1)

    def ids(lengths):
        return [torch.randint(3, PAD, (n,), generator=draw).tolist() for n in lengths]

    batch = Experience.from_ids(ids((2, 1, 7, 7)), ids((1, 17, 9, 9)))
    noise = torch.randn(batch.loss_mask.shape, generator=draw)
    return replace(
        batch,
        old_logprobs=torch.where(batch.loss_mask, noise * 0.1 - 3.7, 0.0),
        advantages=noise.flip(0),
        values=noise * 0.1,
        returns=noise,
    )


def settings_for(path, stage, dtype="float32", **changes):
    return LearnerSettings(
        model=ModelSettings(path=path, dtype=dtype, lora=LORA, **changes),
        zero_stage=stage,
        micro_batch_tokens=40,
        optimizer=OptimizerSettings(learning_rate=1e-2, eps=1e-5, max_grad_norm=0.5),
    )


def whole(seen):
    return torch.cat([t.float().flatten() for _, tensors in seen["groups"] for t in tensors])


def outputs(folder, adapter, role, base):
    """Outputs of the exported model in plain Transformers, or of the base and adapter in PEFT."""
    model = AUTO[role].from_pretrained(folder if adapter is None else base, num_labels=1)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return plain_outputs(model.eval(), role, batch_of(role))


def assert_same_outputs(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        a = a[: len(b)] if b.ndim else a
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)


CASES = [
    *(("ppo", n, stage) for n in (1, 2) for stage in (0, 1, 2, 3)),
    ("critic", 2, 2),
    ("reward", 2, 3),
    ("sft", 2, 3),
]


@pytest.fixture(scope="module")
def trained(pools, base, tmp_path_factory):
    """trained(role, n, stage, dtype) is what the ranks saw, and the folder they wrote; once."""
    known = {}

    def train(role, n, stage, dtype="float32", **changes):
        key = role, n, stage, dtype, *changes
        if key not in known:
            folder = tmp_path_factory.mktemp("trained")
            settings = settings_for(base, stage, dtype, **changes)
            arguments = (role, settings, batch_of(role), str(folder))
            known[key] = pools[n].run(train_an_adapter, *arguments), folder
        return known[key]

    return train


@pytest.mark.engines
@pytest.mark.models
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("role", "n", "stage"), CASES)
def test_ranks_train_one_adapter_and_never_the_base(trained, base, role, n, stage):
    results, _ = trained(role, n, stage)
    seen = results[0]
    plain = AUTO[role].from_pretrained(base, num_labels=1)
    assert seen["names"] == [name for name, _ in plain.named_parameters()]
    assert seen["names"] == [name for names, _ in seen["groups"] for name in names]
    for other in results:
        assert other["digest"] == (seen["digest"][0],) * 2, "the base has changed"
        assert other["metrics"] == seen["metrics"] and torch.equal(whole(other), whole(seen))
        assert other["next"] == other["resumed"] and other["same"]
        if role == "ppo":
            assert torch.equal(other["start"], other["base"])
            assert torch.equal(other["start"], other["later"]) and other["probe"] == (True, True)
            assert (other["live"] - other["base"]).abs().max() > 0.02
    assert all(tensor.any() for name, tensor in seen["adapter"].items() if "lora_B" in name)
    first, _ = trained(role, 1, 0)
    torch.testing.assert_close(whole(seen), whole(first[0]), atol=2e-6, rtol=0)
    for now, then in zip(seen["metrics"], first[0]["metrics"], strict=True):
        assert now == pytest.approx(then, abs=1e-5)
    held = {name: t.shape for name, t in seen["adapter"].items() if ".lora_" not in name}
    heads = {"critic": {"score.weight", "score.bias"}, "reward": {"score.weight"}}
    assert {peft_name(name) for name in heads.get(role, ())} == held.keys()


@pytest.mark.engines
@pytest.mark.models
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("role", "n", "stage"), [c for c in CASES if c[1:] != (2, 1)])
def test_both_exports_compute_what_the_live_model_does(trained, base, role, n, stage):
    results, folder = trained(role, n, stage)
    live = in_order(
        [seen["live"] for seen in results], batch_of(role), 2 if role == "reward" else 1
    )
    assert_same_outputs(live, outputs(folder / "model", None, role, base))
    assert_same_outputs(live, outputs(None, folder / "model" / "adapter", role, base))
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (folder / "model" / name).read_bytes() == (folder / "again" / name).read_bytes()
    saved = load_file(folder / "model/adapter/adapter_model.safetensors")
    assert all(saved[name].any() for name in saved if "lora_B" in name), "only zeros were saved"
    config = json.loads((folder / "model/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base and config["r"] == 4
    size = sum(f.stat().st_size for f in (folder / "model").rglob("*.safetensors"))
    assert 0.5 * size < results[0]["disk"][0] <= size


@pytest.mark.engines
@pytest.mark.models
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("role", "n", "stage", "dtype"),
    [("ppo", 1, 0, "float32"), ("ppo", 2, 3, "bfloat16"), ("reward", 2, 3, "float32")],
)
def test_a_checkpoint_holds_the_adapter_and_becomes_the_exported_model(
    trained, base, tmp_path, role, n, stage, dtype
):
    results, folder = trained(role, n, stage, dtype)
    held = sum(file.stat().st_size for file in (folder / "learner").rglob("*.pt"))
    assert results[0]["disk"][1] <= held
    # a tied weight has two names, and DeepSpeed forgets one of them
    files = (folder / "learner" / "state").glob("*model_states.pt")
    modules = [torch.load(file, weights_only=False)["module"] for file in files]
    assert all("lora_" in name or "score" in name for module in modules for name in module)
    export_saved(read_saved(folder / "learner"), folder / "model_files", tmp_path / "model")
    export_adapter(folder / "learner", tmp_path / "model" / "adapter")
    for file in ("config.json", "model.safetensors", "adapter/adapter_model.safetensors"):
        ours = (tmp_path / "model" / file).read_bytes()
        assert ours == (folder / "model" / file).read_bytes(), file
    names = {file.name for file in (tmp_path / "model" / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.engines
@pytest.mark.models
@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", [2, 3])
def test_bfloat16_and_recomputed_activations(trained, stage):
    """The adapter gets its gradient though the embeddings get none."""
    results, _ = trained("ppo", 2, stage, "bfloat16", gradient_checkpointing=True)
    plain, _ = trained("ppo", 2, stage, "bfloat16")
    for seen, other in zip(results, plain, strict=True):
        assert torch.equal(whole(seen), whole(other)) and seen["same"]
        assert seen["metrics"][0]["grad_norm"] > 0
        assert {t.dtype for _, ts in seen["groups"] for t in ts} == {torch.bfloat16}
        assert torch.equal(seen["start"], seen["later"])


@pytest.mark.engines
@pytest.mark.models
@pytest.mark.timeout(300)
def test_another_base_or_adapter_is_refused_in_one_line(pools, trained, base, tmp_path):
    _, folder = trained("ppo", 2, 3)
    other = tiny("qwen3", initializer_range=0.05)
    other.model.layers[1].mlp.up_proj.weight.data[3, 3] += 1e-3
    other.save_pretrained(tmp_path / "other")
    settings = settings_for(str(tmp_path / "other"), 3)
    for message in pools[2].run(load_onto, settings, str(folder / "learner")):
        assert f"other weights than those of {tmp_path / 'other'}" in message
        assert "\n" not in message
    lora = LoraSettings(rank=2)
    same = settings_for(base, 3)
    narrow = same.model_copy(update={"model": same.model.model_copy(update={"lora": lora})})
    for message in pools[2].run(load_onto, narrow, str(folder / "learner")):
        assert "'rank': 4" in message and "'rank': 2" in message and "\n" not in message

    layout = json.loads((folder / "learner/layout.json").read_text())
    layout["base"]["model"]["path"] = str(tmp_path / "other")
    moved = Path(tmp_path, "moved")
    (moved / "state").mkdir(parents=True)
    (moved / "layout.json").write_text(json.dumps(layout))
    for file in (folder / "learner" / "state").iterdir():
        (moved / "state" / file.name).symlink_to(file)
    with pytest.raises(UserError, match="has other weights"):
        read_saved(moved)
