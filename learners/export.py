"""A model as it leaves a run: weights and config as plain Transformers saves and loads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
)
from transformers.dynamic_module_utils import custom_object_save

from learners.checkpoints import as_it_came, is_a, quiet
from learners.errors import UserError
from learners.heads import REWARD_MODEL, head_class, write_read_me


def save_config(model: Any, folder: Path) -> None:
    """Write the config.json of a model that was loaded for training, with the dropout that it came
    with, the Python code that it brought and, where Transformers lacks its class, a README.md.
    """
    config = as_it_came(model)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    folder.mkdir(parents=True, exist_ok=True)
    if model.is_remote_code():
        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    write_read_me(model, folder)


def save_weights(model: Any, state: dict[str, Tensor], folder: Path) -> None:
    """Write `state`, the model's whole weights by name, as `save_pretrained` does.

    It also writes a config and a generation config; those that the model came with are to be
    written over them. Raises OSError when nothing can be written at `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)  # Transformers only logs that it is a file
    # Names as any checkpoint of this kind has them, not as the one that was loaded happened to: a
    # weight sync goes on with those.
    loaded = vars(model).pop("_weight_conversions", None)
    if model.can_generate():
        # Transformers refuses to save one that asks for a temperature without sampling.
        model.generation_config = GenerationConfig()
    try:
        with quiet():
            model.save_pretrained(folder, state_dict=state)
    except SafetensorError as error:  # as it calls a full disk
        raise OSError(f"{folder}: {error}") from error
    finally:
        if loaded is not None:
            model._weight_conversions = loaded


def save_adapter(config: Mapping[str, Any], adapter: dict[str, Tensor], folder: Path) -> None:
    """Write an adapter (its weights by PEFT's names) as PEFT loads it beside the base."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    try:
        save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder}: {error}") from error


def export_saved(saved: dict[str, Tensor], files: Path, folder: Path) -> None:
    """Write the model of saved weights and of the small files kept with them: what the run itself
    would have written. Raises UserError when they do not belong together.
    """
    # The run copied code that came with the model only because its recipe trusted it.
    trusted = any(files.glob("*.py"))
    config = AutoConfig.from_pretrained(files, trust_remote_code=trusted)
    scores = is_a(config, REWARD_MODEL)
    kind = head_class(REWARD_MODEL, config) if scores else AutoModelForCausalLM
    with quiet(), init_empty_weights(include_buffers=False):
        model = kind.from_config(config, dtype=config.dtype, trust_remote_code=trusted)
    model.tie_weights()  # which making it without memory undoes
    kept = model.state_dict()
    names = [name for name, _ in model.named_parameters()]
    names += [name for name, _ in model.named_buffers() if name in kept]
    if missing := [name for name in names if name not in saved]:
        raise UserError(f"{files}: the weights beside it lack {missing[0]}: another model's?")
    save_weights(model, {name: saved[name] for name in names}, folder)
    shutil.copytree(files, folder, dirs_exist_ok=True)
