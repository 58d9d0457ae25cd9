"""The shapes that data come in, from a raw row to its canonical form."""

import json

import pytest

from learners.data.conversation import Conversation
from learners.data.pairs import LEFT, REPEATED
from learners.data.shapes import demonstration_of, preference_of, prompt_of, recognised
from learners.errors import DataError
from learners.settings import PairData, PromptData, SFTData


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def user(content="q"):
    return say("user", content)


def bot(content="a"):
    return say("assistant", content)


def system(content="s"):
    return say("system", content)


def from_(who, value):
    return {"from": who, "value": value}


def call(name="f", arguments=None, **more):
    function = {"name": name, "arguments": {"x": 1} if arguments is None else arguments}
    return {"type": "function", **more, "function": function}


PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}
CALLED = say("assistant", "", tool_calls=[call()])

OF = {SFTData: demonstration_of, PairData: preference_of, PromptData: prompt_of}


def read(kind, row, **keys):
    data = kind(path="rows.jsonl", **keys)
    return OF[kind](data, row, recognised(data, list(row)))


def sft(row, **keys):
    return read(SFTData, row, **keys)


def pair(row, **keys):
    return read(PairData, row, **keys)


def prompt(row, **keys):
    return read(PromptData, row, **keys)


def refused(run, *args, **keys):
    with pytest.raises(DataError) as error:
        run(*args, **keys)
    message = str(error.value)
    assert "\n" not in message
    return message


# --- columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "columns", "keys", "expected"),
    [
        (SFTData, ["id", "messages"], {}, {"messages": "messages"}),
        (SFTData, ["conversations"], {}, {"messages": "conversations"}),
        (SFTData, ["conversation"], {}, {"messages": "conversation"}),
        (SFTData, ["messages", "conversations"], {}, {"messages": "messages"}),
        (SFTData, ["prompt", "messages"], {}, {"messages": "messages"}),  # UltraChat
        (SFTData, ["prompt", "response"], {}, {"prompt": "prompt", "response": "response"}),
        (SFTData, ["prompt", "completion"], {}, {"prompt": "prompt", "response": "completion"}),
        (
            SFTData,
            ["question", "answer", "messages"],
            {"prompt": "question", "response": "answer"},
            {"prompt": "question", "response": "answer"},
        ),
        (SFTData, ["prompt", "a"], {"response": "a"}, {"prompt": "prompt", "response": "a"}),
        (
            SFTData,
            ["prompt", "response", "chat"],
            {"messages": "chat"},
            {"messages": "chat"},
        ),
        (
            SFTData,
            ["messages", "tools", "chat_template_kwargs"],
            {},
            {
                "messages": "messages",
                "tools": "tools",
                "template_arguments": "chat_template_kwargs",
            },
        ),
        (PairData, ["chosen", "rejected"], {}, {"chosen": "chosen", "rejected": "rejected"}),
        (
            PairData,
            ["prompt", "chosen", "rejected", "messages", "margin"],
            {"margin": "margin"},
            {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "margin": "margin"},
        ),
        (
            PairData,
            ["q", "good", "bad", "functions"],
            {"prompt": "q", "chosen": "good", "rejected": "bad", "tools": "functions"},
            {"prompt": "q", "chosen": "good", "rejected": "bad", "tools": "functions"},
        ),
        (PromptData, ["prompt", "messages", "answer"], {}, {"prompt": "prompt"}),
        (PromptData, ["messages", "tools"], {}, {"prompt": "messages", "tools": "tools"}),
        (PromptData, ["q", "prompt"], {"prompt": "q"}, {"prompt": "q"}),
        (PromptData, ["prompt", "system"], {}, {"prompt": "prompt", "system": "system"}),
        (
            SFTData,
            ["system_prompt", "question", "response"],
            {"prompt": "question"},
            {"prompt": "question", "response": "response", "system": "system_prompt"},
        ),
        (
            PairData,
            ["rules", "chosen", "rejected"],
            {"system": "rules"},
            {"chosen": "chosen", "rejected": "rejected", "system": "rules"},
        ),
        (SFTData, ["messages", "tools"], {"tools": ""}, {"messages": "messages"}),
    ],
)
def test_columns_are_recognised(kind, columns, keys, expected):
    assert recognised(kind(path="p", columns=keys), columns) == expected


SHOWN = "it has the columns {}, and is read by {}: name others, {} `columns: {{{}}}`"


@pytest.mark.parametrize(
    ("kind", "columns", "keys", "said"),
    [
        (PromptData, ["question"], {"columns": {"prompt": "questio"}}, "did you mean 'question'?"),
        (PromptData, ["q"], {"columns": {"prompt": "x"}}, "columns ['x'] missing; it has ['q']"),
        (
            PromptData,
            ["prompt"],
            {"answer_columns": ("answer",)},
            "columns ['answer'] missing; it has ['prompt']",
        ),
        (PairData, ["chosen", "rejected"], {"columns": {"margin": "m"}}, "columns ['m'] missing"),
        (
            SFTData,
            ["question", "answer"],
            {},
            SHOWN.format(
                ["question", "answer"],
                "messages (or conversations), or prompt with response (or completion)",
                "perhaps",
                "prompt: question, response: answer",
            ),
        ),
        (SFTData, ["x", "y"], {}, "as in `columns: {prompt: question, response: answer}`"),
        (SFTData, ["Prompt", "Response"], {}, "{prompt: Prompt, response: Response}"),
        (SFTData, ["prompt", "output"], {}, "perhaps `columns: {response: output}`"),
        (SFTData, ["id", "dialog"], {}, "perhaps `columns: {messages: dialog}`"),
        (PairData, ["chosen", "reject"], {}, "perhaps `columns: {rejected: reject}`"),
        (PairData, ["a"], {}, "as in `columns: {chosen: better, rejected: worse}`"),
        (PairData, ["winner", "loser"], {}, "as in `columns: {chosen: better, rejected: worse}`"),
        (SFTData, ["prompt", "Response text"], {}, '`columns: {response: "Response text"}`'),
        (SFTData, ["my: prompt", "response"], {}, '`columns: {prompt: "my: prompt"}`'),
        (PromptData, ["prompt, en"], {}, '`columns: {prompt: "prompt, en"}`'),
        (
            SFTData,
            ["instruction", "input", "output"],
            {},
            "`columns: {prompt: instruction, response: output}` (input would stay unread)",
        ),
        (PromptData, ["problem"], {}, "read by prompt (or messages): name others, perhaps"),
        (
            SFTData,
            ["conversations", "prompt", "completion"],
            {},
            "`columns: {messages: conversations}` or `columns: {prompt: prompt, response: comple",
        ),
    ],
)
def test_other_columns_are_refused_with_what_would_be_right(kind, columns, keys, said):
    message = refused(recognised, kind(path="p", **keys), columns)
    assert message.startswith("p: ") and said in message


