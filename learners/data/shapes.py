"""The shapes that data come in: which columns are read, and what a row says in canonical form.

Errors of a row begin with the column's name; its place is put in front by whoever reads it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from learners.data.conversation import Conversation, Preference, Said
from learners.data.messages import (
    Turn,
    are_messages,
    at_end,
    chat_in,
    description,
    in_yaml,
    read_messages,
    said_by,
)
from learners.data.pairs import (
    part_response,
    part_texts,
    part_turns,
    refuse_second_answer,
    turns_of_texts,
)
from learners.data.tools import read_object, read_tools, tools_in, without_nulls
from learners.data.transcripts import answer_turns, asks, turns_of
from learners.errors import DataError
from learners.settings import DataSettings, PairData, PromptData, SFTData

Row = Mapping[str, Any]
Names = Mapping[str, str]  # of the data's columns, by what they mean

CHATS = ("messages", "conversations", "conversation")
BESIDE = ("system", "template_arguments", "tools")  # of some rows; only a template can heed them
DEFAULTS = {
    "messages": CHATS,
    "prompt": ("prompt",),
    "response": ("response", "completion"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "system": ("system", "system_prompt"),
    "tools": ("tools",),
    "template_arguments": ("template_arguments", "chat_template_kwargs"),
}
# by other names in data that people have
OFTEN = {
    "messages": ("dialogue", "dialog", "turns", "chat"),
    "prompt": ("question", "instruction", "query", "problem", "input"),
    "response": ("answer", "output", "solution", "target"),
    "chosen": ("preferred", "better", "accepted"),
    "rejected": ("dispreferred", "worse", "refused"),
}
MEDIA = ("image", "images", "audio", "audios", "video", "videos")


# --- columns --------------------------------------------------------------------------------------


def recognised(data: PromptData | SFTData | PairData, columns: Sequence[str]) -> dict[str, str]:
    """Return the columns that are read, by what they mean: `messages`, or `prompt` and `response`
    (SFT); `chosen`, `rejected` and perhaps `prompt` and `margin` (pairs); `prompt` (RL); `system`,
    `tools`, `template_arguments` where there are such.

    Raises DataError when columns that the recipe names are missing, or when it would have to be
    guessed what is meant.
    """
    named = {name: column for name, column in data.columns if column is not None}
    answers = data.answer_columns if isinstance(data, PromptData) else ()
    wanted = (*filter(None, named.values()), *answers)
    if missing := [name for name in wanted if name not in columns]:
        close = difflib.get_close_matches(missing[0], columns, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(f"{data.path}: columns {missing} missing; it has {list(columns)}{hint}")
    others = [column for column in columns if column not in named.values()]
    there = {name: _default(name, others) for name in DEFAULTS} | named
    found = {name: column for name, column in there.items() if column}
    if isinstance(data, PromptData):
        found.setdefault("prompt", found.get("messages", ""))
        needed = ["prompt"]
    elif isinstance(data, PairData):
        needed = ["chosen", "rejected"]
    else:
        needed = _of_sft(data, found, named)
    if lacking := [name for name in needed if not found.get(name)]:
        raise DataError(f"{data.path}: {_unrecognised(data, lacking, columns)}")
    beside = ["prompt", "margin"] if isinstance(data, PairData) else []
    return {name: found[name] for name in (*needed, *BESIDE, *beside) if name in found}


def check_late(data: PromptData | SFTData | PairData, columns: Sequence[str], row: Row) -> None:
    """Raise DataError on a value that would be read if one of the first rows had its column: a row
    has all `columns` of the data, and perhaps more.
    """
    if len(row) == len(columns):
        return
    late = [name for name in row if name not in columns and row[name] is not None]
    for name in late and recognised(data, [*columns, *late]).values():
        if name in late:
            raise DataError(
                f"{name} is a column that none of the first rows has: write it in the first row "
                "too, null if it is empty there"
            )


def _default(name: str, columns: Sequence[str]) -> str:
    return next((column for column in DEFAULTS[name] if column in columns), "")


def _of_sft(data: DataSettings, found: Names, named: Names) -> list[str]:
    """Return what is read for SFT: conversations, or prompts and responses."""
    as_chat = ["messages"]
    as_pair = ["prompt", "response"]
    asked = [shape for shape in (as_chat, as_pair) if any(name in named for name in shape)]
    whole = [shape for shape in (as_chat, as_pair) if all(name in found for name in shape)]
    possible = asked or whole or [as_pair]
    if len(possible) > 1:
        pair = _mapping({name: found.get(name, name) for name in as_pair})
        raise DataError(
            f"{data.path}: conversations and answers in one: name those to read, "
            f"`columns: {_mapping({'messages': found['messages']})}` or `columns: {pair}`"
        )
    return possible[0]


def _unrecognised(data: DataSettings, lacking: Sequence[str], columns: Sequence[str]) -> str:
    """Return the columns there are, those that are read, and how to name others."""
    wanted = "messages (or conversations), or prompt with response (or completion)"
    if isinstance(data, PromptData):
        wanted = "prompt (or messages)"
    elif isinstance(data, PairData):
        wanted = "chosen with rejected, and perhaps prompt"
    example = {"prompt": "question", "response": "answer", "chosen": "better", "rejected": "worse"}
    close = _like(lacking, columns)
    if not close and isinstance(data, SFTData):
        close = _like(["messages"], columns)
    hint = "perhaps" if close else "as in"
    shown = _mapping(close or {name: example[name] for name in lacking})
    unread = [column for column in columns if column.lower() == "input"]
    alpaca = unread and close.get("prompt", "").lower() == "instruction"
    return (
        f"it has the columns {list(columns)}, and is read by {wanted}: name others, {hint} "
        f"`columns: {shown}`{f' ({unread[0]} would stay unread)' if alpaca else ''}"
    )


def _mapping(pairs: Names) -> str:
    """Return names and columns as a recipe writes them."""
    return f"{{{', '.join(f'{name}: {in_yaml(column)}' for name, column in pairs.items())}}}"


def _like(names: Sequence[str], columns: Sequence[str]) -> dict[str, str]:
    """Return the columns that may be meant by names, where any looks like it."""
    found = {name: _close(name, columns) for name in names}
    return {name: column for name, column in found.items() if column}


def _close(name: str, columns: Sequence[str]) -> str:
    """Return the column that may be meant by a name; nothing where none looks like it."""
    lower = {column.lower(): column for column in reversed(columns)}
    for known in (*DEFAULTS[name], *OFTEN[name]):
        if known in lower:
            return lower[known]
    close = difflib.get_close_matches(name, lower, 1)
    return lower[close[0]] if close else ""


# --- prompts --------------------------------------------------------------------------------------


def prompt_of(data: PromptData, row: Row, names: Names) -> Said:
    """Return a prompt, as text unless it is messages or the template is to render it. Raises
    DataError on anything else, and on a last turn of the assistant's unless the recipe says what to
    do with it.
    """
    said = _prompt(data, names["prompt"], row[names["prompt"]])
    if isinstance(said, str):
        if not data.apply_template:
            return _as_text(data, row, names, said)
        said = _turns(said)
    if said[-1]["role"] == "assistant" and data.trailing_assistant != "continue":
        if data.trailing_assistant == "refuse":
            raise DataError(
                f"{names['prompt']} ends with a turn of the assistant's: set trailing_assistant: "
                "strip or continue"
            )
        said = said[: len(said) - at_end(said, "assistant")]
        if not said:
            raise DataError(f"{names['prompt']} has turns of the assistant's alone: none is left")
    return _conversation(data, row, names, said)


def _prompt(data: DataSettings, column: str, value: Any) -> str | list[Turn]:
    """Return a prompt's text, or its turns."""
    chat = chat_in(column, value)
    if chat is not None and are_messages(chat):
        return read_messages(column, chat, data.roles)[0]
    if not isinstance(value, str):
        raise DataError(
            "a prompt must be text, or a list of messages with role and content (or from and "
            f"value), not {description(value)}"
        )
    if not value:
        raise DataError("the prompt is empty")
    return value


