"""LoRA in combination with other keys of a recipe."""

from __future__ import annotations

from actors.settings import ADAPTER_RANKS, RLRecipe
from learners.errors import Rule


def adapter_rules(recipe: RLRecipe) -> list[Rule]:
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
