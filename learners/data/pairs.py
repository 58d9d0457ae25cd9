"""The end of a pair's prompt: in a column, or where two answers part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from learners.data.messages import Turn, at_end, common_turns, said_by, without_system
from learners.data.transcripts import (
    LOOKED_FOR,
    answer_turns,
    asks,
    is_transcript,
    part_repeated,
    part_transcripts,
    turns_of,
)
from learners.errors import DataError

Names = Mapping[str, str]  # of the data's columns, by what they mean
REPEATED = "a prompt that is repeated inside both answers, and taken off there"
LEFT = "a prompt with which an answer begins, and which is left there: it may belong to it"
LONG = 20  # characters; an answer begins with a shorter prompt by chance, such as "Hi"


def part_texts(
    names: Names, prompt: str | None, chosen: str, rejected: str
) -> tuple[str, str, str, str]:
    """Return the prompt, what only each answer says, and a notice of what was taken off."""
    parted = part_transcripts(chosen, rejected)
    if prompt is None:
        if parted is None:
            raise DataError(
                f"{names['chosen']} and {names['rejected']} have no prompt: there is no column of "
                "it, and both do not begin alike up to where the assistant speaks, "
                f"{LOOKED_FOR}; name a column, as in `columns: {{prompt: question}}`"
            )
        return *parted, ""
    if parted and is_transcript(parted[0]) and prompt.strip() in parted[0]:
        return *parted, REPEATED
    if rests := part_repeated(prompt, chosen, rejected):
        return prompt, *rests, REPEATED
    begins = any(text.lstrip().startswith(prompt.strip()) for text in (chosen, rejected))
    return prompt, chosen, rejected, LEFT if begins and len(prompt.strip()) > LONG else ""


def turns_of_texts(
    prompt: str, chosen: str, rejected: str, taken_off: bool, own: bool
) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """Return the turns of a transcript and of its answers, or a user's and one of each answer.
    `taken_off`: the prompt was inside the answers; `own`: it is what the prompt's column says.
    """
    transcript = (taken_off and (not own or is_transcript(prompt))) or asks(prompt)
    before = turns_of(prompt) if transcript else [said_by("user", prompt)]
    rests = [t.lstrip() if taken_off or transcript else t for t in (chosen, rejected)]
    better, worse = (answer_turns(rest, transcript) for rest in rests)
    return before, better, worse


def part_turns(
    names: Names, prompt: list[Turn], better: list[Turn], worse: list[Turn]
) -> tuple[list[Turn], int]:
    """Return the turns of the prompt, and how many of them both answers begin with: those in common
    that stand before an answer of the assistant's.
    """
    shared = min(common_turns(better, worse), len(better) - 1, len(worse) - 1)
    parting = {better[shared]["role"], worse[shared]["role"]}
    if parting != {"assistant"}:
        raise DataError(
            f"{names['chosen']} and {names['rejected']} part at turn {shared + 1}, before an "
            f"answer of the assistant's ({', '.join(sorted(parting))}): they must answer the same"
        )
    shared -= at_end(better[:shared], "assistant")
    if not prompt and not shared:
        raise DataError(
            f"{names['chosen']} and {names['rejected']} have no prompt: no turn in common before "
            "an answer, and no column of it; name one, as in `columns: {prompt: question}`"
        )
    if not shared:
        refuse_second_answer(names["prompt"], prompt, better)
        return prompt, 0
    if not _is_beginning(prompt, better[:shared]):
        raise DataError(
            f"{names['prompt']} is not how {names['chosen']} and {names['rejected']} begin"
        )
    return _with_system(prompt, better[:shared]), shared


def part_response(names: Names, prompt: list[Turn], response: list[Turn]) -> tuple[list[Turn], int]:
    """Return the turns of the prompt, and how many of a response's turns say them again. Raises
    DataError where a response asks before it answers, and it is not the prompt.
    """
    roles = [turn["role"] for turn in response]
    answers = roles.index("assistant") if "assistant" in roles else len(roles)
    asks = [role for role in roles[:answers] if role != "tool"]
    asked = [i for i, role in enumerate(roles, 1) if role == "user" and asks][-1:]
    systems = len(response) - len(without_system(response))
    for repeated in (systems + len(without_system(prompt)), *asked):
        if repeated < len(response) and _is_beginning(prompt, response[:repeated]):
            return _with_system(prompt, response[:repeated]), repeated
    new = "system" not in asks and not common_turns(without_system(prompt), response)
    goes_on = new and prompt[-1]["role"] == "assistant"
    if asks and answers < len(roles) and not goes_on:
        raise DataError(
            f"{names['response']} begins with other turns than {names['prompt']}, before an answer "
            f"of the assistant's ({', '.join(asks)}): it must answer or repeat the prompt"
        )
    return prompt, 0


def _with_system(prompt: Sequence[Turn], repeated: Sequence[Turn]) -> list[Turn]:
    """Return the turns that repeat a prompt, after the system's of either."""
    first = [*prompt[:1], *repeated[:1]]
    system = [turn for turn in first if turn["role"] == "system"][-1:]
    return [*system, *without_system(repeated)]


def _is_beginning(prompt: Sequence[Turn], common: Sequence[Turn]) -> bool:
    """Tell whether a prompt is what the turns in common begin with, or the last of the user's."""
    given, turns = [
        [{**turn, "content": turn["content"].strip()} for turn in some] for some in (prompt, common)
    ]
    systems = [some[0] for some in (given, turns) if some and some[0]["role"] == "system"]
    if len(systems) == 2 and systems[0] != systems[1]:
        return False
    given = without_system(given)
    turns = without_system(turns)
    last = [turn for turn in turns if turn["role"] == "user"][-1:]
    return common_turns(given, turns) == len(given) or common_turns(given, last) == len(given)


def refuse_second_answer(column: str, before: Sequence[Turn], after: Sequence[Turn]) -> None:
    """Raise DataError when an answer would follow one."""
    if before and before[-1]["role"] == after[0]["role"] == "assistant":
        raise DataError(
            f"{column} ends with a turn of the assistant's, and the answer would be a second one"
        )
