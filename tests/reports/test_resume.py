"""Resumed runs: compared with what their checkpoint was made of, never two in one folder, never
back to fewer steps.

Each test names the report of the fault elsewhere that it comes from.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from actors import driver, supervised
from actors.cluster.groups import WorkerError
from actors.run import lock as locks
from actors.run.folder import RunFolder, finished_checkpoints
from actors.run.lock import Displaced, Holder, RunLock
from actors.run.outcome import accounted_for
from actors.run.resume import Resume, fewer_steps
from actors.run.things import Things, found_by, python_files, weights_of
from actors.run_data import RunData
from actors.settings import RLRecipe, RunSettings
from actors.supervised import SupervisedData
from launch import cli
from launch.cluster.ray_job import entrypoint
from launch.recipe.read import read_recipe
from learners.errors import UserError

FORK = multiprocessing.get_context("fork")
STEP = 60  # of the checkpoint that the runs here go on from
ROWS = [{"prompt": f"uniq:{n}=", "answer": str(n), "response": str(n)} for n in range(101, 113)]
DATA = {"rows.jsonl": ROWS[:10], "prompts.jsonl": ROWS[:10], "held_out.jsonl": ROWS[10:]}
FUNCTION = "def exact(prompts, responses, answer):\n    return [0.0 for _ in responses]\n"


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_json(name: str, **values: Any) -> None:
    """Change a model's JSON file, as another export would."""
    file = Path(name)
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def recipes() -> dict[str, dict[str, Any]]:
    prompts = {"path": "prompts.jsonl", "answer_columns": ["answer"]}
    judge = {"name": "judge", "kind": "model", "model": {"path": "judge"}}
    exact = {"name": "exact", "kind": "function", "function": "rewards_of_resume:exact"}
    sft = {
        "kind": "sft",
        "run": {"folder": "runs/sft", "tensorboard": False},
        "learner": {"model": {"path": "base"}},
        "train": {"batch_size": 1, "epochs": 6},
        "data": {"path": "rows.jsonl"},
        "held_out": {"path": "held_out.jsonl"},
    }
    grpo = {
        "kind": "grpo",
        "run": {"folder": "runs/grpo", "tensorboard": False},
        "step": {"prompts_per_step": 4, "group_size": 2, "mini_batch_size": 8},
        "actor": {"model": {"path": "base"}},
        "rewards": [judge, exact],
        "prompts": prompts,
        "evaluation": {
            "prompts": {**prompts, "path": "held_out.jsonl"},
            "function": "rewards_of_resume:exact",
        },
        "generation": {"max_new_tokens": 8},
    }
    return {"sft": sft, "grpo": grpo}


def things_of(kind: str, resume: Resume | None, *overrides: str, weights: str = "0a1b") -> Things:
    """Read what a recipe names, as a run does before and after its models have loaded."""
    recipe, _ = read_recipe(f"{kind}.yaml", overrides)
    rl = isinstance(recipe, RLRecipe)
    data: Any = (
        RunData.load(recipe) if isinstance(recipe, RLRecipe) else SupervisedData.load(recipe)
    )
    things = Things(Path("runs", kind), resume)
    things.add(found_by(recipe, data.tokenizer, data.sets))
    things.add(weights_of(recipe, {"reward judge": [weights]} if rl else {}))
    return things


def leave_run(kind: str) -> None:
    """Leave the folder of a run that was killed a step after its checkpoint."""
    recipe, _ = read_recipe(f"{kind}.yaml")
    run = RunFolder.open(recipe.run, recipe.to_yaml())
    run.things = things_of(kind, None).table
    with run.checkpoint(STEP):
        run.log(STEP, {"loss": 1.0})
    run.log(STEP + 1, {"loss": 1.0})
    run.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Models as far as they are read before they load, data, recipes, and for each recipe the
    folder of a run that was killed a step after its checkpoint.
    """
    from launch.tasks import unique_digits as task

    folder = tmp_path_factory.mktemp("resume")
    size = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 16}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, head in (("base", "CausalLM"), ("judge", "SequenceClassification")):
            task.make_tokenizer(name)
            config = {"architectures": [f"Qwen3For{head}"], "model_type": "qwen3", **size}
            config |= {
                "pad_token_id": 0,
                "id2label": {"0": "S"},
                "score_mean": 0.25,
                "score_std": 1.5,
            }
            Path(name, "config.json").write_text(json.dumps(config))
        for file, rows in DATA.items():
            write(file, rows)
        Path("rewards_of_resume.py").write_text(FUNCTION)
        for kind, values in recipes().items():
            Path(f"{kind}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
            leave_run(kind)
    yield folder
    sys.modules.pop("rewards_of_resume")


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the command line from telling Ray, which this process has imported, of a token."""
    monkeypatch.setattr(cli, "show_ray_token", lambda: None)


