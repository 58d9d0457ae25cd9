"""Errors that are answered, not traced: bad input, and how to put it right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


class UserError(ValueError):
    """Bad input, answered in a line per problem: what is wrong, where, and what would be right."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """Data that cannot be used. Rows are counted from 1, so in a JSON-lines file they are line
    numbers.
    """


class DisagreementError(UserError):
    """Engine and Actor disagree; the message names the largest difference and its likely causes."""


@dataclass(frozen=True)
class Problem:
    """Something wrong with a recipe.

    `keys` are those it comes from, the first is the one to name; `message` says what would be
    right.
    """

    keys: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return f"{self.keys[0]}: {self.message}"


Rule = tuple[object, tuple[str, ...], str]
"""Whether something is wrong, and the keys and message of the problem it then is."""


def problems_of(rules: Iterable[Rule]) -> Iterator[Problem]:
    """Yield a problem for every rule that is broken."""
    return (Problem(keys, message) for wrong, keys, message in rules if wrong)


def first_wrong(*rules: tuple[object, str]) -> str:
    """Return the message of the first rule that is broken; nothing when all hold."""
    return next((message for wrong, message in rules if wrong), "")


def in_a_line(error: BaseException) -> str:
    """Return the first line of an error, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
