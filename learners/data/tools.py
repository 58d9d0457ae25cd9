"""Tools and their calls in the one form that chat templates take, that of OpenAI's API."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from learners.errors import DataError

A_TOOL = "{type: function, function: {name, ...}} or {name, ...}"


def without_nulls(value: Any) -> Any:
    """Return a value without the nulls that a typed column adds: a key that any row has comes back
    as null in all the others. What is left of an object of nulls alone was an empty one; one that
    was not there comes back as null itself.
    """
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def from_json(text: str) -> Any:
    """Return the value that a text is in JSON; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_object(where: str, value: Any) -> dict[str, Any]:
    """Return an object, given as such or as JSON text; null and no text are an empty one.

    Raises DataError, which begins with `where`, on anything else.
    """
    if value is None or value == "":
        return {}
    found = from_json(value) if isinstance(value, str) else value
    if not isinstance(found, dict):
        raise DataError(f"{where} must be an object, or one as JSON text, not {_kind(value)}")
    return found


# --- tools ----------------------------------------------------------------------------------------


@cache
def tools_in(file: str) -> list[dict[str, Any]]:
    """Return the tools of a JSON file, which is read once. Raises DataError that names the key."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"tools: {file}: cannot be read: {why}") from None
    return read_tools(f"tools: {file}", text)


def read_tools(where: str, value: Any) -> list[dict[str, Any]]:
    """Return tools in OpenAI's form, given as a list, or one as JSON text, of such or of bare
    functions. Raises DataError, which begins with `where`, on anything else.
    """
    found = from_json(value) if isinstance(value, str) else without_nulls(value)
    if not isinstance(found, list):
        raise DataError(f"{where} must be a list of tools, or one as JSON text, not {_kind(value)}")
    return [_tool(f"{where}: tool {number}", tool) for number, tool in enumerate(found, 1)]


def _tool(where: str, value: Any) -> dict[str, Any]:
    tool = from_json(value) if isinstance(value, str) else value
    if isinstance(tool, dict) and tool.get("type", "function") == "function":
        bare = {key: inner for key, inner in tool.items() if key != "type"}
        whole = {"type": "function", **(bare if "function" in bare else {"function": bare})}
        if _named(whole["function"]):
            return whole
    raise DataError(f"{where} must be {A_TOOL}")


def _named(function: Any) -> bool:
    return isinstance(function, dict) and isinstance(function.get("name"), str)


# --- calls ----------------------------------------------------------------------------------------


def read_calls(where: str, value: Any) -> list[dict[str, Any]]:
    """Return the tool calls of a turn in OpenAI's form, their arguments as objects; given as a
    list, as one call, or as JSON text of either. Raises DataError, which begins with `where`.
    """
    found = from_json(value) if isinstance(value, str) else value
    calls = [found] if isinstance(found, dict) else found
    if not isinstance(calls, list):
        raise DataError(
            f"{where} must be calls of tools with name and arguments, or those as JSON text"
        )
    return [_call(f"{where}: call {number}", call) for number, call in enumerate(calls, 1)]


def _call(where: str, value: Any) -> dict[str, Any]:
    call = from_json(value) if isinstance(value, str) else value
    if isinstance(call, dict) and "function" not in call:
        bare = {key: inner for key, inner in call.items() if key not in ("id", "type")}
        call = {key: call[key] for key in ("id",) if key in call} | {"function": bare}
    if not isinstance(call, dict) or not _named(call["function"]):
        raise DataError(f"{where} must have a name and arguments")
    function = call["function"]
    arguments = read_object(f"{where}: the arguments", function.get("arguments"))
    outer = {key: inner for key, inner in call.items() if key != "function"}
    outer.setdefault("type", "function")
    return {**outer, "function": {**function, "arguments": arguments}}


def _kind(value: Any) -> str:
    found = from_json(value) if isinstance(value, str) else value
    return "other text" if found is None and value is not None else type(found).__name__
