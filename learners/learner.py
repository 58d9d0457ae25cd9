"""Learner: a model trained by DeepSpeed ZeRO 0-3, on any number of ranks, one optimizer step per
mini-batch.

Every trained role (Actor, Critic, reward model, SFT) is a subclass with its computation on a batch
and its loss. Cutting the mini-batch into micro-batches and ranks, accumulation, stepping, and
leaving a shared GPU live here.
"""

from __future__ import annotations

import gc
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from torch import Tensor, nn

from learners.deepspeed_setup import (
    RoleForward,
    deepspeed_config,
    load_sharded,
    make_optimizer,
    start_process_group,
)
from learners.experience import Experience, map_rows
from learners.lora import attach, head_of, without_dropout
from learners.losses import Stats
from learners.moving import Mover
from learners.schedules import schedule
from learners.settings import LearnerSettings, Rank
from learners.weights import TrainedWeights


class Learner(TrainedWeights, ABC):
    """One rank of a trained role.

    Subclasses implement `forward`, `loss` and, unless the loss is a mean over tokens,
    `loss_denominator`; the denominator handed to `loss` is the whole mini-batch's count, over all
    micro-batches and ranks, so that the gradient does not depend on how it was cut.
    """

    rows_per_unit = 1  # 2 where they are pairs, which no micro-batch may part
    has_head = False  # one that is trained whole beside an adapter

    def __init__(
        self,
        load: Callable[[], Any],
        settings: LearnerSettings,
        rank: Rank,
        total_steps: int,
        seed: int = 0,
    ) -> None:
        """Start the rank with the model that `load` loads; under ZeRO-3 no process ever holds it
        whole. Every rank draws the same adapter, if there is one, from `seed`.
        """
        start_process_group(rank)
        self.model = load_sharded(load, settings) if settings.zero_stage == 3 else load()
        if lora := settings.model.lora:
            head = head_of(self.model) if self.has_head else []
            attach(self.model, lora, head, seed, settings.model.path)
        self.settings = settings
        self.rank = rank
        self.device = f"cuda:{torch.cuda.current_device()}" if rank.device == "cuda" else "cpu"
        if settings.model.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = make_optimizer(self.model, settings.optimizer)
        self.engine, *_ = deepspeed.initialize(
            model=RoleForward(self.model, self.forward, saved_whole=settings.model.lora is None),
            optimizer=self.optimizer,
            lr_scheduler=torch.optim.lr_scheduler.LambdaLR(
                self.optimizer, schedule(settings.optimizer, total_steps)
            ),
            config=deepspeed_config(settings),
            dist_init_required=False,
        )
        self.engine.train()
        self.states = Mover(self.device)  # of Adam states and master weights
        self.weights = Mover(self.device)
        self._in_buffers = 0  # bytes that DeepSpeed has moved
        if rank.device == "cuda":
            gc.freeze()  # DeepSpeed collects garbage whenever weights leave

    @abstractmethod
    def forward(self, model: nn.Module, batch: Experience) -> Tensor:
        """Run the role's forward pass on a micro-batch, with gradient."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: Experience, denominator: float) -> tuple[Tensor, Stats]:
        """Return the micro-batch's contribution to the mini-batch's loss, and its statistics; names
        that start with "max_" are reduced by maximum.
        """

    def loss_denominator(self, shard: Experience) -> float:
        """Return this rank's share of the denominator."""
        return shard.loss_denominator("token_mean")

    def train(self, shard: Experience) -> dict[str, float]:
        """Take one optimizer step on this rank's rows of a mini-batch; a rank without rows still
        takes part.

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
        """Step the optimizer unless the gradient is not finite; return its norm, the same on every
        rank.
        """
        self.states.await_back()
        if self.settings.zero_stage > 0:  # ZeRO takes the norm of its shards, and skips by itself
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

    @torch.no_grad()
    def evaluate(self, shard: Experience) -> dict[str, float]:
        """Return the metrics `train` would report, without learning."""
        return self._pass(shard, learn=False)

    def infer(self, shard: Experience) -> Tensor:
        """Return `forward` of every row without gradient: [b] or [b,T] on the CPU, in the shard's
        order.
        """
        budget = self.settings.micro_batch_tokens
        rounds = int(self._reduce([len(shard.micro_batches(budget))], dist.ReduceOp.MAX)[0])
        with without_dropout(self.model):
            return map_rows(shard, budget, self.engine, self.device, rounds)

    def _pass(self, shard: Experience, learn: bool) -> dict[str, float]:
        micro_batches = shard.micro_batches(self.settings.micro_batch_tokens, self.rows_per_unit)
        rounds = int(self._reduce([len(micro_batches)], dist.ReduceOp.MAX)[0])
        denominator = float(self._reduce([self.loss_denominator(shard)], dist.ReduceOp.SUM)[0])
        totals: dict[str, list[float]] = {}
        for i in range(rounds):
            batch = (
                shard.select(micro_batches[i])
                if i < len(micro_batches)
                else Experience.placeholder(self.rows_per_unit)
            ).to(self.device)
            # Without an explicit boundary ZeRO-1 and ZeRO-2 keep only the last micro-batch's
            # gradient.
            self.engine.set_gradient_accumulation_boundary(i == rounds - 1)
            with nullcontext() if learn else without_dropout(self.model):
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
        maxima = sorted(n for n in totals if n.startswith("max_"))
        means = sorted(totals.keys() - maxima)
        largest = self._reduce([totals[n][0] for n in maxima], dist.ReduceOp.MAX)
        sums = self._reduce([x for n in means for x in totals[n]], dist.ReduceOp.SUM).reshape(-1, 2)
        averages = [total / count if count else 0.0 for total, count in sums.tolist()]
        return dict(zip(maxima + means, largest.tolist() + averages, strict=True))

    def _reduce(self, numbers: list[float], how: Any) -> Tensor:
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if self.rank.world_size > 1 and len(numbers):
            dist.all_reduce(values, op=how)
        return values.cpu()

    # --- shared GPUs ------------------------------------------------------------------------------

    def offload(self, tier: str = "always", wait: bool = True) -> int:
        """Leave the GPU to others; return the bytes that this call moved. By tier kv_cache only
        memory that is not in use leaves; by optimizer Adam states and master weights go to CPU
        memory; by always the weights too: then nothing can be computed until `reload`.

        Without `wait` the states only begin to leave, while what comes next still uses the weights;
        a call that waits must follow. Not with ZeRO 1 in bfloat16.
        """
        states = [] if tier == "kv_cache" else self._states()
        if not wait:
            self._give_back()  # first, since it waits for all copies
            return self.states.leave(states)
        moved = self.states.leave(states)
        if states and self._in_groups():  # else views of master weights would keep their memory
            self.engine.optimizer._clear_hp_buffer_references()
        self.states.finish_leaving()
        if tier == "always":
            moved += self._offload_weights()
        self._give_back()
        return moved

    def reload(self) -> int:
        """Take back to the GPU what left it; return the bytes. Adam states and master weights are
        still under way then: the next optimizer step waits for them.
        """
        moved = self.weights.come_back() + self._in_buffers
        self.weights.await_back()
        if self._in_buffers:
            self.engine.reload_states()
            # While a shard is away DeepSpeed takes it for others' weights: what a checkpoint has
            # gathered meanwhile is gathered anew.
            self.engine.empty_partition_cache()
        self._in_buffers = 0
        moved += self.states.come_back()
        if self._in_groups():
            self.engine.optimizer._link_all_hp_params()
        return moved

    def _give_back(self) -> None:
        """Give memory that is not in use to other processes on the GPU."""
        if self.rank.device == "cuda":
            torch.cuda.empty_cache()

    def _in_groups(self) -> bool:
        """Tell whether ZeRO-1 or ZeRO-2 holds flat master weights on the GPU, with views of
        them.
        """
        return self.settings.zero_stage in (1, 2) and not self.settings.offload_optimizer

    def _states(self) -> list[Tensor]:
        """Return Adam states and master weights, unless they are always on the CPU."""
        if self.settings.offload_optimizer:
            return []
        states = [
            x
            for state in self.optimizer.state.values()
            for x in state.values()
            if torch.is_tensor(x) and x.ndim  # step counters stay
        ]
        if self.settings.zero_stage == 3:
            return states + self.engine.optimizer.fp32_partitioned_groups_flat
        return states + (
            self.engine.optimizer.single_partition_of_fp32_groups if self._in_groups() else []
        )

    def _offload_weights(self) -> int:
        """Move all weights; return the bytes copied. What is not trained has its copy in CPU memory
        after the first time.
        """
        if self.settings.offload_parameters:
            return 0
        trained = [p for p in self.model.parameters() if p.requires_grad]
        others = [p for p in self.model.parameters() if not p.requires_grad]
        frozen = [getattr(p, "ds_tensor", p) for p in others]
        moved = self.weights.leave(frozen, changed=False)
        if self.settings.zero_stage == 0:
            moved += self.weights.leave([*trained, *self.model.buffers()])
        elif not self._in_buffers:
            moved += self._offload_buffers(trained, bool(frozen))
        self.weights.finish_leaving()
        return moved

    def _offload_buffers(self, trained: list[Tensor], some_frozen: bool) -> int:
        """Have DeepSpeed move what it lays out in buffers of its own: weights, and under ZeRO-3 a
        shard of gradients. Return their bytes.
        """
        sharded = self.settings.zero_stage == 3
        kinds = [OffloadStateTypeEnum.contiguous_grad_buffer, OffloadStateTypeEnum.lp_grads]
        if not sharded or not some_frozen:  # beside which it would lay out weights where others are
            kinds.append(OffloadStateTypeEnum.lp_params)
        self.engine.offload_states(include=kinds)
        self._in_buffers = sum(getattr(p, "ds_tensor", p).nbytes for p in trained)
        if sharded and not self.settings.offload_optimizer:  # else it is on the CPU
            self._in_buffers += self.engine.optimizer.grad_partitions_flat_buffer.nbytes
        return self._in_buffers


def _accumulate(totals: dict[str, list[float]], stats: Stats) -> None:
    for name, (total, count) in stats.items():
        seen = totals.setdefault(name, [0.0, 0.0])
        if name.startswith("max_"):
            seen[0] = seen[0] if float(total) <= seen[0] else float(total)  # NaN stays
        else:
            seen[0] += float(total)
            seen[1] += float(count)