# --- messages -------------------------------------------------------------------------------------


CALL = '{"name": "f", "arguments": {"x": 1}}'


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([user(), bot()], [user(), bot()]),
        ([system(), user(), bot(), user(), bot()], [system(), user(), bot(), user(), bot()]),
        ([from_("human", "q"), from_("gpt", "a")], [user(), bot()]),
        ([from_("user", "q"), from_("chatgpt", "a")], [user(), bot()]),
        ([from_("prompter", "q"), from_("bard", "a")], [user(), bot()]),
        ([from_("Human", "q"), from_("GPT", "a")], [user(), bot()]),
        ([say("developer", "s"), user(), say("model", "a")], [system(), user(), bot()]),
        ([{**from_("human", "q"), "role": None}, bot()], [user(), bot()]),
        (
            [from_("human", "q"), from_("function_call", CALL), from_("observation", "1"), bot()],
            [user(), say("assistant", "", tool_calls=[call()]), say("tool", "1"), bot()],
        ),
        (
            [user(), from_("function_call", f"[{CALL}, {CALL}]"), from_("function_response", "1")],
            [user(), say("assistant", "", tool_calls=[call(), call()]), say("tool", "1")],
        ),
        ([user(), say("ipython", "1"), bot()], [user(), say("tool", "1"), bot()]),
        (  # what OpenAI's API had before tools
            [user(), say("assistant", None, function_call={"name": "f", "arguments": '{"x": 1}'})],
            [user(), say("assistant", "", tool_calls=[call()])],
        ),
        (
            [
                user(),
                bot(),
                say("function", "1", name="f", tool_call_id="7"),
                say("assistant", "a", reasoning_content="r", thinking="t"),
            ],
            [
                user(),
                bot(),
                say("tool", "1", name="f", tool_call_id="7"),
                say("assistant", "a", reasoning_content="r", thinking="t"),
            ],
        ),
        (
            [user([{"type": "text", "text": "q", "image_url": None}, {"text": "r"}]), bot()],
            [user("qr"), bot()],
        ),
        (
            [
                user([{"type": "input_text", "text": "q"}, "r"]),
                bot([{"type": "output_text", "text": "a"}]),
            ],
            [user("qr"), bot()],
        ),
        ([user(), say("assistant", "a", name=None, tool_calls=None, extra=[])], None),
        ([user(), say("assistant", "a", tool_calls=[])], [user(), bot()]),
    ],
)
def test_messages_become_canonical(messages, expected):
    expected = expected or [user(), say("assistant", "a", extra=[])]
    expected_whole = Conversation(expected)
    assert sft({"messages": messages}) == expected_whole
    assert sft({"conversations": json.dumps(messages)}) == expected_whole


def test_an_agents_own_names_of_roles():
    row = {"messages": [from_("Customer", "q"), from_("gpt", "a"), from_("Clerk", "b")]}
    roles = {"Customer": "user", "Clerk": "assistant", "gpt": "tool"}
    assert sft(row, roles=roles).messages == [user(), say("tool", "a"), bot("b")]
    message = refused(sft, row)
    assert message.startswith("messages: turn 1 (Customer) is of an unknown role")
    assert "say whose it is: `roles: {Customer: user}`, or system, assistant, tool" in message
    assert '`roles: {"Mr. X: y": user}`' in refused(sft, {"messages": [from_("Mr. X: y", "q")]})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([call(id="7")], [call(id="7")]),
        ([{"name": "f", "arguments": {"x": 1}}], [call()]),
        ([{"name": "f", "arguments": '{"x": 1}', "id": "7"}], [call(id="7")]),
        ([call(arguments='{"x": 1}')], [call()]),
        ([call(arguments='{"x": null}')], [call(arguments={"x": None})]),  # it is meant
        ([call(arguments={"x": 1, "y": None, "z": {"v": None, "w": [None]}})], "nested"),
        ([call(arguments={"x": None})], [call(arguments={})]),  # an empty one in a typed column
        ([call(arguments="")], [call(arguments={})]),
        ([{"function": {"name": "f"}}], [call(arguments={})]),
        (f"[{CALL}]", [call()]),
        ([CALL], [call()]),
        ({"name": "f", "arguments": {"x": 1}}, [call()]),
    ],
)
def test_tool_calls(value, expected):
    if expected == "nested":
        expected = [call(arguments={"x": 1, "z": {"w": [None]}})]
    for content in ({"content": None}, {"content": ""}, {}):
        row = {"messages": [user(), {"role": "assistant", **content, "tool_calls": value}]}
        assert sft(row).messages[1] == say("assistant", "", tool_calls=expected)
    assert sft(row).messages[1]["tool_calls"][0]["type"] == "function"