@pytest.fixture
def place(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a copy of all that."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rewards_of_resume")
    return tmp_path


def files(folder: str) -> dict[str, bytes]:
    paths = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in paths}


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """told(arguments) resumes, which must be refused and change nothing; returns the lines."""

    def refused(kind: str, *arguments: str) -> list[str]:
        before = files("runs")
        assert cli.main([kind, f"{kind}.yaml", "--resume", *arguments]) == 2
        assert files("runs") == before
        said = capsys.readouterr().err.splitlines()
        lines = [line for line in said if not line.startswith("notice: ")]
        assert 0 < len(lines) <= 3 and all(line.startswith("error: ") for line in lines), lines
        return lines

    return refused


# --- things ---------------------------------------------------------------------------------------


def reorder() -> None:
    write("rows.jsonl", ROWS[9::-1])


def shorten() -> None:
    write("rows.jsonl", ROWS[:9])


def shorten_held_out() -> None:
    write("held_out.jsonl", ROWS[10:11])


def other_answers() -> None:
    write("prompts.jsonl", [row | {"answer": "0"} for row in ROWS[:10]])


def other_template() -> None:
    change_json("base/tokenizer_config.json", chat_template="{{ messages[0].content }}")


def other_calibration() -> None:
    change_json("judge/config.json", score_mean=0.75)


def other_lines() -> None:
    change_json("judge/config.json", note="two\nlines")


CHANGES: list[tuple[str, Callable[[], None], str, str]] = [
    # NVIDIA-NeMo/RL#2519: another data set under a resumed loader is skipped into, silently
    ("sft", reorder, "data.path", f"rows.jsonl: rows: 10 .* now, 10 .* at step {STEP}"),
    # TensorAuto/OpenTau#502: a data set that was uploaded again with another number of rows
    ("sft", shorten, "data.path", f"rows.jsonl: rows: 9 .* now, 10 .* at step {STEP}"),
    # allenai/RL4LMs#48: a resumed run is evaluated on other data than before
    ("sft", shorten_held_out, "held_out.path", "held_out.jsonl: rows: 1 .* now, 2 "),
    # rllm-org/rllm#851: resume is exact or fails closed, over data, rendering and tokenizer
    ("grpo", other_answers, "prompts.path", "prompts.jsonl: rows: 10 .* now, 10 "),
    # no public report known to us
    ("sft", other_template, "learner.model.path", "chat template: 25 characters .* now, 0 ch"),
    # NVIDIA-NeMo/RL#3722: a resumed run with another frozen model than it began with
    ("grpo", other_calibration, "rewards.0.model.path", "config.json: score_mean is 0.75 now"),
    # no public report known to us
    ("grpo", other_lines, "rewards.0.model.path", r'note is "two\\nlines" now, null at step 60'),
]


@pytest.mark.parametrize(("kind", "change", "key", "said"), CHANGES)
def test_what_a_path_names_has_changed(
    place: Path, kind: str, change: Callable[[], None], key: str, said: str
) -> None:
    """The reports stand beside the cases."""
    change()
    with pytest.raises(UserError, match=said) as refused:
        things_of(kind, Resume())
    (line,) = refused.value.problems
    assert line.startswith(f"{key}: ") and line.endswith(f"--accept {key}")


