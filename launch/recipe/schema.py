"""Every key a recipe may have, read off the typed models: for `--help`, and for "did you mean"."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

OLD_KEYS = {
    "sync.gate": "sync.max_logprob_diff",
    "sync.mean_gate": "sync.mean_logprob_diff",
    "sync.gate_prompts": "sync.agreement_prompts",
    **{
        f"{data}.{column}_column": f"{data}.columns.{column}"
        for data, columns in {
            "data": ("prompt", "response", "chosen", "rejected", "margin"),
            "held_out": ("prompt", "response", "chosen", "rejected", "margin"),
            "prompts": ("prompt",),
            "evaluation.prompts": ("prompt",),
            "evaluation.test_prompts": ("prompt",),
            "reward_model.calibration": ("prompt", "response"),
        }.items()
        for column in columns
    },
}
"""Keys of earlier versions, which recipes may go on using, and what they are called now."""


@dataclass(frozen=True)
class Key:
    """One key. In `name`, N stands for a position in a list. `default` begins with "required" where
    there is none. `stand_in` is a harmless value of the right type.
    """

    name: str
    kind: str
    default: str
    description: str
    stand_in: Any


@cache
def recipe_keys(model: type[BaseModel]) -> dict[str, Key]:
    """Return all keys and sections of a recipe model, by dotted name, in the order of
    the models.
    """
    schema = model.model_json_schema()
    return {key.name: key for key in _walk(schema, schema.get("$defs", {}), "")}


def suggest(unknown: str, keys: dict[str, Key]) -> str:
    """Return what an unknown key may have meant: "did you mean …?" or the keys there are."""
    parent, _, last = unknown.rpartition(".")
    above = f"{_listed(parent, keys)}." if parent else ""
    siblings = [k[len(above) :] for k in keys if k.startswith(above) and "." not in k[len(above) :]]
    here = f"{parent}." if parent else ""
    if close := difflib.get_close_matches(last, siblings, 1):
        return f"did you mean {here}{close[0]}?"
    elsewhere = [k for k in keys if k.rpartition(".")[2] == last]
    if elsewhere:
        nearest = max(
            elsewhere,
            key=lambda k: (k.startswith(above), difflib.SequenceMatcher(a=unknown, b=k).ratio()),
        )
        return f"did you mean {nearest}?"
    return f"known here: {', '.join(s for s in siblings if s != 'N')}"


def renamed(unknown: str, keys: dict[str, Key]) -> str | None:
    """Return the last part of the sibling key that `unknown` was probably meant to be."""
    match = re.fullmatch(r"did you mean (.*)\?", suggest(unknown, keys))
    parent = unknown.rpartition(".")[0]
    if match and match[1].rpartition(".")[0] == parent:
        return match[1].rpartition(".")[2]
    return None


def lookup(key: str, keys: dict[str, Key]) -> Key | None:
    """Return the entry of a key as written, list numbers and all."""
    return keys.get(_listed(key, keys))


def required(key: str, keys: dict[str, Key]) -> str:
    """Return what belongs into a key that is missing."""
    name = _listed(key, keys)
    if name not in keys:
        return "a required key"
    inside = [
        k.name
        for k in keys.values()
        if k.name.startswith(f"{name}.") and k.default == keys[name].default
    ]
    leaves = [k for k in inside if not any(other.startswith(f"{k}.") for other in inside)]
    if keys[name].kind == "section":
        return f"set {' and '.join(leaves)}" if leaves else f"write {name}: {{}} for its defaults"
    return keys[name].description or keys[name].kind


def listing(model: type[BaseModel], prefix: str = "") -> str:
    """Return the keys as an aligned table: name, type, default, description."""
    rows = [
        (f"{prefix}{k.name}", k.kind, k.default, k.description)
        for k in recipe_keys(model).values()
        if k.kind != "section"
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )


def _listed(key: str, keys: dict[str, Key]) -> str:
    """Return the name under which a key is listed: N for a position, which is left out in a list of
    sections where there may also be one.
    """
    name = ".".join("N" if part.isdecimal() else part for part in key.split("."))
    section, position, rest = name.partition(".N")
    several = any(k.startswith(f"{section}{position}.") for k in keys)
    return name if several else section + rest


def _walk(
    section: dict[str, Any], definitions: dict[str, Any], prefix: str, needed: str = "required"
) -> Iterator[Key]:
    """Yield the keys of a section. `needed` is what stands for the default of those that have none:
    it names the section that may be left out whole, if they are in one.
    """
    for name, written in section["properties"].items():
        full = f"{prefix}{name}"
        required = name in section.get("required", ())
        options = list(_options(written, definitions))
        shape = next((o for o in options if o.get("type") != "null"), None)
        if shape is None:  # a section that this kind of recipe has no use for
            continue
        default = needed if required else _default(written)
        kind = " or ".join(_type_in_words(o, definitions) for o in options)
        item = _resolve(shape.get("items") or {}, definitions)
        described = (d.get("description") for d in (written, shape, item))
        yield Key(full, kind, default, next(filter(None, described), ""), _stand_in(shape))
        if "properties" in shape:
            optional = any(o.get("type") == "null" for o in options)
            inside = f"required in {full}" if optional else needed
            yield from _walk(shape, definitions, f"{full}.", inside)
        elif isinstance(item, dict) and "properties" in item:
            yield from _walk(item, definitions, f"{full}.N.", needed)


def _options(written: dict[str, Any], definitions: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the shapes that a key may have: null, one section, a list of them."""
    for one in written.get("anyOf") or written.get("oneOf") or [written]:
        if "oneOf" in one:
            yield from _options(one, definitions)
        else:
            yield _resolve(one, definitions)