def test_nulls_that_a_typed_column_adds_are_removed():
    import pyarrow

    calls = [call(arguments={"x": {"y": 1}, "z": "a"}), call("g", {"x": {}}), call("h", {})]
    rows = [
        {"messages": [user(), say("assistant", "", tool_calls=calls)], "tools": [TOOL]},
        {"messages": [user(), say("assistant", "a", name="n")], "tools": None},
        {"messages": [user(), bot()], "tools": [{"type": "function", "function": {"name": "g"}}]},
    ]
    typed = pyarrow.Table.from_pylist(rows).to_pylist()
    assert typed != rows
    for row, back in zip(rows, typed, strict=True):
        assert sft(back) == Conversation(row["messages"], row["tools"])


def test_nulls_inside_json_text_are_meant():
    messages = [user(), say("assistant", None, tool_calls=[call(arguments={"x": None})])]
    assert sft({"messages": json.dumps(messages)}).messages[1]["tool_calls"] == [
        call(arguments={"x": None})
    ]


def test_calls_keep_the_order_of_their_keys():
    given = {"id": "7", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    row = {"messages": [user(), say("assistant", None, tool_calls=[given])]}
    assert list(sft(row).messages[1]["tool_calls"][0]) == ["id", "type", "function"]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages is empty: there is no answer to learn"),
        (None, "messages must be a list of messages with role and content"),
        (3, "messages must be a list of messages with role and content"),
        ("hello", "messages must be a list of messages with role and content"),
        ("[1, 2]", "messages must be a list of messages with role and content"),
        (["hello"], "messages must be a list of messages with role and content"),
        ([user(), {"content": "a"}], "messages must be a list of messages with role and content"),
        (str([user(), bot()]), "messages is a conversation as Python prints it: write it as JSON"),
        ([user(), say("assistant", None)], "messages: turn 2 (assistant) has no content"),
        ([user(), {"role": "assistant"}], "messages: turn 2 (assistant) has no content"),
        ([user({"text": "q"}), bot()], "messages: turn 1 (user) has content that is no text, but"),
        ([user(3), bot()], "content that is no text, but int"),
        (
            [user([{"type": "text", "text": "q"}, {"type": "image"}]), bot()],
            "messages: turn 1 (user) has an image: only text can be read",
        ),
        ([user([{"type": "image_url", "image_url": {"url": "u"}}]), bot()], "has an image: only"),
        ([user([{"type": "input_audio", "input_audio": {}}]), bot()], "has an audio: only text"),
        ([user([{"type": "video", "video": "u"}]), bot()], "has a video: only text can be read"),
        ([user([{"type": "file", "file": {}}]), bot()], "has a file: only text can be read"),
        ([user([{"type": "tool_use"}]), bot()], "has a part of type tool_use: only text"),
        ([user([{"type": "text", "text": None}]), bot()], "has a part of type text: only text"),
        ([user([3]), bot()], "has a part of type int: only text"),
        ([user(), from_("function_call", "f(x)")], "turn 2 (function_call) must be calls of tools"),
        ([user(), say("assistant", "", tool_calls=[{"id": "7"}])], "call 1 must have a name"),
        ([user(), say("assistant", "", tool_calls=["f"])], "call 1 must have a name"),
        ([user(), say("assistant", "", tool_calls="f")], "must be calls of tools with name"),
        (
            [user(), say("assistant", "", tool_calls=[call(arguments=[1])])],
            "messages: turn 2 (assistant): call 1: the arguments must be an object, or one as JSON "
            "text, not list",
        ),
        (
            [user(), say("assistant", "", tool_calls=[call(arguments="x=1")])],
            "the arguments must be an object, or one as JSON text, not other text",
        ),
        ([user(), say("assistant", "a", weight=0.5)], "has weight 0.5: a turn is learned (1) or"),
        ([user(), say("assistant", "a", train="no")], "has train 'no': a turn is learned (1) or"),
        ([user(), say("assistant", "a", weight=0)], "messages has no turn of the assistant's to"),
        ([system(), user()], "messages has no turn of the assistant's to learn"),
        ([user(), bot("")], "messages: turn 2 (assistant) is empty: there is no answer to learn"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, said):
    assert said in refused(sft, {"messages": messages})


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([{}, {}], None),
        ([{"weight": 1}, {"train": True}], None),
        ([{"weight": None}, {"train": None}], None),
        ([{"weight": 0}, {}], (True, False, True, True)),
        ([{"weight": 0.0}, {"weight": 1.0}], (True, False, True, True)),
        ([{"train": False}, {"train": True}], (True, False, True, True)),
        ([{"train": 0, "weight": 1}, {}], (True, False, True, True)),
    ],
)
def test_turns_of_weight_0_are_not_learned(weights, expected):
    first, second = weights
    row = {"messages": [user(), {**bot(), **first}, user("r"), {**bot("b"), **second}]}
    assert sft(row) == Conversation([user(), bot(), user("r"), bot("b")], learned=expected)
    with_system = sft(row, system_prompt="s").learned
    assert with_system == (expected and (False, *expected))


def test_an_earlier_empty_answer_may_stand_where_the_last_is_learned():
    row = {"messages": [user(), bot(""), user(), bot()]}
    assert sft(row, train_on="last").messages == row["messages"]
    assert "turn 2 (assistant) is empty" in refused(sft, row)


TEXTS = {"prompt": "q", "response": "a", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("column", "value", "empty"),
    [
        ("image", "u", ""),
        ("images", [{"path": "u", "bytes": None}], []),
        ("audio", {"bytes": b"u", "path": None}, {"bytes": None, "path": None}),
        ("audios", '["u"]', "[]"),
        ("video", 3, None),
        ("videos", [None, "u"], [None]),
    ],
)
def test_images_in_other_columns_are_refused(column, value, empty):
    said = f"{column} is not empty: only text can be read"
    for run, row in ((sft, TEXTS), (prompt, TEXTS), (pair, TEXTS), (sft, {"messages": [bot()]})):
        assert refused(run, row | {column: value}) == said
        assert run(row | {column: empty})
    assert prompt({column: "q"}, columns={"prompt": column}) == "q"  # texts by that name


