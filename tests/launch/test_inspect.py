"""`quatuor inspect` and `--check --data`: what the data of a recipe become. No model has weights
here: none is loaded.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from actors.run.folder import RunFolder
from actors.run.things import Things, found_by
from launch import cli
from launch.inspect import Numbers, also_in, buckets, load_data, repeated
from launch.inspect_screen import marked, printable
from launch.recipe.read import load_recipe
from learners.data.rows import load_prompts
from learners.errors import DataError
from learners.settings import PromptData

pytestmark = pytest.mark.reports  # what people's data become

LONG = "1" * 40
EXACT = "evaluation.function=rewards_of_test:exact"


@pytest.fixture
def shown(real: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, Any]]:
    """shown(recipe, *arguments) inspects; returns what was printed and the JSON."""

    def inspect(recipe: str, *arguments: str) -> tuple[str, Any]:
        assert cli.main(["inspect", recipe, "--json", "out.json", *arguments]) == 0
        return capsys.readouterr().out, json.loads(Path("out.json").read_text())

    return inspect


def write(name: str, *rows: dict[str, Any]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def pair(prompt: str, chosen: str = "2", rejected: str = "3") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "answer": chosen}


def test_sft(shown: Callable[..., tuple[str, Any]]) -> None:
    write("pairs.jsonl", pair("1+1="), pair(LONG), pair("1+2=", "3"), pair("1+1="))
    printed, found = shown("sft.yaml", "data.max_tokens=20", "--rows", "2")
    (source,) = found["sources"]
    assert source["name"] == "data" and source["dropped"] == {"too long": 1}
    first, second = source["rows"]
    assert (first["row"], second["row"]) == (1, 3)
    assert set(first) == {"row", "text", "ids", "trained"}
    assert first["trained"] == [0] * 5 + [1] * 2 and len(first["ids"]) == 7
    assert "data: 3 rows used; left out: 1 too long" in printed
    assert "<bos>1+1=«2<eos>»" in printed and "special tokens: <bos> 3, <eos> 3" in printed
    assert "repeated: 1 rows are, id for id, earlier ones: row 4" in printed


def test_pairs_have_two_texts_each(shown: Callable[..., tuple[str, Any]]) -> None:
    write("pairs.jsonl", pair("1+1="), pair("1+2=", "2", "2"))
    write("held_out.jsonl", pair("1+1="), pair("2+2=", "4"))
    printed, found = shown("rm.yaml", "held_out.path=held_out.jsonl")
    assert [source["name"] for source in found["sources"]] == ["data", "held_out"]
    (row,) = found["sources"][0]["rows"]
    assert set(row) == {"row", "chosen", "rejected"}
    for name in ("chosen", "rejected"):
        assert row[name]["trained"] == [0] * 5 + [1] * 2
    assert row["chosen"]["ids"] != row["rejected"]["ids"]
    assert found["sources"][0]["dropped"] == {"equal answers": 1}
    assert "trained on: 1 rows are, id for id, in data: row 1" in printed


def test_prompts_of_a_mixture_and_of_the_evaluation(shown: Callable[..., tuple[str, Any]]) -> None:
    write("more.jsonl", pair("2+2="), pair("3+3="), pair("1+1="))
    write("test.jsonl", pair("3+3="), pair("4+4="))
    mixture = "{path: prompts.jsonl, answer_columns: [answer]}, {path: more.jsonl, "
    mixture = f"prompts=[{mixture}answer_columns: [answer]}}]"
    words = [mixture, "evaluation.test_prompts={path: test.jsonl, answer_columns: [answer]}", EXACT]
    printed, found = shown("grpo.yaml", *words)
    names = ["prompts.0", "prompts.1", "evaluation.test_prompts"]
    assert [source["name"] for source in found["sources"]] == names
    assert [len(source["rows"]) for source in found["sources"]] == [1, 3, 2]
    assert [row["row"] for row in found["sources"][1]["rows"]] == [1, 2, 3]
    assert all(not any(r["trained"]) for source in found["sources"] for r in source["rows"])
    assert "trained on: 1 rows are, id for id, in prompts.1: row 1" in printed
    assert "repeated: 1 rows are, id for id, in prompts.0: row 3" in printed
    assert printed.count("trained on") == 1 and "«" not in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "sft.yaml", "data.path=no.jsonl"], "no.jsonl"),
        (["inspect", "sft.yaml", "data.columns.response=no"], "columns ['no'] missing"),
        (["inspect", "grpo.yaml", "prompts.max_prompt_tokens=2"], "no row can be used: 1 too long"),
        (["inspect", "sft.yaml", "--json", "no/out.json"], "--json: no/out.json cannot be written"),
        (["inspect", "sft.yaml", "--rows", "0"], "--rows"),
        (["sft", "sft.yaml", "--data"], "--data: only together with --check"),
        (["sft", "sft.yaml", "--check", "--data", "data.max_tokens=3"], "no row can be used"),
        (["grpo", "grpo.yaml", "--check", "--data", "rewards.0.function=os:getcwd"], "os:getcwd"),
    ],
)
def test_what_a_run_would_refuse_is_refused_in_one_line(
    real: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: ") and said in line and not out


def test_models_that_are_not_trained_need_not_be_there_yet(
    shown: Callable[..., tuple[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    later = ["rewards.0.model.path=runs/rm/model", "critic.model.path=runs/rm/model"]
    _, found = shown("ppo.yaml", *later)
    assert [source["name"] for source in found["sources"]] == ["prompts"]
    for arguments in (["ppo", "ppo.yaml", "--check", *later], ["inspect", "ppo.yaml"]):
        own = ["actor.model.path=runs/sft/model"] if arguments[0] == "inspect" else []
        assert cli.main([*arguments, *own]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 + (arguments[0] == "ppo")
        assert all("/model: no such model folder (and no hub name)" in line for line in lines)


def test_a_check_of_the_data_says_what_of_it_will_be_used(
    real: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("pairs.jsonl", pair("1+1="), pair(LONG), pair("1+3=", "<bos>4"))
    assert cli.main(["sft", "sft.yaml", "--check", "--data", "data.max_tokens=20"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "# data: 2 rows used; left out: 1 too long"
    assert yaml.safe_load(out)["data"]["max_tokens"] == 20
    assert "notice: pairs.jsonl: 1 of 2 rows hold control tokens" in err
    assert not Path("runs").exists()


def test_a_check_of_a_resumed_run_compares_the_data(
    real: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a mixture every source is compared by itself."""
    write("more.jsonl", pair("1+2="), pair("1+3="))
    source = {"path": "pairs.jsonl", "columns": {"response": "chosen"}}
    recipe = yaml.safe_load(Path("sft.yaml").read_text())
    recipe["data"] = [source, source | {"path": "more.jsonl"}]
    Path("sft.yaml").write_text(yaml.safe_dump(recipe))
    begun = load_recipe("sft.yaml")
    folder = RunFolder.open(begun.run, begun.to_yaml())
    things = Things(Path("runs/new"), None)
    data = load_data(begun)
    things.add(found_by(begun, data.tokenizer, data.sets))
    assert [key for key in things.table if key.startswith("data")] == ["data.0.path", "data.1.path"]
    folder.things = things.table
    with folder.checkpoint(1):
        pass
    folder.close()
    words = ["sft", "sft.yaml", "train.steps=9", "--resume", "--check", "--data"]
    write("more.jsonl", pair("1+2="), pair("1+5="))
    Path("runs/new/config.yaml").write_text(load_recipe("sft.yaml", ["train.steps=9"]).to_yaml())
    assert cli.main(words) == 2
    said = capsys.readouterr().err.splitlines()
    (line,) = [line for line in said if not line.startswith("notice: ")]
    assert (
        line.startswith("error: data.1.path: more.jsonl: rows: 2 (") and "--accept data.1" in line
    )
    assert cli.main([*words, "--accept", "data.1.path"]) == 0
    assert "accepted: data.1.path" in capsys.readouterr().err


