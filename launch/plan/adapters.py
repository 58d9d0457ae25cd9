"""LoRA in a plan: how much of a model is trained, and how large its adapter is."""

from __future__ import annotations

from collections import Counter

from actors.roles import Head
from actors.settings import RLRecipe
from launch.plan.shapes import Model, Shape
from learners.settings import LoraSettings, ModelSettings


def adapter_tensors(shape: Shape, lora: LoraSettings | None) -> Counter[int]:
    """Return how many parameters of an adapter have so many elements: two beside every linear layer
    that is a target.
    """
    found: Counter[int] = Counter()
    if lora is not None:
        for layer in shape.linear:
            if _is_target(layer.name, lora):
                found.update((lora.rank * layer.inputs, lora.rank * layer.outputs))
    return found


def _is_target(name: str, lora: LoraSettings) -> bool:
    """Tell whether PEFT finds a linear layer by the names of the recipe."""
    return lora.targets == "all-linear" or any(f".{name}".endswith(f".{t}") for t in lora.targets)


def adapter_parameters(shape: Shape, lora: LoraSettings | None) -> int:
    """Return the elements of a model's adapter; 0 where it has none."""
    return sum(n * count for n, count in adapter_tensors(shape, lora).items())


def tensors(shape: Shape, head: Head, settings: ModelSettings) -> Counter[int]:
    """Return how many parameters of a model, its adapter among them, have so many elements."""
    return shape.tensors(head) + adapter_tensors(shape, settings.lora)


def trained(shape: Shape, head: Head, settings: ModelSettings) -> int:
    """Return how many parameters of a trained role's model learn: all or, with LoRA, the adapter
    and a head of scores or values.
    """
    if settings.lora is None:
        return shape.parameters(head)
    return adapter_parameters(shape, settings.lora) + (0 if head == "lm" else sum(shape.head(head)))


def sync_bytes(actor: Model, recipe: RLRecipe) -> int:
    """Return the bytes of one weight sync: of the Actor's weights, or of its adapter alone."""
    if recipe.sync.lora == "adapter":
        return actor.width * adapter_parameters(actor.shape, actor.settings.lora)
    return actor.width * actor.parameters
