"""What only GPUs will run: every call is bound against the installed packages, and what CPUs can
run of it is run.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.cluster.groups import WorkerGroup
from actors.cluster.sharing import GpuSharing
from actors.settings import GenerationSettings
from learners.errors import UserError
from learners.experience import Experience, PromptRequest
from learners.settings import LearnerSettings, ModelSettings, Rank

engines = pytest.mark.engines
pytestmark = pytest.mark.timeout(400)


def bound(function: Callable[..., Any], calls: list[Any], result: Any = None) -> Callable[..., Any]:
    """Stands in for `function`: takes the arguments it would take, and no others, and notes
    them.
    """
    signature = inspect.signature(function)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        calls.append(signature.bind(*args, **kwargs).arguments)
        return result

    return stand_in


# --- turns on shared GPUs -------------------------------------------------------------------------


class Recorder(WorkerGroup):
    """A group without processes; what it is told goes to a common list."""

    def __init__(self, name: str, told: list[str]) -> None:
        class Method:
            def remote(self, method: str, *args: Any) -> None:
                told.append(" ".join([name, method, *(str(a) for a in args)]))

            options = staticmethod(lambda **_: Method())

        class Handle:
            call = stream = Method()

        super().__init__(name, "unused", [])
        self.handles = [Handle()]

    def gather(self, pending: Any, phase: str, deadline_s: float) -> list[Any]:
        return [1] * len(pending)


def told_by(
    act: Callable[[dict[str, Recorder], GpuSharing], None], share: bool = True, swap: str = "always"
) -> list[str]:
    """What all processes are told while `act` works with five groups that have all started."""
    told: list[str] = []
    groups = {
        name: Recorder(name, told)
        for name in ("engine", "actor", "critic", "reference", "reward judge")
    }
    act(groups, GpuSharing(groups if share else {}, 1, swap))
    return told


def step(groups: dict[str, Recorder], turns: GpuSharing) -> None:
    """The calls of one step, as the driver makes them."""
    groups["engine"].streams("generate", [1])
    groups["reward judge"].scatter("scores", [1])
    for role, method in (("actor", "infer"), ("reference", "logprobs"), ("critic", "infer")):
        groups[role].scatter(method, [1])
    turns.learn()
    groups["actor"].scatter("train", [1])
    groups["critic"].scatter("train", [1])
    turns.sync()
    groups["actor"].submit("send_weights")
    groups["actor"].submit("probe")
    groups["engine"].submit("probe_logprobs")
    groups["engine"].submit("accept")


def test_in_one_step_nobody_works_without_the_gpus_and_nobody_stays_in_the_way() -> None:
    told = told_by(step)
    assert told[:15] == [
        "actor offload always True",
        "critic offload always True",
        "reference offload always",
        "reward judge offload always",
        "engine wake None",
        "engine generate 1",
        "engine sleep always",
        "reward judge reload",
        "reward judge scores 1",
        "actor reload",
        "actor infer 1",
        "reference reload",
        "reference logprobs 1",
        "critic reload",
        "critic infer 1",
    ]
    assert told[15:17] == ["reference offload always", "reward judge offload always"]
    assert told[17:] == [
        "actor train 1",
        "critic train 1",
        "critic offload always True",
        "actor offload always False",  # begins under the transfer
        "engine wake ['weights']",
        "actor send_weights",
        "actor probe",
        "actor offload always True",
        "engine wake None",
        "engine probe_logprobs",
        "engine accept",
    ]


def test_a_skipped_step_and_a_second_generation_move_nothing_twice() -> None:
    def act(groups: dict[str, Recorder], turns: GpuSharing) -> None:
        groups["engine"].streams("generate", [1])
        groups["engine"].streams("generate", [2])
        groups["actor"].scatter("infer", [1])
        groups["actor"].submit("save")
        groups["engine"].streams("generate", [3])
        groups["actor"].call_without_swap("save", phase="checkpoint", deadline_s=1)

    told = told_by(act)
    assert told[4:] == [
        "engine wake None",
        "engine generate 1",
        "engine generate 2",
        "engine sleep always",
        "actor reload",
        "actor infer 1",
        "actor save",
        "actor offload always True",
        "engine wake None",
        "engine generate 3",
        "actor save",  # from where it is
    ]


def test_what_leaves_in_a_step_is_no_more_than_the_tier_says() -> None:
    """The cache alone: all give up what they do not use, and nobody fetches anything but the engine
    its cache. With optimizers too, both learners begin to leave under the transfer, and come back
    under the scoring.
    """

    def expected(swap: str, reload: list[str]) -> list[str]:
        learners = [f"{role} offload {swap} " for role in ("actor", "critic")]
        frozen = [f"{role} offload {swap}" for role in ("reference", "reward judge")]
        return [
            *(f"{call}True" for call in learners),
            *frozen,
            "engine wake None",
            "engine generate 1",
            f"engine sleep {swap}",
            "reward judge scores 1",
            *reload[:1],
            "actor infer 1",
            "reference logprobs 1",
            *reload[1:],
            "critic infer 1",
            *frozen,
            "actor train 1",
            "critic train 1",
            *(f"{call}False" for call in learners),
            "actor send_weights",
            "actor probe",
            *(f"{call}True" for call in learners),
            "engine wake None",
            "engine probe_logprobs",
            "engine accept",
        ]

    assert told_by(step, swap="kv_cache") == expected("kv_cache", [])
    reload = ["actor reload", "critic reload"]
    assert told_by(step, swap="optimizer") == expected("optimizer", reload)
    assert told_by(step, swap="never") == told_by(step, share=False)


def test_bytes_and_seconds_of_what_moved_are_told_once() -> None:
    """Each call of this recorder says that it moved one."""

    def metrics(swap: str) -> list[dict[str, float]]:
        found: list[dict[str, float]] = []

        def act(groups: dict[str, Recorder], turns: GpuSharing) -> None:
            step(groups, turns)
            found.append({span.name: 1.0 for span in turns.stopwatch.take()})
            found.extend([turns.metrics(), turns.metrics()])

        told_by(act, swap=swap)
        return found

    spans = dict.fromkeys(("sleep", "wake", "offload", "reload"), 1.0)
    assert metrics("always") == [spans, {"swap/bytes": 17.0}, {"swap/bytes": 0.0}]
    assert metrics("optimizer") == [spans, {"swap/bytes": 15.0}, {"swap/bytes": 0.0}]
    assert metrics("kv_cache")[0].keys() == {"sleep", "wake", "offload"}
    assert metrics("never") == [{}, {"swap/bytes": 0.0}, {"swap/bytes": 0.0}]
    assert GpuSharing().metrics() == {}


def test_with_gpus_of_their_own_nobody_is_told_to_leave() -> None:
    moves = ("sleep", "wake", "offload", "reload")
    told = told_by(step, share=False)
    assert len(told) == 11 and not any(word in line for line in told for word in moves)


# --- vLLM -----------------------------------------------------------------------------------------


@engines
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tensor_parallel", [1, 4])
def test_the_gpu_engine_is_what_the_installed_vllm_takes(
    tensor_parallel: int, shared: bool
) -> None:
    from vllm import EngineArgs
    from vllm.config import WeightTransferConfig

    from actors.engine.arguments import engine_arguments

    model = ModelSettings(path="m", dtype="bfloat16")
    generation = GenerationSettings(tensor_parallel=tensor_parallel, gpu_memory_fraction=0.7)
    arguments = engine_arguments(model, generation, "cuda", 512, shared)
    transfer = WeightTransferConfig(**arguments.pop("weight_transfer_config"))
    taken = EngineArgs(**arguments, weight_transfer_config=transfer)
    assert taken.distributed_executor_backend == ("uni" if tensor_parallel == 1 else "mp")
    assert bool(taken.worker_extension_cls) == (tensor_parallel > 1)
    assert (taken.tensor_parallel_size, taken.gpu_memory_utilization, taken.dtype) == (
        tensor_parallel,
        0.7,
        "bfloat16",
    )
    assert (taken.enable_sleep_mode, transfer.backend) == (
        shared,
        "shared_gpu" if shared else "nccl",
    )
    # what belongs to CPUs stays there
    assert taken.kv_cache_memory_bytes is None and not taken.enforce_eager


@engines
@pytest.mark.parametrize(("swap", "sleeps"), [("never", False), ("kv_cache", True)])
def test_a_cache_of_a_given_size_asks_vllm_for_no_measuring_and_no_free_share(
    swap: str, sleeps: bool
) -> None:
    """Its worker then takes the size as it is, and looks at the share alone before it loads."""
    from vllm import EngineArgs
    from vllm.v1.worker.gpu_worker import Worker

    from actors.engine.arguments import engine_arguments

    model = ModelSettings(path="m", dtype="bfloat16")
    generation = GenerationSettings(kv_cache_bytes=3 * 2**30)
    arguments = engine_arguments(model, generation, "cuda", 512, True, swap=swap)
    del arguments["weight_transfer_config"]
    taken = EngineArgs(**arguments)
    assert (taken.kv_cache_memory_bytes, taken.enable_sleep_mode) == (3 * 2**30, sleeps)
    assert taken.gpu_memory_utilization == 0.01
    measuring = inspect.getsource(Worker.determine_available_memory)
    given = measuring.index("if kv_cache_memory_bytes := self.cache_config.kv_cache_memory_bytes")
    assert given < measuring.index("return") < measuring.index("profile_cudagraph_memory")


@engines
def test_an_engine_that_takes_adapters_is_what_the_installed_vllm_takes() -> None:
    """Its calls, the ranks it has room for, the manager whose layers `unused_parts` looks at."""
    from typing import get_args

    from vllm import EngineArgs
    from vllm.config.lora import LoRAConfig, MaxLoRARanks
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from actors.engine.arguments import NO_ADAPTERS, engine_arguments, in_our_words
    from actors.settings import ADAPTER_RANKS

    assert get_args(MaxLoRARanks) == ADAPTER_RANKS
    arguments = engine_arguments(
        ModelSettings(path="m", dtype="bfloat16"), GenerationSettings(), "cuda", 512, True, 17
    )
    arguments.pop("weight_transfer_config")
    taken = EngineArgs(**arguments)
    assert taken.enable_lora and taken.max_lora_rank == 32
    config = LoRAConfig(max_loras=taken.max_loras, max_cpu_loras=taken.max_cpu_loras)
    assert (config.max_loras, config.max_cpu_loras) == (1, 2)
    inspect.signature(LLMEngine.add_lora).bind(None, object())
    inspect.signature(LLMEngine.remove_lora).bind(None, 1)
    inspect.signature(LLMEngine.list_loras).bind(None)
    inspect.signature(LLMEngine.add_request).bind(None, "1", {}, None, lora_request=None)
    inspect.signature(LoRAModelManager.get_adapter).bind(None, 1)
    inspect.signature(LoRAModelManager._get_lora_layer_weights).bind(None, None, "name")
    assert "self._adapter_manager = " in inspect.getsource(WorkerLoRAManager)
    load = inspect.getsource(GPUModelRunner.load_lora_model)
    assert "self.lora_manager = " in load and f"{NO_ADAPTERS} yet" in load
    told = in_our_words(ValueError(f"GPT2LMHeadModel {NO_ADAPTERS} yet."), "cuda")
    assert told is not None and told.problems[0].startswith("sync.lora: vLLM serves no adapters")


@engines
def test_gpu_workers_have_the_methods_the_loop_calls() -> None:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.gpu_worker import Worker

    inspect.signature(LLMEngine.sleep).bind(None, level=1)
    inspect.signature(LLMEngine.wake_up).bind(None, ["weights"])
    inspect.signature(LLMEngine.release_kv_cache_memory).bind(None)
    # what that asks for is what level 0 does, and waking by no tags undoes it
    assert "is_scheduler_paused()" in inspect.getsource(EngineCore.release_kv_cache_memory)
    assert "pause_scheduler(" in inspect.getsource(EngineCore.sleep).partition("level < 1")[0]
    assert "resume_scheduler()" in inspect.getsource(EngineCore.wake_up)
    for method, *arguments in (
        ["init_weight_transfer_engine", {}],
        ["start_weight_update"],
        ["update_weights", {}],
        ["finish_weight_update"],
        ["sleep", 1],
        ["wake_up", ["weights"]],
        ["discard", ("kv_cache",)],
        ["get_model"],
    ):
        inspect.signature(getattr(Worker, method)).bind(None, *arguments)
    # what clear_interrupted_update looks at
    assert "_weight_update_active" in inspect.getsource(Worker.__init__)


def sampled(served: Any) -> list[list[int]]:
    requests = [PromptRequest(i, i, [1, 5 + i, 9], 2, 1.0, 12, (3, 4)) for i in range(3)]
    return [
        s.response_ids for groups in served.engine.generate(requests) for g in groups for s in g
    ]


@engines
def test_an_engine_that_slept_wakes_with_the_weights_it_had(served: Any) -> None:
    before = sorted(sampled(served))
    served.engine.sleep("kv_cache")
    with pytest.raises(RuntimeError, match="asleep"):
        sampled(served)
    served.engine.wake()
    assert sorted(sampled(served)) == before
    served.engine.sleep()
    for wake in (lambda: None, lambda: served.engine.wake(["weights"])):
        wake()
        with pytest.raises(RuntimeError, match="asleep"):
            sampled(served)
        with pytest.raises(RuntimeError, match="asleep"):
            served.engine.probe_logprobs([1, 5, 9])
    served.engine.wake()
    assert sorted(sampled(served)) == before
    status = served.engine.status()
    assert (status["version"], status["stale"], status["running"]) == (0, False, 0)


@engines
def test_weights_arrive_in_an_engine_that_is_half_awake_and_count_only_when_accepted(
    served: Any,
) -> None:
    from tests.actors.tiny_models import logprobs, make_model, transfer

    new = make_model(seed=1, tied=served.model.config.tie_word_embeddings)
    probe = [1, *range(3, 40)]
    served.engine.sleep()
    served.engine.wake(["weights"])
    transfer(served.engine, new, 1)
    served.engine.wake()
    with pytest.raises(RuntimeError, match="STALE"):
        sampled(served)
    torch.testing.assert_close(
        torch.tensor(served.engine.probe_logprobs(probe)), logprobs(new, probe), atol=1e-4, rtol=0
    )
    served.engine.sleep()
    served.engine.wake()
    with pytest.raises(RuntimeError, match="STALE"):  # sleep does not make it trustworthy
        sampled(served)
    served.engine.accept(1)
    assert sampled(served)


def load_by_load_weights(worker: Any) -> None:
    """As vLLM's own receivers do it."""
    worker.weight_transfer_engine.loader._begin_reload()