@pytest.mark.parametrize(("long", "refused"), [(1, False), (50, False), (60, True)])
def test_few_long_prompts_are_dropped_and_many_refused(
    real: Path, long: int, refused: bool
) -> None:
    tokenizer = load_data(load_recipe("grpo.yaml")).tokenizer
    write("prompts.jsonl", *[{"prompt": LONG if i < long else "1+1="} for i in range(1000)])
    data = PromptData(path="prompts.jsonl", max_prompt_tokens=20)
    if not refused:
        prompts = load_prompts(data, tokenizer)
        assert len(prompts) == 1000 - long and prompts.dropped == {"too long": long}
        return
    told = "prompts.jsonl: 60 of 1000 prompts are too long for max_prompt_tokens 20; at most 5%"
    with pytest.raises(DataError, match=told):
        load_prompts(data, tokenizer)
    allowed = data.model_copy(update={"max_dropped": 0.06})
    assert len(load_prompts(allowed, tokenizer)) == 940
    # the room of the engine counts among the reasons
    with pytest.raises(DataError, match="60 of 1000 prompts are too long for generation.max_model"):
        load_prompts(data.model_copy(update={"max_prompt_tokens": 99}), tokenizer, None, 30)


def test_rows_that_repeat() -> None:
    found = Numbers(array("L", [3] * 4), array("L", [1, 2, 5, 7]), array("Q", [9, 8, 9, 9]))
    other = Numbers(array("L", [3]), array("L", [1]), array("Q", [8]))
    assert repeated(found) == [5, 7] and repeated(other) == []
    assert also_in(found, other) == [2] and also_in(other, found) == [1]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([7], [(7, 7, 1)]),
        ([1, 2, 2], [(1, 1, 1), (2, 2, 2)]),
        ([0, 15, 16], [(0, 2, 1), (3, 5, 0), (6, 8, 0), (9, 11, 0), (12, 14, 0), (15, 17, 2)]),
    ],
)
def test_buckets(lengths: list[int], expected: list[tuple[int, int, int]]) -> None:
    assert buckets(lengths) == expected
    assert sum(rows for _, _, rows in expected) == len(lengths)


def test_trained_tokens_are_marked_without_losing_letters() -> None:
    """A token that is half a letter, or loses its space when read alone, is read with the others
    before it.
    """
    words = {1: "ab", 2: " c", 3: "\x1b[2J", 4: "d"}

    def decode(ids: list[int], **_: Any) -> str:
        return "".join(words[i] for i in ids).lstrip()

    piece = SimpleNamespace(ids=[1, 2, 3, 4], trained=bytes([0, 1, 0, 1]))
    tokenizer = SimpleNamespace(decode=decode)
    assert marked(piece, tokenizer, coloured=False).plain == "ab« c»\\x1b[2J«d»"
    coloured = marked(piece, tokenizer, coloured=True)
    assert coloured.plain == "ab c\\x1b[2Jd"
    assert [coloured.plain[s.start : s.end] for s in coloured.spans if s.style] == [" c", "d"]
    assert printable("a\nb\r") == "a\nb\\r"
