"""A run of an algorithm that is neither PPO nor GRPO, by `kind: rl`."""

from __future__ import annotations

import json

import pytest

from actors import driver
from actors.settings import RLRecipe
from launch.demo.demo import RECIPES
from launch.recipe.read import load_recipe
from tests.e2e.conftest import SEED, Run, Workshop

pytestmark = pytest.mark.engines


def test_an_rl_recipe_runs_the_algorithm_it_names(workshop: Workshop, sft: Run) -> None:
    """Its Reference starts because of its KL penalty; the first mini-batch is on policy."""
    folder = workshop.folder / "reinforce"
    overrides = [
        "kind=rl",
        "algorithm={kind: reinforce_plus_plus, kl_beta: 0.05}",
        f"run={{folder: {folder}, seed: {SEED}, progress: false, tensorboard: false}}",
        "step={steps: 2, prompts_per_step: 32, mini_batch_size: 16}",
        f"actor.model.path={sft.model}",
        "actor.ranks=1",
        f"prompts.path={workshop.folder / 'data' / 'prompts.jsonl'}",
        "evaluation={}",
    ]
    recipe = load_recipe(RECIPES / "demo_grpo.yaml", overrides, "rl")
    assert isinstance(recipe, RLRecipe) and recipe.algorithm.kind == "reinforce_plus_plus"
    run = Run(folder, driver.run(recipe))
    first, second = run.steps
    assert first["actor/max_ratio_deviation_first"] < 1e-3 and first["actor/grad_norm_first"] > 0
    assert first["kl/sequence"] == pytest.approx(0, abs=1e-3) and second["kl/sequence"] != 0
    assert first["advantage/std"] > 0 and "group/with_spread" not in first
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = {row["phase"]: row for row in rows}
    assert times["wall"]["seconds/wall"] > times["start"]["seconds/start"] > 0
    assert second["throughput/tokens_per_second"] > 0
    for phase in ("generate", "score", "advantages", "learn", "sync", "step"):
        assert second[f"seconds/{phase}"] > 0
