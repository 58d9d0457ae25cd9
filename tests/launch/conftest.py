"""A working directory with everything the smallest recipes name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.launch.small_recipes import DECODER, ENCODER, REWARD_MODEL, make_model, recipes


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, filled."""
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "decoder", DECODER)
    make_model(tmp_path / "reward_model", REWARD_MODEL)
    make_model(tmp_path / "encoder", ENCODER)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "1+1=", "chosen": "2", "rejected": "3"}\n')
    (tmp_path / "rewards_of_test.py").write_text(
        "def exact(prompts, responses, answer):\n    return [float(r == a) for r, a in "
        "zip(responses, answer)]\n"
        "def needs_more(prompts, responses, difficulty):\n    return []\n"
        "number = 3\n"
    )
    (tmp_path / "broken_of_test.py").write_text("1 / 0\n")
    for kind, recipe in recipes().items():
        (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return tmp_path
