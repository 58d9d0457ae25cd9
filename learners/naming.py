"""Import of things that a recipe names as "module:name"; nothing else heavy is imported for it."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from learners.errors import UserError


def load_named(name: str, what: str) -> Any:
    """Import "module:name", also from the current folder.

    Raises UserError in one line, which calls it a `what`, when it cannot be imported.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # user code may do anything at import
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{what} {name}: cannot be imported: {reason}") from error
