"""Bad input: one line per problem on stderr, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.run.resume import Resume
from launch import cli
from learners.settings import ModelSettings

Told = Callable[..., list[str]]


@pytest.fixture
def told(place: Path, capsys: pytest.CaptureFixture[str]) -> Told:
    """told(arguments) runs the command, which must refuse; returns the lines of stderr."""

    def refused(*arguments: str) -> list[str]:
        before = sorted(place.rglob("*"))
        assert cli.main(list(arguments)) == 2
        lines = capsys.readouterr().err.splitlines()
        assert 0 < len(lines) <= 3 and all(line.startswith("error: ") for line in lines), lines
        left = [p for p in place.rglob("*") if p not in before and "__pycache__" not in p.parts]
        assert not left
        return lines

    return refused


# --- known within a second, by the recipe and by JSON files ---------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ppo", "nowhere.yaml"], "nowhere.yaml"),
        (["ppo", "decoder"], "decoder"),
        (["ppo", "broken.yaml"], "broken.yaml:3"),
        (["ppo", "empty.yaml"], "empty.yaml"),
        (["ppo", "grpo.yaml"], "run quatuor grpo, not quatuor ppo"),
        (["ppo"], "RECIPE"),
        (["pppo", "ppo.yaml"], "pppo"),
        (["ppo", "ppo.yaml", "--rezume"], "rezume"),
        (["ppo", "ppo.yaml", "step.stepz=3"], "did you mean step.steps"),
        (["ppo", "ppo.yaml", "step.steps"], "step.steps"),
        (["ppo", "ppo.yaml", "step.steps=three"], "must be a whole number, not 'three'"),
        (["ppo", "ppo.yaml", "step.steps=0"], "must be at least 1, not 0"),
        (["ppo", "ppo.yaml", "generation.temperature=-1"], "must be above 0"),
        (["ppo", "ppo.yaml", "actor.zero_stage=4"], "actor.zero_stage"),
        (["ppo", "ppo.yaml", "cluster.device=tpu"], "cluster.device"),
        (["ppo", "ppo.yaml", "step.mini_batch_size=7"], "7 does not divide"),
        (["ppo", "ppo.yaml", "generation.max_new_tokens=1000"], "leaves no room for a prompt"),
        (["ppo", "ppo.yaml", "generation.top_p=0.9"], "samples from another distribution"),
        (["ppo", "ppo.yaml", "actor.model.path=./gone"], "no such model folder"),
        (["ppo", "ppo.yaml", "rewards.0.model.path=./decoder"], "has no score head"),
        (["ppo", "ppo.yaml", "critic.model.path=./encoder"], "is an encoder"),
        (["ppo", "ppo.yaml", "prompts.path=./gone.jsonl"], "no such data file"),
        (["ppo", "ppo.yaml", "prompts.prompt_column=question"], "has no column 'question'"),
        (["rm", "rm.yaml", "data.rejected_column=worse"], "has no column 'worse'"),
        (["grpo", "grpo.yaml", "rewards.0.function=math:pi"], "is a float, not a function"),
        (["ppo", "ppo.yaml", "run.folder=decoder"], "decoder exists"),
        (["ppo", "ppo.yaml", "run.folder=/proc/run"], "/proc/run cannot be made"),
        (["ppo", "ppo.yaml", "run.folder=prompts.jsonl/run"], "is a file"),
        (["ppo", "ppo.yaml", "--resume"], "nothing to resume"),
        (["ppo", "ppo.yaml", "run.wandb_project=curves"], "wandb is not installed"),
        (
            ["grpo", "grpo.yaml", "cluster.device=cuda", "generation.engines=12"],
            "13 GPUs are needed, the cluster has",
        ),
        (
            ["slurm", "grpo.yaml", "cluster.device=cuda", "generation.engines=12"],
            "--nodes: 13 GPUs are needed",
        ),
        (
            ["slurm", "grpo.yaml", "cluster.device=cuda", "generation.tensor_parallel=9"],
            "raise cluster.gpus_per_node",
        ),
        (["slurm", "grpo.yaml", "--script", "."], "--script: . cannot be written: Is a directory"),
        (["slurm", "grpo.yaml", "--script", "x" * 300], "cannot be written: File name too long"),
        (["plan", "nowhere.yaml"], "nowhere.yaml"),
        (["slurm", "ppo.yaml", "step.stepz=3"], "did you mean step.steps"),
        (
            ["submit", "ppo.yaml", "step.stepz=3", "--address", "http://127.0.0.1:1"],
            "did you mean step.steps",
        ),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_recipes_arguments_and_files(
    place: Path, told: Told, arguments: list[str], said: str
) -> None:
    (place / "broken.yaml").write_text("kind: ppo\nrun: {folder: [\n")
    (place / "empty.yaml").write_text("")
    lines = told(*arguments)
    assert said in lines[0], lines


def write_run(folder: Path, recipe: Path) -> None:
    """A run that was stopped after its first step."""
    from launch.recipe.read import load_recipe

    (folder / "checkpoints/step-000001").mkdir(parents=True)
    (folder / "config.yaml").write_text(load_recipe(recipe).to_yaml())


def test_a_resume_with_a_changed_recipe(place: Path, told: Told) -> None:
    write_run(place / "runs/new", place / "grpo.yaml")
    lines = told(
        "grpo",
        "grpo.yaml",
        "--resume",
        "actor.optimizer.learning_rate=0.5",
        "algorithm.kl_beta=0.1",
    )
    assert (
        "actor.optimizer.learning_rate: is 0.5, the run to resume has 1e-06" in lines[0]
        and len(lines) == 2
    )
    assert "algorithm.kl_beta" in lines[1] and "choose another run.folder" in lines[1]


def test_a_resume_may_go_on_for_longer(place: Path) -> None:
    from launch.recipe.read import read_recipe

    write_run(place / "runs/new", place / "grpo.yaml")
    read_recipe(
        "grpo.yaml", ["step.steps=500", "alarms.clip_fraction=0.9"], files=True, resume=Resume()
    )


# --- known once data and tokenizers are read, before any model loads ------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:no", "nowhere.invalid:6379"])
def test_a_cluster_that_does_not_answer(real: Path, told: Told, address: str) -> None:
    """Seconds, not Ray's own minute of trying."""
    (line,) = told("grpo", "grpo.yaml", f"cluster.address={address}")
    assert f"cluster.address: no Ray cluster can be joined at {address}: " in line


