"""LoRA: an adapter of small matrices beside a frozen base, merged into it wherever the weights of
the plain model are wanted.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from learners.errors import UserError
from learners.settings import LoraSettings, ModelSettings

ADAPTER = "default"  # the name PEFT has for the only one
BASE = ".base_layer."
MIX = 0x9E3779B97F4A7C15 - 2**64  # an odd number without a pattern, as a signed one of 64 bits
CHUNK = 2**24  # elements of the base that are read at once
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# The kernels of these models read the weights of these layers, past an adapter beside them.
PAST_ADAPTERS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
PAST_ADAPTERS_LAYERS = ("conv1d", "dt_proj", "out_proj", "x_proj")
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}


# --- building it ----------------------------------------------------------------------------------


def attach(
    model: Any, settings: LoraSettings, head: Sequence[str] = (), seed: int = 0, path: str = ""
) -> None:
    """Freeze the model and give its linear layers an adapter, which leaves its outputs as they are:
    A is drawn from `seed`, B is zero.

    Parameters named in `head` are trained whole, beside the adapter. `path` is that of the base.
    Raises UserError when a target is the name of no linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = linear_layers(model, head)
    alpha: Any = settings.scaled_alpha
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
        lora_dropout=settings.dropout,
        target_modules=_targets(settings, linear, path),
        exclude_modules=sorted(_others(model, linear)) or None,
        fan_in_fan_out=any(not isinstance(model.get_submodule(name), nn.Linear) for name in linear),
        task_type=next(
            (task for end, task in TASKS.items() if type(model).__name__.endswith(end)), None
        ),
        base_model_name_or_path=path,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT: a layer that is turned around, a target twice
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    model.train(model.training)  # new modules begin in training mode
    # the tuner itself would wrap them; PEFT's files only name them
    config.modules_to_save = sorted({_owner(name) for name in head}) or None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) or name in head)
        if is_adapter(name):  # PEFT would keep it in float32 beside a base in bfloat16
            parameter.data = parameter.data.to(model.dtype)


def linear_layers(model: Any, head: Sequence[str] = ()) -> list[str]:
    """Return the names of the linear layers that an adapter may stand beside: all but the head, the
    output layer, and those whose names PEFT takes for others.
    """
    found = _every_linear(model, head)
    refused = {leaf for leaf in {_leaf(name) for name in found} if _refused(model, leaf)}
    return [name for name in found if _leaf(name) not in refused]


def left_out(model: Any) -> list[str]:
    """Return the linear layers of an adapted model, but for head and output layer, that PEFT puts
    no adapter beside because of their names.
    """
    plain = [name for name in _every_linear(model, head_of(model)) if ".lora_" not in name]
    return [name for name in plain if not name.endswith(".base_layer")]


def _every_linear(model: Any, head: Sequence[str]) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    heads = {_owner(name) for name in head}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not output
        and not any(name == owner or name.startswith(f"{owner}.") for owner in heads)
    ]


def fused_experts(model: Any) -> list[str]:
    """Return the names of modules whose weights are those of several experts at once, which no
    adapter stands beside.
    """
    return [
        name
        for name, module in model.named_modules()
        if any(len(getattr(p, "ds_shape", p.shape)) == 3 for p in module.parameters(recurse=False))
        and "experts" in name
    ]


def _refused(model: Any, leaf: str) -> bool:
    """Tell whether PEFT takes the name of a layer for that of experts, which Transformers fuses, or
    it is one of Mamba's layers, which its kernel reads past an adapter.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import (
        convert_peft_config_for_transformers,
        get_model_conversion_mapping,
    )

    if model.config.model_type in PAST_ADAPTERS and leaf in PAST_ADAPTERS_LAYERS:
        return True
    config = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model, get_model_conversion_mapping(model))
    except ValueError:  # one of several that are fused
        return True
    return leaf not in (config.target_modules or ())


def _targets(settings: LoraSettings, linear: list[str], path: str) -> list[str]:
    """Return the names by which PEFT finds the layers to adapt. Raises UserError for one that finds
    none.
    """
    names = sorted({_leaf(name) for name in linear})
    asked = names if settings.targets == "all-linear" else settings.targets
    for target in asked:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise UserError(
                f"{path}: no linear layer to adapt is called {target!r} (model.lora.targets); "
                f"there are {', '.join(names) or 'none'}, and names that PEFT takes for those of "
                "experts do not count"
            )
    if not asked:
        raise UserError(f"{path}: there is no linear layer that model.lora could adapt")
    return sorted(asked)


def _others(model: Any, linear: list[str]) -> set[str]:
    """Return modules that are called like the last part of a layer to adapt, and are none."""
    leaves = {_leaf(name) for name in linear}
    known = set(linear)
    return {name for name, _ in model.named_modules() if _leaf(name) in leaves} - known


def head_of(model: Any) -> list[str]:
    """Return the parameters of the head that reads scores or values off a backbone; an encoder's
    pooler belongs to it.
    """
    backbone = f"{model.base_model_prefix}."
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if not name.startswith(backbone) or ".pooler." in name]


def _owner(name: str) -> str:
    """Return the module of a head's parameter."""
    before, pooler, _ = name.partition("pooler.")
    return f"{before}pooler" if pooler else name.partition(".")[0]


