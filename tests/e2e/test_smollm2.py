"""A real chat model from a package registry: the folder that is made of it, and what the tutorial
tells to do with it. `make test-all` runs this; without the registry it fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.tasks.additions import plain, question, said
from launch.tasks.smollm2 import INSTALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.md"
RECIPES = ROOT / "launch" / "recipes"


@dataclass(frozen=True)
class Desk:
    """A folder with the tutorial's model and data in it."""

    folder: Path
    packages: Path

    def python(self, *arguments: str) -> str:
        """Run Python there, as the tutorial does; return its output."""
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{self.packages}"}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    made = Desk(folder, folder / "packages")
    arguments = INSTALL.split()[1:]  # after .venv/bin/pip
    made.python("-m", "pip", *arguments, "--quiet", "--target", str(made.packages))
    made.python("-m", "launch.tasks.smollm2", "--out", "models/smollm2")
    made.python("-m", "launch.tasks.additions", "--out", "data/additions")
    return made


@pytest.fixture(scope="module")
def tokenizer(desk: Desk) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(desk.folder / "models" / "smollm2")


@pytest.fixture(scope="module")
def model(desk: Desk) -> Iterator[Any]:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(desk.folder / "models" / "smollm2")
    with torch.no_grad():
        yield loaded


def test_the_template_ends_a_turn_with_eos_and_nothing_is_padded_with_it(
    tokenizer: Any, model: Any
) -> None:
    messages = [question((7, 5)), said(plain((7, 5)))]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.endswith("<|im_start|>user\nWhat is 7 + 5?<|im_end|>\n"
                         "<|im_start|>assistant\n7 + 5 = 12<|im_end|>\n")  # fmt: skip
    assert tokenizer.eos_token == "<|im_end|>" != tokenizer.pad_token
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == ids == (1, 2, 0)


@pytest.mark.parametrize("text", ["I don't know\n\n  12 of 3456!", "naïve café 🤗\ttab", "  x"])
def test_tokens_are_the_models_own(tokenizer: Any, text: str) -> None:
    """Digits stand alone, as in its pretraining, and every text comes back as it was."""
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    with_digits = [t for t in tokenizer.convert_ids_to_tokens(ids) if re.search(r"\d", t)]
    assert with_digits == re.findall(r"\d", text)


def test_its_log_probs_are_those_of_a_model_that_reads_english(tokenizer: Any, model: Any) -> None:
    ids = torch.tensor([tokenizer("The sun rises in the east and sets in the west.").input_ids])
    assert model(ids, labels=ids).loss < 3.0  # nats a token; chance is 10.8
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    assert model(shuffled, labels=shuffled).loss > 5.0


def test_the_tutorials_questions_are_answered_partly(desk: Desk) -> None:
    """Its own script, as printed: there is something to learn, and something to start from."""
    (script,) = re.findall(r"cat > ask.py <<'EOF'\n(.*?)^EOF$", TUTORIAL.read_text(), re.S | re.M)
    (desk.folder / "ask.py").write_text(script)
    right = re.search(r"(\d+) of 100 right", desk.python("ask.py", "models/smollm2"))
    assert right and 25 <= int(right[1]) <= 60


@pytest.mark.parametrize("kind", ["sft", "rm", "grpo"])
def test_the_recipes_are_sound_where_model_and_data_are(desk: Desk, kind: str) -> None:
    recipe = str(RECIPES / f"smollm2_{kind}.yaml")
    begin = ["learner.model.path=models/smollm2"] if kind == "rm" else []
    desk.python("-m", "launch", kind, recipe, "--check", *begin)
    assert "It fits." in desk.python("-m", "launch", "plan", recipe, *begin)
