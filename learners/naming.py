"""Import of things that a recipe names as "module:name"; nothing else heavy is imported for it."""

from __future__ import annotations

import ast
import filecmp
import importlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Any

from learners.errors import UserError
from learners.imports import ROOT

started_in = ""
"""The folder that the run was started in, where it is not the current one: told to workers."""


def load_named(name: str, what: str) -> Any:
    """Import "module:name", also from the folder that the run was started in, whose modules hide
    nobody's: it is looked into last.

    Raises UserError in one line, which calls it a `what`, when it cannot be imported, or when that
    folder has such a module, or one that the user's modules import, and another one was found.
    """
    here = started_in or os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    module, _, attribute = name.partition(":")
    before = set(sys.modules)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # user code may do anything at import
        wrong = mistaken([module, *sys.modules.keys() - before], here)
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, AttributeError) and (file := _file(module)):
            reason += f" (it is {file})"
        raise UserError(f"{what} {name}: cannot be imported: {wrong or reason}") from error
    if wrong := mistaken([module, *sys.modules.keys() - before], here):
        raise UserError(f"{what} {name}: {wrong}")
    return found


def mistaken(loaded: Sequence[str], here: str) -> str:
    """Return what is wrong where the folder `here` has a module that is the first of those that
    were loaded, or that the user's among them import, now or later, and where another one is found;
    nothing where that is not so.

    What others' modules import is theirs: a `queue.py` of the user's is not what NumPy means.
    """
    importer = dict.fromkeys(loaded[:1], "")
    waiting = sorted(loaded[1:]) + list(loaded[:1])
    followed = set()
    while waiting:
        name = waiting.pop()
        if name in followed:
            continue
        followed.add(name)
        file = _file(name)
        for other in _imported(file) if file and _users(file) else ():
            importer.setdefault(other, name)
            waiting.append(other)
    for name, by in importer.items():
        if wrong := _another(name, here):
            return f"{wrong} ({by} imports it)" if by else wrong
    return ""


def _another(module: str, here: str) -> str:
    """Return what is wrong where the folder `here` has this module and another is found; nothing
    where both are the same text.
    """
    own = _files(module, here)
    name = module if module in sys.modules else module.partition(".")[0]
    spec = _spec(name) if own else None
    if spec is None or (spec.origin is None and spec.submodule_search_locations is not None):
        return ""  # not here, or folders without __init__.py, `here` among them
    found = spec.origin if spec.has_location else None
    if found and any(filecmp.cmp(found, file, shallow=False) for file in _files(name, here)):
        return ""
    return (
        f"the module {name} is {found or 'part of Python'}, which goes before {own[0]}: rename that"
    )


def _spec(name: str) -> Any:
    """Return where a module comes from, or would; None where there is none or it does not say."""
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # made by hand
        return None


def _files(module: str, folder: str) -> list[str]:
    """Return the files in which a folder has the module."""
    path = os.path.join(folder, *module.split("."))
    return [f for f in (f"{path}.py", os.path.join(path, "__init__.py")) if os.path.isfile(f)]


def _file(module: str) -> str | None:
    """Return the file of an imported module, or of one that would be imported, if it has one."""
    if module in sys.modules:
        return getattr(sys.modules[module], "__file__", None)
    spec = None if "." in module else _spec(module)  # a package would be imported for what it holds
    return spec.origin if spec is not None and spec.has_location else None


def _users(file: str) -> bool:
    """Tell whether a module's file is the user's own: neither Python's, nor installed, nor ours."""
    ours = (os.path.join(ROOT, name, "") for name in ("learners", "actors", "launch"))
    standard = os.path.join(sysconfig.get_path("stdlib"), "")
    installed = {"site-packages", "dist-packages"} & set(file.split(os.sep))
    return not installed and not file.startswith((standard, *ours))


def _imported(file: str) -> Iterator[str]:
    """Yield the names of the modules that a Python file imports, wherever in it, and of what might
    be modules; relative ones cannot be mistaken.
    """
    try:
        with open(file, "rb") as source:
            tree = ast.parse(source.read())
    except (OSError, SyntaxError, ValueError):  # compiled: its text is not here
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