def note_no_longer(worker: Any) -> None:
    """Leave the receiver to other tests as it was."""
    del worker.weight_transfer_engine.model.load_weights
    del worker.weight_transfer_engine.noted


@engines
@pytest.mark.parametrize(
    "fault", ["none", "a tensor that is not what was sent", "a tensor that never came"]
)
def test_a_receiver_of_vllm_is_believed_only_for_what_it_gave_the_model(
    served: Any, fault: str
) -> None:
    """vLLM's own receivers tell nothing of what arrived: what they hand to the model is noted
    there, on any device.
    """
    from actors.weights.proof import SyncError, bit_sums, checksums, verify
    from actors.weights.receiver import note_what_is_loaded
    from tests.actors.tiny_models import make_model, packed_groups

    new = make_model(seed=1, tied=served.model.config.tie_word_embeddings)
    sent = [(n, checksums([bit_sums(p)])[0], [n]) for n, p in new.named_parameters()]
    if fault == "a tensor that is not what was sent":
        with torch.no_grad():
            new.model.norm.weight[3] += 1e-6
    groups = packed_groups(new)
    served.engine.start_weight_update()
    served.engine._worker(load_by_load_weights)
    served.engine._worker(note_what_is_loaded)
    served.engine.update_weights(
        {"groups": groups[:-1] if fault == "a tensor that never came" else groups}
    )
    # the receipt of the CPUs' receiver, in the same list
    ours = {f"group {i}" for i in range(len(groups))}
    receipt = [entry for entry in served.engine.finish_weight_update() if entry[0] not in ours]
    served.engine._worker(note_no_longer)
    names = [name for name, _ in new.named_parameters()]
    if fault == "none":
        verify(sent, receipt, names)
    else:
        with pytest.raises(
            SyncError, match="norm.weight arrived with digest" if "not what" in fault else "missing"
        ):
            verify(sent, receipt, names)