# --- what stands beside the messages --------------------------------------------------------------


def test_a_system_prompt_where_there_is_none():
    own = {"messages": [system("t"), user(), bot()]}
    assert sft(own, system_prompt="s").messages == own["messages"]
    assert sft({"messages": [user(), bot()]}, system_prompt="s").messages[0] == system()
    said = prompt({"prompt": "q"}, system_prompt="s", apply_template=True)
    assert said == Conversation([system(), user()])
    row = {"chosen": [user(), bot()], "rejected": [user(), bot("b")]}
    assert pair(row, system_prompt="s").prompt == Conversation([system(), user()])


CHOICES = {"chosen": [user(), bot()], "rejected": [user(), bot("b")]}


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize("recipe", [None, "t"])
def test_a_column_with_a_system_message(column, recipe):
    keys = {"system_prompt": recipe, "apply_template": True}
    for value in ("s", None, ""):
        first = value or recipe
        expected = [system(first)] if first else []
        beside = {column: value}
        assert sft(TEXTS | beside, **keys).messages == [*expected, user(), bot()]
        assert prompt(TEXTS | beside, **keys).messages == [*expected, user()]
        assert pair(TEXTS | beside, **keys).prompt.messages == [*expected, user()]
        assert pair(CHOICES | beside, **keys).prompt.messages == [*expected, user()]
        said = sft({"messages": [user(), {**bot(), "weight": 0}, user(), bot()]} | beside, **keys)
        assert said.messages[:-4] == expected
        assert said.learned == (False,) * len(expected) + (True, False, True, True)
    assert refused(sft, TEXTS | {column: 3}, **keys) == f"{column} must be text, not int"


def test_a_system_message_of_the_conversation_is_not_doubled():
    own = [system("own"), user(), bot()]
    assert sft({"system": "s", "messages": own}).messages == own
    other = [system("own"), user(), bot("b")]
    assert turns(pair({"system": "s", "chosen": own, "rejected": other})) == (
        own[:2],
        [bot()],
        [bot("b")],
    )
    row = {"who": "s", "system": "u", "messages": [user(), bot()]}
    assert sft(row, columns={"system": "who"}).messages == [system(), user(), bot()]
    row = {"system": "q", "system_prompt": "s"}  # a column is read as one thing
    said = prompt(row, columns={"prompt": "system"}, apply_template=True)
    assert said.messages == [system(), user()]


@pytest.mark.parametrize(
    ("column", "value", "empty"),
    [
        ("system", "s", ""),
        ("system_prompt", "s", None),
        ("tools", [TOOL], []),
        ("tools", json.dumps([TOOL]), "[]"),
        ("template_arguments", {"a": 1}, {"a": None}),
        ("chat_template_kwargs", '{"a": 1}', "{}"),
    ],
)
def test_what_only_a_template_heeds_is_refused_beside_raw_text(column, value, empty):
    for run in (sft, prompt, pair):
        message = refused(run, TEXTS | {column: value})
        assert f"as it stands, without its {column}: set apply_template: true" in message
        assert run(TEXTS | {column: empty}) and run(TEXTS | {column: value}, apply_template=True)


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([TOOL], [TOOL]),
        (json.dumps([TOOL]), [TOOL]),
        ([json.dumps(TOOL)], [TOOL]),
        ([TOOL["function"]], [TOOL]),
        ([{"function": TOOL["function"]}], [TOOL]),
        ([{"type": "function", **TOOL["function"]}], [TOOL]),
        ([{"name": "f", "description": None, "parameters": {"properties": {"x": None}}}], "empty"),
        (None, [TOOL, TOOL]),  # the recipe's
        ("", [TOOL, TOOL]),
        ([], None),
        ("[]", None),
    ],
)
def test_tools_of_a_row_or_of_the_recipe(tmp_path, tools, expected):
    if expected == "empty":
        function = {"name": "f", "parameters": {"properties": {}}}
        expected = [{"type": "function", "function": function}]
    file = tmp_path / "tools.json"
    file.write_text(json.dumps([TOOL, TOOL["function"]]))
    row = {"messages": [user(), bot()], "tools": tools}
    assert sft(row, tools=str(file)).tools == expected
    if expected != [TOOL, TOOL]:
        assert sft(row).tools == expected
    assert prompt({"prompt": [user()], "tools": tools}, tools=str(file)).tools == expected


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ("f", "tools must be a list of tools, or one as JSON text, not other text"),
        ({"name": "f"}, "tools must be a list of tools, or one as JSON text, not dict"),
        ([{"type": "function"}], "tools: tool 1 must be {type: function, function: {name, ...}}"),
        ([TOOL, {"type": "web_search"}], "tools: tool 2 must be {type: function"),
        (["f"], "tools: tool 1 must be"),
    ],
)
def test_other_tools_are_refused(tmp_path, tools, said):
    row = {"messages": [user(), bot()], "tools": tools}
    message = refused(sft, row)
    assert said in message and message.endswith('if it is no tools, set `columns: {tools: ""}`')
    assert sft(row, columns={"tools": ""}).tools is None
    file = tmp_path / "tools.json"
    file.write_text(tools if isinstance(tools, str) else json.dumps(tools))
    message = refused(sft, {"messages": [user(), bot()]}, tools=str(file))
    assert message.startswith(f"tools: {file}") and said.removeprefix("tools") in message


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_file_of_tools_that_cannot_be_read(tmp_path, content):
    file = tmp_path / "tools.json"
    if content is not None:
        file.write_bytes(content)
    message = refused(sft, {"messages": [user(), bot()]}, tools=str(file))
    assert message.startswith(f"tools: {file}: cannot be read: ")