def test_what_is_as_it_was_goes_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also copied elsewhere and back, rewritten with the same content, and saved anew.

    No public report known to us.
    """
    os.utime("rows.jsonl")
    change_json("base/config.json", transformers_version="9.9")
    for kind in ("sft", "grpo"):
        things_of(kind, Resume()).check_accepted()
    assert capsys.readouterr().err == ""


def test_a_reward_model_was_trained_again_under_its_path(place: Path) -> None:
    """Its files say nothing new, its weights do: known when it has loaded, before step 1.

    NVIDIA-NeMo/RL#3722: after a resume the KL is measured against other weights than before.
    """
    with pytest.raises(UserError, match="weights of the reward judge: ffff now, 0a1b at step 60"):
        things_of("grpo", Resume(), weights="ffff")
    things = things_of("grpo", Resume(accept=("rewards.0.model.path",)), weights="ffff")
    things.check_accepted()


def test_data_that_changed_are_refused_before_anything_starts(
    place: Path, told: Callable[..., list[str]]
) -> None:
    """The command line as a whole: exit code 2, the lines that were written since stay.

    NVIDIA-NeMo/RL#2519.
    """
    reorder()
    (line,) = told("sft")
    assert "data.path: rows.jsonl: rows: 10 (" in line and "--accept data.path" in line


def test_a_finished_run_is_refused_in_a_line(place: Path, told: Callable[..., list[str]]) -> None:
    """By the recipe alone where it counts steps, else by the data. No public report known to us."""
    Path("runs/sft/summary.json").write_text(json.dumps({"steps": STEP}))
    for overrides, key in (([f"train.steps={STEP}"], "train.steps"), ([], "train.epochs")):
        (line,) = told("sft", *overrides)
        assert f"{key}: the run has ended after step {STEP}, its model is in runs/sft/model" in line
        assert line.endswith(f"give more than {STEP} steps to go on")


def test_what_is_accepted_is_said_and_kept(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The next checkpoint is made of what was accepted, and is resumed without a word.

    TensorAuto/OpenTau#502.
    """
    shorten_held_out()
    things = things_of("sft", Resume(accept=("held_out.path",)))
    things.check_accepted()
    assert "accepted: held_out.path: held_out.jsonl: rows: 1 (" in capsys.readouterr().err
    recipe, _ = read_recipe("sft.yaml")
    run = RunFolder.open(recipe.run, recipe.to_yaml(), resume=True)
    run.things = things.table
    with run.checkpoint(STEP + 1):
        pass
    things = things_of("sft", Resume(accept=("held_out.path",)))
    with pytest.raises(UserError, match=r"--accept held_out.path: nothing differs .*nothing does"):
        things.check_accepted()


def test_many_differences_are_three_lines(place: Path) -> None:
    """No public report known to us."""
    reorder()
    shorten_held_out()
    other_template()
    with pytest.raises(UserError) as refused:
        things_of("sft", Resume())
    assert [line.partition(": ")[0] for line in refused.value.problems] == [
        "data.path",
        "held_out.path",
        "learner.model.path",
    ]


