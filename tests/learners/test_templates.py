"""Six chat templates as vendors write them: which tokens are learned, and which one ends a turn."""

import json
from datetime import date

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from learners.data.conversation import Conversation
from learners.data.templates import ChatTemplate
from learners.errors import DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<s>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "<s>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}"
    "{% if loop.index0 % 2 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] | trim }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITING = (  # what earlier turns thought is taken out, as Qwen3's does
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
]
CHAT = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "+ 1?"},
    {"role": "assistant", "content": "five"},
]


def make_tokenizer(template, special=SPECIAL):
    """One token per byte, but for line breaks in pairs, as large vocabularies have them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    line = "\u010a"
    vocabulary = {t: i for i, t in enumerate([*special, *letters, line + line])}
    core = Tokenizer(models.BPE(vocabulary, [(line, line)]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="</s>",
        bos_token="<s>",
        pad_token="<pad>",
        additional_special_tokens=special[3:],
    )
    tokenizer.chat_template = template
    return tokenizer


def trained(template, tokenizer, example):
    """Return the trained tokens as texts, one for each run of them."""
    runs = [[]]
    for one, learned in zip(example.ids, example.trained, strict=True):
        if learned:
            runs[-1].append(one)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


ENDS = {
    "chatml": (CHATML, "<|im_end|>", ""),
    "llama3": (LLAMA3, "<|eot_id|>", ""),
    "gemma": (GEMMA, "<end_of_turn>", ""),
    "mistral": (MISTRAL, "</s>", " "),
    "thinking": (THINKING, "<|im_end|>", ""),
    "phi3": (PHI3, "<|end|>", ""),
    "marked": (MARKED, "<|im_end|>", ""),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_assistants_turns_and_their_ends_are_trained(name):
    source, end, space = ENDS[name]
    tokenizer = make_tokenizer(source)
    template = ChatTemplate(tokenizer)
    (example,) = template.examples(Conversation(CHAT))
    assert trained(template, tokenizer, example) == [f"{space}4{end}", f"{space}five{end}"]
    assert example.text == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(example.ids) == example.text
    assert len(example.ids) == len(example.trained)
    assert tokenizer.decode(example.response_ids).endswith(f"five{end}")
    assert tokenizer.decode([template.turn_end]) == end
    assert template.stops == list(dict.fromkeys([template.turn_end, tokenizer.eos_token_id]))


@pytest.mark.parametrize("name", ENDS)
def test_what_comes_before_a_turn_is_the_prompt_that_generation_reads(name):
    source, _, _ = ENDS[name]
    template = ChatTemplate(make_tokenizer(source))
    text, ids = template.prompt(Conversation(CHAT[:1]))
    (example,) = template.examples(Conversation(CHAT[:2]))
    opened = template.opened(Conversation(CHAT[:1]))
    assert (opened == "<think>\n") == (name == "thinking")
    assert text == example.text[: len(text) - len(opened)] + opened
    if not opened:
        assert example.prompt_ids == ids


def test_only_the_last_turn_is_trained_if_that_is_wanted():
    tokenizer = make_tokenizer(CHATML)
    (example,) = ChatTemplate(tokenizer).examples(Conversation(CHAT), train_on="last")
    assert trained(None, tokenizer, example) == ["five<|im_end|>"]


def test_turns_that_are_not_to_be_learned_are_read():
    tokenizer = make_tokenizer(CHATML)
    template = ChatTemplate(tokenizer)
    learned = (True, False, True, True)
    (example,) = template.examples(Conversation(CHAT, learned=learned))
    assert trained(template, tokenizer, example) == ["five<|im_end|>"]
    assert template.examples(Conversation(CHAT, learned=(False,) * 4)) == []


def test_answers_that_open_no_block_are_learned_without_it():
    template = ChatTemplate(make_tokenizer(THINKING))
    template.examples(Conversation(CHAT))
    assert any("opens '<think>\\n', which 2 rendered answers" in line for line in template.notices)


def test_a_turn_that_a_later_one_rewrites_is_an_example_of_its_own():
    tokenizer = make_tokenizer(REWRITING)
    template = ChatTemplate(tokenizer)
    chat = [CHAT[0], CHAT[1] | {"content": "hm</think>4"}, *CHAT[2:]]
    first, second = template.examples(Conversation(chat))
    assert trained(template, tokenizer, first) == ["hm</think>4<|im_end|>"]
    assert trained(template, tokenizer, second) == ["five<|im_end|>"]
    assert "hm" not in second.text
    with pytest.raises(DataError, match="rewrites earlier turns"):
        template.examples(Conversation(chat), rewritten_turns="refuse")
    (whole,) = template.examples(Conversation(CHAT), rewritten_turns="refuse")
    assert len(trained(template, tokenizer, whole)) == 2


def test_a_template_without_an_end_gets_the_tokenizers():
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    template = ChatTemplate(tokenizer)
    assert template.stops == [tokenizer.eos_token_id]
    first, second = template.examples(Conversation(CHAT))
    assert tokenizer.decode(first.ids) == first.text == "user: 2 + 2?\nassistant: 4</s>"
    assert trained(template, tokenizer, second) == ["five</s>"]
    assert second.text.endswith("assistant: 4\nuser: + 1?\nassistant: five</s>")


def test_a_turn_ends_where_the_next_begins_if_the_model_stops_there():
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    template = ChatTemplate(tokenizer, ends=[user])
    _, second = template.examples(Conversation(CHAT))
    assert template.turn_end == user
    assert trained(template, tokenizer, second) == ["five<|user|>"]


def test_an_end_that_is_no_token_is_refused():
    tokenizer = make_tokenizer(CHATML, [t for t in SPECIAL if t != "<|im_end|>"])
    with pytest.raises(DataError, match=r"'<\|im_end\|>', which is no token"):
        ChatTemplate(tokenizer).examples(Conversation(CHAT))


def test_whatever_a_template_raises_is_said_in_its_words():
    template = ChatTemplate(make_tokenizer(MISTRAL))
    with pytest.raises(DataError, match="cannot render it: TemplateError: roles must alternate"):
        template.examples(Conversation([CHAT[0], CHAT[0], CHAT[1]]))
    with pytest.raises(DataError, match="no chat template"):
        ChatTemplate(make_tokenizer(None)).prompt(Conversation(CHAT))


def test_todays_date_is_that_of_the_run():
    template = ChatTemplate(
        make_tokenizer("{{ strftime_now('%Y-%m-%d') }}" + CHATML), today=date(2001, 2, 3)
    )
    text, _ = template.prompt(Conversation(CHAT[:1]))
    assert text.startswith("2001-02-03<|im_start|>user")
    assert any("prints today's date: it is 2001-02-03" in line for line in template.notices)


def test_an_end_that_is_not_eos_is_noticed():
    lines = {}
    for source in (MISTRAL, GEMMA):
        template = ChatTemplate(make_tokenizer(source))
        assert template.notices == [] and template.stops == [template.tokenizer.eos_token_id]
        template.prompt(Conversation(CHAT[:1]))
        lines[source] = template.notices
    assert lines[MISTRAL] == []
    (line,) = lines[GEMMA]
    assert "<end_of_turn>, not with the tokenizer's EOS </s>" in line


CALL = {"id": "abcdefghi", "type": "function"}
CALLS = "{% for c in m.tool_calls %}{{ X }}{% endfor %}"


@pytest.mark.parametrize(
    "written",
    [
        "c.function.arguments | tojson",  # Qwen 2.5
        "c.function.arguments",  # DeepSeek
        "c.function.arguments if c.function.arguments is string else c.function.arguments | tojson",
    ],
)
def test_arguments_of_calls_are_json_once(written):
    source = CHATML.replace("<|im_end|>", CALLS.replace("X", written) + "<|im_end|>", 1)
    tokenizer = make_tokenizer(source)
    call = CALL | {"function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    chat = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    (example,) = ChatTemplate(tokenizer).examples(Conversation(chat))
    (text,) = trained(None, tokenizer, example)
    assert json.loads(text.removesuffix("<|im_end|>")) == {"a": 1, "b": None}


def test_an_assistants_turn_is_continued():
    template = ChatTemplate(make_tokenizer(CHATML))
    text, _ = template.prompt(Conversation(CHAT), going_on=True)
    assert text.endswith("<|im_start|>assistant\nfive")


def test_a_line_break_that_would_join_two_turns_stays_with_the_prompt():
    tokenizer = make_tokenizer(CHATML)
    chat = [CHAT[0], {"role": "assistant", "content": "\nfour"}]
    (example,) = ChatTemplate(tokenizer).examples(Conversation(chat))
    assert trained(None, tokenizer, example) == ["\nfour<|im_end|>"]


def test_a_conversation_that_the_assistant_begins():
    tokenizer = make_tokenizer(CHATML)
    (example,) = ChatTemplate(tokenizer).examples(Conversation(CHAT[1:]))
    assert trained(None, tokenizer, example) == ["4<|im_end|>", "five<|im_end|>"]


def test_calls_and_tools_that_a_template_leaves_out_are_not_lost_silently():
    call = CALL | {"function": {"name": "add", "arguments": {"a": 1}}}
    chat = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    template = ChatTemplate(make_tokenizer(CHATML))
    with pytest.raises(DataError, match="writes no calls"):
        template.examples(Conversation(chat))
    template.prompt(Conversation(CHAT[:1], tools=[{"type": "function"}]))
    assert any("nothing of the tools" in line for line in template.notices)


def test_calls_in_another_form_than_json_are_written_as_the_template_does():
    form = "{{ c.function.name }}({{ c.function.arguments.items() | first | join('=') }})"
    source = CHATML.replace("<|im_end|>", CALLS.replace("{{ X }}", form) + "<|im_end|>", 1)
    tokenizer = make_tokenizer(source)
    call = CALL | {"function": {"name": "add", "arguments": {"a": 1}}}
    chat = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    (example,) = ChatTemplate(tokenizer).examples(Conversation(chat))
    assert trained(None, tokenizer, example) == ["add(a=1)<|im_end|>"]


def test_an_argument_that_the_template_never_looks_at_is_refused():
    source = CHATML + "{% if thinking %}{% generation %}hm{% endgeneration %}{% endif %}"
    template = ChatTemplate(make_tokenizer(source))
    template.check_arguments({"thinking": False})
    with pytest.raises(DataError, match="never looks at thinkin; it looks at thinking$"):
        template.check_arguments({"thinkin": False})


THOUGHTS = (  # two marked parts of a turn, with a star between them that is not marked
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}hm{% endgeneration %}*{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS_UNMARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}"
    "{{ m.tool_calls[0].function | tojson }}{% elif m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_every_marked_part_of_a_turn_is_trained():
    tokenizer = make_tokenizer(THOUGHTS)
    (example,) = ChatTemplate(tokenizer).examples(Conversation(CHAT))
    assert trained(None, tokenizer, example) == ["hm", "4<|im_end|>", "hm", "five<|im_end|>"]


def test_a_turn_that_the_template_does_not_mark_is_found_without_marks():
    tokenizer = make_tokenizer(CALLS_UNMARKED)
    call = CALL | {"function": {"name": "add", "arguments": {"a": 1}}}
    chat = [*CHAT[:3], {"role": "assistant", "content": "", "tool_calls": [call]}]
    (example,) = ChatTemplate(tokenizer).examples(Conversation(chat))
    assert tokenizer.decode(example.ids) == example.text
    first, second = trained(None, tokenizer, example)
    assert first == "4<|im_end|>" and "add" in second and "1?" not in second


def test_a_line_break_is_no_end_although_it_may_be_an_added_token():
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}\n\n{% endfor %}")
    tokenizer.add_tokens(["\n\n"])
    template = ChatTemplate(tokenizer)
    template.prompt(Conversation(CHAT[:1]))
    assert template.turn_end is None and template.stops == [tokenizer.eos_token_id]


def test_a_template_is_tried_as_the_data_use_it():
    needy = (
        "{% if messages[0].role != 'system' or mode != 'x' %}{{ raise_exception('no') }}{% endif %}"
    )
    template = ChatTemplate(make_tokenizer(needy + CHATML))
    chat = [{"role": "system", "content": "s"}, *CHAT]
    (example,) = template.examples(Conversation(chat, arguments={"mode": "x"}))
    assert trained(None, template.tokenizer, example) == ["4<|im_end|>", "five<|im_end|>"]


def test_each_of_a_tokenizers_templates_has_its_own_end():
    tokenizer = make_tokenizer({"default": GEMMA, "tool_use": CHATML})
    template = ChatTemplate(tokenizer)
    for tools, end in ((None, "<end_of_turn>"), ([{"type": "function"}], "<|im_end|>")):
        (example,) = template.examples(Conversation(CHAT[:2], tools))
        assert trained(None, tokenizer, example) == [f"4{end}"]
    ends = tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<|im_end|>", "</s>"])
    assert template.stops == ends


@pytest.mark.parametrize("source", [CHATML, "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_an_empty_answer_is_its_end_alone(source):
    tokenizer = make_tokenizer(source)
    chat = [CHAT[0], {"role": "assistant", "content": ""}]
    (example,) = ChatTemplate(tokenizer).examples(Conversation(chat))
    assert len(example.response_ids) == 1


@pytest.mark.parametrize("name", ["messages", "tools", "chat_template"])
def test_what_a_template_is_given_anyway_is_no_argument(name):
    with pytest.raises(DataError, match=f"{name} is no argument of a template's own"):
        ChatTemplate(make_tokenizer(CHATML)).prompt(Conversation(CHAT, arguments={name: []}))


def test_a_header_that_the_model_has_to_write_is_noticed():
    bare = CHATML.partition("{% if add")[0]
    template = ChatTemplate(make_tokenizer(bare))
    (example,) = template.examples(Conversation(CHAT[:2]))
    header = "<|im_start|>assistant\n"
    assert trained(None, template.tokenizer, example) == [f"{header}4<|im_end|>"]
    assert any(f"leaves {header!r} to the model" in line for line in template.notices)


def test_tokenizers_that_put_a_space_before_each_part_read_the_whole():
    core = Tokenizer(
        models.BPE({t: i for i, t in enumerate(["<s>", "</s>", "\u2581", *"abq:"])}, [])
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'q:' if m.role == 'user' else '' }}{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else ':' }}{% endfor %}"
    )
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (example,) = ChatTemplate(tokenizer).examples(Conversation(chat))
    tokens = tokenizer.convert_ids_to_tokens(example.ids)
    assert tokens == ["\u2581", "q", ":", "a", ":", "b", "</s>"]
    assert list(example.trained) == [0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("answer", ["Quite", "quite", "<think>x</think>Quite"])
def test_an_answer_that_begins_like_a_probe_is_trained_from_its_first_letter(answer):
    tokenizer = make_tokenizer(THINKING)
    chat = [CHAT[0], {"role": "assistant", "content": answer}]
    (example,) = ChatTemplate(tokenizer).examples(Conversation(chat))
    assert trained(None, tokenizer, example) == [
        f"{answer.partition('</think>')[2] or answer}<|im_end|>"
    ]
