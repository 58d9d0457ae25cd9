"""Families of models that differ in kind: right in every role, with an engine and without.

`benchmarks/families.py` examines all of them with the same checks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.engine.limits import GATED_DELTA, engine_problem, sync_problem
from benchmarks import families
from benchmarks import family_checks as checks
from benchmarks.family_shapes import SHAPES
from learners.errors import UserError
from learners.settings import ModelSettings
from tests.actors.troubled import crash, hang

pytestmark = pytest.mark.models

# what each of them has that the others have not
WITH_ENGINE = {
    "gpt2": "positions in a table, matrices the other way round",
    "opt (word_embed_proj)": "embeddings narrower than the layers",
    "gpt_neox (padded vocabulary)": "vLLM serves Transformers' own code, and pads the vocabulary",
    "mistral (sliding window)": "a window",
    "qwen3_moe": "experts that memory holds in one tensor",
    "mixtral": "experts that memory holds in one tensor, under other names",
    "deepseek_v3": "latent attention, queries by head, a buffer that checkpoints hold",
    "lfm2": "a convolution with a state, queries by head",
}
WITHOUT = {
    **WITH_ENGINE,
    "llama (yarn rope)": "scaled positions",
    "llama (dynamic rope)": "positions that depend on the length",
    "gemma2": "capped attention scores",
    "gemma3_text": "norms around 1, two kinds of positions",
    "falcon": "one head of keys, no table",
    "qwen3_next": "linear attention",
    "gpt_oss": "attention sinks, experts with biases",
    "bloom": "distances in place of positions",
}


@pytest.mark.engines
@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", WITH_ENGINE)
def test_the_engine_follows_the_actor(name: str) -> None:
    found = families.examine_apart(name, ("actor", "engine", "sync"))
    assert found == dict.fromkeys(found, "yes"), WITH_ENGINE[name]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: checks.make_model(SHAPES[name], tmp_path_factory.mktemp("m")) for name in WITHOUT}


@pytest.mark.parametrize("name", WITHOUT)
def test_log_probs_are_those_of_plain_transformers(
    name: str, made: dict[str, str], tmp_path: Path
) -> None:
    checks.check_actor(made[name])
    checks.check_export(made[name], tmp_path)
    checks.check_bfloat16(made[name])


@pytest.mark.parametrize(
    "name", ["mistral (sliding window)", "qwen3_moe", "deepseek_v3", "gemma2", "gpt2"]
)
def test_a_family_is_right_as_reward_model_and_critic(
    name: str, made: dict[str, str], tmp_path: Path
) -> None:
    checks.check_reward_model(made[name], tmp_path / "reward_model")
    checks.check_plain_reward_model(made[name], tmp_path / "reward_model")
    checks.check_critic(made[name], tmp_path / "critic")
    checks.check_critic_of_reward_model(made[name], tmp_path / "other")


# --- the matrix itself ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("examine", "words"), [(crash, "crashed (-6)"), (hang, "no answer within 4 s")]
)
def test_a_process_that_ends_or_hangs_leaves_words(
    examine: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "examine", examine)
    found = families.examine_apart(
        "gpt2", ("actor", "engine"), limit_s=30 if examine is crash else 4
    )
    assert found == {"actor": "yes", "engine": words}


def test_the_table_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- /table -->\nafter\n")
    cells = dict.fromkeys(families.CELLS, "yes")
    families.write_table(page, {"a": cells, "b": cells | {"sync": "no | way"}, "c": {}})
    text = page.read_text()
    assert text.startswith("before\n<!-- table -->") and text.endswith("<!-- /table -->\nafter\n")
    assert "old" not in text and "| a | yes | yes |" in text
    assert "| b | yes | yes | no [1] |" in text and "1. no | way" in text and "not tried" in text


def test_words_name_no_folder_and_say_what_an_error_is(tmp_path: Path) -> None:
    def fail(error: Exception) -> None:
        raise error

    told = checks.words_of(str(tmp_path), fail, UserError(f"{tmp_path}/model: has none\nmore"))
    assert told == "model: has none"
    assert checks.words_of("x", fail, KeyError("w | x")) == "KeyError: 'w / x'"


@pytest.mark.parametrize("kind", GATED_DELTA)
def test_what_an_engine_cannot_do_on_cpus_is_told_by_the_config(kind: str) -> None:
    config = {"model_type": kind}
    assert "set dtype: bfloat16" in engine_problem(config, "float32", "cpu")
    assert engine_problem({"model_type": "whole", "text_config": config}, "float32", "cpu")
    assert not engine_problem(config, "bfloat16", "cpu")
    assert not engine_problem(config, "float32", "cuda")
    assert not engine_problem(SHAPES["qwen3"], "float32", "cpu")


def test_families_that_no_engine_can_follow_are_told_by_the_config() -> None:
    assert "cannot take new weights" in sync_problem(SHAPES["gpt_oss"])
    assert "no kernel for mamba on CPUs" in engine_problem(SHAPES["mamba"], "float32", "cpu")
    assert not engine_problem(SHAPES["mamba"], "float32", "cuda")


@pytest.mark.engines
def test_an_engine_refuses_what_it_cannot_do_in_one_line(tmp_path: Path) -> None:
    path = checks.make_model(SHAPES["qwen3_next"], tmp_path)
    with pytest.raises(AssertionError, match="^actor.model: .* in bfloat16 alone") as refused:
        checks.Engine(ModelSettings(path=path))
    assert "\n" not in str(refused.value)