def test_a_reward_function_that_was_edited_is_a_warning(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No public report known to us."""
    with Path("rewards_of_resume.py").open("a") as file:
        file.write("# tidied\n")
    things_of("grpo", Resume()).check_accepted()
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" now, ")[0].partition(" (")[0] for line in said] == [
        "warning: rewards.1.function: rewards_of_resume:exact: code: 3 lines",
        "warning: evaluation.function: rewards_of_resume:exact: code: 3 lines",
    ]


def test_another_path_under_a_key_that_may_change_is_not_compared(place: Path) -> None:
    """No public report known to us."""
    write("other.jsonl", ROWS[:3])
    things_of("grpo", Resume(), "evaluation.prompts.path=other.jsonl")


def test_a_checkpoint_without_digests_says_so(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorAuto/OpenTau#502: nothing in the checkpoint says what it was made of."""
    (finished_checkpoints(Path("runs/sft"))[-1][1] / "things.json").unlink()
    things_of("sft", Resume())
    (line,) = capsys.readouterr().err.splitlines()
    assert "step-000060: saved by a version that kept no digests" in line


def test_a_data_set_that_is_newly_given_can_be_accepted(
    place: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[..., list[str]]
) -> None:
    """deepfakes/faceswap-playground#247: can validation data be added to a run that is resumed?"""
    before = yaml.safe_load(Path("sft.yaml").read_text())
    Path("sft.yaml").write_text(yaml.safe_dump(before | {"held_out": None}))
    shutil.rmtree("runs/sft")
    leave_run("sft")
    Path("sft.yaml").write_text(yaml.safe_dump(before))
    (line,) = told("sft")
    assert "held_out.path: is 'held_out.jsonl', the run to resume has nothing" in line
    accept = ("held_out.path",)
    assert resumed("sft", monkeypatch, "--accept", *accept) == (0, [Resume(accept)])
    things = things_of("sft", Resume(accept))
    things.check_accepted(loaded=False)
    things.check_accepted()
    assert things.differ == {"held_out.path"}


@pytest.mark.parametrize(
    ("kind", "override", "key"),
    [
        # deepfakes/faceswap-playground#247, the other way round
        ("sft", "held_out=null", "held_out.path"),
        # NVIDIA-NeMo/RL#3722: another Reference than the run began with
        ("grpo", "reference.model={path: base}", "reference.model.path"),
    ],
)
def test_a_section_that_is_given_or_taken_is_one_change(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: Callable[..., list[str]],
    kind: str,
    override: str,
    key: str,
) -> None:
    """The reports stand beside the cases."""
    (line,) = told(kind, override)
    assert f" {key}: is " in line
    assert resumed(kind, monkeypatch, override, "--accept", key)[0] == 0
    things_of(kind, Resume((key,)), override).check_accepted()


def test_another_path_is_accepted_in_a_run_of_a_version_without_digests(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorAuto/OpenTau#502: nothing in the checkpoint says what it was made of."""
    (finished_checkpoints(Path("runs/sft"))[-1][1] / "things.json").unlink()
    write("other.jsonl", ROWS[:10])
    accept = ("data.path",)
    assert resumed("sft", monkeypatch, "data.path=other.jsonl", "--accept", *accept)[0] == 0
    things = things_of("sft", Resume(accept), "data.path=other.jsonl")
    things.check_accepted(loaded=False)
    things.check_accepted()


def test_what_is_accepted_in_vain_is_refused_before_models_load(place: Path) -> None:
    """All but the weights of models that are not trained is known then. No public report known to
    us.
    """
    things = things_of("grpo", Resume(("rewards.0.model.path",)))
    things.check_accepted(loaded=False)
    with pytest.raises(UserError, match="rewards.0.model.path: nothing differs"):
        things.check_accepted()
    with pytest.raises(UserError, match="prompts.path: nothing differs"):
        things_of("grpo", Resume(("prompts.path",))).check_accepted(loaded=False)


@pytest.mark.parametrize(
    "override", ["data.max_tokens=2047", "data.limit=10", "data.response_column=answer"]
)
def test_an_accepted_word_hides_no_changed_rows(place: Path, override: str) -> None:
    """career-ops-hq/career-ops#2138: rows that count the same are not the same."""
    key = override.partition("=")[0]
    things_of("sft", Resume((key,)), override).check_accepted()
    reorder()
    with pytest.raises(UserError, match="rows.jsonl: rows: 10 .* now, 10 .* --accept data.path"):
        things_of("sft", Resume((key,)), override)
    things_of("sft", Resume((key, "data.path")), override).check_accepted()


def test_words_of_the_evaluation_may_change_its_rows(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """allenai/RL4LMs#48: a resumed run is evaluated on other data, which is said."""
    things_of("grpo", Resume(), "evaluation.prompts.limit=1").check_accepted()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("notice: evaluation.prompts.path: held_out.jsonl: rows: 1 (")
    assert line.endswith("; its keys have changed, so the rows may have")


def test_code_of_a_hub_model_is_read_in_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docling-project/docling#4224: code of a hub's model that changes under its name."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = tmp_path / "models--own--code"
    found = []
    for commit, code in (("1" * 40, "a = 1\n"), ("2" * 40, "a = 2\n")):
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "snapshots" / commit / "modeling_own.py").write_text(code)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / "main").write_text(commit)
        found.append(python_files("own/code"))
    assert found[0] != found[1] and all(words.startswith("1 files (") for words in found)
    assert found[1] == python_files(str(model / "snapshots" / ("2" * 40)))


@pytest.mark.parametrize("content", ["{", "[]", "null"])
def test_a_table_that_cannot_be_read_is_one_line(place: Path, content: str) -> None:
    """No public report known to us."""
    file = finished_checkpoints(Path("runs/sft"))[-1][1] / "things.json"
    file.write_text(content)
    with pytest.raises(UserError, match=f"run.folder: {file} cannot be read: it is no JSON object"):
        things_of("sft", Resume())


# --- words ----------------------------------------------------------------------------------------


def resumed(
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    *arguments: str,
    during: Callable[[], None] = lambda: None,
) -> tuple[int, list[Any]]:
    """Resume on the command line with `during` as the run; return the exit code, and what ran."""
    runs: list[Any] = []

    def run(recipe: Any, resume: Any, config_yaml: str) -> dict[str, Any]:
        runs.append(resume)
        during()
        return {}

    module: Any = type(sys)("runner_of_resume")
    module.run = run
    monkeypatch.setitem(sys.modules, "runner_of_resume", module)
    monkeypatch.setattr(cli, "RUNNER", "runner_of_resume")
    return cli.main([kind, f"{kind}.yaml", "--resume", *arguments]), runs


def test_words_that_changed_can_be_accepted(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """huggingface/transformers#18070: other arguments than the checkpoint's, without a warning."""
    key = "learner.optimizer.learning_rate"
    code, runs = resumed("sft", monkeypatch, f"{key}=0.5")
    assert code == 2 and not runs
    assert f"--accept {key}" in capsys.readouterr().err
    code, runs = resumed("sft", monkeypatch, f"{key}=0.5", "--accept", key, "--take-over")
    assert (code, runs) == (0, [Resume((key,), take_over=True)])
    assert f"accepted: {key}: is 0.5, the run to resume has 1e-06" in capsys.readouterr().err


def test_a_key_under_which_nothing_differs(place: Path, told: Callable[..., list[str]]) -> None:
    """No public report known to us."""
    for key in ("learner.optimizer.learning_rat", "train.batch_size", "data"):
        (line,) = told("sft", "--accept", key)
        assert line.startswith(f"error: --accept {key}: nothing to accept there")
        assert "learner.model.path, data.path, held_out.path" in line


def test_many_changed_words_are_three_lines(place: Path, told: Callable[..., list[str]]) -> None:
    """No public report known to us."""
    keys = ["run.seed", "train.batch_size", "learner.optimizer.eps", "learner.micro_batch_tokens"]
    *_, last = told("sft", *(f"{key}=7" for key in keys))
    assert sum(key in last for key in keys) == 2 and "--accept each" in last


@pytest.mark.parametrize("option", [["--accept", "data.path"], ["--take-over"]])
@pytest.mark.parametrize("command", [["sft"], ["submit", "--address", "http://127.0.0.1:1"]])
def test_options_of_a_resume_belong_to_a_resume(
    capsys: pytest.CaptureFixture[str], command: list[str], option: list[str]
) -> None:
    """No public report known to us."""
    assert cli.main([*command, "sft.yaml", *option]) == 2
    assert capsys.readouterr().err == f"error: {option[0]}: only together with --resume\n"


def test_a_submitted_job_is_told_how_to_resume() -> None:
    """No public report known to us."""
    words = shlex.split(entrypoint("sft", "a.yaml", [], Resume(("data.path",), take_over=True)))
    assert words[4:8] == ["--resume", "--accept", "data.path", "--take-over"]


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "override", "said"),
    [
        # Lightning-AI/pytorch-lightning#2344, #1922: max_steps below the checkpoint's is not heeded
        ("grpo", "step.steps=10", "step.steps: makes a run of 10 steps, .* has done 60"),
        # AI-Hypercomputer/maxtext#4046: a checkpoint beyond the steps fails clearly and early
        ("sft", "train.steps=59", "train.steps: makes a run of 59 steps, .* has done 60"),
        # no public report known to us
        ("sft", "train.epochs=5", "train.epochs: makes a run of 50 steps, .* has done 60"),
    ],
)
def test_a_resume_with_fewer_steps_than_were_done(
    place: Path, told: Callable[..., list[str]], kind: str, override: str, said: str
) -> None:
    (line,) = told(kind, override)
    assert re.search(said, line) and "60 or more" in line


