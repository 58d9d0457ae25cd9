"""`model.lora` against the rest of the recipe: an adapter belongs to a model that is trained."""

from __future__ import annotations

from collections.abc import Iterator

from actors.roles import roles_of
from actors.settings import Recipe
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