def _turns(text: str) -> list[Turn]:
    """Return the turns of a transcript up to where the assistant is to speak; other text is one of
    the user's.
    """
    return turns_of(text) if asks(text) else [said_by("user", text)]


def _as_text(data: DataSettings, row: Row, names: Names, text: str) -> str:
    """Return a text that no template renders. Raises DataError on keys and columns that only a
    template could heed.
    """
    keys = ("system_prompt", "template_arguments", "tools")
    asked = [(key, "leave that key out") for key in keys if getattr(data, key) not in (None, {})]
    columns = [names[name] for name in BESIDE if name in names]
    asked += [(f"its {c}", "take that column out") for c in columns if _holds(row.get(c))]
    if asked:
        name, otherwise = asked[0]
        raise DataError(
            f"the prompt is text that is read as it stands, without {name}: set "
            f"apply_template: true to render it, or {otherwise}"
        )
    _refuse_media(row, names)
    return text


def _conversation(
    data: DataSettings,
    row: Row,
    names: Names,
    turns: list[Turn],
    learned: tuple[bool, ...] | None = None,
) -> Conversation:
    """Return turns with what else the row and the recipe say for the template."""
    _refuse_media(row, names)
    system = _system(data, row, names)
    if system is not None and all(turn["role"] != "system" for turn in turns):
        turns = [said_by("system", system), *turns]
        learned = learned and (False, *learned)
    arguments = dict(data.template_arguments)
    if column := names.get("template_arguments"):
        arguments |= read_object(column, without_nulls(row.get(column)))
    return Conversation(turns, _tools(data, row, names), arguments, learned)