@pytest.mark.parametrize("column", ["template_arguments", "chat_template_kwargs"])
def test_arguments_of_the_template_from_recipe_and_row(column):
    recipe = {"template_arguments": {"enable_thinking": True, "a": 1}}
    for value in ({"enable_thinking": False, "b": None}, '{"enable_thinking": false}'):
        said = prompt({"prompt": [user()], column: value}, **recipe)
        assert said.arguments == {"enable_thinking": False, "a": 1}
    for value in (None, ""):
        assert prompt({"prompt": [user()], column: value}).arguments == {}
    message = refused(prompt, {"prompt": [user()], column: 3})
    assert message == f"{column} must be an object, or one as JSON text, not int"


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "keys", "expected"),
    [
        ("q", {}, "q"),
        ("[1] is a list", {}, "[1] is a list"),
        ("[1, 2]", {}, "[1, 2]"),
        ("[[[" * 9999, {}, "[[[" * 9999),
        ("q", {"apply_template": True}, Conversation([user()])),
        ([system(), user()], {}, Conversation([system(), user()])),
        ([from_("human", "q")], {"apply_template": True}, Conversation([user()])),
        (json.dumps([user()]), {}, Conversation([user()])),
        (user(), {}, Conversation([user()])),
        ([user(), bot()], {"trailing_assistant": "continue"}, Conversation([user(), bot()])),
        ([user(), bot(), bot()], {"trailing_assistant": "strip"}, Conversation([user()])),
        ([user()], {"trailing_assistant": "strip"}, Conversation([user()])),
    ],
)
def test_prompts(value, keys, expected):
    assert prompt({"prompt": value}, **keys) == expected


@pytest.mark.parametrize(
    ("value", "keys", "said"),
    [
        ("", {}, "the prompt is empty"),
        (None, {}, "a prompt must be text, or a list of messages with role and content"),
        (3, {}, "a prompt must be text, or a list of messages with role and content"),
        ([], {}, "a prompt must be text, or a list of messages with role and content"),
        ([{"text": "q"}], {}, "a prompt must be text, or a list of messages with role and content"),
        (["q"], {}, "a prompt must be text, or a list of messages with role and content"),
        (str([user()]), {}, "prompt is a conversation as Python prints it"),
        ([user(), bot()], {}, "prompt ends with a turn of the assistant's: set trailing_assistant"),
        ([bot()], {"trailing_assistant": "strip"}, "prompt has turns of the assistant's alone"),
        ("q", {"system_prompt": "s"}, "without system_prompt: set apply_template: true to render"),
        ("q", {"template_arguments": {"a": 1}}, "without template_arguments: set apply_template"),
        ("q", {"tools": "tools.json"}, "without tools: set apply_template: true"),
    ],
)
def test_other_prompts_are_refused(value, keys, said):
    assert said in refused(prompt, {"prompt": value}, **keys)


# --- SFT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "keys", "expected"),
    [
        ({"prompt": "q", "response": "a"}, {}, ("q", "a")),
        ({"prompt": "q", "completion": "q a"}, {}, ("q", "q a")),
        ({"prompt": "q", "response": "[]"}, {}, ("q", "[]")),
        ({"prompt": "q", "response": "a"}, {"apply_template": True}, [user(), "|", bot()]),
        ({"prompt": [user()], "response": "a"}, {}, [user(), "|", bot()]),
        ({"prompt": "q", "completion": [bot()]}, {}, [user(), "|", bot()]),
        ({"prompt": [user()], "completion": [bot()]}, {}, [user(), "|", bot()]),
        ({"prompt": json.dumps([user()]), "response": json.dumps([bot()])}, {}, "as above"),
        ({"prompt": "q", "response": bot()}, {}, [user(), "|", bot()]),
        ({"prompt": [user()], "response": [user(), bot()]}, {}, [user(), "|", bot()]),
        ({"prompt": " q\n", "response": [user(), bot()]}, {}, [user(), "|", bot()]),
        *(
            ({"prompt": before, "response": response}, {}, [system(), user(), "|", bot()])
            for before, response in [
                ([user()], [system(), user(), bot()]),
                ("q", [system(), user(), bot()]),
                ([system(), user()], [user(), bot()]),
                ([system(), user()], [system(), user(), bot()]),
                ([system(), user()], [bot()]),
            ]
        ),
        (
            {"prompt": [system()], "response": [user(), bot()]},
            {},
            [system(), "|", user(), bot()],
        ),
        (  # the last question
            {"prompt": "r", "response": [system(), user(), bot(), user("r"), bot("b")]},
            {},
            [system(), user(), bot(), user("r"), "|", bot("b")],
        ),
        (
            {"prompt": [user(), bot(), user("r")], "response": [user(), bot(), user("r"), bot()]},
            {},
            [user(), bot(), user("r"), "|", bot()],
        ),
        (
            {"prompt": [user(), bot()], "response": [user("r"), bot("b")]},
            {},
            [user(), bot(), "|", user("r"), bot("b")],
        ),
        (
            {"prompt": [user(), CALLED], "response": [say("tool", "1"), bot()]},
            {},
            [user(), CALLED, "|", say("tool", "1"), bot()],
        ),
        (
            {"prompt": [user(), bot(), user("r")], "response": "b"},
            {"system_prompt": "s"},
            [system(), user(), bot(), user("r"), "|", bot("b")],
        ),
        (
            {"prompt": "q", "response": [bot(), user("r"), bot("b")]},
            {},
            [user(), "|", bot(), user("r"), bot("b")],
        ),
    ],
)
def test_prompt_and_response(row, keys, expected):
    if isinstance(expected, tuple):
        assert sft(row, **keys) == expected
        return
    turns = [user(), "|", bot()] if expected == "as above" else expected
    part = turns.index("|")
    learned = (False,) * part + (True,) * (len(turns) - part - 1)
    turns = [turn for turn in turns if turn != "|"]
    assert sft(row, **keys) == Conversation(turns, learned=learned)