def test_accepted_rows_that_make_fewer_steps(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AI-Hypercomputer/maxtext#4046, where the data decide how many steps there are."""
    shorten()
    assert cli.main(["sft", "sft.yaml", "--resume", "--accept", "data.path"]) == 2
    *_, accepted, refused = capsys.readouterr().err.splitlines()
    assert accepted.startswith("accepted: data.path: rows.jsonl: rows: 9 (")
    assert "error: train.epochs: makes a run of 54 steps" in refused


def test_as_many_steps_as_were_done_do_the_end_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PrimeIntellect-ai/prime-rl#3352: a run resumed at its last step waits for ever."""
    assert resumed("grpo", monkeypatch, "step.steps=60")[0] == 0
    assert not list(fewer_steps(read_recipe("sft.yaml")[0], STEP, STEP))


# --- the lock -------------------------------------------------------------------------------------


def child(target: Callable[..., None], *args: Any) -> Any:
    """Start a process."""
    process = FORK.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def hold(folder: Path, held: Any, end: Any) -> None:
    """Hold the folder until told to end; tell whether it was ours to the end."""
    try:
        with RunLock(folder) as lock:
            held.send("held")
            end.wait(20)
            lock.check()
            held.send("ours")
    except UserError as error:
        held.send(str(error))
    except Displaced as error:
        held.send(f"{error.code} {error}")


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Any]:
    """A process that holds a run folder, with `said()`, `end` and the `folder`."""
    ours, theirs = FORK.Pipe()
    end = FORK.Event()
    folder = tmp_path / "runs" / "held"
    process = child(hold, folder, theirs, end)

    def said() -> Any:
        assert ours.poll(20)
        return ours.recv()

    assert said() == "held"
    yield SimpleNamespace(process=process, end=end, folder=folder, said=said)
    process.kill()
    process.join()


