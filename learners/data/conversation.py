"""The one form in which every loader sees a conversation, whatever shape it came in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them: each has `role` (system, user, assistant or tool) and
    `content`, a text; some have `tool_calls` and more. Nothing in them is null.

    `tools` are the functions that may be called, as JSON schemas; `arguments` those of the
    template, by which this row differs from the others of its data; `learned` says of each message
    whether it may be learned from (None: all).
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    learned: tuple[bool, ...] | None = None

    def answered(self, *messages: dict[str, Any]) -> Conversation:
        """Return the conversation with more turns, of which alone is learned."""
        learned = (False,) * len(self.messages) + (True,) * len(messages)
        return Conversation([*self.messages, *messages], self.tools, self.arguments, learned)


Said = str | Conversation
"""A prompt: text that is read as it stands, or a conversation that a template renders."""


@dataclass(frozen=True)
class Preference:
    """Prompt with two answers, each a text or the turns that go on from a conversation. A text
    prompt has text answers.
    """

    prompt: Said
    chosen: str | list[dict[str, Any]]
    rejected: str | list[dict[str, Any]]
    margin: float = 0.0
    notice: str = ""  # what was done to the row, the same words for every such row
