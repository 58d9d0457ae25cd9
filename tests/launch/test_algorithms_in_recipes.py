"""An algorithm is one file and one registry line, or a class of the user's own: no more."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from actors.roles import roles_of
from actors.settings import RLRecipe, rl_recipe
from launch.recipe.read import RecipeError, load_recipe
from learners.algorithms import base
from learners.algorithms.base import find_algorithm
from learners.errors import UserError

SOURCE = '''
from typing import Literal

from pydantic import Field

from learners.algorithms.base import Algorithm, AlgorithmSettings


class Settings(AlgorithmSettings):
    strength: float = Field(1.0, gt=0, description="how strongly scores count")


class Scores(Algorithm[Settings]):
    """Advantages are the scores themselves."""

    Settings = Settings

    def advantages(self, batch):
        from dataclasses import replace

        advantages = self.settings.strength * batch.scores[:, None] * batch.loss_mask
        return replace(batch, advantages=advantages), {}


class Unfinished(Algorithm):
    pass


class Unsettled(Scores):
    Settings = dict
'''


@pytest.fixture
def own(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module `own_algorithm`, from which a run would be started."""
    (place / "own_algorithm.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.delitem(sys.modules, "own_algorithm", raising=False)
    rl_recipe.cache_clear()
    yield place
    rl_recipe.cache_clear()


SUBCLASS = """
from pydantic import Field

from learners.algorithms.ppo import PPO, PPOSettings


class Settings(PPOSettings):
    patience: int = Field(3, ge=1, description="one more key")


class Patient(PPO):
    Settings = Settings


class Same(PPO):
    pass
"""


def load(kind: str, *overrides: str) -> RLRecipe:
    recipe = load_recipe("rl.yaml", [f"algorithm.kind={kind}", *overrides])
    assert isinstance(recipe, RLRecipe)
    return recipe


def test_one_line_registers_an_algorithm(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base.ALGORITHMS, "scores", "own_algorithm:Scores")
    recipe = load("scores", "algorithm.strength=2")
    assert recipe.algorithm.model_dump()["strength"] == 2
    made = roles_of(recipe)["actor"].arguments["algorithm"]
    assert type(made).__name__ == "Scores" and made.group_size == recipe.step.group_size


@pytest.mark.parametrize("name", ["Patient", "Same"])
def test_a_class_of_ones_own_may_build_on_a_registered_one(own: Path, name: str) -> None:
    (own / "own_algorithm.py").write_text(SUBCLASS)
    recipe = load(f"own_algorithm:{name}", "critic.model.path=./reward_model", "algorithm.lam=0.9")
    made = pickle.loads(pickle.dumps(roles_of(recipe)["actor"].arguments["algorithm"]))
    assert type(made).__name__ == name and made.settings.lam == 0.9
    assert made.settings.kind == f"own_algorithm:{name}" and "critic" in roles_of(recipe)


def test_the_kind_of_a_recipe_and_of_its_algorithm_agree(place: Path) -> None:
    with pytest.raises(RecipeError, match=r"algorithm\.kind: must be 'grpo' in a recipe for grpo"):
        load_recipe("grpo.yaml", ["algorithm.kind=reinforce_plus_plus"])
    with pytest.raises(RecipeError, match=r"algorithm\.kind: must be text, not 3"):
        load_recipe("rl.yaml", ["algorithm.kind=3"])


def test_a_recipe_may_name_a_class_of_its_own(own: Path) -> None:
    recipe = load("own_algorithm:Scores", "algorithm.strength=3")
    assert recipe.algorithm.kind == "own_algorithm:Scores"
    (own / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe("again.yaml") == recipe
    with pytest.raises(RecipeError, match=r"algorithm\.strenght: unknown key; did you mean"):
        load("own_algorithm:Scores", "algorithm.strenght=3")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("ppoo", "did you mean ppo?"),
        ("own_algorithm:Missing", "cannot be imported: AttributeError"),
        ("own_algorithm:Settings", "is not a subclass of learners.algorithms.base.Algorithm"),
        ("own_algorithm:Unfinished", "has no method advantages(batch)"),
        ("own_algorithm:Unsettled", "its Settings are not a subclass of learners.algorithms.base."),
        ("", "missing; one of ppo, grpo, reinforce_plus_plus, or module:Class of your own"),
    ],
)
def test_an_algorithm_that_is_not_there_is_one_line(own: Path, kind: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        load(kind)
    (problem,) = refused.value.problems
    assert said in problem and problem.startswith("command line: algorithm.kind: ")


@pytest.mark.parametrize("kind", base.ALGORITHMS)
def test_finding_an_algorithm_loads_no_torch(kind: str) -> None:
    code = f"import sys; from learners.algorithms.base import find_algorithm as f; f({kind!r}); "
    code += "sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
    )


def test_what_an_algorithm_needs_decides_the_roles(place: Path) -> None:
    assert set(roles_of(load("reinforce_plus_plus"))) == {
        "engine",
        "actor",
        "reference",
        "reward exact",
    }
    assert "reference" not in roles_of(load("reinforce_plus_plus", "algorithm.kl_beta=0"))
    with pytest.raises(RecipeError, match=r"critic: missing: set critic\.model\.path"):
        load("ppo")
    with pytest.raises(RecipeError, match=r"critic: must be left out: this algorithm has none"):
        load("grpo", "critic.model.path=./reward_model")


def test_rl_runs_what_ppo_and_grpo_run(place: Path) -> None:
    for name in ("ppo", "grpo", "rl"):
        assert isinstance(load_recipe(f"{name}.yaml", kind="rl"), RLRecipe)
    with pytest.raises(RecipeError, match="this is a recipe for rl: run quatuor rl"):
        load_recipe("rl.yaml", kind="grpo")


def test_every_algorithm_is_found() -> None:
    for kind in base.ALGORITHMS:
        assert find_algorithm(kind).Settings.model_fields["kind"].default == kind