def taken(folder: Path, **how: Any) -> float:
    """Take and leave a folder; return the seconds it took."""
    began = time.monotonic()
    with RunLock(folder, **how) as lock:
        lock.check()
    return time.monotonic() - began


def rewrite(folder: Path, **changes: Any) -> None:
    """Change what the lock file says of its holder."""
    with locks._alone(folder / locks.FILE) as file:
        held = locks._read(file)
        assert held is not None
        locks._write(file, replace(held, **changes))


def left_by(folder: Path, **changes: Any) -> None:
    """Leave the lock of a process that has ended."""
    folder.mkdir(parents=True)
    gone = replace(Holder.this_process(), pid=2**22 + 1, **changes)
    with locks._alone(folder / locks.FILE, os.O_CREAT) as file:
        locks._write(file, gone)


def race(folder: Path, start: Any, won: Any) -> None:
    start.wait(20)
    try:
        with RunLock(folder):
            won.put(os.getpid())
            time.sleep(0.05)
    except UserError as error:
        won.put(str(error))


@pytest.mark.parametrize("before", ["new", "killed"])
def test_one_of_several_at_once_gets_the_folder(tmp_path: Path, before: str) -> None:
    """TheMorpheus407/RepoLens#222: two resumes of one run at once, which corrupt its state;
    BSC-ES/autosubmit#2027: the same job running twice.
    """
    folder = tmp_path / "run"
    if before == "killed":
        left_by(folder)
    barrier = FORK.Barrier(3)
    won = FORK.Queue()
    racers = [child(race, folder, barrier, won) for _ in range(3)]
    outcomes = [won.get(timeout=20) for _ in racers]
    for racer in racers:
        racer.join()
    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert sum(f"process {winner} on" in str(outcome) for outcome in outcomes) == 2


def test_a_second_resume_is_refused_and_changes_nothing(
    place: Path, told: Callable[..., list[str]]
) -> None:
    """TheMorpheus407/RepoLens#222."""
    with RunLock(Path("runs/sft")):
        (line,) = told("sft")
    assert f"runs/sft belongs to a run that is going on, process {os.getpid()} on" in line
    assert "--resume --take-over" in line


