"""Find a user's Python function by its name. Imports nothing heavy: a typo is answered at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from learners.errors import UserError
from learners.naming import load_named


def load_function(name: str) -> Callable[..., Sequence[float | None]]:
    """Import "module:function". Raises UserError in one line when that is impossible."""
    function = load_named(name, "reward function")
    if not callable(function):
        raise UserError(f"reward function {name}: is a {type(function).__name__}, not a function")
    return function
