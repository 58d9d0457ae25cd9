"""Finding a user's Python function by its name. Imports nothing heavy: a typo is answered at
once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from learners.errors import UserError


def load_function(name: str) -> Callable[..., Sequence[float | None]]:
    """Import "module:function". Raises UserError in one line when that is impossible."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # user code may do anything at import
        raise UserError(
            f"reward function {name}: cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(function):
        raise UserError(f"reward function {name}: is a {type(function).__name__}, not a function")
    return function
