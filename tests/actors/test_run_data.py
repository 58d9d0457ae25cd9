"""Data of a run made of conversations: where responses end, mixtures, and one date for ever."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from actors import supervised
from actors.roles import roles_of
from actors.run import things as things_module
from actors.run.folder import RunFolder
from actors.run.metrics import find
from actors.run.resume import Resume
from actors.run.things import Things, found_by
from actors.run_data import RunData
from actors.settings import RLRecipe
from actors.supervised import SupervisedData
from launch.recipe.machine import function_problems
from launch.recipe.read import load_recipe
from learners.errors import UserError
from tests.learners.test_templates import CHATML, GEMMA, LLAMA3, SPECIAL, make_tokenizer

DATED = "{{ strftime_now('%Y-%m-%d') }}" + CHATML
FIRST = date(2024, 2, 29)
LATER = date(2031, 1, 1)


def scored(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    return [0.0] * len(responses)


def both(
    prompts: list[str], responses: list[str], messages: list[Any], answer: Any, tests: Any
) -> list[float]:
    return [0.0] * len(responses)


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def make_model(folder: Path, template: str | None, eos: bool = True, score: bool = False) -> str:
    """Write all of a model but its weights."""
    tokenizer = make_tokenizer(template, SPECIAL)
    if not eos:
        tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    config = {
        "architectures": [f"Qwen3For{'SequenceClassification' if score else 'CausalLM'}"],
        "model_type": "qwen3",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": tokenizer.eos_token_id,
        "id2label": {"0": "S"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def rl(folder: Path, template: str | None, **changes: Any) -> RLRecipe:
    """Return a recipe on two sources: three conversations with an answer, five with tests."""
    sums = [{"prompt": asked(f"{i} + {i}?"), "answer": str(2 * i)} for i in range(3)]
    code = [{"prompt": asked(f"program {i}"), "tests": "-"} for i in range(5)]
    one = {"path": write(folder / "sums.jsonl", sums), "answer_columns": ["answer"], "name": "sums"}
    two = {"path": write(folder / "code.jsonl", code), "answer_columns": ["tests"]}
    values: dict[str, Any] = {
        "kind": "grpo",
        "run": {"folder": str(folder / "run"), "tensorboard": False},
        "step": {"prompts_per_step": 4, "group_size": 2, "mini_batch_size": 8},
        "actor": {"model": {"path": make_model(folder / "actor", template)}},
        "prompts": [one, two],
        "rewards": [{"name": "f", "kind": "function", "function": f"{__name__}:scored"}],
        "generation": {"max_new_tokens": 8},
    }
    (folder / "rl.yaml").write_text(yaml.safe_dump(values | changes))
    recipe = load_recipe(folder / "rl.yaml", [])
    assert isinstance(recipe, RLRecipe)
    return recipe


def test_engines_stop_where_the_templates_turns_end(tmp_path: Path) -> None:
    recipe = rl(tmp_path, GEMMA)
    data = RunData.load(recipe)
    end, eos = (data.tokenizer.convert_tokens_to_ids(t) for t in ("<end_of_turn>", "</s>"))
    facts = data.facts(recipe)
    assert facts["stop_token_ids"] == [end, eos] == data.stops
    assert set(roles_of(recipe)["engine"].from_data) <= set(facts)
    assert sum("<end_of_turn>, not with the tokenizer's EOS" in line for line in data.notices) == 1


def test_a_run_whose_responses_could_not_end_is_refused(tmp_path: Path) -> None:
    rl(tmp_path, CHATML)
    make_model(tmp_path / "actor", "{% for m in messages %}{{ m.content }} {% endfor %}", eos=False)
    recipe = load_recipe(tmp_path / "rl.yaml", [])
    assert isinstance(recipe, RLRecipe)
    with pytest.raises(UserError, match=r"actor\.model\.path: .*: no response could end: its tok"):
        RunData.load(recipe)
    file = tmp_path / "actor" / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [4, 7]}))
    assert RunData.load(recipe).stops == [4, 7]


def test_ids_that_end_responses_must_be_known_to_every_model(tmp_path: Path) -> None:
    recipe = rl(tmp_path, CHATML)
    beyond = {"eos_token_id": [2, 4000]}
    (tmp_path / "actor" / "generation_config.json").write_text(json.dumps(beyond))
    with pytest.raises(UserError, match=r"generation_config.json\) with ids up to 4000"):
        RunData.load(recipe)


def test_prompts_of_a_mixture(tmp_path: Path) -> None:
    recipe = rl(tmp_path, CHATML)
    data = RunData.load(recipe)
    assert [(part.name, part.size) for part in data.prompts.parts] == [("sums", 3), ("1", 5)]
    steps = [data.prompts_of(step, 4, 0) for step in (1, 2)]
    assert sorted(p.index for step in steps for p in step) == list(range(8))  # one pass over all
    assert [["answer" in p.columns for p in step].count(True) for step in steps] == [2, 1]
    found = found_by(recipe, data.tokenizer, data.sets)
    assert {"prompts.0.path", "prompts.1.path"} <= set(found)


@pytest.mark.parametrize("function", ["scored", "both"])
def test_functions_are_offered_messages_and_the_columns_of_all_sources(
    tmp_path: Path, function: str
) -> None:
    source = {"name": "f", "kind": "function", "function": f"{__name__}:{function}"}
    assert list(function_problems(rl(tmp_path, CHATML, rewards=[source]))) == []


def test_what_another_template_cannot_render_is_named_with_its_source(tmp_path: Path) -> None:
    refusing = "{{ raise_exception('no programs') if 'program 3' in messages[0].content }}" + LLAMA3
    path = make_model(tmp_path / "judge", refusing, score=True)
    recipe = rl(
        tmp_path, CHATML, rewards=[{"name": "rm", "kind": "model", "model": {"path": path}}]
    )
    with pytest.raises(UserError) as refused:
        RunData.load(recipe)
    (line,) = refused.value.problems
    assert line.startswith(f"rewards.0.model: {path} cannot read row 4 of prompts.1.path and an em")
    assert "no programs" in line


# --- one date for ever ----------------------------------------------------------------------------


class Today(date):
    """A calendar that a test turns."""

    now = FIRST

    @classmethod
    def today(cls) -> date:  # type: ignore[override]
        return cls.now


def test_a_resumed_run_prints_the_date_of_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(things_module, "date", Today)
    recipe = rl(tmp_path, DATED)
    things = Things(tmp_path / "run", None)
    began = RunData.load(recipe, things.today)
    assert began.prompts[0].text.startswith("2024-02-29<|im_start|>")
    assert any("it is 2024-02-29 for the whole run" in line for line in began.notices)
    assert began.facts(recipe)["today"] == FIRST
    things.add(found_by(recipe, began.tokenizer, began.sets))
    run = RunFolder.open(recipe.run, recipe.to_yaml())
    run.things = things.table
    with run.checkpoint(3):
        run.log(3, {"loss": 1.0})
    run.close()

    monkeypatch.setattr(Today, "now", LATER)
    resumed = Things(tmp_path / "run", Resume())
    data = RunData.load(recipe, resumed.today)
    assert [p.compared for p in data.prompts] == [p.compared for p in began.prompts]
    resumed.add(found_by(recipe, data.tokenizer, data.sets))
    resumed.check_accepted()
    assert resumed.table["today"] == things.table["today"]  # and so does the next checkpoint
    other = RunData.load(recipe, LATER)
    with pytest.raises(UserError, match="prompts.0.path: .* rows"):
        Things(tmp_path / "run", Resume()).add(found_by(recipe, other.tokenizer, other.sets))


# --- supervised -----------------------------------------------------------------------------------


def test_supervised_training_on_a_mixture(tmp_path: Path) -> None:
    def source(name: str, count: int, **keys: Any) -> dict[str, Any]:
        rows = [{"messages": [*asked(f"{name} {i}?"), answer(str(i))]} for i in range(count)]
        return {"path": write(tmp_path / f"{name}{count}.jsonl", rows), "name": name, **keys}

    def answer(text: str) -> dict[str, str]:
        return {"role": "assistant", "content": text}

    values = {
        "kind": "sft",
        "run": {"folder": str(tmp_path / "run"), "tensorboard": False},
        "learner": {"model": {"path": make_model(tmp_path / "base", GEMMA)}},
        "train": {"batch_size": 4, "steps": 2},
        "data": [source("a", 9, weight=3), source("b", 2, weight=1)],
        "held_out": [source("a", 1), source("b", 3)],
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(values))
    recipe: Any = load_recipe(tmp_path / "sft.yaml", [])
    data = SupervisedData.load(recipe)
    assert data.stops[0] == data.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    group: Any = SimpleNamespace(nodes=[])
    folder: Any = SimpleNamespace(phase=lambda *_: pytest.MonkeyPatch.context())
    alarms: Any = SimpleNamespace(report=lambda *_: {})
    training = supervised.Supervised(recipe, data, group, folder, alarms)
    read: list[int] = []

    def share(method: str, batch: Any) -> dict[str, float]:
        read.append(len(batch))
        return {"loss": float(len(batch))}

    training.share = share  # type: ignore[method-assign]
    metrics, _ = training.step(1)
    assert metrics == {"loss": 4.0, "source/a/share": 0.75, "source/b/share": 0.25}
    evaluated = training.evaluate(1)
    assert evaluated == {"held_out/loss": 4.0, "held_out/a/loss": 1.0, "held_out/b/loss": 3.0}
    assert all(find(name) for name in [*metrics, *evaluated])