@engines
def test_an_engine_does_not_fall_asleep_over_its_work(served: Any) -> None:
    long = [PromptRequest(0, 0, [1, 2], 1, 1.0, 1), PromptRequest(1, 1, [1, 9], 8, 1.0, 150)]
    with closing(served.engine.generate(long)) as stream:
        next(stream)
        with pytest.raises(RuntimeError, match="requests under way"):
            served.engine.sleep()
    served.engine.start_weight_update()
    with pytest.raises(RuntimeError, match="weights half replaced"):
        served.engine.sleep()


@engines
def test_weights_larger_than_the_buffer_still_pass_between_processes_on_one_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from actors.weights.client import EngineClient
    from actors.weights.senders import PACKED_BYTES, SharedGpuSender

    class Embedding:
        rows = PACKED_BYTES // 4 + 1

        def metadata(self) -> list[Any]:
            return [("small", torch.bfloat16, (3,)), ("embedding", torch.bfloat16, (self.rows, 4))]

        def iter_groups(self) -> Iterator[Any]:
            yield from ()

    calls: list[Any] = []
    real = WeightTransferTrainerFactory.trainer_init
    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", bound(real, calls))
    SharedGpuSender(Embedding(), EngineClient([], 1), rank=1)
    info = calls[0]["init_info"]
    assert (
        info.packed and not info.is_sender and info.packed_buffer_size_bytes == Embedding.rows * 8
    )


