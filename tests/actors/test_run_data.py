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
from actors.run.best import Best
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


def make_model(
    folder: Path,
    template: str | None,
    eos: bool = True,
    score: bool = False,
    positions: int = 256,
) -> str:
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
        "max_position_embeddings": positions,
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


def test_a_list_of_one_source_is_named_as_a_list(tmp_path: Path) -> None:
    path = make_model(tmp_path / "judge", "{{ raise_exception('never') }}", score=True)
    reward = {"name": "rm", "kind": "model", "model": {"path": path}}
    recipe = rl(tmp_path, CHATML, rewards=[reward])
    for prompts, named in ((recipe.prompts[:1], "prompts.0"), (recipe.prompts[0], "prompts")):
        with pytest.raises(UserError, match=rf"cannot read row 1 of {named}\.path and an empty"):
            RunData.load(recipe.model_copy(update={"prompts": prompts}))


def test_a_reward_model_of_the_actors_template_needs_as_many_positions(tmp_path: Path) -> None:
    path = make_model(tmp_path / "judge", CHATML, score=True, positions=40)
    reward = {"name": "rm", "kind": "model", "model": {"path": path}}
    recipe = rl(tmp_path, CHATML, rewards=[reward], generation={"max_new_tokens": 40})
    with pytest.raises(UserError, match=r"rewards\.0\.model: .* has 40 positions"):
        RunData.load(recipe)


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


def training_of(recipe: Any, data: SupervisedData) -> supervised.Supervised:
    """Return a training without processes."""
    group: Any = SimpleNamespace(nodes=[])
    folder: Any = SimpleNamespace(phase=lambda *_: pytest.MonkeyPatch.context())
    alarms: Any = SimpleNamespace(report=lambda *_: {})
    return supervised.Supervised(recipe, data, group, folder, alarms)


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
    training = training_of(recipe, data)
    read: list[int] = []

    def share(method: str, batch: Any) -> dict[str, float]:
        read.append(len(batch))
        return {"loss": float(len(batch))}

    training.share = share  # type: ignore[method-assign]
    metrics, _ = training.step(1)
    assert metrics == {"loss": 4.0, "source/a/share": 0.75, "source/b/share": 0.25}
    evaluated = training.evaluate(1)
    # weighted by tokens, of which every row has two
    assert evaluated == {"held_out/loss": 2.5, "held_out/a/loss": 1.0, "held_out/b/loss": 3.0}
    assert read == [4, 1, 3], "every held-out row is read once"
    assert all(find(name) for name in [*metrics, *evaluated])


@pytest.mark.parametrize("kind", ["sft", "rm"])
def test_sources_evaluated_one_by_one_give_the_metrics_of_all(tmp_path: Path, kind: str) -> None:
    """The learners' own statistics, of outputs that depend on the ids."""
    from learners.forward import response_part
    from learners.reward_model import RewardModelLearner
    from learners.sft import SFTLearner

    def source(name: str, count: int) -> dict[str, Any]:
        rows = [
            {
                "prompt": f"{i}",
                "response": "a" * (i + 1),
                "chosen": f"{i * 7}",
                "rejected": name * i,
            }
            for i in range(1, count + 1)
        ]
        return {"path": write(tmp_path / f"{name}.jsonl", rows), "name": name}

    values = {
        "kind": kind,
        "run": {"folder": str(tmp_path / "run"), "tensorboard": False},
        "learner": {"model": {"path": make_model(tmp_path / "base", None)}},
        "data": source("c", 2),
        "held_out": [source("a", 3), source("b", 8)],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    recipe: Any = load_recipe(tmp_path / "recipe.yaml", [])
    data = SupervisedData.load(recipe)
    training = training_of(recipe, data)
    settings: Any = SimpleNamespace(reward_model=SimpleNamespace(centring=0.1))

    def share(method: str, batch: Any) -> dict[str, float]:
        seen = batch.input_ids.float()
        if kind == "rm":
            found = RewardModelLearner.loss(settings, seen.sum(1).sin(), batch, 1.0)[1]
        else:
            found = SFTLearner.loss(settings, response_part(batch, seen[:, 1:].sin()), batch, 1.0)[
                1
            ]
        return {name: float(total / count) for name, (total, count) in found.items()}

    training.share = share  # type: ignore[method-assign]
    evaluated = training.evaluate(1)
    whole = share("evaluate", data.batch_of(data.held_out))
    assert {name: evaluated[f"held_out/{name}"] for name in whole} == pytest.approx(whole)
    assert len(whole) == (3 if kind == "rm" else 1) and len(evaluated) == 3 * len(whole)


@pytest.mark.parametrize(
    ("steps", "override", "expected"),
    [
        (95, [], list(range(10, 95, 10))),
        (4, [], [1, 2, 3]),
        (1, [], []),
        (4, ["train.evaluate_every=2"], [2, 4]),
        (4, ["train.evaluate_every=0"], []),
    ],
)
def test_a_reward_model_is_evaluated_ten_times_unless_told(
    tmp_path: Path, steps: int, override: list[str], expected: list[int]
) -> None:
    pairs = {"path": "pairs.jsonl"}
    values = {"kind": "rm", "run": {"folder": "run"}, "learner": {"model": {"path": "./m"}}}
    (tmp_path / "rm.yaml").write_text(yaml.safe_dump({**values, "data": pairs, "held_out": pairs}))
    recipe: Any = load_recipe(tmp_path / "rm.yaml", [*override, f"train.steps={steps}"])
    training: Any = SimpleNamespace(recipe=recipe, total_steps=steps)
    due = [i for i in range(1, steps + 1) if supervised.Supervised.evaluation_due(training, i)]
    assert due == expected and recipe.evaluates == (override != ["train.evaluate_every=0"])
    kept = Best(recipe, SimpleNamespace(), SimpleNamespace()).metric  # type: ignore[arg-type]
    assert kept == ("held_out/accuracy" if recipe.evaluates else None)
    patient = load_recipe(tmp_path / "rm.yaml", ["run.patience=2"])
    assert patient.evaluates, "patience needs no more than the default"