def _system(data: DataSettings, row: Row, names: Names) -> str | None:
    """Return the system message of a row or, where it has none, the recipe's."""
    value = row.get(names["system"]) if "system" in names else None
    if value is None or value == "":
        return data.system_prompt
    if not isinstance(value, str):
        raise DataError(f"{names['system']} must be text, not {description(value)}")
    return value


def _tools(data: DataSettings, row: Row, names: Names) -> list[Any] | None:
    """Return the tools of a row or, where it says nothing of any, the recipe's."""
    value = row.get(names["tools"]) if "tools" in names else None
    if value is not None and value != "":
        try:
            return read_tools(names["tools"], value) or None
        except DataError as error:
            raise DataError(f'{error}; if it is no tools, set `columns: {{tools: ""}}`') from None
    return tools_in(data.tools) if data.tools is not None else None


def _refuse_media(row: Row, names: Names) -> None:
    """Raise DataError where something else than text belongs to a row."""
    for column in MEDIA:
        if column not in names.values() and _holds(row.get(column)):
            raise DataError(f"{column} is not empty: only text can be read")


def _holds(value: Any) -> bool:
    """Tell whether a value is more than nulls, false, and empty lists, objects and texts."""
    if isinstance(value, list):
        return any(map(_holds, value))
    if isinstance(value, dict):
        return any(map(_holds, value.values()))
    return value not in (None, False, "", "[]", "{}")


# --- SFT ------------------------------------------------------------------------------------------


def demonstration_of(data: SFTData, row: Row, names: Names) -> tuple[str, str] | Conversation:
    """Return a prompt and the answer to learn, as text that is read as it stands, or a conversation
    with turns to learn. Raises DataError where there is no answer.
    """
    if "messages" in names:
        return _whole_conversation(data, row, names)
    _refuse_labels(data, row, names)
    prompt = _prompt(data, names["prompt"], row[names["prompt"]])
    column = names["response"]
    answer = _answer(data, column, row[column])
    if not answer:
        raise DataError(f"{column} is empty: there is no answer to learn")
    if isinstance(prompt, str) and isinstance(answer, str) and not data.apply_template:
        return _as_text(data, row, names, prompt), answer
    before = _turns(prompt) if isinstance(prompt, str) else prompt
    learned = None
    if isinstance(answer, str):
        after = answer_turns(answer, isinstance(prompt, str) and asks(prompt))
    else:
        after, learned = read_messages(column, answer, data.roles)
    learned = learned or (True,) * len(after)
    before, repeated = part_response(names, before, after)
    after = after[repeated:]
    learned = learned[repeated:]
    refuse_second_answer(names["prompt"], before, after)
    _check_learned(data, column, after, learned)
    return _conversation(data, row, names, before + after, (False,) * len(before) + learned)