def _resolve(shape: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(shape, dict) and "$ref" in shape:
        return definitions[shape["$ref"].rpartition("/")[2]]
    return shape


def _default(written: dict[str, Any]) -> str:
    default = written.get("default", "")
    return default if isinstance(default, str) else json.dumps(default)


def _type_in_words(shape: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "const" in shape:
        return str(shape["const"])
    if "enum" in shape:
        return "|".join(map(str, shape["enum"]))
    if "properties" in shape:
        return "section"
    if shape["type"] == "array":
        if "prefixItems" in shape:
            return (
                f"list of {len(shape['prefixItems'])} "
                f"{_plural(shape['prefixItems'][0], definitions)}"
            )
        return f"list of {_plural(shape['items'], definitions)}"
    words = {"integer": "int", "number": "float", "boolean": "true|false", "string": "text"}
    words |= {"object": "names with values"}
    return words.get(shape["type"], shape["type"]) + _bounds(shape)


def _plural(shape: dict[str, Any], definitions: dict[str, Any]) -> str:
    words = {"section": "sections", "text": "texts", "float": "floats", "int": "ints"}
    singular, *bounds = _type_in_words(_resolve(shape, definitions), definitions).split(" ", 1)
    return " ".join([words.get(singular, singular), *bounds])


def _bounds(shape: dict[str, Any]) -> str:
    low = f">{shape['exclusiveMinimum']:g}" if "exclusiveMinimum" in shape else ""
    low = f">={shape['minimum']:g}" if "minimum" in shape else low
    high = f"<{shape['exclusiveMaximum']:g}" if "exclusiveMaximum" in shape else ""
    high = f"<={shape['maximum']:g}" if "maximum" in shape else high
    return "".join(f" {bound}" for bound in (low, high) if bound)


def _stand_in(shape: dict[str, Any]) -> Any:
    if "const" in shape:
        return shape["const"]
    if "enum" in shape:
        return shape["enum"][0]
    if "properties" in shape:
        return {}
    return {"array": [], "string": "-", "boolean": False}.get(shape["type"], 1)
