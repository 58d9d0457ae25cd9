"""Conversations written into one text: where the prompt ends, and what each turn says."""

from __future__ import annotations

import re

from learners.data.messages import Turn, said_by
from learners.errors import DataError

# After these the assistant speaks. A line break belongs to the marker, a space to the answer.
ASSISTANT = re.compile(
    r"(?:^|\n)Assistant:|(?:^|\s)ASSISTANT:"
    r"|(?:^|\n)### ?(?:Assistant|Response):\n?"
    r"|<\|im_start\|>assistant\n|<\|assistant\|>\n?|<start_of_turn>model\n"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|\[/INST\]"
)
LOOKED_FOR = "such as `Assistant:` on a line of its own, `### Response:` or `<|im_start|>assistant`"
TURN = re.compile(
    r"(?:^|\n)(?:### ?)?(Human|User|Instruction|Assistant|Response|System):"
    r"|(?:^|\s)(USER|ASSISTANT|SYSTEM):"
)
SPEAKERS = {
    "human": "user",
    "user": "user",
    "instruction": "user",
    "assistant": "assistant",
    "response": "assistant",
    "system": "system",
}


def part_transcripts(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """Return the prompt that two texts begin with, up to the last place at which the assistant
    begins to speak in both, and the rest of each; None where there is no such place.
    """
    parted = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    common = chosen[: next(parted, min(len(chosen), len(rejected)))]
    ends = [found.end() for found in ASSISTANT.finditer(common)]
    if not ends:
        return None
    return common[: ends[-1]], chosen[ends[-1] :], rejected[ends[-1] :]


def part_repeated(prompt: str, chosen: str, rejected: str) -> tuple[str, str] | None:
    """Return two answers without the prompt that both begin with and then go on from; None where
    one does not, or where the prompt may be how the answer itself begins: no space is between.
    """
    if not (chosen.startswith(prompt) and rejected.startswith(prompt)):
        return None
    rests = (chosen[len(prompt) :], rejected[len(prompt) :])
    ended = prompt[-1:].isspace() or prompt.endswith(("=", ":", ">"))
    return rests if all(rest.strip() and (ended or rest[0].isspace()) for rest in rests) else None


def is_transcript(text: str) -> bool:
    """Tell whether a text begins with somebody's turn."""
    return TURN.match(text.lstrip()) is not None


def asks(text: str) -> bool:
    """Tell whether a text is a transcript that begins with a user's turn, at the beginning of a
    line, and ends where the assistant is to speak.
    """
    before, *rest = TURN.split(text.strip())
    who = [SPEAKERS[(a or b).lower()] for a, b in zip(rest[::3], rest[1::3], strict=True)]
    return not before and who[:1] == ["user"] and who[-1] == "assistant" and not rest[-1].strip()


def answer_turns(text: str, transcript: bool) -> list[Turn]:
    """Return the turns of an answer: one, or what goes on from a transcript."""
    turns = turns_of("Assistant:" + text) if transcript else []
    return turns or [said_by("assistant", text)]


def turns_of(text: str) -> list[Turn]:
    """Return the turns of a Human/Assistant transcript, without an empty one of the assistant at
    its end. Raises DataError on another.
    """
    before, *rest = TURN.split(text.strip())
    if before.strip() or not rest:
        raise DataError(
            "apply_template reads transcripts of Human: or User:, and Assistant:, alone, and this "
            "one begins otherwise: leave apply_template out, or write messages"
        )
    spoken = zip(rest[::3], rest[1::3], rest[2::3], strict=True)
    turns = [said_by(SPEAKERS[(a or b).lower()], said.strip()) for a, b, said in spoken]
    return turns[:-1] if turns[-1] == said_by("assistant", "") else turns
