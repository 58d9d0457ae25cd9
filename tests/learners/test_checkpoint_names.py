"""Weights travel as a checkpoint holds them, whatever they are called in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from benchmarks.family_checks import Weights, make_model
from benchmarks.family_shapes import SHAPES
from learners.checkpoint_names import entries_of, to_checkpoint
from learners.checkpoints import load_causal_lm
from learners.settings import LearnerSettings, ModelSettings
from tests.learners.ranks import Ranks

CONVERTED = ("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "gpt_neox", "qwen3_next")
AS_THEY_ARE = ("llama (tied)", "gpt2", "lfm2", "gpt_oss")


def load(path: str) -> Any:
    return load_causal_lm(ModelSettings(path=path, attention="eager"))


def sent(weights: Any) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for names, tensors in weights.iter_groups()
        for name, tensor in zip(names, tensors, strict=True)
    }


def assert_same(found: dict[str, torch.Tensor], path: str) -> None:
    files = load_file(Path(path, "model.safetensors"))
    assert found.keys() == files.keys()
    for name, tensor in files.items():
        torch.testing.assert_close(found[name], tensor, atol=0, rtol=0)


@pytest.mark.parametrize("name", [*CONVERTED, *AS_THEY_ARE])
def test_weights_travel_as_the_file_holds_them(name: str, tmp_path: Path) -> None:
    path = make_model(SHAPES[name], tmp_path)
    weights = Weights(load(path))
    assert_same(sent(weights), path)
    expected = [
        (n, t.dtype, tuple(t.shape))
        for names, tensors in weights.iter_groups()
        for n, t in zip(names, tensors, strict=True)
    ]
    assert weights.metadata() == expected
    in_memory = set(dict(weights.model.named_parameters()))
    assert (name in AS_THEY_ARE) == (in_memory <= {n for n, *_ in expected})


def test_whole_weights_are_sent_from_where_they_are(tmp_path: Path) -> None:
    weights = Weights(load(make_model(SHAPES["llama"], tmp_path)))
    found = sent(weights)
    parameters = dict(weights.model.named_parameters())
    assert all(found[name].data_ptr() == p.data_ptr() for name, p in parameters.items())
    assert not any(tensor.requires_grad for tensor in found.values())


def test_what_needs_no_conversion_is_not_touched(tmp_path: Path) -> None:
    model = load(make_model(SHAPES["llama"], tmp_path))
    names = [name for name, _ in model.named_parameters()]
    tensors = list(model.parameters())
    same_names, same = to_checkpoint(model, names, tensors)
    assert same_names == names and all(a is b for a, b in zip(same, tensors, strict=True))


def test_shapes_are_known_without_weights(tmp_path: Path) -> None:
    model = load(make_model(SHAPES["mixtral"], tmp_path))
    huge = [("model.layers.0.mlp.experts.down_proj", torch.bfloat16, (8, 2**20, 2**20))]
    assert entries_of(model, huge) == [
        (f"model.layers.0.block_sparse_moe.experts.{i}.w2.weight", torch.bfloat16, (2**20, 2**20))
        for i in range(8)
    ]


@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_names_stay_when_a_model_was_exported(name: str, tmp_path: Path) -> None:
    weights = Weights(load(make_model(SHAPES[name], tmp_path / "model")))
    before = sent(weights)
    weights.export(str(tmp_path / "export"))
    assert sent(weights).keys() == before.keys() == {n for n, *_ in weights.metadata()}
    assert_same(before, str(tmp_path / "export"))


def test_a_model_that_came_from_no_files_has_the_names_of_its_kind() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {k: v for k, v in SHAPES["mixtral"].items() if k != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **fields))
    assert "model.layers.1.block_sparse_moe.experts.3.w1.weight" in sent(Weights(model))


def gathered(rank: Any, path: str) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """What a rank under ZeRO-3 says that it sends, and what it sends."""
    from learners.actor import ActorLearner
    from learners.algorithms.grpo import GRPO, GRPOSettings

    settings = LearnerSettings(model=ModelSettings(path=path), zero_stage=3, micro_batch_tokens=40)
    actor = ActorLearner(settings, GRPO(GRPOSettings(), 2), 1.0, 16, 10, rank)
    return actor.metadata(), sent(actor)


@pytest.mark.engines
@pytest.mark.models
@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_sharded_weights_travel_as_the_file_holds_them(
    name: str, two_ranks: Ranks, tmp_path: Path
) -> None:
    path = make_model(SHAPES[name], tmp_path)
    for metadata, weights in two_ranks.run(gathered, path):
        assert_same(weights, path)
        assert metadata == [(n, t.dtype, tuple(t.shape)) for n, t in weights.items()]


@pytest.fixture(scope="module")
def two_ranks() -> Any:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def test_names_of_old_times_are_no_conversion() -> None:
    """ZeRO-3's loading keeps them among the others, and their reverse would be written."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES["llama"]))
    model._weight_conversions = get_model_conversion_mapping(model)
    names = [name for name, _ in model.named_parameters()]
    tensors = [p.detach() for p in model.parameters()]
    assert model._weight_conversions and to_checkpoint(model, names, tensors) == (names, tensors)
