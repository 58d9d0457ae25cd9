"""The recipes that docs/data.md prints, run as printed on a model whose turns end with a token that
is not its EOS.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors import driver, supervised
from launch.recipe.read import load_recipe
from tests.learners.test_templates import GEMMA, make_tokenizer

pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
END = "<end_of_turn>"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the printed files, a tiny model and data, where the tests are."""
    folder = tmp_path_factory.mktemp("documented")
    blocks = re.findall(r"```(?:yaml|python)\n# (\S+)\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    for name, text in blocks:
        (folder / name).write_text(text)
    make_model(folder / "models/start")
    make_data(folder / "data")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.syspath_prepend(str(folder))
    patch.setenv("PYTHONPATH", str(folder))
    yield folder
    patch.undo()
    sys.modules.pop("scores", None)


def make_model(folder: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer(GEMMA)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def make_data(folder: Path) -> None:
    from datasets import Dataset

    def asked(i: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{i % 10}+1?"}]

    def said(i: int, answer: int) -> list[dict[str, str]]:
        return [*asked(i), {"role": "assistant", "content": str(answer % 10)}]

    folder.mkdir()
    numbers = range(64)
    sets: dict[str, list[dict[str, Any]]] = {
        "chats": [{"messages": said(i, i + 1)} for i in numbers],
        "pairs": [{"chosen": said(i, i + 1), "rejected": said(i, i + 5)} for i in numbers],
        "prompts": [{"prompt": asked(i), "answer": str((i + 1) % 10)} for i in numbers],
    }
    for name, rows in sets.items():
        Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")
        Dataset.from_list(rows[:16]).to_parquet(folder / f"held_out_{name}.parquet")


def run(kind: str, *overrides: str) -> dict[str, Any]:
    quiet = ["run.progress=false", "run.tensorboard=false"]
    recipe = load_recipe(f"{kind}.yaml", [*quiet, *overrides], kind)
    return (driver if kind == "grpo" else supervised).run(recipe)


@pytest.fixture(scope="module")
def sft(place: Path, cluster: None) -> dict[str, Any]:
    # enough for a random model to know how turns look, and where they end
    return run("sft", "learner.optimizer.learning_rate=1e-2", "train.epochs=12")


@pytest.fixture(scope="module")
def rm(place: Path, sft: dict[str, Any]) -> dict[str, Any]:
    return run("rm")


def test_sft_learns_the_turns_of_the_assistant(place: Path, sft: dict[str, Any]) -> None:
    assert sft["held_out/loss"] < 1.0
    model = place / "runs/sft/model"
    ends = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = make_tokenizer(GEMMA)
    assert tokenizer.convert_tokens_to_ids(END) in ends and tokenizer.eos_token_id in ends
    assert END in (place / "runs/sft/notices.txt").read_text()


def test_a_reward_model_learns_from_pairs_of_conversations(rm: dict[str, Any]) -> None:
    assert 0.0 <= rm["held_out/accuracy"] <= 1.0


def test_responses_end_with_the_turn(place: Path, rm: dict[str, Any]) -> None:
    run("grpo")
    lines = (place / "runs/grpo/samples/step-000001.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    end = make_tokenizer(GEMMA).convert_tokens_to_ids(END)
    stopped = [row for row in rows if row["finish_reason"] == "stop"]
    assert len(stopped) > len(rows) / 2
    assert {row["response_ids"][-1] for row in stopped} == {end}
    assert all(END not in row["response"] for row in rows)
    metrics = [json.loads(line) for line in (place / "runs/grpo/metrics.jsonl").open()]
    trained = [row for row in metrics if row["phase"] == "train"]
    assert len(trained) == 2 and all(row["score/unscorable"] == 0 for row in trained)
    assert all(abs(row["actor/max_ratio_deviation_first"]) < 1e-3 for row in trained)
