"""The recipe as vLLM's arguments, and the engine built of them."""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from actors.settings import ADAPTER_RANKS, GenerationSettings
from actors.weights.client import transfer_backend
from learners.errors import UserError
from learners.imports import imported
from learners.settings import DeviceType, ModelSettings

# modules of vLLM that it would import only while an engine is built
WORKERS = {"cpu": "vllm.v1.worker.cpu_worker", "cuda": "vllm.v1.worker.gpu_worker"}
LEAST_SHARE = 0.01  # of a GPU


def engine_arguments(
    model: ModelSettings,
    generation: GenerationSettings,
    device: DeviceType,
    max_model_tokens: int,
    shared: bool = False,
    adapter_rank: int | None = None,
    swap: str = "always",
) -> dict[str, Any]:
    """Return vLLM's EngineArgs as plain data. Ids in, ids out: no tokenizer. With an `adapter_rank`
    there is room for the adapter that is served, and for the next one. On `shared` GPUs an engine
    can sleep, unless `swap` is never.
    """
    return {
        "model": model.path,
        "dtype": model.dtype,
        "trust_remote_code": model.trust_remote_code,
        "skip_tokenizer_init": True,
        # keeps the checkpoint's own sampling defaults out (repetition penalty!)
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",  # after temperature, as the Actor computes them
        "max_model_len": max_model_tokens,
        "max_num_seqs": generation.max_concurrent,
        "enable_prefix_caching": True,
        "weight_transfer_config": {"backend": transfer_backend(device, shared)},
        "seed": 0,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        **_workers(generation.tensor_parallel),
        **(
            _on_cpu(generation, max_model_tokens)
            if device == "cpu"
            else _on_gpu(generation, shared and swap != "never")
        ),
        **(_with_adapters(adapter_rank) if adapter_rank else {}),
        **({"hf_overrides": {"head_dtype": model.head_dtype}} if model.head_dtype else {}),
    }


def _workers(tensor_parallel: int) -> dict[str, Any]:
    """Keep one worker in this process; of several, each gets a process and knows us by its
    extension.
    """
    if tensor_parallel == 1:
        return {"distributed_executor_backend": "uni"}
    return {
        "distributed_executor_backend": "mp",
        "tensor_parallel_size": tensor_parallel,
        "worker_extension_cls": "actors.weights.parallel.WorkerExtension",
    }


def _with_adapters(rank: int) -> dict[str, Any]:
    most = min(room for room in ADAPTER_RANKS if room >= rank)
    # two are kept in CPU memory: a new one is read before the one that serves is dropped
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "max_lora_rank": most}


def _on_cpu(generation: GenerationSettings, max_model_tokens: int) -> dict[str, Any]:
    return {
        "enforce_eager": True,
        # A prompt cut in two would make vLLM rewind the request's seeded generator, which is not
        # possible on a CPU.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(8192, max_model_tokens),
        "kv_cache_memory_bytes": int(generation.kv_cache_gib * 2**30),
    }


def _on_gpu(generation: GenerationSettings, sleeps: bool) -> dict[str, Any]:
    cache = generation.kv_cache_bytes
    # vLLM asks for its share to be free when it starts, and measures what is left for the cache:
    # with a cache of a given size neither, since others may have begun to load.
    memory = {"kv_cache_memory_bytes": cache, "gpu_memory_utilization": LEAST_SHARE}
    return {
        "enable_sleep_mode": sleeps,
        **(memory if cache else {"gpu_memory_utilization": generation.gpu_memory_fraction}),
        "cudagraph_capture_sizes": graph_sizes(generation.max_concurrent),
    }