def test_weights_inside_a_response():
    response = [user(), {**bot(), "weight": 0}, user("r"), bot("b")]
    said = sft({"prompt": [user()], "response": response})
    assert said.learned == (False, False, True, True) and len(said.messages) == 4


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q", "response": ""}, "response is empty: there is no answer to learn"),
        ({"prompt": "q", "completion": []}, "completion is empty: there is no answer to learn"),
        ({"prompt": "q", "response": [bot("")]}, "turn 1 (assistant) is empty: there is no answer"),
        (
            {"prompt": "q", "response": None},
            "response must be text, or a list of messages, not null or missing",
        ),
        ({"prompt": "q", "response": 3}, "response must be text, or a list of messages, not int"),
        ({"prompt": "q", "response": ["a"]}, "or a list of messages, not a list with text"),
        ({"prompt": "", "response": "a"}, "the prompt is empty"),
        ({"prompt": None, "response": "a"}, "a prompt must be text"),
        ({"prompt": [user()], "response": [user("r")]}, "response has no turn of the assistant's"),
        (
            {"prompt": [user()], "response": [user("r"), bot()]},
            "response begins with other turns than prompt, before an answer of the assistant's (u",
        ),
        (
            {"prompt": [system("t"), user()], "response": [system(), user(), bot()]},
            "(system, user): it must answer or repeat the prompt",
        ),
        ({"prompt": [user(), bot()], "response": [system(), user("r"), bot()]}, "(system, user)"),
        ({"prompt": [user(), bot()], "response": [user(), bot()]}, "it must answer or repeat the"),
        ({"prompt": [user(), bot()], "response": "b"}, "prompt ends with a turn of the assistant"),
    ],
)
def test_other_demonstrations_are_refused(row, said):
    assert said in refused(sft, row)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n\nHuman: q\n\nAssistant:", [user()]),
        ("User: q\nAssistant: a\nUser: r\nAssistant: ", [user(), bot(), user("r")]),
        ("USER: q ASSISTANT:", [user()]),
        ("### Instruction:\nq\n\n### Response:\n", [user()]),
        ("Human: q", None),
        ("Human: q\n\nAssistant: a", None),
        ("Say Human: q\n\nAssistant:", None),
        ("System: s\nHuman: q\nAssistant:", None),
        ("Assistant:", None),
    ],
)
def test_a_transcript_as_a_prompt_becomes_turns(text, expected):
    row = {"prompt": text, "response": " b", "chosen": " b", "rejected": "c"}
    turns_ = expected or [user(text)]
    keys = {"apply_template": True}
    assert prompt(row, **keys).messages == turns_
    answer = bot("b" if expected else " b")
    assert sft(row, **keys).messages == [*turns_, answer]
    assert turns(pair(row, **keys)) == (turns_, [answer], [bot("c")])
    assert (prompt(row), sft(row), pair(row).prompt) == (text, (text, " b"), text)
    messages = row | {"chosen": [bot("b")], "rejected": [bot("c")], "response": [bot("b")]}
    assert turns(pair(messages)) == (turns_, [bot("b")], [bot("c")])
    assert sft(messages).messages == [*turns_, bot("b")]


def test_an_empty_answer_of_a_transcript_is_a_turn():
    said = pair({"chosen": HH + " b", "rejected": HH + " "}, apply_template=True)
    assert said.rejected == [bot("")]


def test_labelled_answers_are_refused_unless_chosen():
    row = {"prompt": "q", "completion": "a", "label": False}
    assert "`where: {label: true}` reads the good ones" in refused(sft, row)
    assert "label is true or false" in refused(sft, {**row, "completion": [bot()], "label": True})
    assert sft(row, where={"label": [True, False]}) == ("q", "a")
    assert sft({**row, "label": 1}) == ("q", "a") and sft({**row, "label": None})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([{"speaker": "x", "text": "q"}], "not a list with an object of speaker and text"),
        ([user(), {"text": "q"}], "not a list with an object of text"),
        (["q"], "not a list with text"),
        ([None], "not a list with null or missing"),
        ({"text": "q"}, "not an object of text"),
        (None, "not null or missing"),
        (True, "not true or false"),
    ],
)
def test_what_there_is_in_place_of_messages_is_said(value, said):
    messages = "a list of messages with role and content (or from and value), "
    assert refused(sft, {"messages": value}) == f"messages must be {messages}{said}"
    assert refused(prompt, {"prompt": value}) == f"a prompt must be text, or {messages}{said}"
    row = {"prompt": "q", "response": value}
    assert refused(sft, row) == f"response must be text, or a list of messages, {said}"


# --- pairs ----------------------------------------------------------------------------------------


def texts(preference):
    return preference.prompt, preference.chosen, preference.rejected


def turns(preference):
    return preference.prompt.messages, preference.chosen, preference.rejected