# --- DeepSpeed and torch --------------------------------------------------------------------------


@engines
def test_gpu_ranks_meet_over_nccl_on_the_one_device_they_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import deepspeed
    import torch.distributed as dist

    from learners.deepspeed_setup import start_process_group

    calls: list[Any] = []
    for owner, name in (
        (dist, "init_process_group"),
        (deepspeed, "init_distributed"),
        (torch.cuda, "set_device"),
    ):
        monkeypatch.setattr(owner, name, bound(getattr(owner, name), calls))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # put back afterwards
    start_process_group(Rank(2, 4, "node", 1234, "cuda", 60))
    device, group, speed = calls
    assert device == {"device": 0}
    assert (group["backend"], group["init_method"], group["rank"]) == ("nccl", "tcp://node:1234", 2)
    assert speed["dist_backend"] == "nccl"


def test_the_actor_takes_the_backend_it_is_told_and_a_port_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from actors.weights.client import transfer_backend
    from actors.weights.senders import SENDERS, SyncedActor

    calls: dict[str, list[Any]] = {"nccl": [], "shared_gpu": []}
    for name, taken in calls.items():
        monkeypatch.setitem(SENDERS, name, bound(SENDERS[name], taken))
    actor = SyncedActor.__new__(SyncedActor)
    actor.rank = Rank(1, 4, "node", 1234, "cuda")
    for shared, expected in ((False, "nccl"), (True, "shared_gpu")):
        actor.connect([], 5.0, 2, transfer_backend("cuda", shared), ("node", 4321))
        (call,) = calls.pop(expected)
        assert (call["rank"], call["address"], call["port"]) == (1, "node", 4321)
        assert not any(calls.values())


