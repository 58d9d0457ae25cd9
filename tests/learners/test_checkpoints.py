import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    CanineConfig,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
)

from learners.checkpoints import (
    Calibration,
    is_encoder,
    load_causal_lm,
    load_config,
    load_critic,
    load_reward_model,
    load_tokenizer,
    read_calibration,
    write_calibration,
)
from learners.errors import UserError
from learners.experience import Experience
from learners.fits import vocabulary_problems
from learners.forward import attention_mask, response_logprobs, response_values, sequence_scores
from learners.settings import ModelSettings

VOCABULARY = 40
PAD = 39
EOS = 1
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]]
RESPONSES = [[20, EOS], [21, 22, 23, EOS], [24, 25, 26, 27, 28, EOS]]
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # ten times the usual: untrained models then tell inputs apart
}


def qwen3(**changes):
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attention_dropout": 0.5,
        "initializer_range": 0.3,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "tie_word_embeddings": True,
    }
    return Qwen3ForCausalLM(Qwen3Config(**{**settings, **changes}))


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.3,
            bos_token_id=EOS,
            eos_token_id=EOS,
        )
    )


MAKE = {
    "qwen3": qwen3,
    "gpt2": gpt2,
    "bert": lambda: BertForMaskedLM(BertConfig(**ENCODER)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**ENCODER, pad_token_id=2)),
    "deberta": lambda: DebertaV2ForMaskedLM(
        DebertaV2Config(
            **ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0
        )
    ),
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(name) is the settings of a tiny base model on disk."""
    saved = {}

    def settings(name):
        if name not in saved:
            torch.manual_seed(0)
            saved[name] = tmp_path_factory.mktemp(name)
            MAKE[name]().save_pretrained(saved[name])
        return ModelSettings(path=str(saved[name]))

    return settings


@pytest.fixture
def reward_checkpoint(checkpoint, tmp_path):
    """A calibrated reward model on disk, and the model."""
    model = reward_model(checkpoint("qwen3"))
    write_calibration(model.config, Calibration(0.5, 2.0))
    model.save_pretrained(tmp_path / "reward")
    return ModelSettings(path=str(tmp_path / "reward")), model


@pytest.fixture
def batch():
    return Experience.from_ids(PROMPTS, RESPONSES)


def reward_model(settings, pad=PAD):
    torch.manual_seed(1)
    return load_reward_model(settings, pad)


def filled(batch, token):
    """The batch with other ids in its padding."""
    ids = torch.where(attention_mask(batch).bool(), batch.input_ids, token)
    return replace(batch, input_ids=ids)


def with_token(batch, row, column, token):
    ids = batch.input_ids.clone()
    ids[row, column] = token
    return replace(batch, input_ids=ids)


def same_weights(a, b):
    b = b.state_dict()
    assert (
        all(torch.equal(tensor, b.pop(name)) for name, tensor in a.state_dict().items()) and not b
    )


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
@torch.no_grad()
def test_padding_never_moves_a_score(checkpoint, batch, name):
    model = reward_model(checkpoint(name))
    alone = torch.cat(
        [
            sequence_scores(model, Experience.from_ids([p], [r]))
            for p, r in zip(PROMPTS, RESPONSES, strict=True)
        ]
    )
    assert alone.shape == (3,) and alone.dtype == torch.float32
    assert alone.std() > 0.01
    for side in ("right", "left"):
        for token in (0, EOS, PAD):
            close(sequence_scores(model, filled(batch, token), side), alone)


@torch.no_grad()
def test_left_padding_reaches_a_decoder(checkpoint, batch):
    model = reward_model(checkpoint("qwen3"))
    seen = {}
    model.base_model.register_forward_pre_hook(lambda *a: seen.update(a[2]), with_kwargs=True)
    sequence_scores(model, batch, "left")
    assert seen["attention_mask"].tolist()[0] == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert seen["input_ids"][0, 4:].tolist() == PROMPTS[0] + RESPONSES[0]
    assert seen["position_ids"][0].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("side", ["right", "left"])
def test_gradients_do_not_depend_on_the_padding(checkpoint, batch, side):
    model = reward_model(checkpoint("qwen3"))
    gradients = []
    for one in (batch, filled(batch, EOS)):
        model.zero_grad()
        sequence_scores(model, one, side).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert a.isfinite().all()
        close(a, b)


@torch.no_grad()
def test_a_decoder_reads_its_score_at_the_last_real_token(checkpoint, batch):
    model = reward_model(checkpoint("qwen3"))
    scores = sequence_scores(model, batch)
    every = model.score(
        model.base_model(batch.input_ids, attention_mask=attention_mask(batch)).last_hidden_state
    )
    for row, length in enumerate(batch.lengths.tolist()):
        close(scores[row], every[row, length - 1, 0])
        moved = sequence_scores(model, with_token(batch, row, length - 1, 30))
        assert (moved[row] - scores[row]).abs() > 1e-3


@torch.no_grad()
def test_pad_equal_to_eos_keeps_our_scores_and_moves_those_of_plain_transformers(checkpoint, batch):
    model = reward_model(checkpoint("qwen3"))
    same = reward_model(checkpoint("qwen3"), pad=EOS)
    close(sequence_scores(same, batch), sequence_scores(model, batch))
    plain = same(filled(batch, EOS).input_ids, attention_mask=attention_mask(batch)).logits[:, 0]
    assert (plain - sequence_scores(same, batch)).abs().min() > 1e-3


@pytest.mark.parametrize("name", MAKE)
@torch.no_grad()
def test_a_saved_reward_model_scores_alike_in_plain_transformers(checkpoint, batch, tmp_path, name):
    model = reward_model(checkpoint(name))
    pad = model.config.pad_token_id
    assert pad == PAD or is_encoder(model.config)
    write_calibration(model.config, Calibration(-1.25, 3.0))
    model.save_pretrained(tmp_path)
    ours = sequence_scores(model, batch)

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = filled(batch, pad).input_ids
    close(plain(ids, attention_mask=attention_mask(batch)).logits[:, 0], ours)
    again = load_reward_model(checkpoint(name).model_copy(update={"path": str(tmp_path)}), None)
    same_weights(again, model)
    close(sequence_scores(again, batch), ours)
    assert read_calibration(again.config) == (-1.25, 3.0)
    assert again.config.pad_token_id == pad


def test_the_token_that_pads_still_learns(checkpoint, batch):
    model = reward_model(checkpoint("qwen3"), pad=EOS)
    sequence_scores(model, batch).sum().backward()
    assert model.get_input_embeddings().weight.grad[EOS].abs().sum() > 0


# --- log-probs ------------------------------------------------------------------------------------


@torch.no_grad()
def test_response_logprobs_are_those_of_a_loop(checkpoint, batch):
    model = load_causal_lm(checkpoint("qwen3"))
    temperature = 0.7
    result = response_logprobs(model, batch, temperature)
    assert result.shape == (3, 6) and result.dtype == torch.float32
    plain = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3").path)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        for t, token in enumerate(response):
            logits = plain(torch.tensor([prompt + response[:t]])).logits[0, -1]
            close(result[row, t], (logits / temperature).log_softmax(-1)[token])
        assert not result[row, len(response) :].any()


def test_the_eos_is_trained_where_it_is_also_the_pad(checkpoint):
    """Two answers of different lengths that end with EOS, which this checkpoint also pads with:
    each EOS counts.
    """
    model = load_causal_lm(checkpoint("qwen3"))
    answers = [[7, 8, 9, EOS], [EOS]]
    assert model.config.pad_token_id == EOS
    batch = filled(Experience.from_ids([[5, 6], [7]], answers), EOS)
    logprobs = response_logprobs(model, batch, 1.0)
    assert (
        batch.loss_mask.sum() == 5
        and batch.loss_mask[0, 3]
        and batch.loss_mask[1, 0]
        and not batch.loss_mask[1, 1:].any()
    )
    for ids, prompt, row in (([5, 6, *answers[0]], 2, 0), ([7, *answers[1]], 1, 1)):
        expected = model(torch.tensor([ids])).logits[0, -2].log_softmax(-1)[EOS]
        close(logprobs[row, len(ids) - prompt - 1], expected)
        (gradient,) = torch.autograd.grad(
            logprobs[row, len(ids) - prompt - 1], model.lm_head.weight, retain_graph=True
        )
        assert gradient[EOS].abs().max() > 1e-3


def test_masked_tokens_have_neither_logprob_nor_gradient(checkpoint, batch):
    model = load_causal_lm(checkpoint("qwen3"))
    valid = batch.loss_mask.clone()
    valid[2, 3] = False
    masked = replace(batch, loss_mask=valid)
    result = response_logprobs(model, masked, 1.0)
    assert result[2, 3] == 0
    close(result[valid], response_logprobs(model, batch, 1.0)[valid])


def test_a_placeholder_has_a_graph_and_no_gradient(checkpoint):
    readings = [
        (load_causal_lm(checkpoint("qwen3")), lambda m, b: response_logprobs(m, b, 1.0)),
        (load_critic(checkpoint("qwen3")), response_values),
    ]
    for model, read in readings:
        read(model, Experience.placeholder()).sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", MAKE)
def test_dropout_is_off_in_training_mode(checkpoint, batch, name):
    settings = checkpoint(name)
    roles = [(reward_model(settings), sequence_scores)]
    if not is_encoder(load_config(settings)):
        roles.append((load_causal_lm(settings), lambda m, b: response_logprobs(m, b, 1.0)))
        roles.append((load_critic(settings), response_values))
        for head in list(roles[-1][0].parameters())[-2:]:
            torch.nn.init.normal_(head)  # a zero head would hide what comes before it
    for model, read in roles:
        assert not model.training
        with torch.no_grad():
            still = read(model, batch)
            assert torch.equal(read(model.train(), batch), still)


# --- critic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@torch.no_grad()
def test_a_critic_from_an_sft_model_starts_at_zero(checkpoint, batch, name):
    values = response_values(load_critic(checkpoint(name)), batch)
    assert values.shape == (3, 6) and values.dtype == torch.float32 and not values.any()


@torch.no_grad()
def test_a_critic_from_a_reward_model_values_a_text_as_its_calibrated_score(
    reward_checkpoint, batch
):
    settings, model = reward_checkpoint
    critic = load_critic(settings)
    values = response_values(critic, batch)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        for t in range(len(response)):  # V(s_t): before token t is seen
            score = sequence_scores(model, Experience.from_ids([prompt], [response[:t]]))
            close(values[row, t], (score[0] - 0.5) / 2.0)
        assert not values[row, len(response) :].any()
    whole = critic(batch.input_ids, attention_mask=attention_mask(batch)).logits[:, :, 0]
    close(
        whole[range(3), (batch.lengths - 1).tolist()], (sequence_scores(model, batch) - 0.5) / 2.0
    )


@torch.no_grad()
def test_values_do_not_see_the_future(reward_checkpoint, batch):
    critic = load_critic(reward_checkpoint[0])
    values = response_values(critic, batch)
    for t in range(6):
        changed = response_values(critic, with_token(batch, 2, len(PROMPTS[2]) + t, 35))
        close(changed[:2], values[:2])
        close(changed[2, : t + 1], values[2, : t + 1])
        assert t == 5 or (changed[2, t + 1] - values[2, t + 1]).abs() > 1e-4


@torch.no_grad()
def test_a_saved_critic_comes_back_and_is_calibrated_once(reward_checkpoint, batch, tmp_path):
    critic = load_critic(reward_checkpoint[0])
    critic.save_pretrained(tmp_path / "critic")
    settings = ModelSettings(path=str(tmp_path / "critic"))
    again = load_critic(settings)
    same_weights(again, critic)
    assert read_calibration(again.config) == (0.0, 1.0)
    plain = AutoModelForTokenClassification.from_pretrained(settings.path)
    close(response_values(plain, batch), response_values(critic, batch))


# --- refusals -------------------------------------------------------------------------------------


def test_encoders_are_told_from_decoders():
    assert all(is_encoder(c) for c in (BertConfig(), RobertaConfig(), DebertaV2Config()))
    assert not any(is_encoder(c) for c in (Qwen3Config(), GPT2Config(), GPTNeoXConfig()))


@pytest.mark.parametrize("load", [load_causal_lm, load_critic])
def test_an_encoder_is_neither_actor_nor_critic(checkpoint, load):
    with pytest.raises(UserError, match="causal"):
        load(checkpoint("bert"))


def test_encoder_decoders_are_refused(tmp_path):
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="encoder-decoder"):
        load_reward_model(ModelSettings(path=str(tmp_path)), PAD)


@pytest.mark.parametrize("load", [load_causal_lm, lambda s: load_reward_model(s, PAD), load_critic])
def test_missing_weights_are_named(tmp_path, load):
    model = qwen3()
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(
        UserError, match=r"1 weights are missing .*layers\.1\.mlp\.up_proj\.weight"
    ) as error:
        load(ModelSettings(path=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_finished_reward_model_without_its_head_is_refused(reward_checkpoint, tmp_path):
    model = reward_checkpoint[1]
    state = model.state_dict()
    del state["score.weight"]
    model.save_pretrained(tmp_path / "headless", state_dict=state)
    with pytest.raises(UserError, match=r"score\.weight"):
        load_reward_model(ModelSettings(path=str(tmp_path / "headless")), None)


def test_a_reward_model_has_one_label(tmp_path):
    config = qwen3().config
    config.architectures = ["Qwen3ForSequenceClassification"]
    config.num_labels = 5
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="one label, not 5"):
        load_reward_model(ModelSettings(path=str(tmp_path)), PAD)


@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_a_folder_without_a_model_is_one_line(tmp_path, load):
    with pytest.raises(UserError) as error:
        load(ModelSettings(path=str(tmp_path)))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


OWN = """
from transformers import Qwen3Config, Qwen3ForCausalLM