def test_pairs_of_texts():
    row = {"prompt": "q", "chosen": "a", "rejected": "", "m": 1.5}
    said = pair(row, columns={"margin": "m"})
    assert (*texts(said), said.margin, said.notice) == ("q", "a", "", 1.5, "")
    assert turns(pair(row, apply_template=True)) == ([user()], [bot()], [bot("")])
    for margin in (None, "1", float("nan")):
        message = refused(pair, {**row, "m": margin}, columns={"margin": "m"})
        assert message.startswith("m must be a number, not ")


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Why? Because.", "Why? No.", (" Because.", " No.")),
        ("Why?\nBecause.", "Why?\nNo.", ("\nBecause.", "\nNo.")),
        ("Why? Because.", "No.", None),
        ("Because.", "Why? No.", None),
    ],
)
def test_a_prompt_repeated_inside_both_answers_is_taken_off(chosen, rejected, expected):
    row = {"prompt": "Why?", "chosen": chosen, "rejected": rejected}
    said = pair(row)
    assert texts(said) == ("Why?", *(expected or (chosen, rejected)))
    assert said.notice == (REPEATED if expected else "")
    if expected:
        assert turns(pair(row, apply_template=True)) == (
            [user("Why?")],
            [bot("Because.")],
            [bot("No.")],
        )


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Hi", "Hill", "Hippo"),
        ("Hi", "Hi", "Hi there"),
        ("Hi ", "Hi ", "Hi there"),
        ("Hello", "Hello! I am fine", "Hello, what?"),
        ("1", "1, 2, 3", "1. no"),
    ],
)
def test_how_an_answer_itself_begins_is_not_taken_off(prompt, chosen, rejected):
    said = pair({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert texts(said) == (prompt, chosen, rejected) and not said.notice


@pytest.mark.parametrize(
    ("prompt", "between"),
    [("1+1=", ""), ("1+1=", " "), ("1+1:", ""), ("1+1\n", ""), ("<user>1+1<bot>", "")],
)
def test_a_prompt_that_leads_to_an_answer_is_taken_off(prompt, between):
    row = {"prompt": prompt, "chosen": f"{prompt}{between}2", "rejected": f"{prompt}{between}3"}
    said = pair(row)
    assert texts(said) == (prompt, f"{between}2", f"{between}3") and said.notice == REPEATED


@pytest.mark.parametrize(
    ("chosen", "rejected", "notice"),
    [
        ("{} Because.", "No.", LEFT),
        ("No.", "\n{}", LEFT),
        ("{}Because.", "{} No.", LEFT),
        ("Why is the sky", "No.", ""),
    ],
)
def test_a_long_prompt_that_is_left_inside_an_answer_is_noticed(chosen, rejected, notice):
    asked = "Why is the sky blue at noon?"
    row = {"prompt": asked, "chosen": chosen.format(asked), "rejected": rejected.format(asked)}
    said = pair(row)
    assert (*texts(said), said.notice) == (*row.values(), notice)


def test_an_answer_keeps_its_first_spaces_where_a_template_renders_it():
    row = {"prompt": "q", "chosen": "    return 1", "rejected": "\nreturn 2"}
    expected = ([user()], [bot("    return 1")], [bot("\nreturn 2")])
    assert turns(pair(row, apply_template=True)) == expected


HH = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"


@pytest.mark.parametrize(
    ("begin", "chosen", "rejected"),
    [
        (HH, " b", " c"),
        (HH, " both begin alike", " both begin so"),
        (HH, " same", " same"),
        (HH, " b", " b\n\nHuman: more\n\nAssistant: c"),
        (HH, "", " c"),
        ("User: q\nAssistant:", " b", " c"),
        ("Assistant:", " b", " c"),
        ("A chat. USER: q ASSISTANT:", " b</s>", " c</s>"),
        ("### Human: q\n### Assistant:", " b", " c"),
        ("### Instruction:\nq\n\n### Response:\n", "b", "c"),
        ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "b<|im_end|>", "c<|im_end|>"),
        ("<|user|>\nq</s>\n<|assistant|>\n", "b", "c"),
        ("<s>[INST] q [/INST]", " b</s>", " c</s>"),
        ("<start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n", "b", "c"),
        (
            "<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "b",
            "c",
        ),
    ],
)
def test_transcripts_part_where_the_assistant_begins_to_speak(begin, chosen, rejected):
    said = pair({"chosen": begin + chosen, "rejected": begin + rejected})
    assert texts(said) == (begin, chosen, rejected) and not said.notice


@pytest.mark.parametrize("column", [{}, {"prompt": "r"}, {"prompt": HH}])
def test_transcripts_become_turns_where_a_template_renders_them(column):
    chosen = " b\n\nHuman: x\n\nAssistant: y"
    row = {**column, "chosen": HH + chosen, "rejected": HH + " c"}
    assert turns(pair(row, apply_template=True)) == (
        [user(), bot(), user("r")],
        [bot("b"), user("x"), bot("y")],
        [bot("c")],
    )
    row = {"chosen": "USER: q ASSISTANT: b", "rejected": "USER: q ASSISTANT: c"}
    assert turns(pair(row, apply_template=True)) == ([user()], [bot("b")], [bot("c")])


@pytest.mark.parametrize("prompt", ["r", HH])
def test_transcripts_that_hold_the_prompt_are_not_doubled(prompt):
    said = pair({"prompt": prompt, "chosen": HH + " b", "rejected": HH + " c"})
    assert texts(said) == (HH, " b", " c") and "taken off" in said.notice


@pytest.mark.parametrize(
    ("begin", "keys", "said"),
    [
        (
            "The sky is",
            {},
            "chosen and rejected have no prompt: there is no column of it, and both",
        ),
        ("Human: q\n\n", {}, "such as `Assistant:` on a line of its own, `### Response:` or"),
        ("<|im_start|>assistant\n", {"apply_template": True}, "apply_template reads transcripts"),
        ("Be kind. USER: q ASSISTANT:", {"apply_template": True}, "this one begins otherwise"),
        (HH, {"system_prompt": "s"}, "without system_prompt: set apply_template: true"),
    ],
)
def test_texts_without_a_prompt_are_refused(begin, keys, said):
    assert said in refused(pair, {"chosen": begin + " b", "rejected": begin + " c"}, **keys)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chosen": [user(), bot()], "rejected": [user(), bot("b")]}, "q a b"),
        ({"prompt": "q", "chosen": [user(), bot()], "rejected": [user(), bot("b")]}, "q a b"),
        ({"prompt": " q\n", "chosen": [user(), bot()], "rejected": [user(), bot("b")]}, "q a b"),
        ({"prompt": None, "chosen": [user(), bot()], "rejected": [user(), bot("b")]}, "q a b"),
        ({"prompt": [user()], "chosen": [user(), bot()], "rejected": [user(), bot("b")]}, "q a b"),
        ({"prompt": [user()], "chosen": [bot()], "rejected": [bot("b")]}, "q a b"),
        ({"prompt": "q", "chosen": [bot()], "rejected": [bot("b")]}, "q a b"),
        ({"prompt": "q", "chosen": bot(), "rejected": from_("gpt", "b")}, "q a b"),
        ({"prompt": [user()], "chosen": "a", "rejected": "b"}, "q a b"),
        ({"prompt": json.dumps([user()]), "chosen": "a", "rejected": "b"}, "q a b"),
        ({"prompt": "q", "chosen": "a", "rejected": [bot("b")]}, "q a b"),
        (
            {
                "chosen": json.dumps([user(), bot()]),
                "rejected": [from_("human", "q"), from_("gpt", "b")],
            },
            "q a b",
        ),
        (  # a rating is nothing that is said
            {
                "chosen": [{**user(), "id": 1}, {**bot(), "score": 5}],
                "rejected": [{**user(), "id": 2}, {**bot("b"), "score": 1}],
            },
            ([{**user(), "id": 1}], [{**bot(), "score": 5}], [{**bot("b"), "score": 1}]),
        ),
        (
            {
                "prompt": "r",
                "chosen": [system(), user(), bot(), user("r"), bot("c")],
                "rejected": [system(), user(), bot(), user("r"), bot("d")],
            },
            ([system(), user(), bot(), user("r")], [bot("c")], [bot("d")]),
        ),
        (
            {
                "prompt": [system(), user()],
                "chosen": [user(), bot()],
                "rejected": [user(), bot("b")],
            },
            ([system(), user()], [bot()], [bot("b")]),
        ),
        (
            {
                "prompt": [user()],
                "chosen": [system(), user(), bot()],
                "rejected": [system(), user(), bot("b")],
            },
            ([system(), user()], [bot()], [bot("b")]),
        ),
        (
            {
                "prompt": [user()],
                "chosen": [user(), CALLED, say("tool", "1"), bot()],
                "rejected": [user(), CALLED, say("tool", "1"), bot("b")],
            },
            ([user(), CALLED, say("tool", "1")], [bot()], [bot("b")]),
        ),
        (
            {"chosen": [user(), CALLED, say("tool", "1"), bot()], "rejected": [user(), bot("b")]},
            ([user()], [CALLED, say("tool", "1"), bot()], [bot("b")]),
        ),
        (
            {"chosen": [user(), bot(), bot("c")], "rejected": [user(), bot(), bot("d")]},
            ([user()], [bot(), bot("c")], [bot(), bot("d")]),
        ),
        ({"chosen": [user(), bot()], "rejected": [user(), bot()]}, "q a a"),
        (
            {"chosen": [user(), bot()], "rejected": [user(), bot(), user("r"), bot("b")]},
            ([user()], [bot()], [bot(), user("r"), bot("b")]),
        ),
    ],
)
def test_pairs_of_messages(row, expected):
    if isinstance(expected, str):
        asked, better, worse = expected.split()
        expected = ([user(asked)], [bot(better)], [bot(worse)])
    said = pair(row)
    assert turns(said) == expected and not said.notice


