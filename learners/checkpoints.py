"""Models as Hugging Face saves them: configs, tokenizers, weights and the heads put on them.

Heads are those of Transformers wherever it has one (learners/heads.py), so that what is trained
here loads there.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from learners.calibration import calibration_problem
from learners.errors import UserError, in_a_line
from learners.heads import CRITIC, REWARD_MODEL, head_class, head_of, renamed_head
from learners.kernels import refused_attention, resolve_attention
from learners.output_layer import compute_in_float32
from learners.scorers import unreadable_head
from learners.settings import ModelSettings

OWN_CODE = "comes with code of its own (auto_map)"
ABSENT = ...  # stands for a value in a config where there is none


class Calibration(NamedTuple):
    """Mean and standard deviation of raw scores; a calibrated score is (raw - mean) / std."""

    mean: float
    std: float


def read_calibration(config: Any) -> Calibration:
    """Return the calibration saved in a model's config; (0, 1) where there is none. Raises
    UserError on one that cannot be meant.
    """
    mean = getattr(config, "score_mean", 0.0)
    std = getattr(config, "score_std", 1.0)
    if wrong := calibration_problem(mean, std):
        raise UserError(f"{config.name_or_path}: config.json: {wrong}")
    return Calibration(float(mean), float(std))


def write_calibration(config: Any, calibration: Calibration) -> None:
    """Put the calibration where `save_pretrained` keeps it. Raises UserError on one that
    `read_calibration` would refuse.
    """
    if calibration_problem(calibration.mean, calibration.std):
        raise UserError(
            f"scores with {calibration} cannot be calibrated: they must be finite and not all equal"
        )
    config.score_mean = float(calibration.mean)
    config.score_std = float(calibration.std)


def forget_calibration(config: Any) -> None:
    """Remove the calibration of weights that are trained on: it says nothing of their scores."""
    for name in ("score_mean", "score_std"):
        if hasattr(config, name):
            delattr(config, name)


def load_tokenizer(model: ModelSettings) -> Any:
    """Load the checkpoint's tokenizer, with the chat template that the settings choose. Raises
    UserError when there is none.
    """
    with one_line(model.path):
        tokenizer = AutoTokenizer.from_pretrained(
            model.path, trust_remote_code=model.trust_remote_code
        )
    if model.template is not None:
        tokenizer.chat_template = _template(model.template, tokenizer.chat_template)
    return tokenizer


def _template(name: str, own: Any) -> str:
    """Return a chat template: one of the tokenizer's own by its name, or a file's."""
    if isinstance(own, dict) and name in own:
        return str(own[name])
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        named = (
            f"; the tokenizer has templates named {', '.join(own)}" if isinstance(own, dict) else ""
        )
        raise UserError(f"template: {name}: cannot be read: {why}{named}") from None


def load_config(model: ModelSettings) -> Any:
    """Load the checkpoint's config, with dropout off. Raises UserError when there is none."""
    config = config_as_it_came(model)
    _without_dropout(config)
    for part in (config, config.get_text_config()):
        pad = getattr(part, "pad_token_id", None)
        rows = embedding_rows(config)
        if isinstance(pad, int) and rows is not None and pad >= rows:
            part.pad_token_id = None  # no embedding can be made with a PAD that has no row in it
    return config


def config_as_it_came(model: ModelSettings) -> Any:
    with one_line(model.path):
        return AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)


def needs_own_code(model: ModelSettings) -> bool:
    """Tell whether config or tokenizer can only be read by running the model's own code."""
    try:
        load_config(model)
        load_tokenizer(model)
    except UserError as error:
        return OWN_CODE in str(error)
    return False


def is_encoder(config: Any) -> bool:
    """Tell BERT-style models, whose tokens also see what comes after them, from causal decoders."""
    kind = config.model_type
    own = getattr(config, "auto_map", None) or {}  # classes that came with the model
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in own
    return kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or not causal


def embedding_rows(config: Any) -> int | None:
    """Return how many ids a model knows; None where it hashes letters."""
    return getattr(config.get_text_config(), "vocab_size", None)


# --- loading --------------------------------------------------------------------------------------


