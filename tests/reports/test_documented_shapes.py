"""The rows that docs/data.md shows are read, by the words of its table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from learners.data.conversation import Conversation
from learners.data.shapes import demonstration_of, preference_of, prompt_of, recognised
from learners.settings import PairData, PromptData, SFTData

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
ROWS = re.findall(r"^\| (SFT|pairs|RL) \| `(\{.*?\})` \|", PAGE, re.MULTILINE)
READERS = {
    "SFT": (SFTData, demonstration_of),
    "pairs": (PairData, preference_of),
    "RL": (PromptData, prompt_of),
}


def test_the_table_is_found() -> None:
    assert len(ROWS) > 15 and {kind for kind, _ in ROWS} == set(READERS)


@pytest.mark.parametrize(("kind", "text"), ROWS)
def test_a_documented_row_is_read(kind: str, text: str) -> None:
    settings, read = READERS[kind]
    row = json.loads(text)
    data = settings(path="rows.jsonl")
    said = read(data, row, recognised(data, list(row)))
    answered = said if kind == "SFT" else getattr(said, "prompt", said)
    as_turns = "role" in text or "from" in text
    assert isinstance(answered, Conversation) == as_turns
    if kind == "SFT" and isinstance(answered, Conversation):
        assert answered.messages[-1]["role"] == "assistant"
    if kind == "pairs":
        assert said.chosen != said.rejected