def test_a_cluster_that_has_ended(real: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray remembers where the last one was, and would wait for it."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    (line,) = told("grpo", "grpo.yaml", "cluster.address=auto")
    assert "cluster.address: no Ray cluster can be joined at auto: " in line and "refused" in line


@pytest.mark.parametrize("greeting", [b"", b"SSH-2.0-OpenSSH_9.2\r\n"], ids=["silent", "SSH"])
def test_a_port_where_something_else_listens(
    real: Path, told: Told, monkeypatch: pytest.MonkeyPatch, greeting: bytes
) -> None:
    monkeypatch.setattr("actors.cluster.connection.REACH_S", 0.2)
    with socket.create_server(("", 0)) as server:  # Ray takes localhost for this machine's address
        guests: list[socket.socket] = []

        def greet() -> None:
            guests.append(server.accept()[0])
            guests[0].sendall(greeting)

        threading.Thread(target=greet, daemon=True).start()
        (line,) = told("grpo", "grpo.yaml", f"cluster.address=127.0.0.1:{server.getsockname()[1]}")
    assert "what listens there is not Ray's head" in line


def write_prompts(place: Path, *prompts: Any) -> None:
    rows = [{"prompt": prompt, "answer": "2"} for prompt in prompts]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("prompts", "override", "said"),
    [
        (["1+1=", ""], "run.seed=0", "row 2: the prompt is empty"),
        (
            ["1+1=", "0123456789" * 4],
            "prompts.max_prompt_tokens=20",
            "prompts.jsonl: 1 of 2 prompts are too long for max_prompt_tokens 20; at most 5% may "
            "be dropped (max_dropped)",
        ),
        (
            ["1+1=", "0123456789" * 4],
            ["prompts.max_prompt_tokens=20", "prompts.long_prompts=refuse"],
            "row 2: the prompt has 41 tokens, too many for max_prompt_tokens 20; raise it, or set "
            "long_prompts: drop",
        ),
        (
            ["0123456789" * 4],
            ["prompts.max_prompt_tokens=20", "prompts.long_prompts=drop"],
            "no row can be used: 1",
        ),
        (
            [[{"role": "user", "content": "1+1="}]],
            "run.seed=0",
            "the tokenizer has no chat template",
        ),
        ([["1+1="]], "run.seed=0", "a prompt must be text, or a list of messages"),
        (["<bos><bos>1+1="], "run.seed=0", "begins with <bos> twice"),
    ],
    ids=[
        "empty",
        "too many too long",
        "too long",
        "all too long",
        "chat without template",
        "neither text nor chat",
        "double BOS",
    ],
)
def test_prompts(
    real: Path, told: Told, prompts: list[Any], override: str | list[str], said: str
) -> None:
    write_prompts(real, *prompts)
    overrides = [override] if isinstance(override, str) else override
    assert said in told("grpo", "grpo.yaml", *overrides)[0]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("tokenizer.json", "{}", "decoder: cannot be loaded: KeyError 'added_tokens'"),
        ("config.json", {"hidden_size": "16"}, "decoder: cannot be loaded: StrictDataclass"),
        (
            "config.json",
            {"vocab_size": 4},
            "actor.model: ./decoder knows 4 ids, the data hold ids up to",
        ),
    ],
)
def test_a_malformed_model(
    real: Path, told: Told, file: str, text: str | dict[str, Any], said: str
) -> None:
    path = real / "decoder" / file
    path.write_text(
        text if isinstance(text, str) else json.dumps(json.loads(path.read_text()) | text)
    )
    (line,) = told("grpo", "grpo.yaml")
    assert said in line


