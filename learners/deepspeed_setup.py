"""DeepSpeed as we use it: process group, sharded loading, configuration and optimizer."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from learners.experience import Experience
from learners.launchers import clear_foreign_launchers
from learners.settings import LearnerSettings, OptimizerSettings, Rank


class RoleForward(nn.Module):
    """Module that DeepSpeed wraps: its forward is the role's computation, so that ZeRO's hooks see
    all of it. Unless it is `saved_whole`, what is frozen is not in its checkpoints.
    """

    def __init__(self, model: nn.Module, role_forward: Any, saved_whole: bool = True) -> None:
        super().__init__()
        self.model = model
        self.role_forward = role_forward
        self.saved_whole = saved_whole

    def forward(self, batch: Experience) -> Tensor:
        return self.role_forward(self.model, batch)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return what a checkpoint holds. DeepSpeed itself would keep a frozen weight that is tied,
        under its second name.
        """
        state = super().state_dict(*args, **kwargs)
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if not (self.saved_whole or parameter.requires_grad):
                del state[name]
        return state


def start_process_group(rank: Rank) -> None:
    """Join the ranks of this role (nccl on GPU, gloo on CPU) and hand the group to DeepSpeed."""
    if dist.is_initialized():
        return
    clear_foreign_launchers()
    # DeepSpeed names its shared-memory segments after these two, and roles on one host must not
    # share them.
    os.environ.update(MASTER_ADDR=rank.address, MASTER_PORT=str(rank.port))
    os.environ.update(RANK=str(rank.index), WORLD_SIZE=str(rank.world_size), LOCAL_RANK="0")
    backend = "nccl" if rank.device == "cuda" else "gloo"
    if rank.device == "cuda":
        torch.cuda.set_device(0)  # the only one this process sees
    dist.init_process_group(
        backend,
        init_method=f"tcp://{rank.address}:{rank.port}",
        rank=rank.index,
        world_size=rank.world_size,
        timeout=timedelta(seconds=rank.timeout_s),
    )
    # DeepSpeed's shared-memory all-reduce takes a minute to compile, and nothing here uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def load_sharded(load: Callable[[], nn.Module], settings: LearnerSettings) -> nn.Module:
    """Return the model that `load` has Transformers load, with only this rank's ZeRO-3 shard of
    every weight.

    The process group must exist: without it nothing would be sharded, with no more than a warning.
    """
    assert dist.is_initialized()
    # Transformers refers to it weakly and would forget it without a name of its own.
    _alive = HfDeepSpeedConfig(deepspeed_config(settings))
    try:
        model = load()
    finally:
        unset_hf_deepspeed_config()
    _restore_buffers(model, getattr(torch, settings.model.dtype))
    return model


def _restore_buffers(model: Any, dtype: torch.dtype) -> None:
    """Compute buffers anew that no checkpoint holds: zero.Init makes them in the weights' dtype,
    and frequencies of rotary embeddings rounded to bfloat16 would be off by whole radians at late
    positions.
    """
    with init_empty_weights(include_buffers=False):
        whole = type(model)._from_config(model.config, dtype=dtype)
    saved = model.state_dict().keys()
    for name, buffer in whole.named_buffers():
        if name not in saved:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.to(model.get_buffer(name).device))


def deepspeed_config(settings: LearnerSettings) -> dict[str, Any]:
    """Return DeepSpeed's configuration, with every default that has changed between versions
    written out.
    """
    cpu = {"device": "cpu", "pin_memory": True}
    return {
        # unused: micro-batches are cut by tokens, in Learner
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.optimizer.max_grad_norm,
        "zero_optimization": {
            "stage": settings.zero_stage,
            **({"offload_optimizer": cpu} if settings.offload_optimizer else {}),
            **({"offload_param": cpu} if settings.offload_parameters else {}),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # ZeRO 1-3 then keep float32 master weights; without the check ZeRO 1 and 2 would step on
        # NaN.
        "bf16": {"enabled": settings.model.dtype == "bfloat16", "check_grad_overflow": True},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if settings.zero_stage > 0 else {}),
        "wall_clock_breakdown": False,
    }


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return Torch's optimizer of what is trained, with weight decay on matrices only, as usual for
    Transformers.
    """
    # a ZeRO-3 shard is flat, so its own shape tells no matrix from a vector
    trained = (p for p in model.parameters() if p.requires_grad)
    shapes = {p: getattr(p, "ds_shape", p.shape) for p in trained}
    matrices = [p for p, shape in shapes.items() if len(shape) >= 2]
    vectors = [p for p, shape in shapes.items() if len(shape) < 2]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((matrices, settings.weight_decay), (vectors, 0.0))
        if params
    ]
    if settings.kind == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate)
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps
    )
