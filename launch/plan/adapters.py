"""LoRA in a plan: how much of a model is trained, and how large its adapter is."""

from __future__ import annotations

from collections import Counter

from actors.roles import Head
from actors.settings import RLRecipe
from launch.plan.shapes import Model, Shape
from learners.settings import ModelSettings

LEAST_COLUMNS = 16  # of a linear layer; vectors and routers have fewer beside the hidden size


def adapter_tensors(shape: Shape, rank: int) -> Counter[int]:
    """Return how many parameters of an adapter beside every linear layer have so many elements. One
    side of a linear layer is the hidden size; experts fused into one parameter have no adapter.
    """
    hidden = shape.hidden
    most = 3 * max(hidden, shape.heads * shape.head_dim, shape.intermediate)
    columns = [n // hidden for n in shape.layer if n % hidden == 0]
    found: Counter[int] = Counter()
    for others in (c for c in columns if LEAST_COLUMNS <= c <= most):
        found.update({rank * hidden: shape.layers})
        found.update({rank * others: shape.layers})
    return found


def adapter_parameters(shape: Shape, rank: int) -> int:
    """Return the elements of an adapter of a model."""
    return sum(n * count for n, count in adapter_tensors(shape, rank).items())


def adapter_of(shape: Shape, settings: ModelSettings) -> int:
    """Return the elements of a model's adapter; 0 where it has none."""
    return adapter_parameters(shape, settings.lora.rank) if settings.lora else 0


def tensors(shape: Shape, head: Head, settings: ModelSettings) -> Counter[int]:
    """Return how many parameters of a model, its adapter among them, have so many elements."""
    adapter = adapter_tensors(shape, settings.lora.rank) if settings.lora else Counter()
    return shape.tensors(head) + adapter


def trained(shape: Shape, head: Head, settings: ModelSettings) -> int:
    """Return how many parameters of a trained role's model learn: all or, with LoRA, the adapter
    and a head of scores or values.
    """
    if settings.lora is None:
        return shape.parameters(head)
    return adapter_of(shape, settings) + (0 if head == "lm" else sum(shape.head(head)))


def sync_bytes(actor: Model, recipe: RLRecipe) -> int:
    """Return the bytes of one weight sync: of the Actor's weights, or of its adapter alone."""
    if recipe.sync.lora == "adapter":
        return actor.width * adapter_of(actor.shape, actor.settings)
    return actor.width * actor.parameters
