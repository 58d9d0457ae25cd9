"""How much code a reader of one PPO step has to follow: counted, and held to a bound."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path

import pytest

from actors.cluster.placement import Placement
from actors.cluster.processes import Processes
from actors.driver import Driver
from actors.roles import roles_of
from actors.run.alarms import AlarmLog
from actors.run.folder import RunFolder
from actors.run_data import RunData
from actors.settings import RLRecipe
from actors.start import Workers
from launch.demo.demo import RECIPES
from launch.recipe.read import load_recipe
from tests.e2e import entered
from tests.e2e.conftest import Run, Workshop

pytestmark = pytest.mark.engines

DESIGN = entered.ROOT / "docs" / "design.md"
STATED = re.compile(r"enters (\d+) files, (\d+) functions and (\d+) statements")


def one_step(recipe: RLRecipe) -> set[entered.Function]:
    """Return the functions of ours that `Driver.step` enters until it returns, in all processes."""
    data = RunData.load(recipe)
    with Placement(recipe.cluster, roles_of(recipe)) as placement:
        workers = Workers(recipe, data, Processes(roles_of(recipe), placement))
        handles = [handle for group in workers.groups.values() for handle in group.handles]
        with closing(RunFolder.open(recipe.run, recipe.to_yaml(), False)) as folder:
            driver = Driver(recipe, data, workers, folder, AlarmLog(folder, 3))
            driver.begin(1)
            entered.start(handles)
            driver.step(1)
            return entered.stop(handles)


def test_a_step_enters_what_the_design_page_says(
    workshop: Workshop, sft: Run, reward_model: Run
) -> None:
    """The numbers on the page may be left by a twentieth: then count again and write them there."""
    overrides = [
        f"run.folder={workshop.folder / 'step_size'}",
        "run.tensorboard=false",
        f"actor.model.path={sft.model}",
        f"critic.model.path={reward_model.model}",
        f"rewards.0.model.path={reward_model.model}",
        f"prompts.path={workshop.folder / 'data' / 'prompts.jsonl'}",
        "evaluation.prompts=null",
        "evaluation.test_prompts=null",
        "evaluation.function=null",
        "evaluation.every_steps=0",
        "step.prompts_per_step=16",
        "step.mini_batch_size=8",
    ]
    recipe = load_recipe(RECIPES / "demo_ppo.yaml", overrides)
    assert isinstance(recipe, RLRecipe)
    found = one_step(recipe)
    counted = (
        len({file for file, _ in found}),
        len(found),
        sum(entered.statements(function) for function in found),
    )
    names = sorted({str(Path(file).relative_to(entered.ROOT)) for file, _ in found})
    print(f"enters {counted[0]} files, {counted[1]} functions and {counted[2]} statements: {names}")
    stated = STATED.search(DESIGN.read_text().replace("\n", " "))
    assert stated is not None
    assert all(n <= int(s) for n, s in zip(counted, stated.groups(), strict=True)), counted
    assert all(n >= 0.95 * int(s) for n, s in zip(counted, stated.groups(), strict=True)), counted