def load_causal_lm(settings: ModelSettings) -> Any:
    """Load an Actor or Reference. Raises UserError when the checkpoint lacks weights or is an
    encoder.
    """
    config = load_config(settings)
    if is_encoder(config):
        raise UserError(
            f"{settings.path}: {config.model_type} is not a causal language model; use a decoder"
        )
    model, missing = _load(AutoModelForCausalLM, settings, config)
    _refuse_missing(missing, settings.path)
    if settings.head_dtype and settings.head_dtype != settings.dtype:
        compute_in_float32(model, settings.path)
    return model


def load_reward_model(settings: ModelSettings, pad_token_id: int | None) -> Any:
    """Load a finished reward model, or put a new head (torch's generator draws it) on an SFT or
    base checkpoint.

    `pad_token_id` is written into a decoder's config for plain Transformers; None keeps what is
    there. Raises UserError when weights are missing beside the new head, or the model has no head
    we know how to read.
    """
    config = load_config(settings)
    if wrong := unreadable_head(config):
        raise UserError(f"{settings.path}: {wrong}")
    finished = is_a(config, REWARD_MODEL)
    if finished and config.num_labels != 1:
        raise UserError(f"{settings.path}: a reward model has one label, not {config.num_labels}")
    config.num_labels = 1
    kind = head_class(REWARD_MODEL, config)
    encoder = is_encoder(config)
    model, missing = _load(
        kind, settings, config, renamed_head(kind, config) if finished and not encoder else None
    )
    if not encoder and not hasattr(model, "score"):
        raise UserError(
            f"{settings.path}: {type(model).__name__} has no head named score, read at the "
            "last token"
        )
    _refuse_missing(missing if finished else missing - _new_head(model, missing), settings.path)
    # RoBERTa counts its positions from its own PAD.
    if pad_token_id is not None and not encoder:
        _set_pad(model, pad_token_id)
    return model


def _set_pad(model: Any, pad_token_id: int) -> None:
    """Write the PAD into a decoder's config; its embedding gets rows up to it, where it has none
    for it: zeros, the same in every process.
    """
    rows = model.get_input_embeddings().weight
    had = getattr(rows, "ds_shape", rows.shape)[0]
    if pad_token_id >= had:
        with quiet():
            model.resize_token_embeddings(pad_token_id + 1, mean_resizing=False)
        rows = model.get_input_embeddings().weight
        with torch.no_grad(), _whole([rows]):
            rows[had:] = 0.0
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad_token_id


def load_critic(settings: ModelSettings) -> Any:
    """Load a decoder with a value head on every token: a finished critic, or one begun from a
    reward or SFT model.

    From a reward model it takes the score head over, calibration folded in: values start as
    calibrated scores of the text so far. From any other checkpoint the head is zero, and so are the
    values. Raises UserError for an encoder, which would see the future, and for missing weights.
    """
    config = load_config(settings)
    if is_encoder(config) or getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{settings.path}: {config.model_type} sees the future; a critic must be a "
            "causal decoder"
        )
    mean, std = read_calibration(config)
    from_reward_model = is_a(config, REWARD_MODEL)
    if from_reward_model and (wrong := unreadable_head(config)):
        raise UserError(f"{settings.path}: {wrong}")
    finished = is_a(config, CRITIC)
    config.num_labels = 1
    write_calibration(config, Calibration(0.0, 1.0))
    kind = head_class(CRITIC, config)
    renamed = renamed_head(kind, config) if from_reward_model else None
    model, missing = _load(kind, settings, config, renamed)
    head = set() if finished else _new_head(model, missing)
    linear = head_of(model)
    if from_reward_model and (not linear or any(not name.endswith(".bias") for name in head)):
        raise UserError(
            f"{settings.path}: {type(model).__name__} cannot take over the reward model's "
            "score head"
        )
    _refuse_missing(missing - head, settings.path)
    with (
        torch.no_grad(),
        _whole(linear.parameters() if from_reward_model else map(model.get_parameter, head)),
    ):
        for name in head:
            model.get_parameter(name).zero_()
        if from_reward_model:
            linear.weight.div_(std)
            if head:  # it came without a bias
                linear.bias.fill_(-mean / std)
            else:
                linear.bias.sub_(mean).div_(std)
    return model


