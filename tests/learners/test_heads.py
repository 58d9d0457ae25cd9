"""Reward models and critics of decoders of every kind: on Transformers' classes, on our own where
it has none, and from heads of any name.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CTRLConfig,
    CTRLForSequenceClassification,
)

from learners import heads
from learners.checkpoints import (
    Calibration,
    is_encoder,
    load_critic,
    load_reward_model,
    read_calibration,
    write_calibration,
)
from learners.errors import UserError
from learners.experience import Experience
from learners.export import export_saved, save_config, save_weights
from learners.forward import attention_mask, response_values, sequence_scores
from learners.settings import ModelSettings

pytestmark = pytest.mark.models

VOCABULARY = 48
PAD = 47
EOS = 1
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]]
RESPONSES = [[20, EOS], [21, 22, 23, EOS], [24, 25, 26, 27, 28, EOS]]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {**SIZES, "ffn_dim": 48}
FAMILIES = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gptj": {**GPT2, "rotary_dim": 4},
    "gpt_neox": {**SIZES, "intermediate_size": 48},
    "falcon": {**SIZES, "new_decoder_architecture": False},
    "opt": OPT,
    "opt (projected)": {**OPT, "word_embed_proj_dim": 16},
    "gemma3_text": {**LLAMA, "head_dim": 8},
    "olmo2": LLAMA,
    "olmoe": {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2},
    "granite": LLAMA,
    "cohere": LLAMA,
    "lfm2": {**LLAMA, "full_attn_idxs": [1]},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "llama4_text": {**LLAMA, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2},
}
OWN_REWARD_MODEL = ("cohere", "granite", "lfm2", "llama4_text", "mamba", "olmoe")
TRANSFORMERS_CRITIC = ("llama", "gpt2", "gpt_bigcode", "gpt_neox", "falcon")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(name) is the settings of a tiny base model of a family on disk."""
    saved = {}

    def settings(name):
        if name not in saved:
            saved[name] = tmp_path_factory.mktemp("base")
            written = {
                "vocab_size": VOCABULARY,
                "bos_token_id": 2,
                "eos_token_id": EOS,
                "pad_token_id": None,
                "initializer_range": 0.3,
            }
            kind = name.partition(" ")[0]
            config = AutoConfig.for_model(kind, **written, **FAMILIES[name])
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(saved[name])
        return at(saved[name], "auto")

    return settings


@pytest.fixture(scope="module")
def reward(base, tmp_path_factory):
    """reward(name) is the settings of a calibrated reward model of a family on disk, and itself."""
    saved = {}

    def model(name):
        if name not in saved:
            folder = tmp_path_factory.mktemp("reward")
            torch.manual_seed(1)
            made = load_reward_model(base(name), PAD)
            write_calibration(made.config, Calibration(0.5, 2.0))
            write(made, folder)
            saved[name] = at(folder, base(name).attention), made
        return saved[name]

    return model


@pytest.fixture
def batch():
    return Experience.from_ids(PROMPTS, RESPONSES)


def at(folder, attention="auto"):
    return ModelSettings(path=str(folder), attention=attention)


def write(model, folder):
    save_weights(model, dict(model.state_dict()), folder)
    save_config(model, folder)


def close(a, b, tolerance=3e-6):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_reward_model_of_every_family(base, reward, batch, name):
    """Padding moves no score, and what is saved scores alike: in plain Transformers where that has
    the class.
    """
    settings, model = reward(name)
    scores = sequence_scores(model, batch)
    assert scores.std() > 0.1 and not is_encoder(model.config)
    close(sequence_scores(model, batch, "left"), scores)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        close(sequence_scores(model, Experience.from_ids([prompt], [response]))[0], scores[row])

    again = load_reward_model(settings, None)
    close(sequence_scores(again, batch), scores)
    assert read_calibration(again.config) == (0.5, 2.0) and again.config.pad_token_id == PAD
    assert heads.made_here(model) == heads.made_here(again) == (name in OWN_REWARD_MODEL)
    if name not in OWN_REWARD_MODEL:
        plain = AutoModelForSequenceClassification.from_pretrained(settings.path)
        ids = torch.where(attention_mask(batch).bool(), batch.input_ids, PAD)
        close(plain(ids, attention_mask=attention_mask(batch)).logits[:, 0], scores)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_critic_of_every_family(base, reward, batch, tmp_path, name):
    """Begun from an SFT model it gives 0, from a reward model its calibrated scores; what is saved
    gives the same.
    """
    assert not response_values(load_critic(base(name)), batch).any()

    settings, model = reward(name)
    critic = load_critic(settings)
    assert heads.made_here(critic) == (name not in TRANSFORMERS_CRITIC)
    values = response_values(critic, batch)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        for t in range(len(response)):  # before token t is seen
            score = sequence_scores(model, Experience.from_ids([prompt], [response[:t]]))
            close(values[row, t], (score[0] - 0.5) / 2.0)

    linear = heads.head_of(critic)
    torch.nn.init.normal_(linear.weight)
    torch.nn.init.normal_(linear.bias)
    write(critic, tmp_path)
    again = load_critic(at(tmp_path, settings.attention))
    close(response_values(again, batch), response_values(critic, batch))
    assert read_calibration(again.config) == (0.0, 1.0)
    name = "score" if heads.made_here(critic) or name == "llama" else "classifier"
    outside = {n for n in again.state_dict() if not n.startswith(f"{again.base_model_prefix}.")}
    assert outside == {f"{name}.weight", f"{name}.bias"}


