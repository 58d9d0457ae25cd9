"""Sample a model once, without training: engines start, answer, and stop."""

from __future__ import annotations

from collections.abc import Sequence

from actors.cluster.layout import Demand
from actors.cluster.placement import Placement
from actors.evaluation import requests_for
from actors.rollouts.generator import Engines
from actors.settings import ClusterSettings, GenerationSettings
from learners.data import Prompt, encode_prompt
from learners.models import load_tokenizer
from learners.settings import ModelSettings


def sample_responses(
    model: str,
    prompts: Sequence[str],
    generation: GenerationSettings,
    seed: int,
    cluster: ClusterSettings | None = None,
) -> list[str]:
    """One response per prompt, as text without special tokens."""
    settings = ModelSettings(path=model)
    cluster = cluster or ClusterSettings()
    tokenizer = load_tokenizer(settings)
    rows = [Prompt(i, encode_prompt(tokenizer, text), text, {}) for i, text in enumerate(prompts)]
    demand = Demand(generation.engines, generation.threads, generation.tensor_parallel)
    with Placement(cluster, {"engine": demand}) as placement:
        engines = Engines(placement.options("engine"))
        longest = max(len(r.ids) for r in rows) + generation.max_new_tokens
        arguments = {
            "model": settings,
            "generation": generation,
            "device": cluster.device,
            "max_model_tokens": longest,
            "eos_token_id": tokenizer.eos_token_id,
        }
        starting = engines.start(arguments, cluster.start_deadline_s)
        engines.gather(starting, "start", cluster.start_deadline_s)
        rollouts = engines.generate(
            requests_for(rows, generation.on_policy(), 1, (seed, "sample")), cluster.call_deadline_s
        )
    return tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)
