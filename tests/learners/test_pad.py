"""The PAD of reward models: which one is chosen, and that plain Transformers then scores alike."""

from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from actors.supervised import SupervisedData
from launch.recipe.read import load_recipe
from launch.tasks.unique_digits import write_rows
from learners.checkpoints import load_causal_lm, load_critic, load_reward_model, load_tokenizer
from learners.data.pad import same_words, settle_filler, settle_pad
from learners.data.tokenise import tokenizer_digest
from learners.experience import Experience
from learners.export import save_config, save_weights
from learners.forward import response_values, sequence_scores
from learners.settings import ModelSettings
from tests.learners.test_heads import FAMILIES

LETTERS = "abcdefgh"


def make(*added, byte_fallback=False, template=None, **special):
    """A tokenizer of a token per letter: <unk> is 0, <eos> 1, then the letters, then `added`."""
    words = {token: i for i, token in enumerate(["<unk>", "<eos>", *LETTERS])}
    if byte_fallback:
        words |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    core = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=byte_fallback))
    core.decoder = decoders.ByteFallback()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, **{"eos_token": "<eos>", "unk_token": "<unk>", **special}
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in added])
    tokenizer.chat_template = template
    return tokenizer


EOS = 1
READY = ("<|reserved_special_token_0|>", "<|reserved_special_token_1|>")
CHOICES = {
    "its own": (make("<pad>", pad_token="<pad>"), 11, "<pad>", ""),
    "made for it": (make(*READY, "<|finetune_right_pad_id|>"), 13, "<|finetune_right_pad_id|>", ""),
    "reserved": (make("<|im_end|>", *READY), 13, READY[0], "has no PAD"),
    "EOS": (make("<unused0>", pad_token="<eos>"), 11, "<unused0>", "the PAD <eos> ends texts"),
    "in its template": (make(*READY, template=f"{READY[0]} {{{{ x }}}}"), 12, READY[1], ""),
    "stands for an image": (make("<|image_pad|>"), 20, "<|pad|>", "has no PAD"),
    "beyond the model": (make(*READY), 10, "<|pad|>", "grows from 10 to 13 rows"),
    "never unknown": (make(byte_fallback=True), 266, "<unk>", "has no PAD"),
    "unknown letters": (make(), 10, "<|pad|>", "grows from 10 to 11 rows"),
    "a row to spare": (make(), 16, "<|pad|>", "PAD: the reward model's is <|pad|> (10)"),
    "added as advised": (make("<pad>", pad_token="<pad>"), 10, "<pad>", "grows from 10 to 11 rows"),
    "a name that is taken": (make("<|pad|>", eos_token="<|pad|>"), 11, "<<|pad|>>", "grows from"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_pad_that_is_chosen(name, tmp_path):
    tokenizer, rows, pad, told = CHOICES[name]
    before = dict(tokenizer.get_vocab())
    said = settle_pad(tokenizer, rows, [tokenizer.eos_token_id])
    assert tokenizer.pad_token == pad and told in said
    assert (said == "") == (name == "its own") and "\n" not in said
    assert ("grows" in said) == (tokenizer.pad_token_id >= rows)
    assert tokenizer.get_vocab().items() >= before.items()
    assert settle_pad(tokenizer, tokenizer.pad_token_id + 1, [EOS]) == ""  # once is enough

    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(ModelSettings(path=str(tmp_path)))
    assert again.pad_token_id == tokenizer.pad_token_id
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)


def test_a_pad_that_ends_a_template_s_turns_is_another_from_now_on():
    tokenizer = make("<|im_end|>", *READY, pad_token="<|im_end|>")
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert settle_pad(tokenizer, 13, [EOS]) == ""
    assert "the PAD <|im_end|> ends texts" in settle_pad(tokenizer, 13, [turn_end, EOS])
    assert tokenizer.pad_token == READY[0]


def test_a_model_that_generates_never_grows():
    """PAD is filler there, and may be the EOS."""
    own = make(pad_token="<eos>")
    assert settle_filler(own, 10) == "" and own.pad_token == "<eos>"
    assert settle_filler(make(), 10) == ""
    beyond = make("<pad>", pad_token="<pad>")
    assert "no row for its PAD <pad> (10): <eos> (1) is exported" in settle_filler(beyond, 10)
    assert beyond.pad_token == "<eos>"


def test_a_pad_of_its_own_keeps_a_reward_model_s_ids_those_of_the_actor():
    assert same_words(make("<pad>", pad_token="<pad>"), make())
    assert same_words(make("<pad>", pad_token="<pad>"), make("<pad>"))
    assert not same_words(make("<tool>", "<pad>", pad_token="<pad>"), make("<pad>"))
    assert not same_words(make("<tool>"), make())


# --- models ---------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    """place(name) makes a tiny base model of a family that knows its tokenizer's ids and no more,
    and data to train a reward model.
    """
    monkeypatch.chdir(tmp_path)

    def made(name, tokenizer, **config):
        sizes = {"vocab_size": 10, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": None}
        kind = name.partition(" ")[0]
        shape = {**sizes, "initializer_range": 0.3, **FAMILIES[name]}
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
        made.save_pretrained("base")
        made.config.update(config)
        made.config.save_pretrained("base")
        tokenizer.save_pretrained("base")
        pair = {"prompt": "abc", "chosen": "defg", "rejected": "b"}
        write_rows(tmp_path / "pairs.jsonl", [pair] * 2)
        (tmp_path / "rm.yaml").write_text(
            "kind: rm\nrun: {folder: run}\nlearner: {model: {path: ./base}}\n"
            "data: {path: pairs.jsonl}\nheld_out: {path: pairs.jsonl}\n"
        )
        return ModelSettings(path="base", attention="eager" if name == "gptj" else "sdpa")

    return made


PROMPTS = [[2, 3], [4, 5, 6, 7], [8]]
RESPONSES = [[4, EOS], [9, 2, EOS], [EOS]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "gemma3_text", "granite"])
@torch.no_grad()
def test_an_embedding_grows_by_a_row_and_plain_transformers_scores_alike(place, name, side):
    settings = place(name, make(pad_token="<eos>"))
    data = SupervisedData.load(load_recipe("rm.yaml"))
    assert any("grows from 10 to 11 rows" in line for line in data.notices)
    assert ("README.md" in data.notices[-1]) == (name == "granite")
    torch.manual_seed(1)
    model = load_reward_model(settings, data.tokenizer.pad_token_id)
    assert not model.training and model.get_input_embeddings().weight.shape[0] == 11
    batch = Experience.from_ids(PROMPTS, RESPONSES)
    scores = sequence_scores(model, batch)
    assert scores.std() > 0.01
    out = Path("out")
    save_weights(model, dict(model.state_dict()), out)
    save_config(model, out)
    data.tokenizer.save_pretrained(out)

    tokenizer = AutoTokenizer.from_pretrained(out, padding_side=side)
    config = AutoConfig.from_pretrained(out)
    assert config.pad_token_id == tokenizer.pad_token_id == 10 and config.vocab_size == 11
    again = load_reward_model(settings.model_copy(update={"path": "out"}), None)
    torch.testing.assert_close(sequence_scores(again, batch), scores, atol=3e-6, rtol=0)
    assert not response_values(load_critic(settings), batch).any()
    assert response_values(load_critic(settings.model_copy(update={"path": "out"})), batch).any()
    if name != "granite":
        plain = AutoModelForSequenceClassification.from_pretrained(out)
        rows = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
        padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        assert (padded["input_ids"] == 10).any()
        positions = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
        how = {"position_ids": positions} if side == "left" else {}
        found = plain(**padded, **how).logits[:, 0]
        torch.testing.assert_close(found, scores, atol=3e-6, rtol=0)


@pytest.mark.parametrize("name", ["llama", "opt", "gemma3_text"])
def test_a_pad_that_was_added_by_hand_is_no_crash(place, name):
    """The tokenizer and the config know it, the embedding does not."""
    settings = place(name, make("<pad>", pad_token="<pad>"), pad_token_id=10)
    assert load_causal_lm(settings).config.pad_token_id is None
    assert not response_values(load_critic(settings), Experience.placeholder()).any()
    Path("sft.yaml").write_text(
        "kind: sft\nrun: {folder: run}\nlearner: {model: {path: ./base}}\n"
        "data: {path: pairs.jsonl, response_column: chosen}\n"
    )
    data = SupervisedData.load(load_recipe("sft.yaml"))
    assert data.tokenizer.pad_token == "<eos>" and "as its PAD" in data.notices[-1]
    data = SupervisedData.load(load_recipe("rm.yaml"))
    assert any("no row for its PAD <pad> (10): the embedding" in line for line in data.notices)
    model = load_reward_model(settings, data.tokenizer.pad_token_id)
    assert model.config.pad_token_id == 10 and model.config.vocab_size == 11
