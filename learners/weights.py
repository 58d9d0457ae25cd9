"""Trained weights: gathered layer by layer, exported, saved, loaded, read from a checkpoint."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from learners.checkpoint_names import Entry, entries_of, to_checkpoint
from learners.export import save_config, save_weights
from learners.settings import LearnerSettings, Rank


class TrainedWeights:
    """Base of Learner: everything it does with its weights besides training them."""

    model: Any
    engine: Any
    settings: LearnerSettings
    rank: Rank
    _entries: list[Entry] | None = None

    def metadata(self) -> list[Entry]:
        """Return (name, dtype, full shape) of every tensor, in the order `iter_groups` yields
        them.
        """
        if self._entries is None:
            self._entries = [
                entry for layer in self._held() for entry in entries_of(self.model, layer)
            ]
        return self._entries

    def iter_groups(self) -> Iterator[tuple[list[str], list[Tensor]]]:
        """Yield full weights, one layer at a time, as (names, clones) under the names of a
        checkpoint. Collective under ZeRO-3: all ranks in lockstep.
        """
        for names, tensors in self._gathered():
            yield to_checkpoint(self.model, names, tensors)

    def _held(self) -> list[list[Entry]]:
        """Return (name, dtype, full shape) of every tensor, layer by layer, as it is in memory."""
        return [
            [(n, t.dtype, tuple(getattr(t, "ds_shape", t.shape))) for n, t in layer.items()]
            for layer in self._layers()
        ]

    def _gathered(self) -> Iterator[tuple[list[str], list[Tensor]]]:
        """Yield what `iter_groups` yields, under the names of the model in memory."""
        for layer in self._layers():
            # does nothing to parameters that are not sharded
            with deepspeed.zero.GatheredParameters(list(layer.values())):
                clones = [p.detach().clone() for p in layer.values()]
            yield list(layer), clones

    def _layers(self) -> list[dict[str, Tensor]]:
        """Group the parameters, and the buffers that checkpoints hold, by the first number in their
        names (the layer); embeddings and heads are by themselves.
        """
        layers: dict[str, dict[str, Tensor]] = {}
        kept = self.model.state_dict()
        buffers = {name: b for name, b in self.model.named_buffers() if name in kept}
        for name, parameter in [*self.model.named_parameters(), *buffers.items()]:
            parts = name.split(".")
            number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
            layers.setdefault(".".join(parts[: number + 1]), {})[name] = parameter
        return list(layers.values())

    def export(self, folder: str) -> None:
        """Write a Hugging Face model that plain Transformers loads. Call on every rank; rank 0
        writes.
        """
        state: dict[str, Tensor] = {}
        for names, tensors in self._gathered():
            if self.rank.index == 0:
                state.update(zip(names, (t.cpu() for t in tensors), strict=True))
        if self.rank.index == 0:
            save_weights(self.model, state, Path(folder))
            save_config(self.model, Path(folder))

    def export_config(self, folder: str) -> None:
        """Write the config.json that `export` writes, without the weights. Call on every rank;
        rank 0 writes.
        """
        if self.rank.index == 0:
            save_config(self.model, Path(folder))

    def disk_bytes(self) -> tuple[int, int]:
        """Return the bytes that an export and that a checkpoint of all ranks take at least."""
        held = itertools.chain.from_iterable(self._held())
        sizes = [(math.prod(shape), dtype.itemsize) for _, dtype, shape in held]
        model = sum(count * size for count, size in sizes)
        moments = 2 if self.settings.optimizer.kind == "adamw" else 0
        if self.settings.zero_stage == 0:
            return model, model * (1 + moments)
        masters = 4 * (1 + moments) * sum(count for count, _ in sizes)
        # ZeRO-3 keeps the float32 weights alone
        return model, masters + (model if self.settings.zero_stage < 3 else 0)

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
        plan = self.engine.lr_scheduler
        base = plan.base_lrs
        asked = [
            {name: value for name, value in group.items() if name != "params"}
            for group in plan.optimizer.param_groups
        ]
        path, client = self.engine.load_checkpoint(folder, tag="state")
        if path is None:
            raise ValueError(f"{folder}: DeepSpeed found no checkpoint here that it can read")
        torch.set_rng_state(client["rng"])
        # what is saved are the rates and decays of that recipe, for a run as long as that was to be
        plan.base_lrs = base
        for i, group in enumerate(plan.optimizer.param_groups):
            group |= asked[i] | {"lr": base[i] * plan.lr_lambdas[i](plan.last_epoch)}

    def _layout(self) -> dict[str, int]:
        return {"ranks": self.rank.world_size, "zero_stage": self.settings.zero_stage}


def read_saved(folder: Path) -> dict[str, Tensor]:
    """Return the whole weights of every rank's `save`, in the dtype they were trained in, on the
    CPU. Files alone are read: there need be neither ranks nor their devices.
    """
    stage = json.loads((folder / "layout.json").read_text())["zero_stage"]
    first = "zero_pp_rank_0_mp_rank_00" if stage == 3 else "mp_rank_00"
    file = folder / "state" / f"{first}_model_states.pt"
    # DeepSpeed pickles objects of its own beside the tensors
    module = torch.load(file, map_location="cpu", mmap=True, weights_only=False)["module"]
    if stage == 3:  # whose ranks hold parts, in float32; here the names, dtypes and buffers are
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            whole = get_fp32_state_dict_from_zero_checkpoint(folder, tag="state", lazy_mode=True)
        parameters = {name for name, tensor in module.items() if not tensor.numel()}
        module |= {name: whole[name].contiguous().to(module[name].dtype) for name in parameters}
    return {name.removeprefix("model."): tensor for name, tensor in module.items()}
