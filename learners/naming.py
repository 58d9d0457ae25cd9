"""Import of things that a recipe names as "module:name"; nothing else heavy is imported for it."""

from __future__ import annotations

import filecmp
import importlib
import os
import sys
from typing import Any

from learners.errors import UserError


def load_named(name: str, what: str) -> Any:
    """Import "module:name", also from the current folder, whose modules hide nobody's: it is
    looked into last.

    Raises UserError in one line, which calls it a `what`, when it cannot be imported, or when the
    current folder has such a module and another one was found.
    """
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # user code may do anything at import
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, AttributeError) and (file := _file(module)):
            reason += f" (it is {file})"
        raise UserError(
            f"{what} {name}: cannot be imported: {mistaken(module, here) or reason}"
        ) from error
    if wrong := mistaken(module, here):
        raise UserError(f"{what} {name}: {wrong}")
    return found


def mistaken(module: str, here: str) -> str:
    """Return what is wrong where the folder `here` has this module and another was imported;
    nothing where that is not so, or where both are the same text.
    """
    own = _files(module, here)
    name = module if module in sys.modules else module.partition(".")[0]
    if not own or name not in sys.modules:
        return ""
    found = _file(name)
    if found is None and hasattr(sys.modules[name], "__path__"):
        return ""  # folders without __init__.py, `here` among them
    if found is not None and any(
        filecmp.cmp(found, file, shallow=False) for file in _files(name, here)
    ):
        return ""
    return (
        f"the module {name} is {found or 'part of Python'}, which goes before {own[0]}: rename that"
    )


def _files(module: str, folder: str) -> list[str]:
    """Return the files in which a folder has the module."""
    path = os.path.join(folder, *module.split("."))
    return [f for f in (f"{path}.py", os.path.join(path, "__init__.py")) if os.path.isfile(f)]


def _file(module: str) -> str | None:
    """Return the file of an imported module, if it has one."""
    return getattr(sys.modules.get(module), "__file__", None)
