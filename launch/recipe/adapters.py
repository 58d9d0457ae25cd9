"""`model.lora` against the rest of the recipe: an adapter belongs to a model that is trained."""

from __future__ import annotations

from collections.abc import Iterator

from actors.roles import roles_of
from actors.settings import ADAPTER_RANKS, Recipe, RLRecipe
from learners.errors import Rule


def adapter_rules(recipe: Recipe) -> Iterator[Rule]:
    """Yield the rules for every model of the recipe that is to have an adapter."""
    roles = [role for role in roles_of(recipe).values() if role.model is not None]
    trained = {role.model_key for role in roles if role.learner is not None}
    for key, role in {role.model_key: role for role in roles}.items():
        if role.model is None or (lora := role.model.lora) is None:
            continue
        named = f"{key}.lora"
        only = f"is for models that are trained ({', '.join(sorted(trained))}); this one is only"
        yield key not in trained, (named,), f"{only} read: leave it out"
        yield (
            lora.dropout > 0 and key == "actor.model",
            (f"{named}.dropout",),
            f"{lora.dropout:g} makes the policy that is updated another than the one that has "
            "answered; use 0",
        )


def adapter_uses(recipe: RLRecipe) -> list[Rule]:
    """Require an adapter of the Actor where the Reference or the sync is made of it."""
    lora = recipe.actor.model.lora
    share = recipe.reference.share
    alone = recipe.sync.lora == "adapter"
    rank = lora.rank if lora else 0
    most = max(ADAPTER_RANKS)
    key = "actor.model.lora"
    return [
        (
            share and lora is None,
            ("reference.share", key),
            f"needs {key}: an Actor without an adapter no longer holds the model it started from",
        ),
        (
            share and recipe.reference.model is not None,
            ("reference.share", "reference.model"),
            "makes the Actor without its adapter the Reference: leave out reference.model, or set "
            "share to false",
        ),
        (
            alone and lora is None,
            ("sync.lora", key),
            f"adapter needs {key}; without it merged is right: the weights are sent",
        ),
        (
            alone and rank > most,
            ("sync.lora", f"{key}.rank"),
            f"vLLM takes no adapter of rank {rank}, only up to {most}: lower the rank, or set "
            "sync.lora to merged",
        ),
    ]