def test_an_optimizer_step_and_a_checkpoint_wait_for_what_is_still_coming_back(
    tmp_path: Path,
) -> None:
    from learners.sft import SFTLearner

    order: list[str] = []
    learner: Any = SFTLearner.__new__(SFTLearner)
    learner.states = SimpleNamespace(await_back=lambda: order.append("wait"))
    learner.engine = SimpleNamespace(
        step=lambda: order.append("step"),
        get_global_grad_norm=lambda: 1.0,
        save_checkpoint=lambda *_, **__: order.append("save"),
    )
    learner.settings = LearnerSettings(model=ModelSettings(path="m"), zero_stage=2)
    learner.rank = Rank(1, 2, "node", 1234, "cuda")
    learner._step()
    learner.save(str(tmp_path))
    assert order == ["wait", "step", "wait", "save"]


def test_flash_attention_without_its_package_is_refused_in_one_line(folder: Path) -> None:
    from learners.checkpoints import load_causal_lm

    with pytest.raises(UserError) as error:  # the lock files leave the package out
        load_causal_lm(ModelSettings(path=str(folder), attention="flash_attention_2"))
    assert error.value.problems == [
        f"{folder}: flash_attention_2 needs the package flash-attn; without it use auto"
    ]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Any]:
    from tests.learners.ranks import Ranks

    with closing(Ranks(2)) as pool:
        yield pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.actors.tiny_models import save_model

    folder = tmp_path_factory.mktemp("model")
    save_model(folder, seed=0, tied=True)
    return folder


def batch_of(rank: Rank) -> Experience:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 64, (n,), generator=draw).tolist() for n in (2, 9, 5, 12)]
    batch = Experience.from_ids([i[:2] for i in ids], [[*i, 2] for i in ids])
    return batch.select(batch.shard(rank.world_size)[rank.index])


def train(
    rank: Rank, settings: LearnerSettings, turns: Sequence[Sequence[str]]
) -> tuple[list[Any], torch.Tensor]:
    """A step for each of `turns`, after which the learner leaves the GPU by these tiers, one after
    the other, and comes back each time.
    """
    from learners.sft import SFTLearner

    learner = SFTLearner(settings, 10, rank)
    metrics = []
    for tiers in turns:
        metrics.append(learner.train(batch_of(rank)))
        for tier in tiers:
            leave_and_come_back(learner, tier)
    return metrics, weights_of(learner)