class OwnConfig(Qwen3Config):
    model_type = "own"


class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_only_when_trusted(tmp_path, monkeypatch):
    def ask(*_):
        raise AssertionError("nobody sits at the terminal")

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    folder = tmp_path / "model"
    qwen3().save_pretrained(folder)
    (folder / "own.py").write_text(OWN)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    written = config | {"model_type": "own", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(written))
    tokenizer = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))

    for load in (load_config, load_tokenizer, load_causal_lm):
        with pytest.raises(UserError, match=r"comes with code of its own .*: true to run it$"):
            load(ModelSettings(path=str(folder)))
    assert not (tmp_path / "hf").exists()
    trusted = ModelSettings(path=str(folder), trust_remote_code=True)
    assert type(load_causal_lm(trusted)).__name__ == "OwnForCausalLM"


@pytest.mark.parametrize(
    "calibration", [(0.0, 0.0), (0.0, math.nan), (math.nan, 1.0), (0.0, math.inf)]
)
def test_a_calibration_must_be_usable(calibration):
    with pytest.raises(UserError, match="calibrated"):
        write_calibration(Qwen3Config(), Calibration(*calibration))


def test_a_config_that_counts_no_ids_has_no_problem_with_them(tmp_path):
    """Canine hashes letters; InternLM/Intern-S1#12 fell over another config without the key."""
    CanineConfig().save_pretrained(tmp_path / "canine")
    qwen3().config.save_pretrained(tmp_path / "qwen3")
    ids = [[], [3, VOCABULARY]]
    assert vocabulary_problems("m", ModelSettings(path=str(tmp_path / "canine")), ids) == []
    (problem,) = vocabulary_problems("m", ModelSettings(path=str(tmp_path / "qwen3")), ids)
    assert problem.endswith(f"knows {VOCABULARY} ids, the data hold ids up to {VOCABULARY}")
    assert not vocabulary_problems("m", ModelSettings(path=str(tmp_path / "qwen3")), [[39]])
