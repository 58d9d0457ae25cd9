"""What rewards see of a response: its text, its conversation and its ids, or another model's."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from actors.rewards.function import FunctionReward
from actors.rewards.reading import Reader
from actors.rollouts.requests import samples_of
from actors.rollouts.sample import Sample
from learners.data.conversation import Conversation
from learners.data.rows import Prompt
from learners.data.templates import ChatTemplate
from learners.experience import Rollout
from tests.learners.test_templates import CHATML, GEMMA, LLAMA3, SPECIAL, THINKING, make_tokenizer

ASKED = [{"role": "user", "content": "2 + 2?"}]
MARKS = ["<answer>", "</answer>"]
DATED = "{{ strftime_now('%Y-%m-%d') }} " + CHATML


def said(
    template: ChatTemplate,
    written: str,
    messages: list[dict[str, Any]] | None = None,
    reason: str = "stop",
) -> Sample:
    """Return the sample of a prompt, raw text without `messages`, and of a response that was
    sampled as this text.
    """
    tokenizer = template.tokenizer
    text = "2 + 2 = "
    ids = tokenizer(text)["input_ids"]
    conversation = None
    if messages:
        conversation = Conversation(messages)
        text, ids = template.prompt(conversation, messages[-1]["role"] == "assistant")
    response = tokenizer(written, add_special_tokens=False)["input_ids"]
    rollout = Rollout(0, 0, 0, ids, response, [0.0] * len(response), reason, (0, 0))
    (sample,) = samples_of([rollout], [Prompt(0, ids, text, {}, 1, conversation)], 1, template)
    return sample


def answer_of(sample: Sample) -> dict[str, Any]:
    assert sample.answered is not None
    return sample.answered.messages[-1]


@pytest.mark.parametrize(
    ("written", "reason", "text"),
    [
        ("<answer>4</answer><|im_end|>", "stop", "<answer>4</answer>"),
        ("4</s>", "stop", "4"),
        ("4<pad></s>", "stop", "4"),
        ("a<|im_end|>b<|im_end|>", "stop", "a<|im_end|>b"),  # a stop nobody told the engine of
        ("<answer>4", "length", "<answer>4"),
        ("", "length", ""),
    ],
)
def test_the_text_has_every_special_token_but_those_that_end_it(
    written: str, reason: str, text: str
) -> None:
    template = ChatTemplate(make_tokenizer(CHATML, [*SPECIAL, *MARKS]))
    for messages in (ASKED, None):
        assert said(template, written, messages, reason).response == text


def test_the_answer_begins_with_what_the_prompt_had_opened() -> None:
    template = ChatTemplate(make_tokenizer(THINKING))
    sample = said(template, "hm</think>4<|im_end|>", ASKED)
    assert sample.response == "hm</think>4"
    assert answer_of(sample) == {"role": "assistant", "content": "<think>\nhm</think>4"}
    assert sample.answered is not None and sample.answered.messages[:-1] == ASKED
    plain = said(ChatTemplate(make_tokenizer(CHATML)), "4<|im_end|>", ASKED)
    assert answer_of(plain)["content"] == "4"


def test_a_turn_that_was_begun_goes_on() -> None:
    begun = [*ASKED, {"role": "assistant", "content": "It is "}]
    for source in (CHATML, THINKING):
        sample = said(ChatTemplate(make_tokenizer(source)), "4<|im_end|>", begun)
        assert sample.answered is not None and len(sample.answered.messages) == 2
        assert answer_of(sample) == {"role": "assistant", "content": "It is 4"}


# --- functions ------------------------------------------------------------------------------------

given: dict[str, Any] = {}


def sees_all(prompts: list[str], responses: list[str], **others: Any) -> list[float]:
    given.update(others, prompts=prompts, responses=responses)
    others["messages"][0].pop() if others["messages"][0] else None
    others["prompt_ids"][0].clear()
    return [0.0] * len(prompts)


def sees_messages(
    prompts: list[str], responses: list[str], messages: list[Any], tests: list[Any], answer: Any = 7
) -> list[float]:
    assert answer == 7 or answer == ["4"]
    return [float(m is None) + 10 * float(t is None) for m, t in zip(messages, tests, strict=True)]


def test_a_function_is_given_messages_and_ids() -> None:
    template = ChatTemplate(make_tokenizer(CHATML))
    chat = said(template, "4<|im_end|>", ASKED)
    raw = said(template, "4</s>")
    before = list(chat.prompt_ids)
    FunctionReward("tests.actors.test_said:sees_all").scores([chat, raw])
    from tests.actors.test_said import given  # the module as it was imported by its name

    assert given["messages"][1] is None and given["messages"][0] == ASKED  # its last was popped
    assert given["response_ids"] == [chat.response_ids, raw.response_ids]
    assert given["prompt_ids"][1] == raw.prompt_ids and chat.prompt_ids == before
    assert given["responses"] == ["4", "4"] and given["finish_reasons"] == ["stop"] * 2
    assert chat.answered is not None and len(chat.answered.messages) == 2


def test_a_column_that_only_another_source_has_is_none() -> None:
    """A step of a mixture may hold rows of one source alone."""
    template = ChatTemplate(make_tokenizer(CHATML))
    reward = FunctionReward("tests.actors.test_said:sees_messages")
    scores = reward.scores([said(template, "4", ASKED), said(template, "4")])
    assert [score.value for score in scores] == [10.0, 11.0]


# --- reward models --------------------------------------------------------------------------------


def reader(
    template: str | None, actor: Any, tmp_path: Path, special: list[str] = SPECIAL
) -> Reader:
    """Return the reader of a reward model with this template."""
    from transformers import Qwen3Config

    from learners.settings import ModelSettings

    tokenizer = make_tokenizer(template, special)
    tokenizer.save_pretrained(tmp_path)
    Qwen3Config(vocab_size=len(tokenizer), max_position_embeddings=64).save_pretrained(tmp_path)
    return Reader.of(ModelSettings(path=str(tmp_path)), actor, date(2024, 2, 29))


EMPTY_THOUGHTS = THINKING.replace("<think>\n{%", "<think>\n\n</think>\n\n{%")
TRIMMING = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")


@pytest.mark.parametrize(
    ("source", "written", "reason"),
    [
        (CHATML, "4<|im_end|>", "stop"),
        (CHATML, "4</s>", "stop"),
        (CHATML, "4", "length"),
        (TRIMMING, " 4 <|im_end|>", "stop"),
        (THINKING, "hm</think>4<|im_end|>", "stop"),
        (EMPTY_THOUGHTS, "4<|im_end|>", "stop"),
    ],
)
def test_a_reward_model_with_the_actors_template_reads_what_it_was_trained_on(
    tmp_path: Path, source: str, written: str, reason: str
) -> None:
    template = ChatTemplate(make_tokenizer(source))
    judge = reader(source, template.tokenizer, tmp_path)
    answer = {"role": "assistant", "content": "4"}
    (trained,) = template.examples(Conversation(ASKED).answered(answer), "last")
    prompt, response = judge.ids(said(template, written, ASKED, reason))
    assert prompt + response == [*trained.prompt_ids, *trained.response_ids]
    assert judge.tokenizer.decode(response) == "4<|im_end|>"
    assert judge.same_ids and judge.as_long
    raw = said(template, "4", None, "length")
    assert judge.ids(raw) == (raw.prompt_ids, raw.response_ids)


def test_a_reward_model_renders_messages_with_its_own_template(tmp_path: Path) -> None:
    """Ids of the same vocabulary in another template are not what it was trained on."""
    template = ChatTemplate(make_tokenizer(CHATML))
    judge = reader(LLAMA3, template.tokenizer, tmp_path)
    own = make_tokenizer(LLAMA3)
    for written, reason in (("4<|im_end|>", "stop"), ("4", "length")):
        sample = said(template, written, ASKED, reason)
        prompt, response = judge.ids(sample)
        assert judge.same_ids and not judge.as_long and own.decode(response) == "4<|eot_id|>"
        assert prompt == ChatTemplate(own).prompt(Conversation(ASKED))[1]
    raw = said(template, "4</s>")
    assert judge.ids(raw) == (raw.prompt_ids, raw.response_ids)
    prompts = [Prompt(i, [1], "2", {}, i + 1, c) for i, c in enumerate([None, Conversation(ASKED)])]
    assert 1 in judge.unsure_of(prompts)


def test_the_same_template_in_another_vocabulary_gives_other_ids(tmp_path: Path) -> None:
    template = ChatTemplate(make_tokenizer(GEMMA))
    judge = reader(GEMMA, template.tokenizer, tmp_path, [*SPECIAL, *MARKS])
    prompt, response = judge.ids(said(template, "4<end_of_turn>", ASKED))
    assert not judge.same_ids
    assert judge.tokenizer.decode(response) == "4<end_of_turn>"
    assert judge.tokenizer.decode(prompt).endswith("<start_of_turn>model\n")


def test_a_reward_model_without_a_template_reads_the_text(tmp_path: Path) -> None:
    template = ChatTemplate(make_tokenizer(CHATML))
    judge = reader(None, template.tokenizer, tmp_path, [*SPECIAL, *MARKS])
    prompt, response = judge.ids(said(template, "4<|im_end|>", ASKED))
    assert judge.template is None and not judge.same_ids
    assert judge.tokenizer.decode(prompt) == template.prompt(Conversation(ASKED))[0]
    assert judge.tokenizer.decode(response) == "4</s>"


def test_a_reward_models_template_prints_the_date_of_the_run(tmp_path: Path) -> None:
    template = ChatTemplate(make_tokenizer(CHATML))
    judge = reader(DATED, template.tokenizer, tmp_path)
    prompt, _ = judge.ids(said(template, "4<|im_end|>", ASKED))
    assert judge.tokenizer.decode(prompt).startswith("2024-02-29 <|im_start|>")
