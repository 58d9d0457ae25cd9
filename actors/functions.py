"""Find a user's Python function by its name. Imports nothing heavy: a typo is answered at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

from learners.errors import UserError, first_wrong
from learners.naming import load_named


def load_function(name: str) -> Callable[..., Sequence[float | None]]:
    """Import "module:function". Raises UserError in one line when that is impossible."""
    function = load_named(name, "reward function")
    wrong = first_wrong(
        (not callable(function), f"is a {type(function).__name__}, not a function"),
        (
            inspect.iscoroutinefunction(function),
            "is async, nobody would wait for it; name a function that returns its scores",
        ),
    )
    if wrong:
        raise UserError(f"reward function {name}: {wrong}")
    return function