def test_tools_and_arguments_of_pairs():
    row = {"chosen": [user(), bot()], "rejected": [user(), bot("b")], "tools": [TOOL]}
    said = pair(row, template_arguments={"a": 1}).prompt
    assert said == Conversation([user()], [TOOL], {"a": 1})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "x", "chosen": [user(), bot()], "rejected": [user(), bot("b")]},
            "prompt is not how chosen and rejected begin",
        ),
        (
            {
                "prompt": [system("t"), user()],
                "chosen": [system(), user(), bot()],
                "rejected": [system(), user(), bot("b")],
            },
            "prompt is not how chosen and rejected begin",
        ),
        ({"chosen": [bot()], "rejected": [bot("b")]}, "no turn in common before an answer, and no"),
        (
            {"chosen": [user(), bot()], "rejected": [user("x"), bot()]},
            "chosen and rejected part at turn 1, before an answer of the assistant's (user)",
        ),
        (
            {
                "chosen": [user(), bot(), user("r"), bot("c")],
                "rejected": [user(), bot(), user("x"), bot("d")],
            },
            "chosen and rejected part at turn 3, before an answer",
        ),
        (
            {"chosen": [user(), bot()], "rejected": [user()]},
            "rejected must end with a turn of the assistant's",
        ),
        (
            {"chosen": [], "rejected": [user(), bot()]},
            "chosen must end with a turn of the assistant's",
        ),
        (
            {"prompt": [user(), bot()], "chosen": "c", "rejected": "d"},
            "prompt ends with a turn of the assistant's, and the answer would be a second one",
        ),
        (
            {"prompt": "q", "chosen": None, "rejected": "b"},
            "chosen must be text, or a list of messages, not null or missing",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": None},
            "rejected must be text, or a list of messages, not null or missing",
        ),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "the prompt is empty"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "a prompt must be text"),
        (
            {"chosen": [user(), say("assistant", None)], "rejected": [user(), bot()]},
            "chosen: turn 2 (assistant) has no content",
        ),
    ],
)
def test_other_pairs_are_refused(row, said):
    assert said in refused(pair, row)
