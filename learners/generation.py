"""The generation_config.json of a checkpoint: what it asks of sampling, where it lets a response
end, and what a trained model takes along.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import cached_file

from learners.checkpoints import config_as_it_came, one_line
from learners.settings import ModelSettings


def sampling_defaults(path: str) -> dict[str, Any]:
    """Read the checkpoint's generation_config.json; return {} where there is none. Raises UserError
    when it is broken.
    """
    with one_line(path):
        try:
            return GenerationConfig.from_pretrained(path).to_diff_dict()
        except OSError:
            return {}


def generation_config(
    model: ModelSettings, tokenizer: Any, stops: Sequence[int] = ()
) -> dict[str, Any]:
    """Return the generation_config.json of what is trained from this checkpoint: the one that it
    came with (or else what its config.json says), with every token that ends an answer as EOS.

    These are those of the file, the tokenizer's EOS and `stops`, such as the end of a template's
    turns: at the same ones a run's engine stops. Raises UserError when the file is broken.
    """
    came = _read_generation_config(model.path)
    if came is None:
        came = _derived_generation_config(model)
        if tokenizer.pad_token_id is not None:
            came.setdefault("pad_token_id", tokenizer.pad_token_id)
    named = _ends_in(came)
    taught = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ends = [*dict.fromkeys([*named, *taught, *stops])]
    if ends != named:
        came["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        # some versions of Transformers take this mark as leave to ask the config.json instead
        came.pop("_from_model_config", None)
    return came


def ends_of_generation(model: ModelSettings) -> list[int]:
    """Return the ids at which the checkpoint's generation_config.json, or else its config.json,
    lets a response end. Raises UserError when the file is broken.
    """
    came = _read_generation_config(model.path)
    return _ends_in(_derived_generation_config(model) if came is None else came)


def _derived_generation_config(model: ModelSettings) -> dict[str, Any]:
    """Return what Transformers reads in a config.json where there is no generation_config.json."""
    derived = GenerationConfig.from_model_config(config_as_it_came(model)).to_diff_dict()
    left_out = ("_from_model_config", "transformers_version")
    return {k: v for k, v in derived.items() if v is not None and k not in left_out}


def _ends_in(generation: Mapping[str, Any]) -> list[int]:
    listed = generation.get("eos_token_id")
    return [end for end in (listed if isinstance(listed, list) else [listed]) if end is not None]


def _read_generation_config(path: str) -> dict[str, Any] | None:
    """Return every key of a checkpoint's generation_config.json; None where there is none."""
    with one_line(path):
        try:
            file = cached_file(path, "generation_config.json")
        except OSError:
            return None
        try:
            return dict(json.loads(Path(str(file)).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"generation_config.json is no JSON object: {error}") from error
