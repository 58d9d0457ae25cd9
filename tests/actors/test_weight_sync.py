"""Weight sync: what arrives is what was sent, what is served is what arrived, and nothing else is
served.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.weights import senders
from actors.weights.client import EngineClient
from actors.weights.packing import pack_group, unpack_group
from actors.weights.proof import (
    Receipt,
    SyncError,
    bit_sums,
    check_adapter,
    check_probe,
    checksums,
    probe_decides,
    verify,
)
from actors.weights.senders import SENDERS, Metadata, ObjectStoreSender
from learners.experience import PromptRequest, Rollout

engines = pytest.mark.engines
PROBE = [1, *range(3, 60)]


def checksum(tensor: Tensor) -> str:
    return checksums([bit_sums(tensor)])[0]


# --- bytes and receipts ---------------------------------------------------------------------------


def test_a_packed_group_unpacks_to_the_same_tensors() -> None:
    tensors = [
        ("odd", torch.arange(3, dtype=torch.bfloat16)),
        ("matrix", torch.randn(5, 7).t()),
        ("empty", torch.zeros(0, 4)),
        ("scalar", torch.tensor(3.5)),
    ]
    meta, data = pack_group("layer 0", tensors)
    assert data.dtype == np.uint8 and meta["names"] == ["odd", "matrix", "empty", "scalar"]
    for (name, sent), (got_name, got) in zip(
        tensors, unpack_group(meta, torch.from_numpy(data)), strict=True
    ):
        assert got_name == name and got.dtype == sent.dtype and torch.equal(got, sent)


def test_the_digest_depends_on_every_byte() -> None:
    weight = torch.zeros(4)
    before = pack_group("a", [("w", weight)])[0]["digest"]
    weight[3] = 1e-30
    assert pack_group("a", [("w", weight)])[0]["digest"] != before


def test_small_groups_are_packed_in_the_same_memory_and_a_tensor_alone_stays_where_it_is() -> None:
    buffer = torch.full((64,), 7, dtype=torch.uint8)
    two = [("a", torch.ones(3)), ("b", torch.arange(4.0))]
    meta, data = pack_group("group 0", two, buffer)
    assert data.ctypes.data == buffer.data_ptr()
    assert meta["digest"] == pack_group("group 0", two)[0]["digest"]  # gaps are zeros
    assert torch.equal(unpack_group(meta, torch.from_numpy(data))[1][1], two[1][1])
    alone = torch.ones(3)
    assert pack_group("group 1", [("a", alone)], buffer)[1].ctypes.data == alone.data_ptr()
    larger = pack_group("group 2", [*two, ("c", torch.ones(20))], buffer)[1]
    assert larger.ctypes.data != buffer.data_ptr() and larger.nbytes == 112


def test_checksums_of_many_tensors_are_those_of_each() -> None:
    tensors = [torch.randn(5, 7), torch.randn(3).bfloat16(), torch.tensor(2.5), torch.zeros(0, 4)]
    found = checksums([bit_sums(tensor) for tensor in tensors])
    rows = tensors[0].view(torch.int32).sum(1, dtype=torch.int64).tolist()
    weighted = sum(row * (i + 1) for i, row in enumerate(rows))
    assert found[0] == f"{sum(rows) & 2**64 - 1:016x}{weighted & 2**64 - 1:016x}"
    assert found == [checksum(tensor) for tensor in tensors] and checksums([]) == []


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]
)
def test_the_checksum_depends_on_every_element_and_its_row(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 7).to(dtype)
    assert checksum(weight[[1, 0, 2, 3, 4]]) != checksum(weight)  # the same elements elsewhere
    for row, column in ((0, 0), (4, 6)):
        changed = weight.clone()
        changed[row, column] = 0.015625
        assert checksum(changed) != checksum(weight)
    # of the numbers, not of how they lie
    assert checksum(weight.t().contiguous().t()) == checksum(weight)
    assert (
        len(
            {
                checksum(torch.tensor(0.5)),
                checksum(torch.tensor([0.5, 0.5])),
                checksum(torch.zeros(0, 3)),
            }
        )
        == 3
    )


SENT: Receipt = [("group 0", "aa", ["x", "y"]), ("group 1", "bb", ["z"])]


def test_verify_accepts_what_was_sent() -> None:
    verify(SENT, SENT, ["x", "y", "z"])


@pytest.mark.parametrize(
    ("received", "names", "message"),
    [
        (
            [SENT[0], ("group 1", "cc", ["z"])],
            ["x", "y", "z"],
            "engine.1.: group 1 arrived with digest cc, sent was bb",
        ),
        ([SENT[0]], ["x", "y", "z"], r"missing \['z'\] \(1\)"),
        (SENT, ["x", "y"], r"unexpected \['z'\] \(1\)"),
        ([*SENT, SENT[1]], ["x", "y", "z"], "4 parameters arrived, 3 expected"),
        ([], ["x"], r"missing \['x'\]"),
    ],
)
def test_verify_refuses_in_one_line(received: Receipt, names: list[str], message: str) -> None:
    with pytest.raises(SyncError, match=message) as caught:
        verify(SENT, received, names, "engine[1]")
    assert "\n" not in str(caught.value)


def test_check_probe_measures_the_largest_difference() -> None:
    assert check_probe(
        [-1.0, -2.0], [-1.0, -2.00005], max_logprob_diff=1e-4, mean_logprob_diff=1e-4
    ) == pytest.approx(5e-5)
    for wrong in ([-1.0, -2.1], [-1.0, math.nan]):
        with pytest.raises(SyncError, match="on the probe.*allowed are 1e-04"):
            check_probe([-1.0, -2.0], wrong, max_logprob_diff=1e-4, mean_logprob_diff=1e-4)
    with pytest.raises(ValueError, match="zip"):
        check_probe([-1.0, -2.0], [-1.0], max_logprob_diff=1e-4, mean_logprob_diff=1e-4)
    assert check_probe(
        [-1.0, -2.0], [-1.5, -2.0], max_logprob_diff=1.0, mean_logprob_diff=0.3
    ) == pytest.approx(0.5)
    with pytest.raises(SyncError, match="2.50e-01 on average"):
        check_probe([-1.0, -2.0], [-1.5, -2.0], max_logprob_diff=1.0, mean_logprob_diff=0.2)


WITH = [-1.0, -2.0, -3.0]


@pytest.mark.parametrize(
    ("without", "decides"),
    [
        (WITH, False),  # B is zero
        ([-1.0, -2.0, -3.4], False),
        ([-1.0, -2.0, -3.6], True),  # one is too far off
        ([-1.3, -2.3, -3.3], True),  # all of them together are
    ],
)
def test_the_probe_decides_where_an_engine_without_the_adapter_would_be_out_of_bounds(
    without: list[float], decides: bool
) -> None:
    bounds = {"max_logprob_diff": 0.5, "mean_logprob_diff": 0.25}
    assert probe_decides(WITH, without, **bounds) is decides
    try:
        check_probe(WITH, without, **bounds)
        refused = False
    except SyncError:
        refused = True
    assert refused is decides


def test_an_engine_has_to_be_nearer_to_the_actor_with_its_adapter() -> None:
    without = [-1.0, -2.0, -9.0]
    check_adapter(WITH, without, [-1.0, -2.1, -5.9])
    with pytest.raises(SyncError, match=r"engine\[1\] serves the base model without the adapter"):
        check_adapter(WITH, without, [-1.0, -2.0, -6.1], "engine[1]")


# --- the engine's side ----------------------------------------------------------------------------


@engines
def test_new_weights_are_served_as_transformers_computes_them(served: Any) -> None:
    from tests.actors.tiny_models import make_model, transfer

    new = make_model(seed=1, tied=served.model.config.tie_word_embeddings)
    for version, model in ((1, new), (2, served.model), (3, new)):
        receipt = transfer(served.engine, model, version)
        verify(receipt, receipt, [name for name, _ in model.named_parameters()])
        assert probe_difference(served, model) < 1e-4
        served.engine.accept(version)
        assert probe_difference(served, model) < 1e-4
    assert probe_difference(served, served.model) > 1.0
    assert served.engine.status()["version"] == 3


def long_prompt(served: Any) -> list[int]:
    """Longer than a block of the cache, so that its prefix is kept."""
    cache = served.engine._engine.vllm_config.cache_config
    prompt = [1, *(3 + i % 60 for i in range(cache.block_size + 10))]
    assert cache.enable_prefix_caching and len(prompt) < served.engine.max_model_tokens - 4
    return prompt


def assert_fresh(served: Any, model: Any, prompt: list[int]) -> None:
    """Twice, so that the second time the prefix comes from the cache."""
    from tests.actors.tiny_models import logprobs

    for _ in range(2):
        (sample,) = generate(served, prompt, tokens=4)
        expected = logprobs(model, prompt + sample.response_ids)[-len(sample.logprobs) :]
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-4, rtol=0)


@engines
@pytest.mark.parametrize("version", [1, 0], ids=["another-version", "a-version-used-before"])
def test_no_prefix_of_older_weights_is_reused_by_an_idle_engine(served: Any, version: int) -> None:
    """With a version used before, requests have the salt of then: only the reset of the cache keeps
    them apart.
    """
    from tests.actors.tiny_models import make_model, transfer

    prompt = long_prompt(served)
    new = make_model(seed=1, tied=served.model.config.tie_word_embeddings)
    assert_fresh(served, served.model, prompt)
    transfer(served.engine, new, version)
    served.engine.accept(version)
    assert_fresh(served, new, prompt)


@engines
def test_no_prefix_of_older_weights_is_reused_while_requests_run(served: Any) -> None:
    """The cache of a busy engine cannot be reset: here the version in the salt keeps old and new
    apart.
    """
    from tests.actors.tiny_models import make_model, transfer

    prompt = long_prompt(served)
    new = make_model(seed=1, tied=served.model.config.tie_word_embeddings)
    assert_fresh(served, served.model, prompt)
    long = [request([1, 2], tokens=1, slot=0), request([1, 9], tokens=150, slot=1, size=8)]
    with closing(served.engine.generate(long)) as stream:
        next(stream)  # the long one is under way
        transfer(served.engine, new, 1)
        assert served.engine.status()["running"] > 0
        served.engine.accept(1)
        assert_fresh(served, new, prompt)


@engines
def test_an_idle_engine_that_keeps_its_cache_is_not_accepted(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.actors.tiny_models import transfer

    with monkeypatch.context() as patch:
        patch.setattr(served.engine._engine, "reset_prefix_cache", lambda: False)
        with pytest.raises(RuntimeError, match="did not reset the prefix cache"):
            transfer(served.engine, served.model, 1)
    assert served.engine.status()["stale"]


@engines
def test_a_stale_engine_gets_no_prompts_until_it_is_accepted(served: Any) -> None:
    from tests.actors.tiny_models import packed_groups

    engine = served.engine
    engine.start_weight_update()
    for step in (
        lambda: engine.update_weights({"groups": packed_groups(served.model)}),
        engine.finish_weight_update,
    ):
        with pytest.raises(RuntimeError, match="STALE"):
            generate(served, [1, 2])
        with pytest.raises(RuntimeError, match="STALE: its weights are half replaced"):
            engine.probe_logprobs(PROBE)
        with pytest.raises(RuntimeError, match="STALE: a weight update was begun and not finished"):
            engine.accept(1)
        step()
    with pytest.raises(RuntimeError, match="STALE"):
        generate(served, [1, 2])
    assert engine.status()["stale"]
    engine.accept(1)
    assert generate(served, [1, 2])[0].weight_versions == (1, 1)


def corrupt_digest(engine: Any, groups: list[dict[str, Any]]) -> None:
    groups[1]["ref"] = groups[1]["ref"].copy()
    groups[1]["ref"][17] ^= 1
    with pytest.raises(SyncError, match="group 1 arrived with digest"):
        engine.update_weights({"groups": groups})


def break_in_the_middle(engine: Any, groups: list[dict[str, Any]]) -> None:
    groups[1]["names"] = [name.replace("layers.0", "layers.9") for name in groups[1]["names"]]
    with pytest.raises(Exception, match="layers.9"):
        engine.update_weights({"groups": groups})


def lose_the_sender(engine: Any, groups: list[dict[str, Any]]) -> None:
    # vLLM fuses q, k and v: one layer is left half filled
    assert groups[0]["names"][-1].endswith("k_proj.weight")
    engine.update_weights({"groups": groups[:1]})  # and nobody sends the rest


@engines
@pytest.mark.parametrize("interrupt", [corrupt_digest, break_in_the_middle, lose_the_sender])
def test_a_full_update_repairs_an_interrupted_one(
    served: Any, interrupt: Callable[..., None]
) -> None:
    from tests.actors.tiny_models import make_model, packed_groups, transfer

    new = make_model(seed=1, tied=served.model.config.tie_word_embeddings)
    served.engine.start_weight_update()
    interrupt(served.engine, packed_groups(new))
    assert served.engine.status()["stale"]
    with pytest.raises(RuntimeError, match="STALE"):
        served.engine.probe_logprobs(PROBE)
    transfer(served.engine, new, 1)
    assert probe_difference(served, new) < 1e-4


@engines
def test_a_parameter_that_was_not_sent_is_found_by_name(served: Any) -> None:
    from tests.actors.tiny_models import packed_groups

    served.engine.start_weight_update()
    served.engine.update_weights({"groups": packed_groups(served.model)[:-1]})
    receipt = served.engine.finish_weight_update()
    with pytest.raises(SyncError, match=r"parameters arrived, 2\d expected; missing \['"):
        verify(receipt, receipt, [name for name, _ in served.model.named_parameters()])


@engines
def test_running_requests_live_through_an_update_and_say_so(served: Any) -> None:
    from tests.actors.tiny_models import make_model, transfer

    tied = served.model.config.tie_word_embeddings
    short = request([1, 2], tokens=1, slot=0)
    long = request([1, 9], tokens=150, slot=1, size=8)
    stream = served.engine.generate([short, long])
    next(stream)  # now the long one is under way
    transfer(served.engine, make_model(seed=1, tied=tied), 5)
    served.engine.probe_logprobs(PROBE)
    served.engine.accept(5)
    samples = [sample for groups in stream for group in groups for sample in group]
    assert (0, 5) in {s.weight_versions for s in samples} <= {(0, 0), (0, 5)}


@engines
def test_running_requests_of_a_refused_update_are_failed(served: Any) -> None:
    from tests.actors.tiny_models import transfer

    stream = served.engine.generate(
        [request([1, 2], tokens=1, slot=0), request([1, 9], tokens=150, slot=1, size=8)]
    )
    next(stream)
    transfer(served.engine, served.model, 1)  # and nobody accepts it
    transfer(served.engine, served.model, 1)
    with pytest.raises(RuntimeError, match="replaced and never accepted"):
        list(stream)
    served.engine.accept(1)
    assert served.engine.status()["running"] == 0


def request(prompt: list[int], tokens: int, slot: int = 0, size: int = 1) -> PromptRequest:
    return PromptRequest(slot, slot, prompt, size, 1.0, tokens)


def generate(served: Any, prompt: list[int], tokens: int = 2) -> list[Rollout]:
    return [
        sample
        for groups in served.engine.generate([request(prompt, tokens)])
        for g in groups
        for sample in g
    ]


def probe_difference(served: Any, model: Any) -> float:
    from tests.actors.tiny_models import logprobs

    expected = logprobs(model, PROBE).tolist()
    found = served.engine.probe_logprobs(PROBE)
    return check_probe(expected, found, max_logprob_diff=math.inf, mean_logprob_diff=math.inf)


# --- the trainer's side ---------------------------------------------------------------------------


class TwoLayers:
    """A source of weights."""

    def __init__(self) -> None:
        self.layers = [
            (["a", "b"], [torch.ones(3), torch.zeros(2, 2)]),
            (["c"], [torch.arange(4.0)]),
        ]

    def metadata(self) -> Metadata:
        return [
            (n, t.dtype, tuple(t.shape))
            for names, tensors in self.layers
            for n, t in zip(names, tensors, strict=True)
        ]

    def iter_groups(self) -> Iterator[tuple[list[str], list[Tensor]]]:
        yield from self.layers


@pytest.fixture(scope="module")
def two_engines(cluster: None) -> list[Any]:
    """Ray actors that take calls as engines do, and only take notes."""
    import ray

    class Recorder:
        def call(self, method: str, *args: Any) -> Any:
            if method == "forget":
                self.notes = []  # type: ignore[var-annotated]
                self.trouble = args[0]
            elif method == "notes":
                return self.notes
            elif method == self.trouble:
                time.sleep(3)
                raise ValueError("no room")
            else:
                self.notes.append((method, *args))
            return None

    return [ray.remote(Recorder).options(num_cpus=0).remote() for _ in range(2)]  # type: ignore[attr-defined]


@pytest.fixture
def handles(two_engines: list[Any]) -> list[Any]:
    prepare(two_engines, ["", ""])
    return two_engines


def prepare(handles: list[Any], troubles: list[str]) -> None:
    """Forget all notes; from now on each engine fails in the given method, after 3 s."""
    import ray

    ray.get(
        [h.call.remote("forget", t) for h, t in zip(handles, troubles, strict=True)], timeout=60
    )


def notes(handles: list[Any]) -> list[Any]:
    import ray

    return ray.get([h.call.remote("notes") for h in handles], timeout=60)


@engines
def test_a_sync_is_three_calls_to_every_engine(
    handles: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(senders, "GROUP_BYTES", 40)  # the first layer has 28

    client = EngineClient(handles, deadline_s=30)
    client.begin(7)
    sent = ObjectStoreSender(TwoLayers(), client, rank=0).send_weights()
    verify(sent, sent, ["a", "b", "c"])
    # other ranks only gather
    assert ObjectStoreSender(TwoLayers(), client, rank=1).send_weights() == []
    for connect, start, update, finish in notes(handles):
        assert connect == ("init_weight_transfer_engine", {"timeout_s": 30})
        assert (start, finish) == (("start_weight_update",), ("finish_weight_update", "7"))
        groups = update[1]["groups"]
        assert [(g["name"], g["digest"], g["names"]) for g in groups] == sent
        data = torch.from_numpy(ray.get(groups[1]["ref"], timeout=30).copy())
        assert torch.equal(unpack_group(groups[1], data)[0][1], torch.arange(4.0))


@engines
def test_a_late_or_failing_engine_is_named(handles: list[Any]) -> None:
    prepare(handles, ["update_weights", "start_weight_update"])
    names = ["engine[0] on node a", "engine[1] on node b"]
    with pytest.raises(
        SyncError, match=r"start_weight_update: engine\[1\] on node b did not answer within 1 s"
    ):
        EngineClient(handles, deadline_s=1, names=names).start_weight_update()
    with pytest.raises(SyncError, match=r"update_weights: engine\[0\] failed: .*'no room'\)$"):
        EngineClient(handles, deadline_s=30).update_weights({})


@engines
def test_independent_engines_get_their_own_ranks(handles: list[Any]) -> None:
    client = EngineClient(handles, deadline_s=30, workers_per_engine=4)
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": client.world_size})
    (_, first), (_, second) = (note[0] for note in notes(handles))
    assert (first, second) == (
        {"rank_offset": 1, "world_size": 9},
        {"rank_offset": 5, "world_size": 9},
    )


@engines
@pytest.mark.parametrize("backend", ["nccl", "shared_gpu"])
def test_the_gpu_sender_fits_the_installed_vllm(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    real = inspect.signature(WeightTransferTrainerFactory.trainer_init)
    seen = {}

    class Engine:
        def send_weights(self) -> None:
            assert [name for name, _ in seen["source"]] == ["a", "b", "c"]

    def trainer_init(*args: Any, **kwargs: Any) -> Engine:
        seen.update(real.bind(*args, **kwargs).arguments)
        return Engine()

    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", trainer_init)
    client = EngineClient([object(), object()], deadline_s=1)
    sender = SENDERS[backend](TwoLayers(), client, rank=0, address="node", port=1234)
    tensors = [
        (n, t) for names, ts in TwoLayers().iter_groups() for n, t in zip(names, ts, strict=True)
    ]
    for _ in range(2):  # the second receipt is not the first one continued
        assert sender.send_weights() == [
            (name, checksum(tensor), [name]) for name, tensor in tensors
        ]
    info = seen["init_info"]
    source = seen["source"]
    assert (
        info.backend == backend.replace("shared_gpu", "ipc")
        and info.is_sender
        and getattr(info, "world_size", 3) == 3
    )
    assert isinstance(client, VLLMWeightSyncClient) and isinstance(source, WeightSource)
    assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == TwoLayers().metadata()
    # other ranks only gather
    assert SENDERS[backend](TwoLayers(), client, rank=1).send_weights() == []
    for method in (
        "init_weight_transfer_engine",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
    ):
        ours, theirs = (
            inspect.signature(getattr(c, method)) for c in (EngineClient, VLLMWeightSyncClient)
        )
        assert list(ours.parameters) == list(theirs.parameters)
