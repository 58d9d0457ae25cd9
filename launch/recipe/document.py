"""A YAML file as plain values that remember where they were written, and `key.sub=value` overrides
on top of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from learners.errors import UserError, first_wrong

COMMAND_LINE = "command line"
_DEEPEST = 50  # recipes are 5 deep; parsers of YAML and JSON give up at some hundreds
_MERGE = "tag:yaml.org,2002:merge"

# YAML 1.2 scalars. PyYAML's own (1.1) read 1e-6 as text, `on` as true, 010 as eight and 2026-01-01
# as a date.
_RESOLVERS = {
    None: [
        (f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z"))
        for tag, pattern in (
            ("null", r"~|null|Null|NULL|"),
            ("bool", r"true|True|TRUE|false|False|FALSE"),
            ("int", r"[-+]?(?:0|[1-9][0-9_]*)"),
            (
                "float",
                r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+",
            ),
            ("float", r"[-+]?\.inf|\.nan"),
            ("merge", r"<<"),
        )
    ]
}


class RecipeLoader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return a node's value. One that is not what its tag says is an error with a line, as all
        others.
        """
        try:
            value = super().construct_object(node, deep)
            if isinstance(node, yaml.ScalarNode):
                # half a surrogate pair is no text, and JSON has no numbers without bounds
                str(value).encode()
            return value
        except (ValueError, KeyError, AttributeError):
            problem = f"{in_words(node.value)} cannot be read as {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