def _refuse_labels(data: SFTData, row: Row, names: Names) -> None:
    """Raise DataError on answers of which some are labelled as bad, unless the recipe has chosen
    among them.
    """
    used = (*data.where, *names.values())
    if isinstance(row.get("label"), bool) and "label" not in used:
        raise DataError(
            "label is true or false, and bad answers would be learned too: "
            "`where: {label: true}` reads the good ones (`[true, false]`: all)"
        )


def _whole_conversation(data: SFTData, row: Row, names: Names) -> Conversation:
    column = names["messages"]
    chat = chat_in(column, row[column])
    if chat == []:
        raise DataError(f"{column} is empty: there is no answer to learn")
    if chat is None or not are_messages(chat):
        raise DataError(
            f"{column} must be a list of messages with role and content (or from and value), "
            f"not {description(chat or row[column])}"
        )
    turns, learned = read_messages(column, chat, data.roles)
    _check_learned(data, column, turns, learned or (True,) * len(turns))
    return _conversation(data, row, names, turns, learned)


def _answer(data: DataSettings, column: str, value: Any) -> str | list[Any]:
    """Return an answer's text, or its messages."""
    chat = chat_in(column, value)
    if chat is not None and (chat == [] or are_messages(chat)):
        return chat
    if not isinstance(value, str):
        raise DataError(f"{column} must be text, or a list of messages, not {description(value)}")
    return value


def _check_learned(
    data: SFTData, column: str, turns: Sequence[Turn], learned: tuple[bool, ...]
) -> None:
    """Raise DataError unless there is a turn to learn, and none to learn is empty."""
    both = enumerate(zip(turns, learned, strict=True), 1)
    answers = [(i, turn) for i, (turn, it) in both if it and turn["role"] == "assistant"]
    if not answers:
        raise DataError(f"{column} has no turn of the assistant's to learn")
    for number, turn in answers[-1:] if data.train_on == "last" else answers:
        if not turn["content"] and "tool_calls" not in turn:
            raise DataError(
                f"{column}: turn {number} (assistant) is empty: there is no answer to learn"
            )


# --- pairs ----------------------------------------------------------------------------------------


def preference_of(data: PairData, row: Row, names: Names) -> Preference:
    """Return a prompt and two answers. The prompt is a column (null in a row without), or how both
    answers begin: the turns or, in transcripts, the text in common. Raises DataError on others.
    """
    column = names.get("prompt", "")
    value = row[column] if column else None
    prompt = None if value is None else _prompt(data, column, value)
    chosen = _answer(data, names["chosen"], row[names["chosen"]])
    rejected = _answer(data, names["rejected"], row[names["rejected"]])
    margin = _margin(row, names)
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        text, liked, other, notice = part_texts(names, prompt, chosen, rejected)
        if not data.apply_template:
            text = _as_text(data, row, names, text)
            return Preference(text, liked, other, margin, notice)
        before, better, worse = turns_of_texts(
            text, liked, other, taken_off=liked != chosen, own=text == prompt
        )
        return Preference(_conversation(data, row, names, before), better, worse, margin, notice)
    before = _turns(prompt) if isinstance(prompt, str) else prompt or []
    better = _answer_turns(data, names["chosen"], chosen)
    worse = _answer_turns(data, names["rejected"], rejected)
    before, shared = part_turns(names, before, better, worse)
    said = _conversation(data, row, names, before)
    return Preference(said, better[shared:], worse[shared:], margin)


def _margin(row: Row, names: Names) -> float:
    if "margin" not in names:
        return 0.0
    value = row[names["margin"]]
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{names['margin']} must be a number, not {value!r}")
    return float(value)


def _answer_turns(data: PairData, column: str, answer: str | list[Any]) -> list[Turn]:
    if isinstance(answer, str):
        return [said_by("assistant", answer)]
    turns, _ = read_messages(column, answer, data.roles)
    if not turns or turns[-1]["role"] != "assistant":
        raise DataError(f"{column} must end with a turn of the assistant's")
    return turns
