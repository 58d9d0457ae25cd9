"""Learner: a model trained by DeepSpeed ZeRO 0-3, on any number of ranks, one optimizer step per
mini-batch.

Every trained role (Actor, Critic, reward model, SFT) is a subclass that says what it computes on a
batch and what its loss is. Cutting the mini-batch into micro-batches and ranks, accumulation,
stepping, saving and exporting live here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from learners.experience import Experience, map_rows
from learners.settings import LearnerSettings, OptimizerSettings, Rank

Stats = dict[str, tuple[Tensor, Tensor]]
"""Statistics as (sum, count) pairs, reduced over micro-batches and ranks; names that start with
"max_" by maximum.
"""


class Learner(ABC):
    """One rank of a trained role.

    Subclasses implement `forward` (a forward pass), `loss` and `loss_denominator`; the denominator
    handed to `loss` is the whole mini-batch's count, over all micro-batches and ranks, so that the
    gradient does not depend on how it was cut.
    """

    rows_per_unit = 1  # preference pairs stay together: 2

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        settings: LearnerSettings,
        rank: Rank,
        total_steps: int,
    ) -> None:
        """`model` may be what loads it: under ZeRO-3 it then never stands whole in one process."""
        start_process_group(rank)
        if not isinstance(model, nn.Module):
            model = load_sharded(model, settings) if settings.zero_stage == 3 else model()
        self.model = model
        self.settings = settings
        self.rank = rank
        self.device = f"cuda:{torch.cuda.current_device()}" if rank.device == "cuda" else "cpu"
        if settings.model.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = optimizer = make_optimizer(model, settings.optimizer)
        scale = schedule(settings.optimizer, total_steps)
        self.engine, *_ = deepspeed.initialize(
            model=_RoleForward(model, self.forward),
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, scale),
            config=deepspeed_config(settings),
            dist_init_required=False,
        )
        self.engine.train()

    @abstractmethod
    def forward(self, model: nn.Module, batch: Experience) -> Tensor:
        """The role's forward pass on a micro-batch, with gradient."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Experience, denominator: float) -> tuple[Tensor, Stats]:
        """The micro-batch's contribution to the mini-batch's loss."""

    @abstractmethod
    def loss_denominator(self, shard: Experience) -> float:
        """This rank's share of the denominator."""

    def train(self, shard: Experience) -> dict[str, float]:
        """One optimizer step on this rank's rows of a mini-batch; a rank without rows still takes
        part.

        Returns the metrics of the whole mini-batch, the same on every rank, with `grad_norm`
        (before clipping), `learning_rate`, and `skipped_updates`: 1 when loss or gradient was not
        finite and nothing was updated, else 0.
        """
        metrics = self._pass(shard, learn=True)
        learning_rate = self.engine.get_lr()[0]
        norm = self._step()
        return {
            **metrics,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "skipped_updates": float(not math.isfinite(norm)),
        }

    def _step(self) -> float:
        """The optimizer step, unless the gradient is not finite; returns its norm, the same on
        every rank.
        """
        if (
            self.settings.zero_stage > 0
        ):  # ZeRO computes the norm of its shards, and skips by itself
            self.engine.step()
            return float(self.engine.get_global_grad_norm())
        norm = float(
            torch.nn.utils.get_total_norm(
                [p.grad for p in self.model.parameters() if p.grad is not None]
            )
        )
        if math.isfinite(norm):
            self.engine.step()
        else:
            self.engine.zero_grad()
        return norm

    def evaluate(self, shard: Experience) -> dict[str, float]:
        """The metrics `train` would report, without learning."""
        with torch.no_grad():
            return self._pass(shard, learn=False)

    def infer(self, shard: Experience) -> Tensor:
        """`forward` on every row without gradient: [b] or [b,T] on the CPU, in the shard's
        order.
        """
        budget = self.settings.micro_batch_tokens
        rounds = int(self._reduce([len(shard.micro_batches(budget))], dist.ReduceOp.MAX)[0])
        return map_rows(shard, budget, self.engine, self.device, rounds)

    def _pass(self, shard: Experience, learn: bool) -> dict[str, float]:
        micro_batches = shard.micro_batches(self.settings.micro_batch_tokens, self.rows_per_unit)
        rounds = int(self._reduce([len(micro_batches)], dist.ReduceOp.MAX)[0])
        denominator = float(self._reduce([self.loss_denominator(shard)], dist.ReduceOp.SUM)[0])
        totals: dict[str, list[float]] = {}
        for i in range(rounds):
            mine = i < len(micro_batches)
            batch = (
                shard.select(micro_batches[i])
                if mine
                else Experience.placeholder(self.rows_per_unit)
            )
            batch = batch.to(self.device)
            # Without an explicit boundary ZeRO-1 and ZeRO-2 keep only the last micro-batch's
            # gradient.
            self.engine.set_gradient_accumulation_boundary(i == rounds - 1)
            outputs = self.engine(batch)
            loss, stats = self.loss(outputs, batch, denominator)
            if learn:
                # A loss that overflowed may have a finite gradient, or none behind a clip: a NaN
                # that enters where the model's outputs leave it is seen by every rank in the norm.
                poison = torch.where(loss.detach().isfinite(), 0.0, torch.nan)
                # DeepSpeed averages gradients over ranks; the denominator is global already, so
                # undo that.
                self.engine.backward((loss + outputs.sum() * poison) * self.rank.world_size)
            _accumulate(totals, stats)
        return self._reduce_stats(totals)

    def _reduce_stats(self, totals: dict[str, list[float]]) -> dict[str, float]:
        names = sorted(totals)
        maxima = [n for n in names if n.startswith("max_")]
        means = [n for n in names if not n.startswith("max_")]
        largest = self._reduce([totals[n][0] for n in maxima], dist.ReduceOp.MAX)
        metrics = dict(zip(maxima, largest.tolist(), strict=True))
        sums = self._reduce([x for n in means for x in totals[n]], dist.ReduceOp.SUM).reshape(-1, 2)
        for name, (total, count) in zip(means, sums.tolist(), strict=True):
            metrics[name] = total / count if count else 0.0
        return metrics

    def _reduce(self, numbers: list[float], how: Any) -> Tensor:
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if self.rank.world_size > 1 and len(numbers):
            dist.all_reduce(values, op=how)
        return values.cpu()

    # --- shared GPUs ------------------------------------------------------------------------------

    def offload(self) -> None:
        """Leave the GPU: weights, gradients and optimizer states wait in CPU memory. Nothing can be
        computed then.

        Not with ZeRO 1 in bfloat16, where DeepSpeed cannot.
        """
        if self.settings.zero_stage == 0:
            self.model.to("cpu")
        elif not self.settings.offload_parameters:
            self.engine.offload_states(include=self._movable())
        self._move_optimizer("cpu")
        if self.rank.device == "cuda":
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """Take the GPU again, and go on."""
        if self.settings.zero_stage == 0:
            self.model.to(self.device)
        elif not self.settings.offload_parameters:
            self.engine.reload_states()
        self._move_optimizer(self.device)

    def _movable(self) -> list[OffloadStateTypeEnum]:
        """What DeepSpeed moves. It would take step counters along, and refuses, under ZeRO-3,
        master weights and states of any optimizer but its own FusedAdam: these we move ourselves.
        """
        ours = {OffloadStateTypeEnum.optim_states}
        if self.settings.zero_stage == 3:
            ours.add(OffloadStateTypeEnum.hp_params)
        return [state for state in OffloadStateTypeEnum if state not in ours]

    def _move_optimizer(self, device: str) -> None:
        """Optimizer states to `device` and, under ZeRO-3, the master weights, unless they are
        always on the CPU.
        """
        if self.settings.offload_optimizer:
            return
        states = self.optimizer.state.values()
        # step counters stay
        tensors = [x for s in states for x in s.values() if torch.is_tensor(x) and x.ndim]
        if self.settings.zero_stage == 3:
            tensors += self.engine.optimizer.fp32_partitioned_groups_flat
        for tensor in tensors:
            tensor.data = tensor.data.to(device)

    # --- weights ----------------------------------------------------------------------------------

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, full shape) of every parameter, in the order `iter_groups` yields them."""
        named = dict(self.model.named_parameters())
        return [
            (name, named[name].dtype, tuple(getattr(named[name], "ds_shape", named[name].shape)))
            for names in self._layer_groups()
            for name in names
        ]

    def iter_groups(self) -> Iterator[tuple[list[str], list[Tensor]]]:
        """Full weights, one layer at a time, as (names, clones). Collective under ZeRO-3: all ranks
        in lockstep.
        """
        named = dict(self.model.named_parameters())
        for names in self._layer_groups():
            parameters = [named[name] for name in names]
            sharded = self.settings.zero_stage == 3
            with (
                deepspeed.zero.GatheredParameters(parameters)
                if sharded
                else contextlib.nullcontext()
            ):
                clones = [p.detach().clone() for p in parameters]
            yield names, clones

    def _layer_groups(self) -> list[list[str]]:
        """Parameter names, grouped by the first number in them (the layer), embeddings and heads by
        themselves.
        """
        groups: dict[str, list[str]] = {}
        for name, _ in self.model.named_parameters():
            parts = name.split(".")
            layer = next((i for i, part in enumerate(parts) if part.isdigit()), None)
            groups.setdefault(
                ".".join(parts[: layer + 1] if layer is not None else parts[:-1]), []
            ).append(name)
        return list(groups.values())

    def export(self, folder: str) -> None:
        """Write a Hugging Face model that plain Transformers loads. Call on every rank; rank 0
        writes.
        """
        state: dict[str, Tensor] = {}
        for names, tensors in self.iter_groups():
            if self.rank.index == 0:
                state.update(zip(names, (t.cpu() for t in tensors), strict=True))
        if self.rank.index == 0:
            state.update(
                {n: b.cpu() for n, b in self.model.named_buffers() if n in self.model.state_dict()}
            )
            self.model.save_pretrained(folder, state_dict=state)

    def save(self, folder: str) -> None:
        """Write a resumable checkpoint: weights, optimizer, schedule and RNG. Call on every
        rank.
        """
        self.engine.save_checkpoint(
            folder, tag="state", client_state={"rng": torch.get_rng_state()}
        )
        if self.rank.index == 0:
            Path(folder, "layout.json").write_text(json.dumps(self._layout()))

    def load(self, folder: str) -> None:
        """Continue from `save`. Raises ValueError when the world size or ZeRO stage is another."""
        saved = json.loads(Path(folder, "layout.json").read_text())
        if saved != self._layout():
            raise ValueError(
                f"{folder}: saved with {saved}, cannot resume with {self._layout()}; use the "
                "same layout"
            )
        path, client = self.engine.load_checkpoint(folder, tag="state")
        if path is None:
            raise ValueError(f"{folder}: no checkpoint that DeepSpeed can read")
        torch.set_rng_state(client["rng"])

    def _layout(self) -> dict[str, int]:
        return {"ranks": self.rank.world_size, "zero_stage": self.settings.zero_stage}


class _RoleForward(nn.Module):
    """What DeepSpeed wraps: a module whose forward is the role's computation, so that ZeRO's hooks
    see all of it.
    """

    def __init__(self, model: nn.Module, role_forward: Any) -> None:
        super().__init__()
        self.model = model
        self.role_forward = role_forward

    def forward(self, batch: Experience) -> Tensor:
        return self.role_forward(self.model, batch)


def start_process_group(rank: Rank) -> None:
    """Join the ranks of this role (nccl on GPU, gloo on CPU) and hand the group to DeepSpeed."""
    if dist.is_initialized():
        return
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
    # Nothing we call uses DeepSpeed's shared-memory all-reduce, which takes a minute to compile at
    # first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def load_sharded(load: Callable[[], nn.Module], settings: LearnerSettings) -> nn.Module:
    """The model that `load` has Transformers load, of every weight this rank's ZeRO-3 shard alone.

    The process group must exist: without it nothing would be sharded, with no more than a warning.
    """
    assert dist.is_initialized()
    # Transformers holds it weakly: it must live to the end
    config = HfDeepSpeedConfig(deepspeed_config(settings))
    try:
        model = load()
    finally:
        del config
        unset_hf_deepspeed_config()
    _restore_buffers(model, getattr(torch, settings.model.dtype))
    return model


def _restore_buffers(model: Any, dtype: torch.dtype) -> None:
    """Buffers that no checkpoint holds, computed anew: zero.Init makes them in the weights' dtype,
    and frequencies of rotary embeddings rounded to bfloat16 would turn late positions by whole
    radians.
    """
    with init_empty_weights(include_buffers=False):
        whole = type(model)._from_config(model.config, dtype=dtype)
    saved = model.state_dict().keys()
    for name, buffer in whole.named_buffers():
        if name not in saved:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.to(model.get_buffer(name).device))


def deepspeed_config(settings: LearnerSettings) -> dict[str, Any]:
    """DeepSpeed's configuration, with every default that has changed between versions written
    out.
    """
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        # unused: micro-batches are cut by tokens, in Learner
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.optimizer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # ZeRO 1-3 then keep float32 master weights; without the check ZeRO 1 and 2 would step on
        # NaN.
        "bf16": {"enabled": settings.model.dtype == "bfloat16", "check_grad_overflow": True},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if settings.zero_stage > 0 else {}),
        "wall_clock_breakdown": False,
    }


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Torch's optimizer; weight decay on matrices only, as usual for Transformers."""
    # a ZeRO-3 shard is flat
    shapes = {p: getattr(p, "ds_shape", p.shape) for p in model.parameters()}
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


def schedule(settings: OptimizerSettings, total_steps: int) -> Any:
    """Factor of the peak learning rate at optimizer step i: linear warm-up, then constant, linear
    or cosine decay.
    """

    def factor(i: int) -> float:
        warm = min(1.0, (i + 1) / (settings.warmup_steps + 1))
        if settings.schedule == "constant" or i < settings.warmup_steps:
            return warm
        done = min(1.0, (i - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps))
        left = 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return settings.final_fraction + (1 - settings.final_fraction) * left

    return factor


def _accumulate(totals: dict[str, list[float]], stats: Stats) -> None:
    for name, (total, count) in stats.items():
        seen = totals.setdefault(name, [0.0, 0.0])
        if name.startswith("max_"):
            seen[0] = seen[0] if float(total) <= seen[0] else float(total)  # NaN stays
        else:
            seen[0] += float(total)
            seen[1] += float(count)
