"""Messages of any shape made canonical: turns of system, user, assistant and tool, with text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from learners.data.tools import from_json, read_calls, without_nulls
from learners.errors import DataError

Turn = dict[str, Any]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("model", "ai", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("function_response", "tool_response", "tool_result"), "tool"),
}
CALLS = ("function_call", "tool_call", "tool_calls")  # an assistant whose words are calls
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
LEARNED_KEYS = ("weight", "train")
OURS = (*ROLE_KEYS, *CONTENT_KEYS, *LEARNED_KEYS, "tool_calls", "function_call")
SPOKEN = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")

TEXT_PARTS = ("text", "input_text", "output_text")
OTHER_PARTS = re.compile("image|audio|video|file")
PYTHON_CHAT = re.compile(r"\[\s*\{\s*'(role|from|content|value)'\s*:")


def chat_in(column: str, value: Any) -> list[Any] | None:
    """Return the messages that a value holds: a list, one message alone, or a list as JSON text,
    whose nulls are meant. None where it is something else, other text for instance.

    Raises DataError, as everything here does with the column's name first, on a conversation as
    Python prints it.
    """
    if isinstance(value, list):
        return [without_nulls(message) for message in value]
    if isinstance(value, dict) and _role_name(value):
        return [without_nulls(value)]
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    if PYTHON_CHAT.match(value.lstrip()):
        raise DataError(
            f"{column} is a conversation as Python prints it: write it as JSON, or as messages"
        )
    found = from_json(value)
    return found if isinstance(found, list) and are_messages(found) else None


def are_messages(values: Sequence[Any]) -> bool:
    """Tell whether values are messages, at least one and each with a role."""
    return bool(values) and all(isinstance(v, dict) and _role_name(v) for v in values)


def read_messages(
    column: str, messages: Sequence[dict[str, Any]], roles: Mapping[str, str]
) -> tuple[list[Turn], tuple[bool, ...] | None]:
    """Return canonical turns, and which of them may be learned (None: all). `roles` are the data's
    own names of roles.
    """
    turns: list[Turn] = []
    learned: list[bool] = []
    for number, message in enumerate(messages, 1):
        where = f"{column}: turn {number} ({_role_name(message)})"
        turns.append(_turn(where, message, roles))
        learned.append(_may_be_learned(where, message))
    return turns, None if all(learned) else tuple(learned)


def _turn(where: str, message: dict[str, Any], roles: Mapping[str, str]) -> Turn:
    name = _role_name(message)
    content = next((message[key] for key in CONTENT_KEYS if message.get(key) is not None), None)
    rest = {k: v for k, v in message.items() if k not in OURS and v is not None}
    said = message.get("tool_calls") or message.get("function_call")
    if name in CALLS and name not in roles and not said:
        return {"role": "assistant", "content": "", "tool_calls": read_calls(where, content)} | rest
    turn: Turn = {"role": _role(where, name, roles), "content": _text(where, content, bool(said))}
    if said:
        turn["tool_calls"] = read_calls(where, said)
    return turn | rest


def _role_name(message: dict[str, Any]) -> str:
    """Return how a message names its role; nothing where it does not."""
    names = (message.get(key) for key in ROLE_KEYS)
    return next((name for name in names if isinstance(name, str)), "")


def _role(where: str, name: str, roles: Mapping[str, str]) -> str:
    role = roles.get(name) or ROLES.get(name.lower())
    if role is None:
        raise DataError(
            f"{where} is of an unknown role: say whose it is: `roles: {{{in_yaml(name)}: user}}`, "
            "or system, assistant, tool"
        )
    return role


def _text(where: str, content: Any, calls: bool) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part(where, part) for part in content)
    if content is None and calls:
        return ""
    if content is None:
        raise DataError(f"{where} has no content")
    raise DataError(f"{where} has content that is no text, but {type(content).__name__}")


def _part(where: str, part: Any) -> str:
    """Return the text of a part of a message."""
    if isinstance(part, str):
        return part
    kind = str(part.get("type", "text")) if isinstance(part, dict) else type(part).__name__
    if other := OTHER_PARTS.search(kind):
        article = "a" if other[0] in ("video", "file") else "an"
        raise DataError(f"{where} has {article} {other[0]}: only text can be read")
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise DataError(f"{where} has a part of type {kind}: only text can be read")
    return str(part["text"])


def _may_be_learned(where: str, message: dict[str, Any]) -> bool:
    for key in LEARNED_KEYS:
        value = message.get(key)
        if value is not None and value not in (0, 1):
            raise DataError(
                f"{where} has {key} {value!r}: a turn is learned (1) or not (0), nothing between"
            )
    return all(message.get(key) in (None, 1) for key in LEARNED_KEYS)


# --- several turns --------------------------------------------------------------------------------


def common_turns(one: Sequence[Turn], other: Sequence[Turn]) -> int:
    """Return how many turns two conversations have in common at their beginnings. What templates
    do not render, such as an id or a rating, may differ.
    """
    pairs = zip(one, other, strict=False)
    parted = (i for i, (a, b) in enumerate(pairs) if _spoken(a) != _spoken(b))
    return next(parted, min(len(one), len(other)))


def _spoken(turn: Turn) -> dict[str, Any]:
    return {key: turn[key] for key in SPOKEN if key in turn}


def at_end(turns: Sequence[Turn], role: str) -> int:
    """Return how many turns of a role stand at the end."""
    others = (i for i, turn in enumerate(reversed(turns)) if turn["role"] != role)
    return next(others, len(turns))


def without_system(turns: Sequence[Turn]) -> list[Turn]:
    """Return the turns after the system's at the beginning."""
    return list(turns[1:] if turns and turns[0]["role"] == "system" else turns)


def said_by(role: str, text: str) -> Turn:
    """Return the turn of a role that says a text."""
    return {"role": role, "content": text}


# --- words for errors -----------------------------------------------------------------------------


def description(value: Any) -> str:
    """Return what a value is that was to be text or messages."""
    if value is None:
        return "null or missing"
    if isinstance(value, dict):
        return f"an object of {' and '.join(list(value)[:4]) or 'nothing'}"
    if isinstance(value, list):
        strange = (description(one) for one in value if not are_messages([one]))
        return f"a list with {next(strange, 'messages')}" if value else "an empty list"
    return {"str": "text", "bool": "true or false"}.get(kind := type(value).__name__, kind)


def in_yaml(name: str) -> str:
    """Return a name as a recipe writes it inside `{}`: in quotes where it has spaces or would mean
    something else.
    """
    import yaml

    try:
        plain = " " not in name and yaml.safe_load(f"{{{name}: {name}}}") == {name: name}
    except (yaml.YAMLError, ValueError):
        plain = False
    return name if plain else json.dumps(name, ensure_ascii=False)