def weights_of(learner: Any) -> torch.Tensor:
    groups = [tensors for _, tensors in learner.iter_groups()]
    return torch.cat([t.float().flatten() for tensors in groups for t in tensors])


def leave_and_come_back(learner: Any, tier: str) -> None:
    """What must leave does: its data are where the mover keeps them, and one byte off them there is
    one byte off when they are back.
    """
    states = learner._states()
    frozen = [p for p in learner.model.parameters() if not p.requires_grad]
    whole = learner.settings.offload_parameters
    before = [x.data_ptr() for x in states]
    began = learner.offload(tier, wait=False)
    assert began == sum(x.nbytes for x in states) and [x.data_ptr() for x in states] == before
    infer = learner.infer(batch_of(learner.rank))  # the weights are there, as for a transfer
    assert infer.isfinite().all()
    rest = learner.offload(tier)
    assert (rest > 0) == (tier == "always" and not whole)
    away = [learner.states._places[x].data_ptr() for x in states]
    assert [x.data_ptr() for x in states] == away and not set(away) & set(before)
    assert len(states) >= 2 or learner.settings.offload_optimizer
    if tier == "always" and not whole:
        held = [getattr(p, "ds_tensor", p) for p in frozen]
        assert [x.data_ptr() for x in held] == [
            learner.weights._places[x].data_ptr() for x in held
        ], "DeepSpeed leaves what is frozen on the GPU"
    learner.save(f"{learner.settings.model.path}-left")  # gathers weights under ZeRO-3
    came = learner.reload()
    assert came >= began and not set(away) & {x.data_ptr() for x in states}


def settings_of(
    folder: Path,
    stage: int,
    dtype: str = "float32",
    lora: dict[str, int] | None = None,
    **changes: Any,
) -> LearnerSettings:
    values = {
        "ranks": 2,
        "zero_stage": stage,
        "micro_batch_tokens": 20,
        "optimizer": {"learning_rate": 1e-2},
    }
    return LearnerSettings.model_validate(
        {"model": {"path": str(folder), "dtype": dtype, "lora": lora}, **values, **changes}
    )


@engines
@pytest.mark.parametrize(
    ("stage", "dtype", "lora"),
    [
        *((stage, "float32", None) for stage in (0, 1, 2, 3)),
        (2, "bfloat16", None),
        (3, "bfloat16", None),
        (0, "float32", {"rank": 4}),
        (2, "bfloat16", {"rank": 4}),
        (3, "bfloat16", {"rank": 4}),
    ],
)
def test_a_learner_that_leaves_and_comes_back_learns_the_same(
    ranks: Any, folder: Path, stage: int, dtype: str, lora: dict[str, int] | None
) -> None:
    settings = settings_of(folder, stage, dtype, lora=lora)
    tiers = (("always", "optimizer", "always"), ("optimizer",), ())
    stayed, left = (ranks.run(train, settings, turns) for turns in (((), (), ()), tiers))
    for (metrics, weights), (expected, expected_weights) in zip(left, stayed, strict=True):
        assert metrics == expected and torch.equal(weights, expected_weights)


@engines
@pytest.mark.parametrize(
    ("stage", "dtype", "lora"),
    [
        *((stage, dtype, None) for stage in (1, 2, 3) for dtype in ("float32", "bfloat16")),
        (3, "bfloat16", {"rank": 4}),
    ],
)
def test_an_offloaded_learner_learns_the_same(
    ranks: Any, folder: Path, stage: int, dtype: str, lora: dict[str, int] | None
) -> None:
    changes = {"offload_optimizer": True, "offload_parameters": stage == 3}
    turns = (("always", "optimizer"), ()) if (stage, dtype) != (1, "bfloat16") else ((), ())
    plain = ranks.run(train, settings_of(folder, stage, dtype, lora), ((), ()))
    offloaded = ranks.run(train, settings_of(folder, stage, dtype, lora, **changes), turns)
    rounding = 2**-7 if dtype == "bfloat16" else 1e-4
    for (metrics, weights), (expected, expected_weights) in zip(offloaded, plain, strict=True):
        assert metrics == [pytest.approx(one, rel=1e-4) for one in expected]
        torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=rounding)


