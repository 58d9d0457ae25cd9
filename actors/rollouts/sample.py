"""A finished response as the sources of scores read it: without torch, since the process of a
function imports it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from learners.data.conversation import Conversation


@dataclass(frozen=True)
class Sample:
    """A finished response to be scored: as ids, and as text without EOS, PAD and the token that
    ended it, but with every other special token; and the data's answer columns.

    `conversation` is the prompt's (None: raw text); `opened` is text at the end of the rendered
    prompt that belongs to the assistant's turn, such as an open <think>.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    prompt: str
    response: str
    finish_reason: str
    columns: dict[str, Any]
    conversation: Conversation | None = None
    opened: str = ""

    @property
    def answered(self) -> Conversation | None:
        """The conversation with the response as the assistant's turn, or in the one that the prompt
        had begun.
        """
        if self.conversation is None:
            return None
        *before, last = self.conversation.messages
        if last["role"] != "assistant":
            answer = {"role": "assistant", "content": self.opened + self.response}
            return self.conversation.answered(answer)
        begun = replace(self.conversation, messages=before)
        return begun.answered({**last, "content": last.get("content", "") + self.response})