def _leaf(name: str) -> str:
    """Return the last part of a module's name, or the whole where that is a number."""
    last = name.rpartition(".")[2]
    return name if last.isdigit() else last


def target_problems(key: str, model: ModelSettings, config: Any) -> list[str]:
    """Return a problem in a list if a target of the adapter is the name of no linear layer of a
    model with this config, else []. Nothing is loaded.
    """
    if model.lora is None or model.lora.targets == "all-linear":
        return []
    from accelerate import init_empty_weights
    from transformers import AutoModel

    with init_empty_weights():
        backbone = AutoModel.from_config(config, trust_remote_code=model.trust_remote_code)
    there = sorted({_leaf(name) for name in linear_layers(backbone)})
    return [
        f"{key}.lora.targets: {model.path} has no linear layer {target!r} that PEFT adapts: there "
        f"are {', '.join(there)}"
        for target in model.lora.targets
        if _leaf(target) not in there
    ]


# --- names ----------------------------------------------------------------------------------------


def is_adapter(name: str) -> bool:
    """Tell an adapter's parameter from one of the plain model."""
    return ".lora_" in name


def base_name(name: str) -> str:
    """Return the name that a parameter, which is not an adapter's, has in the plain model."""
    return name.replace(BASE, ".")


def layer_name(name: str) -> str:
    """Return a name by which an adapter's parameter belongs to the layer that it stands beside."""
    return name.partition(".lora_")[0] + ".weight" if is_adapter(name) else base_name(name)


def peft_name(name: str) -> str:
    """Return the name of a trained parameter in PEFT's files."""
    return "base_model.model." + name.replace(f".{ADAPTER}.", ".")


# --- reading it -----------------------------------------------------------------------------------


def merged(model: Any, layer: Mapping[str, Tensor]) -> tuple[list[str], list[Tensor]]:
    """Return names and weights [out, in] of the plain model for some parameters of the adapted one,
    which are whole now: W + scale · B A, summed in float32 and cast once. W is not changed. What no
    adapter stands beside is the model's own tensor.
    """
    names = [name for name in layer if not is_adapter(name)]
    return [*map(base_name, names)], [_merged(model, name, layer[name].detach()) for name in names]


def _merged(model: Any, name: str, weight: Tensor) -> Tensor:
    owner = name.removesuffix(f"{BASE}weight")
    if owner == name:
        return weight
    layer = model.get_submodule(owner)
    up = layer.lora_B[ADAPTER].weight.detach().float()
    down = layer.lora_A[ADAPTER].weight.detach().float()
    factors = (down.T, up.T) if layer.fan_in_fan_out else (up, down)
    return torch.addmm(weight.float(), *factors, alpha=layer.scaling[ADAPTER]).to(weight.dtype)


def adapter_config(model: Any) -> dict[str, Any]:
    """Return what PEFT's adapter_config.json holds."""
    config: dict[str, Any] = model.peft_config[ADAPTER].to_dict()
    plain = {name: sorted(v) if isinstance(v, set) else v for name, v in config.items()}
    return plain | {"inference_mode": True}


@contextlib.contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """Compute the base alone inside."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Compute the whole adapter inside: what is only read drops nothing."""
    dropping = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p and m.training]
    for module in dropping:
        module.eval()
    try:
        yield
    finally:
        for module in dropping:
            module.train()


@torch.no_grad()
def base_digest(model: nn.Module) -> str:
    """Return the digest of all that is frozen, the same however it is sharded. Collective under
    ZeRO-3.
    """
    total = torch.zeros((), dtype=torch.int64)
    sharded = False
    start = 0
    for parameter in (p for p in model.parameters() if not p.requires_grad):
        whole = math.prod(getattr(parameter, "ds_shape", parameter.shape))
        shard: Tensor = getattr(parameter, "ds_tensor", parameter).detach().flatten()
        first = 0
        if hasattr(parameter, "ds_tensor"):
            sharded = True
            first = dist.get_rank() * shard.numel()
            shard = shard[: max(0, whole - first)]  # the last one is padded
        total = total.to(shard.device) + _mixed(shard, start + first)
        start += whole
    if sharded and dist.get_world_size() > 1:
        # offloaded shards lie on the CPU, where nccl cannot add
        total = total.cuda() if dist.get_backend() == "nccl" else total
        dist.all_reduce(total)
    return f"{int(total) & 2**64 - 1:016x}"


def _mixed(values: Tensor, start: int) -> Tensor:
    """Return the sum of the values' bits, each times a number of its own place."""
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for part in values.view(INTEGERS[values.element_size()]).split(CHUNK):
        places = torch.arange(start + 1, start + 1 + len(part), device=values.device)
        places = places * MIX
        places ^= places >> 29
        total += (part.to(torch.int64) * places).sum()
        start += len(part)
    return total
