"""Families of models that differ in kind, each with an engine in processes of their own."""

from __future__ import annotations

import pytest

from benchmarks.families import examine_apart

pytestmark = [pytest.mark.engines, pytest.mark.timeout(200)]

# what each of them has that the others have not
WITH_ENGINE = {
    "gpt2": "positions in a table, matrices the other way round",
    "opt (word_embed_proj)": "embeddings narrower than the layers",
    "gpt_neox (padded vocabulary)": "vLLM serves Transformers' own code, and pads the vocabulary",
    "mistral (sliding window)": "a window",
    "qwen3_moe": "experts that memory holds in one tensor",
    "mixtral": "experts that memory holds in one tensor, under other names",
    "deepseek_v3": "latent attention, queries by head, a buffer that checkpoints hold",
    "lfm2": "a convolution with a state, queries by head",
}


@pytest.mark.parametrize("name", WITH_ENGINE)
def test_the_engine_follows_the_actor(name: str) -> None:
    found = examine_apart(name, ("actor", "engine", "sync"))
    assert found == dict.fromkeys(found, "yes"), WITH_ENGINE[name]
