"""Sample a model once, without training: engines start, answer, and stop."""

from __future__ import annotations

from collections.abc import Sequence

from actors.cluster.placement import Placement
from actors.cluster.processes import start_groups
from actors.roles import engine_role
from actors.rollouts.generator import Engines
from actors.rollouts.requests import requests_for, texts_of
from actors.settings import ClusterSettings, GenerationSettings
from learners.checkpoints import load_tokenizer
from learners.data.rows import Prompt
from learners.data.templates import ChatTemplate
from learners.data.tokenise import encode_prompt
from learners.errors import UserError
from learners.fits import length_problems
from learners.generation import ends_of_generation
from learners.settings import ModelSettings


def sample_responses(
    model: str,
    prompts: Sequence[str],
    generation: GenerationSettings,
    seed: int,
    cluster: ClusterSettings | None = None,
) -> list[str]:
    """Return one response per prompt, as text. Raises UserError where the model has fewer positions
    than the longest prompt and response need.
    """
    cluster = cluster or ClusterSettings()
    settings = ModelSettings(path=model)
    tokenizer = load_tokenizer(settings)
    rows = [Prompt(i, encode_prompt(tokenizer, text), text, {}) for i, text in enumerate(prompts)]
    longest = max(len(r.ids) for r in rows) + generation.max_new_tokens
    if problems := length_problems("model", settings, longest):
        raise UserError(problems)
    stops = ChatTemplate(tokenizer, ends_of_generation(settings)).stops
    facts = {"max_model_tokens": longest, "stop_token_ids": stops}
    roles = {"engine": engine_role(settings, generation, cluster, seed)}
    with Placement(cluster, roles) as placement:
        engines = start_groups(roles, facts, placement)["engine"]
        assert isinstance(engines, Engines)
        requests = requests_for(rows, generation.on_policy(), 1, (seed, "sample"))
        rollouts = engines.generate(requests, cluster.call_deadline_s)
    return texts_of(rollouts, tokenizer)