def test_a_critic_that_reads_other_ids_than_the_actor_writes(real: Path, told: Told) -> None:
    file = real / "reward_model/tokenizer.json"
    file.write_text(file.read_text().replace('"7":', '"X":'))
    lines = told("ppo", "ppo.yaml")
    assert "critic.model" in lines[0] and "has another vocabulary than the Actor" in lines[0]


def test_a_model_with_code_of_its_own(
    place: Path, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    file = place / "decoder/config.json"
    config = json.loads(file.read_text()) | {"auto_map": {"AutoConfig": "own.OwnConfig"}}
    file.write_text(json.dumps(config))
    assert cli.main(["sft", "sft.yaml", "--check"]) == 0  # Transformers has code for that one too
    capsys.readouterr()
    file.write_text(json.dumps(config | {"model_type": "own"}))
    (line,) = told("sft", "sft.yaml")
    assert line.startswith("error: sft.yaml:") and line.endswith(
        ": learner.model.path: ./decoder comes with code of its own (auto_map); set "
        "learner.model.trust_remote_code: true to run it"
    )
    assert cli.main(["sft", "sft.yaml", "--check", "learner.model.trust_remote_code=true"]) == 0
    runs, notice = capsys.readouterr().err.splitlines()
    assert runs == "learner.model: Python code that comes with ./decoder will run"
    assert "learner.model.attention: auto is eager for ./decoder: its own code" in notice


def test_a_reward_model_that_scores_with_another_tokenizer_than_it_was_trained_with(
    real: Path, told: Told
) -> None:
    from learners.checkpoints import load_tokenizer
    from learners.data.tokenise import tokenizer_digest

    config = json.loads((real / "reward_model/config.json").read_text())
    trained_with = tokenizer_digest(load_tokenizer(ModelSettings(path=str(real / "reward_model"))))
    (real / "reward_model/config.json").write_text(
        json.dumps(config | {"tokenizer_digest": trained_with})
    )
    file = real / "reward_model/tokenizer.json"
    file.write_text(file.read_text().replace('"7":', '"X":'))
    recipe = yaml.safe_load((real / "ppo.yaml").read_text())
    recipe["critic"]["model"]["path"] = "./decoder"
    (real / "ppo.yaml").write_text(yaml.safe_dump(recipe))
    assert (
        "rewards.0.model.path: ./reward_model was trained with another tokenizer"
        in told("ppo", "ppo.yaml")[0]
    )