@dataclass
class Document:
    """`values` by today's keys, `origins` of every written key ("file:line" or "command line"), the
    keys `given` on the command line, the old names under which keys were `written`, and what was
    wrong.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    given: list[str] = field(default_factory=list)
    written: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: str | Path) -> Document:
        """Return the file as a document. Raises UserError when it cannot be read as YAML with keys
        at the top.
        """
        name = str(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"{name}: no such recipe file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{name}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}"
            ) from None
        return cls.parse(text, name)

    @classmethod
    def parse(cls, text: str, name: str) -> Document:
        document = cls(name)
        try:
            values = document._parse(text, "", lambda node: f"{name}:{node.start_mark.line + 1}")
        except (yaml.YAMLError, RecursionError) as error:
            raise UserError(_malformed(error, name)) from None
        if not isinstance(values, dict):
            raise UserError(
                f"{name}: a recipe is a list of keys and values, not {in_words(values)}"
            )
        document.values = values
        return document

    def override(self, text: str) -> None:
        """Apply one `key.sub=value`; the value is YAML, a number among the keys indexes a list."""
        key, equals, written = text.partition("=")
        # as problems name a position in a list, however it is written
        parts = [str(int(part)) if part.isdecimal() else part for part in key.split(".")]
        key = ".".join(parts)
        if not equals or not all(parts):
            self.problems.append(f"{COMMAND_LINE}: {text}: an override reads key.sub=value")
            return
        origins = self.origins
        self.origins = {}
        try:
            value = self._parse(written, key, lambda node: COMMAND_LINE)
        except (yaml.YAMLError, RecursionError) as error:
            self.problems.append(_malformed(error, f"{COMMAND_LINE}: {key}", line=False))
            self.origins = origins
            return
        kept = {k: v for k, v in origins.items() if k != key and not k.startswith(f"{key}.")}
        made = {".".join(parts[:depth]): COMMAND_LINE for depth in range(1, len(parts))}
        self.origins = {**made, **kept, key: COMMAND_LINE, **self.origins}
        self.given.append(key)
        problem = _put(self.values, parts, value)
        if problem:
            self.problems.append(f"{COMMAND_LINE}: {key}: {problem}")

    def rename(self, names: Mapping[str, str]) -> None:
        """Move what stands under an old key of a section to its new key. On the command line either
        name replaces what the file says under the other; elsewhere both are a problem.
        """
        for old, new in names.items():
            *above, last = old.split(".")
            section: Any = self.values
            for name in above:
                section = section.get(name) if isinstance(section, dict) else None
            if not isinstance(section, dict) or last not in section:
                continue
            value = section.pop(last)
            here = self.where(old)
            there = self.origins.get(new)
            if there is not None and (here == COMMAND_LINE) == (there == COMMAND_LINE):
                self.problems.append(f"{here}: {old}: is now {new}, which is given too; keep one")
            elif there is None or here == COMMAND_LINE:
                self.problems += filter(None, [_put(self.values, new.split("."), value)])
                self.origins[new] = here
                self.given = [new if key == old else key for key in self.given]
                self.written[new] = old

    def where(self, key: str, *others: str) -> str:
        """Return where a problem of these keys comes from: the command line, if it gave any of
        them, for what the file says is fine without. Else where the first, or the section that
        should hold it, was written.
        """
        for one in (key, *others):
            if any(f"{one}.".startswith(f"{given}.") for given in self.given):
                return COMMAND_LINE if one == key else f"{COMMAND_LINE} ({one})"
        while key and key not in self.origins:
            key = key.rpartition(".")[0]
        return self.origins.get(key, self.name)

    def _parse(self, text: str, prefix: str, origin: Callable[[yaml.Node], str]) -> Any:
        loader = RecipeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            self._note(node, prefix, origin, ())
            return _plain(loader.construct_document(node))
        finally:
            loader.dispose()

    def _note(
        self,
        node: yaml.Node,
        prefix: str,
        origin: Callable[[yaml.Node], str],
        above: tuple[yaml.Node, ...],
    ) -> None:
        """Remember the origin of every key below a node; report keys that are written twice."""
        if wrong := first_wrong(
            (any(node is outer for outer in above), "an alias that contains itself"),
            (len(above) > _DEEPEST, "nested too deeply"),
        ):
            raise yaml.constructor.ConstructorError(None, None, wrong, node.start_mark)
        above = (*above, node)
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self._enter(f"{prefix}.{i}" if prefix else str(i), item, item, origin, above)
        elif isinstance(node, yaml.MappingNode):
            for value in (value for key, value in node.value if key.tag == _MERGE):
                for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    self._note(one, prefix, origin, above)
            written: dict[str, str] = {}
            for key, value in ((k, v) for k, v in node.value if k.tag != _MERGE):
                name = f"{prefix}.{key.value}" if prefix else str(key.value)
                if name in written:
                    self.problems.append(
                        f"{origin(key)}: {name}: written twice, first at {written[name]}"
                    )
                written[name] = origin(key)
                self._enter(name, key, value, origin, above)

    def _enter(
        self,
        name: str,
        key: yaml.Node,
        value: yaml.Node,
        origin: Callable[[yaml.Node], str],
        above: tuple[yaml.Node, ...],
    ) -> None:
        self.origins[name] = origin(key)
        self._note(value, name, origin, above)


def in_words(value: Any) -> str:
    """Return a value as an error message names it."""
    if isinstance(value, bool):
        return str(value).lower()
    words = {type(None): "nothing", dict: "a section", list: "a list"}
    if type(value) in words:
        return words[type(value)]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested sections and lists as key.sub names."""
    if values and isinstance(values, list):
        values = dict(enumerate(values))
    if not values or not isinstance(values, dict):
        return {prefix: values}
    return {
        k: v
        for name, value in values.items()
        for k, v in flat(value, f"{prefix}.{name}".lstrip(".")).items()
    }


def _plain(value: Any) -> Any:
    """Return a copy in which nothing is shared (YAML aliases share) and every key is text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else repr(value)


def _put(values: dict[str, Any], parts: list[str], value: Any) -> str | None:
    """Set one key, making sections on the way; returns what is wrong with the key, if anything."""
    holder: Any = values
    for depth, part in enumerate(parts):
        here = ".".join(parts[:depth])
        if not isinstance(holder, dict | list):
            return f"{here} is {in_words(holder)} and has no key {part}"
        slot: Any = part
        if isinstance(holder, list):
            if not part.isdecimal() or int(part) >= len(holder):
                return f"{here} is a list of {len(holder)}; its entries are numbered from 0"
            slot = int(part)
        if depth == len(parts) - 1:
            holder[slot] = value
        else:
            if isinstance(holder, dict) and holder.get(slot) is None:
                holder[slot] = {}
            holder = holder[slot]
    return None


def _malformed(error: yaml.YAMLError | RecursionError, name: str, line: bool = True) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    what = "nested too deeply" if isinstance(error, RecursionError) else what
    context = getattr(error, "context", None)
    where = f"{name}:{mark.line + 1}" if line and mark else name
    return f"{where}: not valid YAML: {f'{context}, ' if context else ''}{what}"