@pytest.mark.parametrize("name", ["gpt2", "granite", "llama"])
@pytest.mark.parametrize("head", ["classifier", "classification_head", "reward_head"])
@torch.no_grad()
def test_a_reward_head_is_taken_over_whatever_it_is_called(reward, batch, tmp_path, name, head):
    settings, model = reward(name)
    write(model, tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {k.replace("score.", f"{head}."): v for k, v in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    again = load_reward_model(at(tmp_path), None)
    close(sequence_scores(again, batch), sequence_scores(model, batch))
    values = response_values(load_critic(at(tmp_path)), batch)
    close(values, response_values(load_critic(settings), batch))

    # Transformers' class would drop a bias without a word
    save_file({**weights, f"{head}.bias": torch.tensor([3.0])}, file, {"format": "pt"})
    with pytest.raises(UserError, match="no place for its head's bias"):
        load_reward_model(at(tmp_path), None)
    critic = load_critic(at(tmp_path))
    shifted = torch.where(batch.loss_mask, values + 1.5, 0.0)
    close(response_values(critic, batch), shifted)
    critic.save_pretrained(tmp_path / "critic")  # under its own names
    again = load_critic(at(tmp_path / "critic"))
    close(response_values(again, batch), response_values(critic, batch))


@pytest.mark.parametrize("name", ["granite", "llama"])
def test_saved_weights_become_the_exported_model(reward, tmp_path, name):
    """As `quatuor export` makes it of a checkpoint: to the byte what the run exports."""
    _, model = reward(name)
    write(model, tmp_path / "run")
    save_config(model, tmp_path / "files")
    export_saved(dict(model.state_dict()), tmp_path / "files", tmp_path / "again")
    written = sorted(file.name for file in (tmp_path / "run").iterdir())
    assert written == sorted(file.name for file in (tmp_path / "again").iterdir())
    assert ("README.md" in written) == (name == "granite")
    for file in written:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "run" / file).read_bytes()


def test_a_folder_says_how_transformers_reads_it(reward, batch, monkeypatch):
    """The lines of its README.md, run as they stand on texts of a tokenizer that pads."""
    settings, model = reward("granite")
    assert "GraniteForSequenceClassification" in heads.head_notice(model.config)
    assert heads.head_notice(reward("llama")[1].config) == ""
    with pytest.raises(ValueError, match="GraniteConfig"):
        AutoModelForSequenceClassification.from_pretrained(settings.path)

    inputs = {"input_ids": batch.input_ids, "attention_mask": attention_mask(batch)}
    said = SimpleNamespace(from_pretrained=lambda folder: lambda texts, **how: inputs)
    monkeypatch.setattr("transformers.AutoTokenizer", said)
    code = Path(settings.path, "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {"folder": settings.path, "texts": ["a", "b", "c"]}
    exec(code, names)
    with torch.no_grad():
        close(names["scores"], sequence_scores(model, batch))


def test_a_head_that_is_more_than_a_linear_map_is_refused(tmp_path):
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 4, "dff": 32}
    model = CTRLForSequenceClassification(CTRLConfig(**sizes, num_labels=1))
    model.save_pretrained(tmp_path)
    for load in (load_critic, lambda settings: load_reward_model(settings, PAD)):
        with pytest.raises(UserError, match="ctrl has no head named score"):
            load(at(tmp_path))


def test_the_names_that_a_checkpoint_has_are_the_family_s(reward):
    """So that any file of the family gives the backbone, and a later Transformers the whole."""
    settings, model = reward("granite")
    config = json.loads(Path(settings.path, "config.json").read_text())
    assert config["architectures"] == ["GraniteForSequenceClassification"]
    saved = load_file(Path(settings.path, "model.safetensors"))
    names = {name for name in saved if not name.startswith("model.")}
    assert names == {"score.weight"} and saved.keys() == model.state_dict().keys()
