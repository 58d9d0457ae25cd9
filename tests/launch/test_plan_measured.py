"""Weights, gradients and optimizer states: the plan against what DeepSpeed really holds, tensor by
tensor.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from launch.plan.memory import model_states
from launch.plan.shapes import find_shape
from learners.settings import LearnerSettings, ModelSettings, OptimizerSettings, Rank
from tests.learners.ranks import Ranks

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]

CONFIG = Qwen3Config(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CASES = [
    (stage, dtype)
    for stage in range(4)
    for dtype in ("float32", "bfloat16")
    if stage or dtype == "float32"
]


# --- on the ranks ---------------------------------------------------------------------------------


def storages(tensors: Any) -> dict[int, int]:
    """Bytes of every piece of memory that the tensors lie in, by its address."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def living() -> dict[int, int]:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        objects = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    return storages([*objects, *(x.grad for x in objects if x.is_leaf)])


def held(engine: Any, before: set[int]) -> dict[str, int]:
    """Bytes this rank holds: weights, optimizer states, and as gradients everything else but
    reduction buckets.
    """
    zero = engine.engine.optimizer
    parameters = list(engine.model.parameters())
    optimizer = getattr(zero, "optimizer", zero)
    shards = [getattr(p, "ds_tensor", None) for p in parameters]
    buckets = getattr(zero, "ipg_buckets", {}).values()
    flat = ("bit16_groups_flat", "bf16_groups_flat")
    masters = (
        "single_partition_of_fp32_groups",
        "fp32_partitioned_groups_flat",
        "fp32_groups_flat_partition",
    )
    known = {
        "weights": [*parameters, *shards, *(t for name in flat for t in getattr(zero, name, []))],
        "optimizer": [t for name in masters for t in getattr(zero, name, [])]
        + [t for state in optimizer.state.values() for t in state.values()],
        "buckets": [
            t for b in buckets for t in (b.buffer if isinstance(b.buffer, list) else [b.buffer])
        ],
    }
    sizes = {}
    seen = set(before)
    for name, tensors in known.items():
        own = {place: size for place, size in storages(tensors).items() if place not in seen}
        sizes[name] = sum(own.values())
        seen |= set(own)
    del sizes["buckets"]  # a buffer of fixed size; on CPU most of it is never touched
    sizes["gradients"] = sum(size for place, size in living().items() if place not in seen)
    return sizes


def largest_states(rank: Rank, settings: LearnerSettings) -> tuple[int, dict[str, int]]:
    """How often we looked, and the largest size of each kind: during an optimizer step of several
    micro-batches.
    """
    from learners.experience import Experience
    from learners.sft import SFTLearner

    before = set(living())
    engine = SFTLearner(settings, 10, rank)
    batch = Experience.from_ids([[1] * 8] * 16, [[2] * 8] * 16)
    shard = batch.select(batch.shard(rank.world_size)[rank.index])
    looks: list[dict[str, int]] = []
    backward = engine.engine.backward
    step = engine._step

    def look_after_backward(loss: Any) -> None:
        backward(loss)
        looks.append(held(engine, before))

    def look_around_step() -> float:
        looks.append(held(engine, before))
        norm = step()
        looks.append(held(engine, before))
        return norm

    engine.engine.backward = look_after_backward
    engine._step = look_around_step
    engine.train(shard)
    return len(looks), {kind: max(look[kind] for look in looks) for kind in looks[0]}


# --- the tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 million parameters: large beside everything that is not counted, small enough for a
    test.
    """
    folder = tmp_path_factory.mktemp("model")
    Qwen3ForCausalLM(CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    pool = Ranks(request.param)
    yield pool
    pool.close()


@pytest.mark.parametrize(("stage", "dtype"), CASES)
def test_states_are_what_deepspeed_holds(ranks: Ranks, model: Path, stage: int, dtype: str) -> None:
    settings = LearnerSettings.model_validate(
        {
            "model": {"path": str(model), "dtype": dtype},
            "ranks": ranks.world_size,
            "zero_stage": stage,
            "micro_batch_tokens": 64,
        }
    )
    planned = model_states(find_shape(str(model)), "lm", settings)
    for looks, measured in ranks.run(largest_states, settings):
        assert looks >= 4
        assert measured == pytest.approx(planned, rel=0.05)


def test_sgd_has_master_weights_alone(ranks: Ranks, model: Path) -> None:
    settings = LearnerSettings(
        model=ModelSettings(path=str(model), dtype="bfloat16"),
        ranks=ranks.world_size,
        zero_stage=2,
        micro_batch_tokens=64,
        optimizer=OptimizerSettings(kind="sgd"),
    )
    planned = model_states(find_shape(str(model)), "lm", settings)
    assert ranks.run(largest_states, settings)[0][1] == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (2, "bfloat16"), (3, "bfloat16")])
def test_of_what_lora_leaves_frozen_there_are_weights_alone(
    ranks: Ranks, model: Path, stage: int, dtype: str
) -> None:
    settings = LearnerSettings.model_validate(
        {
            "model": {"path": str(model), "dtype": dtype, "lora": {"rank": 64}},
            "ranks": ranks.world_size,
            "zero_stage": stage,
            "micro_batch_tokens": 64,
        }
    )
    planned = model_states(find_shape(str(model)), "lm", settings)
    for _, measured in ranks.run(largest_states, settings):
        for kind in ("weights", "optimizer"):
            assert measured[kind] == pytest.approx(planned[kind], rel=0.05), kind
        assert measured["gradients"] == pytest.approx(planned["gradients"], rel=0.1)