def _load(
    kind: Any, settings: ModelSettings, config: Any, renamed: Mapping[str, str] | None = None
) -> tuple[Any, set[str]]:
    """Return the model in eval mode, and the names of weights that its checkpoint did not have.
    `renamed` are patterns of the checkpoint's names, with what stands in their place in the model.
    """
    if settings.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise UserError(
            f"{settings.path}: flash_attention_2 needs the package flash-attn; without it use auto"
        )
    if wrong := refused_attention(settings, config):
        raise UserError(f"{settings.path}: {wrong}")
    with quiet(), one_line(settings.path):
        model, info = kind.from_pretrained(
            settings.path,
            config=config,
            dtype=getattr(torch, settings.dtype),
            attn_implementation=resolve_attention(settings, config),
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
            **({"key_mapping": dict(renamed)} if renamed else {}),
        )
    if renamed:
        _save_under_own_names(model, renamed)
    if "score.bias" in info["unexpected_keys"]:
        raise UserError(
            f"{settings.path}: {type(model).__name__} has no place for its head's bias; lower "
            "score_mean in config.json by it, and take it out of the weights"
        )
    # An embedding's padding_idx keeps that token from learning, also where it is the EOS.
    model.get_input_embeddings().padding_idx = None
    came = config_as_it_came(settings)
    # the language model of a larger one has a config of its own
    model.came_with = _without_dropout(
        came if type(came) is type(model.config) else came.get_text_config()
    )
    return model, set(info["missing_keys"])


def _save_under_own_names(model: Any, renamed: Mapping[str, str]) -> None:
    """Keep `save_pretrained` from giving the head the name back that it had in the checkpoint."""
    came_by = getattr(model, "_weight_conversions", ())
    model._weight_conversions = [c for c in came_by if not renamed.keys() & {*c.source_patterns}]


def _whole(parameters: Iterable[Any]) -> contextlib.AbstractContextManager[Any]:
    """Gather parameters that ZeRO-3 has sharded, and keep what is written into them."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=0)


@contextlib.contextmanager
def one_line(path: str) -> Iterator[None]:
    """Raise Transformers' errors about the files at `path` as a UserError of one line: their own
    run over many, and the first one says it.

    A file that is not what it should be may raise anything; the kind of the error is then part of
    the message.
    """
    try:
        yield
    except (
        MemoryError,
        torch.OutOfMemoryError,
        torch.AcceleratorError,
        torch.distributed.DistError,
    ):
        raise  # not the files' fault
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{path}: {OWN_CODE}; set the model's trust_remote_code: true to run it"
            ) from error
        why = in_a_line(error)
        if not os.path.exists(path):
            known = "" if "Repo id must" in why else f"; as a name of the hub: {why}"
            why = f"no such model folder{known or ' (and no hub name)'}"
        raise UserError(f"{path}: {why}") from error
    except Exception as error:
        what = " ".join([type(error).__name__, *str(error).split()])
        raise UserError(f"{path}: cannot be loaded: {what[:200]}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Transformers' table of new heads and its progress bar: missing weights are checked
    here.
    """
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _without_dropout(config: Any) -> dict[tuple[str, ...], Any]:
    """Set dropout and routing noise to 0 in every field of the config and of those inside it;
    return what was there, by the names that lead to it, with ABSENT for what was not.
    """
    came: dict[tuple[str, ...], Any] = {}
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            came |= {(name, *inner): old for inner, old in _without_dropout(value).items()}
        elif ("drop" in name or "jitter" in name) and type(value) in (int, float):
            came[(name,)] = value
            setattr(config, name, 0.0)
    # Where it is absent or None, token classification falls back to 0.1.
    came.setdefault(("classifier_dropout",), vars(config).get("classifier_dropout", ABSENT))
    config.classifier_dropout = 0.0
    return came


def as_it_came(model: Any) -> Any:
    """Return a copy of the config of a model that was loaded here, with the dropout that it came
    with.
    """
    config = copy.deepcopy(model.config)
    for (*inside, name), value in model.came_with.items():
        owner = functools.reduce(getattr, inside, config)
        if value is ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, value)
    return config


def is_a(config: Any, architecture: str) -> bool:
    """Tell whether a config names a class of this ending, such as REWARD_MODEL."""
    return any(name.endswith(architecture) for name in config.architectures or ())


def _new_head(model: Any, missing: set[str]) -> set[str]:
    """Return the missing weights outside the backbone; an encoder's pooler belongs to the head."""
    backbone = model.base_model_prefix + "."
    return {name for name in missing if not name.startswith(backbone) or ".pooler." in name}


def _refuse_missing(names: set[str], path: str) -> None:
    if names:
        shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        raise UserError(f"{path}: {len(names)} weights are missing in the checkpoint: {shown}")
