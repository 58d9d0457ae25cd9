"""The recipe as vLLM's arguments, and the engine built of them."""

from __future__ import annotations

import os
from typing import Any

import torch

from actors.settings import GenerationSettings
from actors.weights.client import transfer_backend
from learners.settings import DeviceType, ModelSettings


def engine_arguments(
    model: ModelSettings,
    generation: GenerationSettings,
    device: DeviceType,
    max_model_tokens: int,
    shared: bool = False,
) -> dict[str, Any]:
    """Return vLLM's EngineArgs as plain data. Ids in, ids out: no tokenizer."""
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
        **(
            _on_cpu(generation, max_model_tokens)
            if device == "cpu"
            else _on_gpu(generation, shared)
        ),
    }


def _on_cpu(generation: GenerationSettings, max_model_tokens: int) -> dict[str, Any]:
    return {
        "distributed_executor_backend": "uni",
        "enforce_eager": True,
        # A prompt cut in two would make vLLM rewind the request's seeded generator, which is not
        # possible on a CPU.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(8192, max_model_tokens),
        "kv_cache_memory_bytes": int(generation.kv_cache_gib * 2**30),
    }


def _on_gpu(generation: GenerationSettings, shared: bool) -> dict[str, Any]:
    return {
        "distributed_executor_backend": "uni" if generation.tensor_parallel == 1 else "mp",
        "tensor_parallel_size": generation.tensor_parallel,
        "gpu_memory_utilization": generation.gpu_memory_fraction,
        "enable_sleep_mode": shared,
    }


def build_engine(arguments: dict[str, Any], device: DeviceType, threads: int) -> Any:
    """Return a vLLM engine in this process (on GPUs with `tensor_parallel` worker processes)."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else one core stays reserved for others
    # It counts YaRN's positions unscaled, and limits ALiBi: learners/positions.py knows better.
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if device == "cpu":
        from torch._dynamo import config as compiler

        # Compiling a helper of the sampler would hold the first token up by 6 s.
        compiler.disable = True
        torch.set_num_threads(threads)  # vLLM disables this function while it starts
    from vllm import EngineArgs, LLMEngine
    from vllm.config import WeightTransferConfig

    import actors.weights.receiver  # noqa: F401  registers our transfer backend

    transfer = WeightTransferConfig(**arguments.pop("weight_transfer_config"))
    engine = LLMEngine.from_engine_args(EngineArgs(**arguments, weight_transfer_config=transfer))
    engine.set_weight_version("0")
    return engine