def test_a_second_new_run_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two new runs in one folder: the first has it before it loads anything.

    No public report known to us.
    """
    with RunLock(Path("runs/new")):
        assert cli.main(["sft", "sft.yaml", "run.folder=runs/new"]) == 2
        assert "runs/new belongs to a run that is going on" in capsys.readouterr().err
        assert os.listdir("runs/new") == [locks.FILE]
    assert not Path("runs/new").exists()


def test_a_killed_run_is_resumed_at_once(holder: Any) -> None:
    """tox-dev/filelock#115: what becomes of a lock whose process was killed? Here nobody has even
    asked for its exit code.
    """
    os.kill(holder.process.pid, signal.SIGKILL)
    while psutil.Process(holder.process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.001)
    assert taken(holder.folder) < 1


def test_a_process_id_that_was_given_out_again(holder: Any) -> None:
    """nightlyone/lockfile#39: a lock that a reused process id keeps for ever."""
    rewrite(holder.folder, started=Holder.this_process().started - 1000)
    assert taken(holder.folder) < 1


def test_a_new_run_that_was_killed_while_it_began_blocks_no_other(tmp_path: Path) -> None:
    """No public report known to us."""
    left_by(tmp_path / "run")
    settings = RunSettings(folder=str(tmp_path / "run"), tensorboard=False)
    RunFolder.check(settings, resume=False)
    with RunLock(tmp_path / "run"):
        RunFolder.open(settings, "kind: sft\n").close()
    assert [path.name for path in (tmp_path / "run").glob("*.yaml")] == ["config.yaml"]
    assert not (tmp_path / "run" / locks.FILE).exists()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life in milliseconds."""
    monkeypatch.setattr(locks, "BEAT_S", 0.01)
    monkeypatch.setattr(locks, "PATIENCE_S", 0.06)


OTHERS = [
    # a job queued again on another node after its own died; no public report known to us
    "another machine",
    # ROCm/aiter#5269, garrytan/gbrain#2840: a container's process id says nothing in another one
    locks.this_machine().replace("pid:[", "pid:[1"),
    # this machine before it was started again
    locks.this_machine().replace("-", "0"),
]


@pytest.mark.parametrize("machine", OTHERS)
def test_on_another_machine_signs_of_life_decide(
    tmp_path: Path, quick: None, machine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reports stand beside the machines."""
    left_by(tmp_path / "run", machine=machine)
    assert 0.06 < taken(tmp_path / "run") < 1
    assert "none came: going on" in capsys.readouterr().err


@pytest.mark.parametrize("machine", OTHERS[:2])
def test_a_run_on_another_machine_that_gives_signs_of_life(
    quick: None, machine: str, monkeypatch: pytest.MonkeyPatch, holder: Any
) -> None:
    """filelock#553 (tox-dev): a lock of another host is believed or broken by its process id."""
    monkeypatch.setattr(locks, "this_machine", lambda: machine)
    with pytest.raises(UserError, match=f"process {holder.process.pid} on"):
        taken(holder.folder)
    holder.end.set()
    assert holder.said() == "ours"