def load_both_ways(rank: Rank, loader: str, settings: LearnerSettings) -> tuple[list[str], int]:
    """What differs between a model loaded whole and one loaded into shards; and how many weights
    are sharded.
    """
    import deepspeed

    from learners import checkpoints
    from learners.deepspeed_setup import load_sharded, start_process_group

    def load() -> Any:
        torch.manual_seed(7)  # a new head is drawn
        return getattr(checkpoints, loader)(
            settings.model, *([0] if loader == "load_reward_model" else [])
        )

    start_process_group(rank)
    whole = load()
    sharded = load_sharded(load, settings)
    names = [name for name, _ in whole.named_parameters()]
    assert names == [name for name, _ in sharded.named_parameters()] and not sharded.training
    differs = []
    for (name, one), (_, other) in zip(
        whole.named_parameters(), sharded.named_parameters(), strict=True
    ):
        count = other.numel()
        with deepspeed.zero.GatheredParameters([other]):
            if count or one.dtype != other.dtype or not torch.equal(one, other):
                differs.append(name)
    for (name, one), (_, other) in zip(whole.named_buffers(), sharded.named_buffers(), strict=True):
        if one.dtype != other.dtype or not torch.equal(one, other):
            differs.append(name)
    return differs, len(names)


@pytest.fixture(scope="module")
def checkpoints(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import Qwen3ForSequenceClassification, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from tests.actors.tiny_models import make_model, save_model

    top = tmp_path_factory.mktemp("checkpoints")
    save_model(top / "untied", seed=0, tied=False)
    shape = make_model(0, False).config.to_dict() | {
        "model_type": "qwen3_moe",
        "architectures": None,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts)).save_pretrained(top / "experts")
    scores = make_model(0, True).config
    scores.num_labels = 1
    Qwen3ForSequenceClassification(scores).save_pretrained(top / "scores")
    return {"tied": folder, **{name: top / name for name in ("untied", "experts", "scores")}}


@engines
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "loader"),
    [
        ("tied", "load_causal_lm"),
        ("untied", "load_causal_lm"),
        ("experts", "load_causal_lm"),
        ("tied", "load_critic"),
        ("scores", "load_critic"),
        ("tied", "load_reward_model"),
    ],
)
def test_a_model_loaded_into_shards_is_the_whole_model_bit_by_bit(
    ranks: Any, checkpoints: dict[str, Path], name: str, loader: str, dtype: str
) -> None:
    """Buffers too: in the weights' dtype, rotary frequencies would be rounded to bfloat16."""
    for differs, weights in ranks.run(
        load_both_ways, loader, settings_of(checkpoints[name], 3, dtype)
    ):
        assert differs == [] and weights > 20


@engines
def test_weights_missing_in_a_checkpoint_are_found_when_it_is_loaded_into_shards(
    ranks: Any, checkpoints: dict[str, Path]
) -> None:
    with pytest.raises(
        AssertionError, match="1 weights are missing in the checkpoint: lm_head.weight"
    ):
        ranks.run(load_sharded_alone, settings_of(without_head(checkpoints["untied"]), 3))


def load_sharded_alone(rank: Rank, settings: LearnerSettings) -> None:
    from learners.checkpoints import load_causal_lm
    from learners.deepspeed_setup import load_sharded, start_process_group

    start_process_group(rank)
    load_sharded(lambda: load_causal_lm(settings.model), settings)


