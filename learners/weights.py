"""Trained weights: gathered layer by layer, exported, saved, loaded, read from a checkpoint."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from learners.checkpoint_names import Entry, entries_of, to_checkpoint
from learners.checkpoints import load_causal_lm, load_reward_model
from learners.errors import UserError
from learners.export import save_adapter, save_config, save_weights
from learners.kernels import AUTO
from learners.lora import (
    adapter_config,
    attach,
    base_digest,
    base_name,
    fused_experts,
    is_adapter,
    layer_name,
    left_out,
    merged,
    peft_name,
)
from learners.moving import Mover
from learners.settings import ADAPTER_FOLDER, LearnerSettings, ModelSettings, Rank


class TrainedWeights:
    """Base of Learner: everything it does with its weights besides training them."""

    model: Any
    engine: Any
    states: Mover
    settings: LearnerSettings
    rank: Rank
    _entries: list[Entry] | None = None
    _base_digest = ""  # as it was first asked for

    def metadata(self) -> list[Entry]:
        """Return (name, dtype, full shape) of every tensor of the plain model, in the order
        `iter_groups` yields them.
        """
        if self._entries is None:
            self._entries = [
                entry for layer in self._held() for entry in entries_of(self.model, layer)
            ]
        return self._entries

    def iter_groups(self) -> Iterator[tuple[list[str], list[Tensor]]]:
        """Yield full weights of the plain model, one layer at a time, as (names, tensors) under the
        names of a checkpoint, with the adapter merged into them. The tensors may be the model's
        own: not to be written to, and as they are until the next step. Collective under ZeRO-3: all
        ranks in lockstep.
        """
        for names, tensors in self._gathered():
            yield to_checkpoint(self.model, names, tensors)

    def _held(self) -> list[list[Entry]]:
        """Return (name, dtype, full shape) of every tensor, layer by layer, as it is in memory."""
        return [
            [
                (base_name(n), t.dtype, tuple(getattr(t, "ds_shape", t.shape)))
                for n, t in layer.items()
                if not is_adapter(n)
            ]
            for layer in self._layers()
        ]

    def _gathered(self) -> Iterator[tuple[list[str], list[Tensor]]]:
        """Yield what `iter_groups` yields, under the names of the model in memory."""
        for layer in self._layers():
            # does nothing to parameters that are not sharded
            with deepspeed.zero.GatheredParameters(list(layer.values())):
                names, tensors = merged(self.model, layer)
                if self.settings.zero_stage == 3:  # whole inside alone
                    tensors = [tensor.clone() for tensor in tensors]
            yield names, tensors

    def adapter(self) -> dict[str, Tensor]:
        """Return the trained weights of a model with LoRA (adapter and head) whole, on the CPU, by
        PEFT's names. Collective under ZeRO-3.
        """
        found: dict[str, Tensor] = {}
        for layer in self._layers():
            trained = {name: p for name, p in layer.items() if p.requires_grad}
            with deepspeed.zero.GatheredParameters(list(trained.values())):
                found |= {peft_name(n): p.detach().cpu().clone() for n, p in trained.items()}
        return found

    def base_fingerprint(self) -> str:
        """Return the digest of the frozen weights, the same on every rank and for every ZeRO stage.
        Collective under ZeRO-3.
        """
        digest = base_digest(self.model)
        self._base_digest = self._base_digest or digest
        return digest

    def unadapted(self) -> str:
        """Return in words what of the model gets no adapter, though all linear layers are to have
        one; nothing where there is none.
        """
        lora = self.settings.model.lora
        if lora is None or lora.targets != "all-linear":
            return ""
        left = {"experts": fused_experts(self.model), "linear layers": left_out(self.model)}
        found = [
            f"{len(names)} {what}, such as {names[0]}" for what, names in left.items() if names
        ]
        return f"no adapter stands beside {' and '.join(found)}" if found else ""

    def _layers(self) -> list[dict[str, Tensor]]:
        """Group the parameters, and the buffers that checkpoints hold, by the first number in their
        names (the layer); embeddings and heads are by themselves. An adapter is in the group of the
        weight that it changes.
        """
        layers: dict[str, dict[str, Tensor]] = {}
        kept = self.model.state_dict()
        buffers = {name: b for name, b in self.model.named_buffers() if name in kept}
        for name, parameter in [*self.model.named_parameters(), *buffers.items()]:
            parts = layer_name(name).split(".")
            number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
            layers.setdefault(".".join(parts[: number + 1]), {})[name] = parameter
        return list(layers.values())

    def export(self, folder: str) -> None:
        """Write a Hugging Face model that plain Transformers loads and, of one with LoRA, the
        adapter for PEFT inside it. Call on every rank; rank 0 writes.
        """
        if self.settings.model.lora:
            adapter = self.adapter()
            if self.rank.index == 0:
                save_adapter(adapter_config(self.model), adapter, Path(folder, ADAPTER_FOLDER))
        state: dict[str, Tensor] = {}
        for names, tensors in self._gathered():
            if self.rank.index == 0:
                copies = (t.to("cpu", copy=True) for t in tensors)
                state.update(zip(names, copies, strict=True))
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
        model = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in held)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        count = sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in trained)
        weights = count * trained[0].element_size()
        exported = model + weights if self.settings.model.lora else model
        moments = 2 if self.settings.optimizer.kind == "adamw" else 0
        if self.settings.zero_stage == 0:
            return exported, weights * (1 + moments)
        masters = 4 * (1 + moments) * count
        # ZeRO-3 keeps the float32 weights alone
        return exported, masters + (weights if self.settings.zero_stage < 3 else 0)

    def save(self, folder: str) -> None:
        """Write a resumable checkpoint: weights (with LoRA those that are trained, and the digest
        of the base), optimizer, schedule and RNG. Call on every rank; what has left the GPU is
        written from CPU memory.
        """
        self.states.await_back()
        self.engine.save_checkpoint(
            folder,
            tag="state",
            client_state={"rng": torch.get_rng_state()},
            exclude_frozen_parameters=self.settings.model.lora is not None,
        )
        layout = self._layout() | self._base()
        if self.rank.index == 0:
            Path(folder, "layout.json").write_text(json.dumps(layout))

    def load(self, folder: str) -> None:
        """Continue from `save`. Raises ValueError when the world size, ZeRO stage, adapter or base
        is another.
        """
        saved = _read_layout(Path(folder))
        base = saved.pop("base", None)
        targets = (saved.pop("adapter", None) or {}).get("target_modules")
        if saved != self._layout():
            raise ValueError(
                f"{folder}: saved with {saved}, cannot resume with {self._layout()}; use the "
                "same layout"
            )
        if base is not None and base["digest"] != self.base_fingerprint():
            raise ValueError(
                f"{folder}: its adapter was trained on other weights than those of "
                f"{self.settings.model.path}: use the model that it was trained on"
            )
        if targets is not None and targets != adapter_config(self.model)["target_modules"]:
            raise ValueError(f"{folder}: its adapter stands beside other layers: {targets}")
        plan = self.engine.lr_scheduler
        rates = plan.base_lrs
        asked = [
            {name: value for name, value in group.items() if name != "params"}
            for group in plan.optimizer.param_groups
        ]
        path, client = self.engine.load_checkpoint(
            folder, tag="state", load_module_strict=self.settings.model.lora is None
        )
        if path is None:
            raise ValueError(f"{folder}: DeepSpeed found no checkpoint here that it can read")
        torch.set_rng_state(client["rng"])
        # what is saved are the rates and decays of that recipe, for a run as long as that was to be
        plan.base_lrs = rates
        for i, group in enumerate(plan.optimizer.param_groups):
            group |= asked[i] | {"lr": rates[i] * plan.lr_lambdas[i](plan.last_epoch)}

    def _layout(self) -> dict[str, Any]:
        layout = {"ranks": self.rank.world_size, "zero_stage": self.settings.zero_stage}
        lora = self.settings.model.lora
        if lora is None:
            return layout
        asked = lora.model_dump(mode="json", exclude={"dropout"})
        return layout | {"lora": asked | {"alpha": lora.scaled_alpha}}

    def _base(self) -> dict[str, Any]:
        """Return what a checkpoint with LoRA says of weights that are not in it, and of the adapter
        beside them. Collective under ZeRO-3.
        """
        model = self.settings.model
        if model.lora is None:
            return {}
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        base = {
            # read once: a base that waits in CPU memory would be read there at every checkpoint
            "digest": self._base_digest or self.base_fingerprint(),
            "model": model.model_dump(mode="json"),
            "head": [name for name in trained if not is_adapter(name)],
            "pad_token_id": self.model.config.pad_token_id,  # for which a score's model may grow
        }
        return {"base": base, "adapter": adapter_config(self.model)}


def read_saved(folder: Path) -> dict[str, Tensor]:
    """Return the whole weights of the plain model of every rank's `save`, in the dtype they were
    trained in, on the CPU. Files alone are read (with LoRA also those of the base): there need be
    neither ranks nor their devices. Raises UserError where the base is another.
    """
    trained = _read_trained(folder)
    base = _read_layout(folder).get("base")
    return trained if base is None else _merged_into(base, trained)


def export_adapter(saved: Path, folder: Path) -> None:
    """Write the adapter of a checkpoint for PEFT, if it has one."""
    layout = _read_layout(saved)
    if "adapter" not in layout:
        return
    adapter = {
        peft_name(name): tensor
        for name, tensor in _read_trained(saved).items()
        if is_adapter(name) or name in layout["base"]["head"]
    }
    save_adapter(layout["adapter"], adapter, folder)


def _read_layout(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "layout.json").read_text()))


def _read_trained(folder: Path) -> dict[str, Tensor]:
    """Return the weights that are in a checkpoint: without those of a frozen base."""
    layout = _read_layout(folder)
    stage = layout["zero_stage"]
    first = "zero_pp_rank_0_mp_rank_00" if stage == 3 else "mp_rank_00"
    file = folder / "state" / f"{first}_model_states.pt"
    # DeepSpeed pickles objects of its own beside the tensors
    module = torch.load(file, map_location="cpu", mmap=True, weights_only=False)["module"]
    if stage == 3:  # whose ranks hold parts, in float32; here the names, dtypes and buffers are
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            whole = get_fp32_state_dict_from_zero_checkpoint(
                folder, tag="state", lazy_mode=True, exclude_frozen_parameters="base" in layout
            )
        parameters = {name for name, tensor in module.items() if not tensor.numel()}
        module |= {name: whole[name].contiguous().to(module[name].dtype) for name in parameters}
    return {name.removeprefix("model."): tensor for name, tensor in module.items()}


@torch.no_grad()
def _merged_into(base: Mapping[str, Any], trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the base with the adapter merged into them. Raises UserError where it
    is not the one that the adapter was trained on.
    """
    settings = ModelSettings(**base["model"] | {"attention": AUTO})  # nothing is computed by it
    assert settings.lora is not None
    scores = base["head"]
    model = (
        load_reward_model(settings, base["pad_token_id"]) if scores else load_causal_lm(settings)
    )
    attach(model, settings.lora, scores, path=settings.path)
    if base_digest(model) != base["digest"]:
        raise UserError(
            f"{settings.path}: has other weights than those that the adapter was trained on: put "
            "them back there"
        )
    known = model.load_state_dict(trained, strict=False)
    lost = [*known.unexpected_keys, *filter(is_adapter, known.missing_keys)]
    if lost:
        raise UserError(f"{settings.path}: the adapter does not fit: {lost[0]} has no counterpart")
    names, tensors = merged(model, dict(model.named_parameters()))
    kept = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return buffers | dict(zip(names, tensors, strict=True))
