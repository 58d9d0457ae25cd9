"""A working directory with everything the smallest recipes name."""

from __future__ import annotations

import json
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


@pytest.fixture
def real(place: Path) -> Path:
    """The recipes of `place` with a real tokenizer and models that could load."""
    from launch.tasks import unique_digits as task

    for name in ("decoder", "reward_model"):
        task.make_tokenizer(place / name)
        config = json.loads((place / name / "config.json").read_text())
        small = {
            "vocab_size": 64,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "head_dim": 16,
        }
        config |= {**small, "num_key_value_heads": 1, "intermediate_size": 16, "pad_token_id": 0}
        (place / name / "config.json").write_text(json.dumps(config))
    return place