def test_a_run_that_is_taken_over_stops_and_writes_nothing_more(
    holder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """No public report known to us."""
    assert taken(holder.folder, take_over=True) < 1
    assert f"taken over from process {holder.process.pid} on" in capsys.readouterr().err
    holder.end.set()  # it wakes up when the other run has ended and left
    assert re.fullmatch(
        r"1 error: run.folder: .*held was taken over .*this run stops", holder.said()
    )


def test_a_displaced_run_is_one_line_and_exit_code_1(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its traceback would go into the folder, which is no longer its own.

    No public report known to us.
    """
    before = files("runs")

    def displaced() -> None:
        raise Displaced(Path("runs/sft"), "the run of process 7 on node b")

    assert resumed("sft", monkeypatch, during=displaced)[0] == 1
    assert files("runs") == before
    assert capsys.readouterr().err.splitlines() == [
        "error: run.folder: runs/sft was taken over by the run of process 7 on node b; this run "
        "stops"
    ]


def test_a_run_that_fails_when_it_is_displaced_keeps_no_traceback_there(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other run removes its drafts, which fails it before it looks whose folder it is.

    dejuknow/md-redline#67: a holder that stalled comes back and removes another's lock.
    """
    other = RunLock(Path("runs/sft"), take_over=True)

    def run() -> None:
        with accounted_for("runs/sft"), RunLock(Path("runs/sft")):
            other.__enter__()
            Path("runs/sft/checkpoints/step-000061.1.tmp/a").write_text("")

    assert resumed("sft", monkeypatch, during=run)[0] == 1
    said = capsys.readouterr().err.splitlines()
    assert "runs/sft was taken over by the run of process" in said[-1]
    assert "Traceback" not in "".join(said) and not Path("runs/sft/error.log").exists()
    other.__exit__()
    assert not Path("runs/sft", locks.FILE).exists()


def test_a_failure_in_a_folder_that_is_gone_stays_what_it_was(tmp_path: Path) -> None:
    """No public report known to us."""
    with pytest.raises(WorkerError), RunLock(tmp_path / "run") as lock:
        shutil.rmtree(lock.folder)
        raise WorkerError("critic failed")


def test_a_displaced_run_leaves_the_folder_to_the_other(tmp_path: Path) -> None:
    """No public report known to us."""
    settings = RunSettings(folder=str(tmp_path / "run"), tensorboard=False)
    with RunLock(tmp_path / "run") as lock:
        folder = RunFolder.open(settings, "")
        folder.lock = lock
        with folder.checkpoint(1):
            folder.log(1, {"loss": 1.0})
        other = RunLock(tmp_path / "run", take_over=True)
        with pytest.raises(Displaced), folder.checkpoint(2), other:
            before = files(str(tmp_path))
            for write in (lambda: folder.log(2, {}), lambda: folder.finish({})):
                with pytest.raises(Displaced):
                    write()
            with pytest.raises(Displaced), folder.checkpoint(2):
                pass
            assert files(str(tmp_path)) == before
        assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000001"]


# --- with real processes of a run -----------------------------------------------------------------


@pytest.fixture
def real(place: Path) -> Path:
    """The working directory with models that load, and nothing begun."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from launch.tasks import unique_digits as task

    shutil.rmtree("runs")
    task.make_model("base", 0)
    config = AutoConfig.from_pretrained("base", num_labels=1)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained("judge")
    return place


@pytest.mark.engines
@pytest.mark.timeout(120)
def test_weights_of_a_frozen_model_are_compared_once_it_has_loaded(
    real: Path, cluster: None
) -> None:
    """NVIDIA-NeMo/RL#3722."""
    few = ["generation.threads=1", "generation.kv_cache_gib=0.125", "algorithm.kl_beta=0"]
    recipe, _ = read_recipe("grpo.yaml", few)
    leave_run("grpo")
    before = files("runs")
    with pytest.raises(UserError) as refused:
        driver.run(recipe, Resume())  # type: ignore[arg-type]
    (line,) = refused.value.problems
    assert re.search(r"weights of the reward judge: [0-9a-f]{32} now, 0a1b at step 60", line)
    assert files("runs") == before


@pytest.mark.engines
@pytest.mark.timeout(120)
def test_a_run_that_is_taken_over_is_resumed_by_the_other(
    real: Path, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first run ends before its next step is written. What it saved is gone on from with other
    held-out rows, which are accepted, and as many steps as were done: the end is done again.

    No public report known to us.
    """
    small = ["run.checkpoint_every_steps=1", "run.progress=false"]
    recipe: Any = read_recipe("sft.yaml", [*small, "train.steps=100000"])[0]
    other = RunLock(Path("runs/sft"), take_over=True)

    def take_over() -> None:
        while not finished_checkpoints(Path("runs/sft")):
            time.sleep(0.01)
        other.__enter__()

    thread = threading.Thread(target=take_over)
    thread.start()
    with pytest.raises(Displaced):
        supervised.run(recipe)
    thread.join()
    done, _ = finished_checkpoints(Path("runs/sft"))[-1]
    assert not Path("runs/sft/model").exists() and not Path("runs/sft/summary.json").exists()
    other.__exit__()
    shorten_held_out()
    recipe = read_recipe("sft.yaml", [*small, f"train.steps={done}"])[0]
    supervised.run(recipe, resume=Resume(("held_out.path",)))
    assert "accepted: held_out.path" in capsys.readouterr().err
    lines = Path("runs/sft/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["phase"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, done + 1))
    assert Path("runs/sft/model/config.json").exists()
    assert not Path("runs/sft", locks.FILE).exists()
