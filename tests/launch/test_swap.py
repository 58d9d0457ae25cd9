"""What leaves GPUs that roles share: the tier by arithmetic to the byte, and what a run is told."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from launch.plan import resolve as resolving
from launch.plan.hints import hints_for
from launch.plan.memory import GIB, kv_wanted
from launch.plan.plan import Plan, as_json, make_plan
from launch.plan.resolve import resolve, smallest_gib
from launch.plan.swap import TIERS
from launch.plan.table import print_plan
from launch.recipe.read import annotated, load_recipe, read_recipe
from launch.recipe.resumed import changes
from learners.errors import UserError

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
GRPO = RECIPES / "grpo_qwen3_0.6b.yaml"
PPO = RECIPES / "ppo_qwen3_0.6b.yaml"
PARAMETERS = 596_049_920  # of Qwen3-0.6B
TOKEN = 2 * 28 * 2 * 8 * 128  # bytes of its keys and values
WHOLE = "generation.gpu_memory_fraction=1.0"  # so that the cache is as large as it can use


@pytest.fixture(autouse=True)
def no_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolving, "nvidia_smi", lambda: None)


def plan(*overrides: str, path: Path = GRPO) -> Plan:
    return make_plan(load_recipe(path, [WHOLE, *overrides]))


def gpu_peak(made: Plan) -> int:
    (gpu,) = (memory for memory in made.memories if memory.is_gpu)
    return gpu.peak[1]


@pytest.mark.parametrize(("tier", "next_tier"), [*pairwise(TIERS), ("always", "always")])
def test_a_tier_is_taken_down_to_the_last_byte(tier: str, next_tier: str) -> None:
    needs = gpu_peak(plan(f"cluster.swap={tier}", "cluster.gpu_memory_gib=1000"))
    just = plan(f"cluster.gpu_memory_gib={needs / GIB!r}")
    short = plan(f"cluster.gpu_memory_gib={(needs - 1) / GIB!r}")
    assert (just.tier, gpu_peak(just), just.fits) == (tier, needs, True)
    assert (short.tier, short.fits) == (next_tier, tier != "always")


def test_what_lies_on_the_gpu_by_each_tier() -> None:
    made = {tier: plan(f"cluster.swap={tier}", "cluster.gpu_memory_gib=100") for tier in TIERS}
    engine = {tier: made[tier].memories[0].uses for tier in TIERS}
    cache = TOKEN * 16 * (128 * 96 + 1)  # 96 blocks a sequence, and the one that vLLM keeps
    never = engine["never"]
    kept = sum(max(sum(u[role].values()) for u in never.values()) for role in never["learn"])
    assert sum(sum(use.values()) for use in never["learn"].values()) == kept
    for phase in ("start", "score", "learn", "sync"):
        assert engine["never"][phase]["engine"]["kv_cache"] == cache
        assert "kv_cache" not in engine["kv_cache"][phase]["engine"]
        assert engine["optimizer"][phase]["engine"]["weights"] == 2 * PARAMETERS
    assert {engine[tier]["generate"]["engine"]["kv_cache"] for tier in TIERS} == {cache}
    assert engine["kv_cache"]["generate"]["actor"]["optimizer"] == 12 * PARAMETERS
    assert engine["optimizer"]["generate"]["actor"].keys() == {"weights", "runtime"}
    assert engine["optimizer"]["sync"]["actor"]["optimizer"] == 12 * PARAMETERS
    assert engine["always"]["generate"]["actor"].keys() == {"runtime"}
    assert engine["always"]["learn"]["engine"].keys() == {"runtime"}
    # what leaves keeps its place in CPU memory
    host = {tier: made[tier].memories[-1].uses for tier in TIERS}
    assert "optimizer" not in host["kv_cache"]["learn"]["actor"]
    assert host["optimizer"]["learn"]["actor"]["optimizer"] == 12 * PARAMETERS
    assert host["always"]["learn"]["actor"]["weights"] == 2 * PARAMETERS
    assert host["always"]["generate"]["engine"]["weights"] == 2 * PARAMETERS


def test_bytes_a_step() -> None:
    """Of the Actor 12 bytes a parameter in both directions, or 14; of the engine 2; of frozen
    models 2 in one direction; nothing of what is in CPU memory anyway.
    """
    found = [plan(f"cluster.swap={tier}").swapped for tier in TIERS]
    assert found == [0, 0, 24 * PARAMETERS, 32 * PARAMETERS]
    ppo = plan("cluster.swap=always", path=PPO)
    parameters = {name: model.parameters for name, model in ppo.models.items()}
    actor, critic, *frozen = (parameters[n] for n in parameters if n != "engine")
    assert ppo.recipe.critic.offload_optimizer and len(frozen) == 2  # type: ignore[union-attr]
    assert ppo.swapped == 4 * actor + 28 * actor + 4 * critic + 2 * sum(frozen)
    assert as_json(ppo, {})["swap"] == {"tier": "always", "bytes": ppo.swapped}


def test_a_cache_holds_as_many_sequences_as_are_decoded_and_not_a_byte_more() -> None:
    made = plan("cluster.gpu_memory_gib=100")
    model = made.models["engine"]
    wanted = kv_wanted(model, made.longest, made.recipe.generation)  # type: ignore[union-attr]
    assert made.kv_room == 128
    for given, room in ((wanted, 128), (wanted - 1, 127)):
        exact = plan("cluster.gpu_memory_gib=100", f"generation.kv_cache_bytes={given}")
        assert exact.kv_room == room
    # what gpu_memory_fraction leaves, if that is less; and all of it where no GPUs are shared
    assert plan("generation.gpu_memory_fraction=0.5").kv_room < 128
    own = plan("cluster.gpu_memory_gib=100", "cluster.placement=separate")
    assert own.kv_room > 128 and own.tier == "never" and own.swapped == 0


def test_a_tier_that_does_not_fit_is_a_problem_and_auto_helps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = plan("cluster.swap=never", "generation.gpu_memory_fraction=0.8")
    assert not made.fits and "needs" in made.problems[0]
    hints = hints_for(made)
    assert hints["cluster.swap"] == "auto"
    print_plan(made, hints)
    out = capsys.readouterr().out
    assert "Swap     never (as the recipe says): all fits at once; 0.0 MB move a step" in out
    small = plan("generation.kv_cache_bytes=1000")
    assert "generation.kv_cache_bytes: 1000 bytes on each GPU do not hold one" in small.problems[0]


def test_a_run_is_told_what_arithmetic_decides(tmp_path: Path) -> None:
    """Also in its config.yaml, from which it goes on though its recipe says auto."""
    recipe, document = read_recipe(GRPO, [f"run.folder={tmp_path}"])
    decided, line = resolve(recipe, document)
    made = make_plan(recipe)
    assert (decided.cluster.swap, line) == (
        made.tier,
        "cluster.swap: optimizer, 14.3 GB move a step",
    )
    saved = annotated(decided, document)
    assert "  swap: optimizer  # by plan's arithmetic\n" in saved
    (tmp_path / "config.yaml").write_text(saved)
    again = load_recipe(tmp_path / "config.yaml")
    assert again == decided
    cache = make_plan(again).memories[0].uses["generate"]["engine"]["kv_cache"]
    assert again.generation.kv_cache_bytes == cache  # type: ignore[union-attr]
    assert changes(recipe) == {}


def test_what_a_recipe_says_itself_stays() -> None:
    own = ["cluster.swap=kv_cache", "generation.kv_cache_bytes=5000000000"]
    recipe, document = read_recipe(GRPO, own)
    decided, line = resolve(recipe, document)
    assert decided == recipe and line == "cluster.swap: kv_cache, 0.0 GB move a step"


@pytest.mark.parametrize("name", ["demo_ppo", "grpo_qwen3_8b"])
def test_where_no_gpus_are_shared_nothing_leaves(name: str) -> None:
    recipe, document = read_recipe(RECIPES / f"{name}.yaml")
    decided, line = resolve(recipe, document)
    assert (decided.cluster.swap, line) == ("never", "")
    assert decided.generation == recipe.generation  # type: ignore[union-attr]
    sft, document = read_recipe(RECIPES / "demo_sft.yaml")
    assert resolve(sft, document) == (sft, "")


def test_a_model_that_cannot_be_counted_leaves_whole_and_that_is_said() -> None:
    unknown = "actor.model.path=nobody/knows"
    recipe, document = read_recipe(GRPO, [unknown])
    decided, line = resolve(recipe, document)
    assert decided.cluster.swap == "always"
    assert decided.generation == recipe.generation  # type: ignore[union-attr]
    assert line.startswith("cluster.swap: always; a model cannot be counted: command line: actor")
    with pytest.raises(UserError, match="kv_cache_bytes: must be given beside cluster.swap never"):
        resolve(*read_recipe(GRPO, [unknown, "cluster.swap=never"]))
    given = [unknown, "cluster.swap=never", "generation.kv_cache_bytes=5000000000"]
    assert resolve(*read_recipe(GRPO, given))[0].cluster.swap == "never"


def test_a_smaller_gpu_than_the_recipe_says_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ["NVIDIA H100, 81559 MiB, 570.1", "NVIDIA A10, 23028 MiB, 570.1"]
    assert smallest_gib(listed) == pytest.approx(22.49, abs=0.01)
    assert smallest_gib([]) is smallest_gib(None) is None
    monkeypatch.setattr(resolving, "nvidia_smi", lambda: listed)
    decided, line = resolve(*read_recipe(GRPO, ["cluster.gpu_memory_gib=80"]))
    assert decided.cluster.swap == "optimizer" and decided.cluster.gpu_memory_gib == 80
    assert line.endswith("; GPUs here have 22.5 GiB, not 80")
    assert resolve(*read_recipe(GRPO, ["cluster.gpu_memory_gib=20"]))[0].cluster.swap == "always"