def without_head(folder: Path) -> Path:
    from safetensors.torch import load_file, save_file

    other = folder.with_name("headless")
    other.mkdir()
    (other / "config.json").write_text((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    return other


# --- a whole run, rehearsed on CPUs ---------------------------------------------------------------


def tiny_run(folder: Path, swap: str) -> Any:
    """Two steps of PPO with all four models and an evaluation."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from actors.settings import rl_recipe
    from launch.tasks import unique_digits as task

    if not (folder / "base").exists():
        task.make_tokenizer(folder / "base")
        task.make_model(folder / "base", 0)
        task.write_rows(folder / "prompts.jsonl", task.make_prompts(64, 0, "train"))
        task.make_tokenizer(folder / "judge")
        config = AutoConfig.from_pretrained(folder / "base", num_labels=1)
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "judge")
    base = {"path": str(folder / "base")}
    judge = {"path": str(folder / "judge")}
    prompts = {"path": str(folder / "prompts.jsonl"), "answer_columns": ["answer"]}
    return rl_recipe("ppo", "ppo").model_validate(
        {
            "run": {
                "folder": str(folder / swap),
                "progress": False,
                "tensorboard": False,
                "checkpoint_every_steps": 1,
            },
            "cluster": {"swap": swap},
            "step": {"steps": 2, "prompts_per_step": 8, "mini_batch_size": 4},
            "actor": {"model": base, "zero_stage": 3},
            "critic": {"model": judge, "zero_stage": 2},
            "prompts": prompts,
            "rewards": [{"name": "judge", "kind": "model", "model": judge}],
            "generation": {"max_new_tokens": 12, "threads": 1, "kv_cache_gib": 0.125},
            "evaluation": {
                "prompts": {**prompts, "limit": 8},
                "function": "launch.tasks.unique_digits:exact_match",
                "every_steps": 1,
                "greedy": False,
            },
        }
    )


def rehearse(recipe: Any) -> list[dict[str, float]]:
    """Metrics of the run's steps, in which everything is done that shared GPUs would ask for by the
    recipe's `cluster.swap`.
    """
    from actors.cluster.placement import Placement
    from actors.cluster.processes import Processes
    from actors.driver import Driver
    from actors.loop import Loop
    from actors.roles import roles_of
    from actors.run.alarms import AlarmLog
    from actors.run.folder import RunFolder
    from actors.run_data import RunData
    from actors.start import Workers
    from launch.plan.resolve import resolve
    from launch.recipe.document import Document

    recipe, _ = resolve(recipe, Document("rehearsal"))
    data = RunData.load(recipe)
    with Placement(recipe.cluster, roles_of(recipe)) as placement:
        placement.shared = True
        workers = Workers(recipe, data, Processes(roles_of(recipe), placement))
        with closing(RunFolder.open(recipe.run, recipe.to_yaml(), False)) as run:
            alarms = AlarmLog(run, 3)
            driver = Driver(recipe, data, workers, run, alarms)
            Loop(recipe, driver, run, alarms, clock=0.0).run(resume=False)
    lines = Path(recipe.run.folder, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def numbers(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """All that where and when things were done has no say in."""
    other = ("seconds/", "throughput/", "swap/")
    return [{k: v for k, v in r.items() if k != "time" and not k.startswith(other)} for r in rows]


def saved(folder: Path) -> list[torch.Tensor]:
    """Every tensor of a checkpoint, optimizer states too, but for random states: nothing is drawn
    from them here.
    """
    files = [torch.load(f, weights_only=False) for f in sorted(folder.rglob("*.pt"))]
    return [t for file in files for t in tensors_in(file | {"rng": None})]


def tensors_in(value: Any) -> list[torch.Tensor]:
    if torch.is_tensor(value):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    return [t for v in inner for t in tensors_in(v)] if isinstance(value, dict | list) else []


@engines
def test_no_number_of_a_run_depends_on_who_slept_or_left(cluster: None, tmp_path: Path) -> None:
    """vLLM's CPU worker only pretends to sleep; learners and frozen models really leave and come
    back. On CPUs auto means that nothing moves. What moves is what the plan says, though every step
    is saved; nobody comes back for that, and what is saved is the same.
    """
    from launch.plan.plan import make_plan

    rows = {}
    for swap in ("auto", "kv_cache", "optimizer", "always"):
        recipe = tiny_run(tmp_path, swap)
        rows[swap] = rehearse(recipe)
        assert numbers(rows[swap]) == numbers(rows["auto"]) and len(rows[swap]) > 4
        on_gpus = {"device": "cuda", "placement": "colocated", "gpus_per_node": 1}
        cluster_of = recipe.cluster.model_copy(update=on_gpus)
        plan = make_plan(recipe.model_copy(update={"cluster": cluster_of}))
        expected = plan.swapped - plan.footprints["engine", False].moved
        _, second = (row for row in rows[swap] if "swap/bytes" in row)
        assert second["swap/bytes"] == pytest.approx(expected, rel=0.01), swap
        assert ("seconds/score/sleep" in second) == (swap != "auto")
        checkpoint = tmp_path / swap / "checkpoints" / "step-000002"
        tensors = saved(checkpoint)
        first = saved(tmp_path / "auto" / "checkpoints" / "step-000002")
        assert len(tensors) == len(first) > 10
        assert all(torch.equal(a, b) for a, b in zip(tensors, first, strict=True))