def graph_sizes(most: int) -> list[int]:
    """Return the numbers of sequences for which vLLM captures CUDA graphs; a batch is padded to the
    next. Powers of two and, above 32, one between them: a third of vLLM's own, each of which takes
    time at every start.
    """
    powers = [2**i for i in range(most.bit_length())]
    between = [3 * power // 2 for power in powers if power >= 32]
    return sorted({size for size in (*powers, *between, most) if size <= most})


def our_key(argument: str, device: DeviceType) -> str:
    """Return the recipe's key for the name by which vLLM calls one of its arguments."""
    memory = "kv_cache_gib" if device == "cpu" else "gpu_memory_fraction"
    return {
        "gpu_memory_utilization": f"generation.{memory}",
        "kv_cache_memory_bytes": f"generation.{memory}",
        "vllm_cpu_kvcache_space": f"generation.{memory}",
        "max_model_len": "generation.max_model_tokens",
        "max_num_batched_tokens": "generation.max_model_tokens",
        "max_num_seqs": "generation.max_concurrent",
        "tensor_parallel_size": "generation.tensor_parallel",
        "dtype": "actor.model.dtype",
        "head_dtype": "actor.model.head_dtype",
        "trust_remote_code": "actor.model.trust_remote_code",
    }[argument.replace("-", "_").lower()]


NO_ADAPTERS = "does not support LoRA"
ARGUMENT = re.compile(
    r"(?:--)?\b(gpu[-_]memory[-_]utilization|kv[-_]cache[-_]memory[-_]bytes|max[-_]model[-_]len"
    r"|VLLM_CPU_KVCACHE_SPACE|max[-_]num[-_]batched[-_]tokens|max[-_]num[-_]seqs"
    r"|tensor[-_]parallel[-_]size|head[-_]dtype|dtype|trust[-_]remote[-_]code)\b"
)
NO_ROOM = re.compile(
    r"max seq len \((\d+)\), \(([\d.]+) GiB KV cache is needed.* memory \(([\d.]+) GiB\)"
    r"(?:.*maximum model length is (\d+))?"
)


def in_our_words(error: ValueError, device: DeviceType) -> UserError | None:
    """Return what vLLM refuses as one line that names the recipe's keys; None where it names none
    of the arguments that come from a recipe.
    """
    text = " ".join(str(error).partition("See https")[0].split())
    if NO_ADAPTERS in text:
        return UserError(
            f"sync.lora: vLLM serves no adapters for this model ({text}): use merged, which sends "
            "the adapter within the weights"
        )
    if found := NO_ROOM.search(text):
        tokens, needed, there, fitting = found.groups()
        enough = float(needed) + 0.01  # they are rounded
        more = f"raise it to {enough:.2f}" if device == "cpu" else "raise it"
        fewer = f" to {fitting}" if fitting else ""
        return UserError(
            f"{our_key('kv_cache_memory_bytes', device)}: the KV cache has {there} GiB, and one "
            f"sequence of {tokens} tokens needs {needed} GiB: {more}, or lower "
            f"generation.max_model_tokens{fewer}"
        )
    named = ARGUMENT.search(text)
    if named is None:
        return None
    said = ARGUMENT.sub(lambda match: our_key(match[1], device), text)
    return UserError(f"{our_key(named[1], device)}: vLLM cannot start: {said[:400]}")


def exact_products(dtype: str) -> None:
    """Have Triton multiply float32 as float32, in this process and those it starts: the attention
    kernel would do it in TF32. Triton keeps its compiled kernels apart by this.
    """
    if dtype == "float32":
        os.environ["TRITON_F32_DEFAULT"] = "ieee"


def prepare(device: DeviceType) -> None:
    """Import vLLM, with what it reads from the environment meanwhile. No GPU is touched."""
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over the recipe
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # this process has threads: never fork
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else one core stays reserved for others
    # It counts YaRN's positions unscaled, and limits ALiBi: learners/positions.py knows better.
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # the second makes this process ready for a worker of ours, as it does spawned ones
    for module in ("vllm.v1.engine.llm_engine", "actors.weights.parallel", WORKERS[device]):
        imported(module)


def build_engine(arguments: dict[str, Any], device: DeviceType, threads: int) -> Any:
    """Return a vLLM engine in this process; workers that are parallel have processes of their own.

    Raises UserError where vLLM refuses what the recipe asks for.
    """
    prepare(device)
    if device == "cpu":
        torch.set_num_threads(threads)  # vLLM disables this function while it starts
    else:
        exact_products(arguments["dtype"])
    from vllm import EngineArgs, LLMEngine
    from vllm.config import WeightTransferConfig

    transfer = WeightTransferConfig(**arguments.pop("weight_transfer_config"))
    try:
        chosen = EngineArgs(**arguments, weight_transfer_config=transfer)
        if device == "cpu" and chosen.create_model_config().has_inner_state:
            # States of linear attention or a convolution are kept only for prompts that may be cut.
            chosen.enable_prefix_caching = False
        engine = LLMEngine.from_engine_args(chosen)
    except ValueError as error:
        if told := in_our_words(error, device):
            raise told from error
        raise
    engine.set_weight_version("0")
    return engine
