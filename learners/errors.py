"""Bad input, as an exception whose message is for the person who gave it."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input, answered in one line per problem: what is wrong, where, and what would be
    right.
    """

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """Data that cannot be used. Rows are counted from 1, so in a JSON-lines file they are line
    numbers.
    """
