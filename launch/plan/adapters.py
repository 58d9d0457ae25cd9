"""LoRA in a plan: how much of a model is trained, and how large its adapter is."""

from __future__ import annotations

from actors.roles import Head
from actors.settings import RLRecipe
from launch.plan.shapes import Model, Shape
from learners.settings import ModelSettings

LEAST_COLUMNS = 16  # of a linear layer; vectors and routers have fewer beside the hidden size


def adapter_parameters(shape: Shape, rank: int) -> int:
    """Return the elements of an adapter beside every linear layer, one of whose sides is the hidden
    size; experts that are fused into one parameter have none.
    """
    hidden = shape.hidden
    most = 3 * max(hidden, shape.heads * shape.head_dim, shape.intermediate)
    columns = [n // hidden for n in shape.layer if n % hidden == 0]
    sides = sum(hidden + c for c in columns if LEAST_COLUMNS <= c <= most)
    return shape.layers * rank * sides


def adapter_of(shape: Shape, settings: ModelSettings) -> int:
    """Return the elements of a model's adapter; 0 where it has none."""
    return adapter_parameters(shape, settings.lora.rank) if settings.lora else 0


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
