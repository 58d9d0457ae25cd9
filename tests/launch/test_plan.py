"""`quatuor plan`: batches, places, memory and advice, against figures worked out by hand and
figures others publish.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.settings import rl_recipe
from launch import cli
from launch.plan.devices import ranges
from launch.plan.hints import hints_for
from launch.plan.memory import GIB, model_states, total
from launch.plan.plan import Plan, as_json, make_plan
from launch.plan.shapes import Shape, find_shape
from launch.plan.table import print_plan, show_plan
from launch.recipe.combinations import Recipe, combination_problems
from launch.recipe.document import Document
from launch.recipe.read import load_recipe, read_recipe
from launch.recipe.schema import lookup, recipe_keys
from learners.errors import UserError
from learners.settings import LearnerSettings
from tests.launch.test_cli import quatuor

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
SHIPPED = sorted(RECIPES.glob("*.yaml"))


def recipe(name: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml", overrides)


def plan(name: str, *overrides: str) -> Plan:
    return make_plan(recipe(name, *overrides))


# --- the recipes that come with it ----------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_recipe_fits(path: Path) -> None:
    """On nodes with usual CPU memory: 16 GB for the demo, 64 for one GPU, 1 TB for eight."""
    made = make_plan(load_recipe(path))
    cluster = made.recipe.cluster
    memory = 64 if cluster.gpus_per_node == 1 else 1000
    if cluster.device == "cpu":
        memory = 16
    made = make_plan(load_recipe(path, [f"cluster.node_memory_gib={memory}"]))
    assert made.fits, made.problems
    assert all(m.headroom is not None and m.headroom > 0 for m in made.memories)


@pytest.mark.parametrize(
    ("name", "nodes", "gpus", "memory"),
    [
        ("grpo_qwen3_0.6b", 1, 1, 22),
        ("ppo_qwen3_0.6b", 1, 1, 22),
        ("grpo_qwen3_8b", 1, 8, 80),
        ("grpo_qwen3_8b_lora", 1, 1, 80),
        ("ppo_qwen3_8b", 1, 8, 80),
        ("grpo_qwen3_32b", 4, 8, 80),
        ("ppo_qwen3_14b", 4, 8, 80),
    ],
)
def test_recipes_to_start_from_use_the_cluster_they_name(
    name: str, nodes: int, gpus: int, memory: int
) -> None:
    made = plan(name)
    assert made.recipe.cluster.gpu_memory_gib == memory
    used = {(p.node, gpu) for p in made.where.processes for gpu in p.gpus}
    assert used == {(node, gpu) for node in range(nodes) for gpu in range(gpus)}


# --- batches and places ---------------------------------------------------------------------------


def test_batch_arithmetic() -> None:
    """128 prompts x 8 in mini-batches of 256: 4 optimizer steps; a rank's 64 sequences of 5120, 3
    in 16384 tokens.
    """
    batch = plan("grpo_qwen3_8b").batch
    assert (batch["sequences"], batch["mini_batches"], batch["optimizer_steps_per_step"]) == (
        1024,
        4,
        4,
    )
    assert (batch["optimizer_steps"], batch["longest_sequence_tokens"]) == (800, 5120)
    assert batch["ranks"]["actor"]["sequences_per_rank"] == 64
    assert batch["ranks"]["actor"]["micro_batches_at_most"] == 22


def test_pairs_stay_together_and_positions_bound_lengths() -> None:
    """64 pairs are 128 sequences; a model of 64 positions has no longer ones, so 16 fit 1024
    tokens.
    """
    batch = plan("demo_rm", "data.max_tokens=2048", "held_out.max_tokens=2048").batch
    assert (batch["sequences"], batch["longest_sequence_tokens"]) == (128, 64)
    assert batch["ranks"]["rm"] == {
        "ranks": 2,
        "sequences_per_rank": 64,
        "micro_batch_tokens": 1024,
        "micro_batches_at_most": 4,
    }
    assert plan("demo_ppo").batch["optimizer_steps_per_step"] == 4  # two mini-batches, two epochs


def test_separate_roles_fill_nodes_in_order() -> None:
    made = plan("grpo_qwen3_32b")
    places = {p.name: (p.node, p.gpus) for p in made.where.processes if p.gpus}
    assert places["engine[0]"] == (0, (0, 1)) and places["engine[7]"] == (1, (6, 7))
    assert places["actor[0]"] == (2, (0,)) and places["actor[15]"] == (3, (7,))


def test_an_engine_never_straddles_two_nodes() -> None:
    made = plan("grpo_qwen3_32b", "cluster.gpus_per_node=7", "cluster.nodes=5")
    assert all(len({p.node}) == 1 and max(p.gpus, default=0) < 7 for p in made.where.processes)
    # on the next node: one GPU was left
    assert {p.name: p.gpus for p in made.where.processes}["engine[3]"] == (
        0,
        1,
    )


def test_cpu_nodes_are_spread_over() -> None:
    assert {p.node for p in plan("demo_ppo", "cluster.nodes=2").where.processes} == {0, 1}
    assert {p.node for p in plan("demo_ppo").where.processes} == {0}


def test_shared_gpus_are_taken_in_turns() -> None:
    """Engines alone while generating; learners alone while learning; who is away waits in CPU
    memory.
    """
    made = plan("ppo_qwen3_0.6b")
    gpu, host = made.memories
    weights = {
        phase: {name for name, use in uses.items() if use.get("weights")}
        for phase, uses in gpu.uses.items()
    }
    assert weights["generate"] == {"engine"}
    assert weights["score"] == {"actor", "critic", "reference", "reward reward_model"}
    assert weights["learn"] == {"actor", "critic"}
    assert weights["sync"] == {"actor", "engine"}
    assert host.uses["generate"]["actor"]["optimizer"] == gpu.uses["learn"]["actor"]["optimizer"]
    assert "optimizer" not in gpu.uses["learn"]["critic"]  # offloaded: always in CPU memory
    assert host.uses["learn"]["critic"]["optimizer"] == host.uses["generate"]["critic"]["optimizer"]


def test_ranges_of_numbers() -> None:
    assert ranges([5, 0, 1, 2, 3]) == "0-3,5"


# --- memory ---------------------------------------------------------------------------------------


def states(parameters: int, stage: int, ranks: int) -> dict[str, int]:
    """GB of a bfloat16 model that is one large matrix."""
    shape = Shape("llama", 1, 1, 1, 1, 1, 1, 1, 1, True, (parameters,), (), ())
    settings = {"model": {"path": "x", "dtype": "bfloat16"}, "zero_stage": stage, "ranks": ranks}
    return {
        k: v / 1e9
        for k, v in model_states(shape, "lm", LearnerSettings.model_validate(settings)).items()
    }


@pytest.mark.parametrize(("stage", "published"), [(1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_zero_papers_figure(stage: int, published: float) -> None:
    """Rajbhandari et al., arXiv:1910.02054, figure 1: 7.5 billion parameters on 64 GPUs.

    The paper keeps gradients in 16 bits: 2 bytes each, of all parameters in stage 1 and of a rank's
    share in 2 and 3.
    """
    ours = states(7_500_000_000, stage, 64)
    gradients = 2 * 7.5 / (1 if stage == 1 else 64)
    assert ours["weights"] + ours["optimizer"] + gradients == pytest.approx(published, abs=0.06)


@pytest.mark.engines
@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
@pytest.mark.parametrize("model", ["Llama-2-7b", "Llama-2-13b", "Llama-2-70b"])
def test_deepspeeds_own_estimates(model: str, nodes: int) -> None:
    """Nodes of 8 GPUs. Two known differences. DeepSpeed adds ZeRO-3's largest layer, which is among
    the buffers here. And its ZeRO-2 counts 16-bit gradients of a rank's share beside the float32
    ones: 6 % of the whole on 8 GPUs, 1 % on 64. With float32 accumulation it keeps none
    (_use_compact_grad_partition_buffer in stage_1_and_2.py: each bucket is added to one float32
    buffer), as test_plan_measured.py finds.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero_3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero_2

    shape = find_shape(f"meta-llama/{model}")
    gpus = 8 * nodes
    whole = shape.parameters("lm")
    largest = shape.vocabulary * shape.hidden
    two, three = (sum(states(whole, stage, gpus).values()) * 1e9 for stage in (2, 3))
    _, theirs = zero_2(whole, 8, nodes, cpu_offload=False)
    assert two + 2 * whole / gpus == pytest.approx(theirs, rel=1e-6)
    assert 1 - two / theirs == pytest.approx(2 / (2 * gpus + 18), rel=1e-6)
    assert zero_2(whole, 8, nodes, cpu_offload=True)[1] == states(whole, 2, gpus)["weights"] * 1e9
    _, theirs, layer = zero_3(whole, largest, 8, nodes, cpu_offload=False, cpu_offload_params=False)
    assert three == pytest.approx(theirs - layer, rel=1e-6)


def test_the_example_in_deepspeeds_documentation() -> None:
    """deepspeed.readthedocs.io/en/latest/memory.html: 2851 M parameters, 8 GPUs: ZeRO-3 takes 6.09
    GiB a GPU, of which 0.12 is the largest layer (ZeRO-2 takes 5.31 of weights, with all the rest
    offloaded).
    """
    assert sum(states(2_851_000_000, 3, 8).values()) * 1e9 / GIB == pytest.approx(
        6.09 - 0.12, abs=0.01
    )
    assert states(2_851_000_000, 2, 8)["weights"] * 1e9 / GIB == pytest.approx(5.31, abs=0.01)


@pytest.mark.parametrize(
    ("model", "nodes", "gpus", "parallel", "offload"),
    [("Qwen2.5-7B", 1, 2, 2, True), ("Qwen2.5-14B", 1, 4, 2, True), ("Qwen2.5-72B", 4, 8, 8, True)],
)
def test_what_verl_runs_on_80_gb_fits(
    model: str, nodes: int, gpus: int, parallel: int, offload: bool
) -> None:
    """verl, docs/perf/device_tuning.rst, GRPO on H800 (80 GB) with engines on the same GPUs:
    Qwen2-7B on 2, 14B on 4, 70B on 32. As there: states offloaded between phases, gradient
    checkpointing, prompts and responses of 1024.
    """
    made = plan(
        "grpo_qwen3_8b",
        f"actor.model.path=Qwen/{model}",
        f"cluster.nodes={nodes}",
        f"cluster.gpus_per_node={gpus}",
        "cluster.placement=colocated",
        f"actor.ranks={nodes * gpus}",
        f"generation.tensor_parallel={parallel}",
        f"generation.engines={nodes * gpus // parallel}",
        "actor.micro_batch_tokens=4096",
        f"actor.offload_optimizer={str(offload).lower()}",
        "generation.max_new_tokens=1024",
        "generation.gpu_memory_fraction=0.6",
        "cluster.node_memory_gib=2000",
    )
    assert made.fits, made.problems


def test_gradients_of_zero_2_that_stay_on_the_gpu() -> None:
    """In float32 even where the optimizer is offloaded; in bfloat16 those of parameters larger than
    a bucket, here the embedding and the head of Qwen3-8B.
    """
    made = plan("ppo_qwen3_0.6b")
    assert (
        made.memories[0].uses["learn"]["critic"]["gradients"]
        == 4 * made.models["critic"].parameters
    )
    actor = plan("grpo_qwen3_8b", "actor.zero_stage=2").memories[2]
    assert actor.uses["learn"]["actor"]["buffers"] == 2 * (500_000_000 + 2 * 151_936 * 4096)


def test_70b_does_not_fit_where_nobody_claims_it() -> None:
    """18 bytes of 70.6 billion parameters are 1183 GiB: more than 8 x 80 GB."""
    made = plan(
        "grpo_qwen3_8b",
        "actor.model.path=meta-llama/Llama-3.1-70B",
        "actor.ranks=8",
        "cluster.placement=colocated",
        "generation.engines=1",
        "generation.tensor_parallel=8",
    )
    assert not made.fits and "node 0 GPU 0-7: learn needs" in made.problems[0]


def test_sync_and_kv_cache() -> None:
    """8.19 billion parameters in bfloat16; 144 KiB of cache a token."""
    made = plan("grpo_qwen3_8b")
    assert made.sync == {"bytes": 2 * 8_190_735_360, "engines": 4, "devices": 4}
    engine = made.memories[0].uses["generate"]["engine"]
    blocks = engine["kv_cache"] // (16 * 144 * 1024) - 1  # vLLM keeps one for itself
    assert made.kv_room == blocks // (5120 // 16) == 71
    assert total(engine) == pytest.approx(0.85 * 80 * GIB, rel=1e-6)


def test_what_lora_saves() -> None:
    """Gradients and Adam states of an adapter alone, no Reference, and less to send. By hand: q and
    o 4096 x 4096, k and v 4096 x 1024, three of 4096 x 12288, in 36 layers, of rank 32.
    """
    adapter = 36 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288))
    made = plan("grpo_qwen3_8b_lora")
    (gpu,) = (memory for memory in made.memories if memory.is_gpu)
    actor = gpu.uses["score"]["actor"]
    assert actor["weights"] == 2 * (8_190_735_360 + adapter)
    assert actor["optimizer"] == 12 * adapter
    assert gpu.uses["learn"]["actor"]["gradients"] == 4 * adapter
    assert "reference" not in made.models and made.sync["bytes"] == 2 * 8_190_735_360
    whole = plan("grpo_qwen3_8b_lora", "actor.model.lora=")
    assert not whole.fits and "reference" in whole.models
    assert made.seconds["learn"] < whole.seconds["learn"]
    alone = plan("grpo_qwen3_8b_lora", "sync.lora=adapter")
    assert alone.sync["bytes"] == 2 * adapter and alone.fits
    assert alone.seconds["sync"] < made.seconds["sync"]


def test_what_lora_saves_is_printed_for_every_role(capsys: pytest.CaptureFixture[str]) -> None:
    """Of an adapter, and of the 8.19 billion parameters of which all would learn: ZeRO-2, 16 bytes
    each. Fewer targets train less: q and v, 4096 x (4096 + 1024), in 36 layers.
    """
    args = [str(RECIPES / "grpo_qwen3_8b_lora.yaml")]
    adapter = 36 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288))
    fewer = 36 * 32 * ((4096 + 4096) + (4096 + 1024))
    whole = f"{16 * 8_190_735_360 / GIB:.1f}"
    for count, more in ((adapter, []), (fewer, ["actor.model.lora.targets=[q_proj,v_proj]"])):
        assert cli.main(["plan", *args, *more]) == 0
        line = (
            f"actor: LoRA of rank 32 trains {count / 1e6:.2f} M parameters: gradients and "
            f"optimizer {16 * count / GIB:.1f} GiB a rank instead of {whole}\n"
        )
        assert line in capsys.readouterr().out


def test_a_critic_with_lora_trains_its_head_too() -> None:
    same = "critic.model.path=Qwen/Qwen3-8B"
    made = plan("ppo_qwen3_8b", "critic.model.lora.rank=8", same)
    critic = as_json(made, {})["models"]["critic"]
    adapter = 36 * 8 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288))
    assert critic["trained"] == adapter + 4096 + 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_phase_takes_time_and_no_size_is_negative(path: Path) -> None:
    made = make_plan(load_recipe(path))
    assert all(seconds > 0 for seconds in made.seconds.values())
    sizes = [
        n
        for m in made.memories
        for uses in m.uses.values()
        for use in uses.values()
        for n in use.values()
    ]
    assert min(sizes) > 0


# --- what does not fit, and what helps ------------------------------------------------------------

G8 = "grpo_qwen3_8b"
COLOCATED = "cluster.placement=colocated actor.ranks=8 generation.engines=8"
LLAMA_2 = "actor.model.path=meta-llama/Llama-2-7b generation.max_new_tokens=50000"
ON_CPU = "cluster.device=cpu actor.model.dtype=float32 generation.max_new_tokens=8192"
SEVEN = (
    "actor.model.path=Qwen/Qwen2.5-0.5B generation.tensor_parallel=7 generation.engines=1 "
    "cluster.nodes=2"
)
FUNCTIONS = "rewards.0.workers=100 cluster.node_memory_gib=80"
OFFLOADED = "actor.offload_optimizer=true cluster.node_memory_gib=64"
FULL = [  # recipe, overrides, the problem, keys that must be among those that help
    (G8, "actor.model.gradient_checkpointing=false", "learn needs", "gradient_checkpointing true"),
    (G8, "actor.micro_batch_tokens=65536", "learn needs", "actor.micro_batch_tokens lower"),
    (
        G8,
        "actor.micro_batch_tokens=5120 actor.ranks=8 cluster.nodes=2 cluster.gpu_memory_gib=26",
        "learn needs",
        "generation.max_new_tokens lower",
    ),
    (G8, "actor.model.attention=eager", "learn needs", "actor.model.attention sdpa"),
    (G8, "actor.zero_stage=1", "learn needs", "actor.zero_stage 3"),
    (G8, "actor.zero_stage=2 cluster.gpu_memory_gib=60", "learn needs", "actor.zero_stage 3"),
    (G8, "cluster.gpu_memory_gib=48", "learn needs", "actor.offload_optimizer true"),
    (
        G8,
        "cluster.gpu_memory_gib=26 actor.offload_optimizer=true",
        "learn needs",
        "actor.micro_batch_tokens lower",
    ),
    (
        G8,
        "generation.gpu_memory_fraction=1.0",
        "sync needs",
        "generation.gpu_memory_fraction lower",
    ),
    (
        G8,
        "generation.gpu_memory_fraction=0.2",
        "no KV cache",
        "generation.gpu_memory_fraction high",
    ),
    (G8, "cluster.gpu_memory_gib=16", "no KV cache", "generation.tensor_parallel 2 or 4 or 8"),
    (G8, f"{COLOCATED} cluster.gpu_memory_gib=45", "learn needs", "actor.offload_optimizer true"),
    ("grpo_qwen3_0.6b", "cluster.swap=kv_cache", "generate needs", "cluster.swap auto"),
    (
        "grpo_qwen3_0.6b",
        "generation.kv_cache_bytes=22000000000",
        "generate needs",
        "generation.kv_cache_bytes lower",
    ),
    (
        "grpo_qwen3_0.6b",
        "cluster.gpu_memory_gib=23 cluster.swap=never generation.max_concurrent=64",
        "learn needs",
        "generation.max_concurrent lower",
    ),
    (G8, OFFLOADED, "CPU memory", "actor.offload_optimizer false"),
    (G8, FUNCTIONS, "CPU memory", "rewards.0.workers lower"),
    (G8, LLAMA_2, "50000 leaves no room for a prompt in the model's 4096", "tokens below 4096"),
    (G8, SEVEN, "7 does not divide the model's 2 key-value heads", "tensor_parallel 1 or 2"),
    (
        G8,
        "generation.tensor_parallel=16",
        "must be on one node",
        "tensor_parallel 1 or 2 or 4 or 8",
    ),
    ("grpo_qwen3_32b", "cluster.nodes=2", "32 GPUs are needed", "cluster.placement colocated"),
    ("ppo_qwen3_8b", "actor.ranks=512", "GPUs are needed", "cluster.nodes 65"),
    (
        "ppo_qwen3_8b",
        "actor.ranks=16 critic.ranks=16 cluster.placement=colocated",
        "16 GPUs are needed",
        "critic.ranks lower",
    ),
    ("ppo_qwen3_8b", "cluster.gpu_memory_gib=24", "learn needs", "actor.offload_optimizer true"),
    ("ppo_qwen3_0.6b", "critic.offload_optimizer=false", "learn needs", "critic.offload_optimizer"),
    ("ppo_qwen3_0.6b", "cluster.node_memory_gib=9", "CPU memory", "critic.offload_optimizer false"),
    (
        "demo_grpo",
        "generation.kv_cache_gib=20 cluster.node_memory_gib=16",
        "CPU memory",
        "kv_cache_gib lower",
    ),
    ("demo_grpo", "generation.max_model_tokens=65", "65 is more than the model's 64", "tokens 64"),
    ("grpo_qwen3_0.6b", ON_CPU, "1 GiB of KV cache do not hold one sequence of 8704", "gib higher"),
    ("demo_ppo", "cluster.node_memory_gib=2", "CPU memory", "cluster.nodes higher"),
    ("demo_sft", "cluster.node_memory_gib=0.5", "CPU memory", "learner.ranks lower"),
]


def excess(made: Plan) -> list[int]:
    """Nodes that are missing, lines about something else than memory, bytes too many on GPUs and in
    CPU memory: the largest excess, and of all kinds of devices.
    """
    nodes = 10**6 if made.where.nodes is None else made.where.nodes
    lines = sum("needs" not in problem and "cluster:" not in problem for problem in made.problems)
    over = [
        size
        for gpu in (True, False)
        for one in [[-(m.headroom or 0) for m in made.memories if m.is_gpu == gpu and m.overflows]]
        for size in (max(one, default=0), sum(one))
    ]
    return [max(0, nodes - made.recipe.cluster.nodes), lines, *over]


def steps(now: Any, what: str) -> list[Any]:
    """Values to give a key whose hint says `what`."""
    if what in ("lower", "higher"):
        if isinstance(now, int):
            return [max(1, now >> n) if what == "lower" else now << n for n in range(1, 13)]
        factors = (0.9, 0.75, 0.5, 0.25) if what == "lower" else (1.1, 1.5, 2, 4, 16)
        return [now * factor for factor in factors]
    if what.startswith("below"):
        return [int(what.split()[1]) // 2]
    return [yaml.safe_load(value) for value in what.split(" or ")]


def applied(made: Plan, key: str, what: str) -> list[Plan]:
    """The plan with values that a hint asks for, as far as they make a recipe."""
    now: Any = made.recipe
    for part in key.split("."):
        now = now[int(part)] if part.isdigit() else getattr(now, part)
    found = []
    for value in steps(now, what):
        values = made.recipe.model_dump(mode="json")
        place: Any = values
        *path, last = key.split(".")
        for part in path:
            place = place[int(part)] if part.isdigit() else place[part]
        place[last] = value
        if key == "generation.tensor_parallel":  # on as many GPUs
            engines = values["generation"]["engines"] * now // value
            values["generation"]["engines"] = max(1, engines)
        try:
            changed = type(made.recipe).model_validate(values)
        except ValueError:
            continue
        if key.endswith("ranks") and what == "higher":
            cluster = changed.cluster.model_copy(update={"nodes": 64})
            changed = changed.model_copy(update={"cluster": cluster})
        if not any(combination_problems(changed)):
            found.append(make_plan(changed))
    return found


@pytest.mark.parametrize(("name", "overrides", "problem", "hint"), FULL)
def test_what_does_not_fit_is_said_with_keys_that_help(
    name: str, overrides: str, problem: str, hint: str
) -> None:
    """Every key that is named is one of the recipe and, by itself, makes less of what is too much;
    where several roles are too many for the GPUs they share, all of them together do.
    """
    made = plan(name, *overrides.split())
    assert not made.fits and problem in made.problems[0]
    hints = hints_for(made)
    assert hint in ", ".join(f"{key} {what}" for key, what in hints.items())
    for key, what in hints.items():
        assert lookup(key, recipe_keys(type(made.recipe))), key
        if problem == "16 GPUs are needed" and key.endswith("ranks"):
            continue  # both must be lower
        before = excess(made)
        tried = [excess(one) for one in applied(made, key, what)]
        assert any(x < y for one in tried for x, y in zip(one, before, strict=True)), (key, what)


@pytest.mark.parametrize(
    ("name", "overrides", "missing"),
    [
        (G8, "cluster.gpu_memory_gib=48", "gradient_checkpointing zero_stage dtype attention"),
        (G8, "cluster.gpu_memory_gib=30 actor.offload_optimizer=true", "offload_optimizer"),
        (G8, "actor.micro_batch_tokens=5120 cluster.gpu_memory_gib=30", "micro_batch_tokens"),
        ("demo_ppo", "cluster.node_memory_gib=2", "offload gpu placement critic.ranks"),
        ("ppo_qwen3_0.6b", "critic.offload_optimizer=false", "placement critic.zero_stage"),
    ],
)
def test_what_is_done_or_impossible_is_not_hinted_at(
    name: str, overrides: str, missing: str
) -> None:
    hints = hints_for(plan(name, *overrides.split()))
    assert hints and not [key for key in hints if any(word in key for word in missing.split())]


def test_processes_that_share_gpus_are_lowered_together() -> None:
    overrides = ["actor.ranks=16", "critic.ranks=16", "cluster.placement=colocated"]
    hints = hints_for(plan("ppo_qwen3_8b", *overrides))
    assert (hints["actor.ranks"], hints["critic.ranks"]) == ("lower", "lower")
    assert plan("ppo_qwen3_8b", *overrides, "actor.ranks=8", "critic.ranks=8").where.nodes == 1


@pytest.mark.parametrize(
    "extra", ["", "cluster.nodes=1", "cluster.gpu_memory_gib=20 cluster.node_memory_gib=9"]
)
@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_hints_are_keys_of_the_recipe_and_none_where_all_fits(path: Path, extra: str) -> None:
    made = make_plan(load_recipe(path, extra.split()))
    hints = hints_for(made)
    assert made.fits <= (not hints)
    assert all(lookup(key, recipe_keys(type(made.recipe))) for key in hints)


def test_where_nothing_helps_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    broken = plan("demo_sft", "cluster.node_memory_gib=0.5", "learner.ranks=1")
    assert hints_for(broken) == {}
    print_plan(broken, {})
    assert "No key helps: it takes a smaller model" in capsys.readouterr().out


def test_a_rank_never_holds_more_than_its_rows() -> None:
    """One row of 5120 tokens a rank and mini-batch, whatever the budget; while scoring, 256
    rows.
    """
    wide = ["step.mini_batch_size=4", "actor.micro_batch_tokens=65536"]
    (actor,) = [
        m for m in plan("grpo_qwen3_8b", *wide).memories if "actor" in m.uses["learn"] and m.is_gpu
    ][:1]
    assert plan("grpo_qwen3_8b", *wide).fits
    narrow = plan("grpo_qwen3_8b", "actor.micro_batch_tokens=5120").memories
    assert actor.uses["learn"] in [m.uses["learn"] for m in narrow]
    # the logits of all of them
    assert actor.uses["score"]["actor"]["activations"] > 65536 * 151936 * 2


# --- the command ----------------------------------------------------------------------------------


def at_once(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: nothing heavy is imported, and it takes less than a second."""
    return quatuor("plan", *arguments)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_recipe_fits_and_so_does_its_plan(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "It fits." in out and err == ""
    lines = out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", ["demo_ppo", "ppo_qwen3_14b"])
def test_plan_answers_at_once(name: str) -> None:
    done = at_once(str(RECIPES / f"{name}.yaml"))
    assert done.returncode == 0 and done.stderr == "" and "It fits." in done.stdout, done


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("ppo_qwen3_14b", "cluster.gpu_memory_gib=24"),
        ("ppo_qwen3_14b", "cluster.nodes=8 actor.ranks=40 cluster.gpu_memory_gib=24"),
        ("ppo_qwen3_8b", "actor.ranks=512"),
        ("ppo_qwen3_8b", "actor.ranks=4096"),
    ],
)
def test_it_takes_no_longer_when_it_does_not_fit(name: str, overrides: str) -> None:
    done = at_once(str(RECIPES / f"{name}.yaml"), *overrides.split())
    assert done.returncode == 1 and "It does not fit." in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120 and "…" not in done.stdout


def test_what_does_not_fit_exits_with_1_at_once() -> None:
    done = at_once(str(RECIPES / "ppo_qwen3_8b.yaml"), "cluster.gpu_memory_gib=24")
    assert done.returncode == 1
    assert "node 0 GPU 1-3: learn needs" in done.stdout
    assert "These help: actor.offload_optimizer true, " in done.stdout


def test_an_unknown_model_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    written = yaml.safe_load((RECIPES / "demo_sft.yaml").read_text())
    written["learner"]["model"]["path"] = "nobody/knows-it"
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(written))
    done = at_once(str(tmp_path / "sft.yaml"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "learner.model.path: nobody/knows-it: its shape is not known here" in done.stderr


def test_every_model_that_is_not_known_is_told_with_its_line() -> None:
    path = RECIPES / "ppo_qwen3_8b.yaml"
    parsed, document = read_recipe(
        path, ["critic.model.path=a/critic", "actor.model.path=an/actor"]
    )
    with pytest.raises(UserError) as error:
        show_plan(parsed, document=document)
    actor, critic = error.value.problems
    assert actor.startswith("command line: actor.model.path: an/actor: its shape is not known here")
    assert critic.startswith("command line: critic.model.path: a/critic: its shape")
    text = path.read_text().replace("Qwen/Qwen3-8B", "FacebookAI/roberta-base")
    document = Document.parse(text, "my.yaml")
    with pytest.raises(UserError) as error:
        make_plan(rl_recipe("ppo", "ppo").model_validate(document.values), document)
    line = next(
        i
        for i, line in enumerate(text.splitlines(), 1)
        if line.startswith("  model: {path: FacebookAI")
    )
    assert error.value.problems[0].startswith(
        f"my.yaml:{line}: actor.model.path: FacebookAI/roberta-base: "
    )


@pytest.mark.parametrize(
    "override",
    [
        "generation.kv_cache_gib=1e308",
        "cluster.gpu_memory_gib=1e308",
        "cluster.node_memory_gib=1e308",
    ],
)
def test_a_size_beyond_all_machines_is_one_line(
    override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(RECIPES / "demo_ppo.yaml"), override]) == 2
    told = capsys.readouterr().err
    assert (
        told.startswith(f"error: command line: {override.split('=')[0]}: must be at most")
        and told.count("\n") == 1
    )


# --- the JSON -------------------------------------------------------------------------------------

NAMES = {  # keys that are names, by the path of what holds them
    "models": "ROLE",
    "batch.ranks": "ROLE",
    "changes[]": "KEY",
    "estimated_phases": "PHASE",
    "memory[].phases": "PHASE",
    "memory[].phases.PHASE": "PROCESS",
    "memory[].phases.PHASE.PROCESS": "COMPONENT",
}


def paths(value: Any, name: str = "") -> set[str]:
    """Every place where a value stands."""
    if isinstance(value, list):
        return set[str]().union(*(paths(item, f"{name}[]") for item in value))
    if not isinstance(value, dict):
        return {name}
    return set[str]().union(
        *(paths(v, f"{name}.{NAMES.get(name, k)}".lstrip(".")) for k, v in value.items())
    )


def test_the_documented_keys_are_those_that_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (RECIPES.parents[1] / "docs" / "plan.md").read_text().split("## The JSON")[1]
    documented = re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)
    written: set[str] = set()
    words: set[str] = set()
    for arguments in (["ppo_qwen3_8b.yaml", "actor.ranks=2"], ["demo_rm.yaml"], ["demo_ppo.yaml"]):
        cli.main(
            [
                "plan",
                str(RECIPES / arguments[0]),
                *arguments[1:],
                "--json",
                str(tmp_path / "plan.json"),
            ]
        )
        told = json.loads((tmp_path / "plan.json").read_text())
        written |= paths(told)
        for device in told["memory"]:
            words |= {device["largest_phase"], *device["phases"]}
            words |= {c for held in device["phases"].values() for use in held.values() for c in use}
    assert len(documented) == len(set(documented)) and set(documented) == written
    assert list(dict.fromkeys(re.split(r"[.\[]", name)[0] for name in documented)) == list(told)
    assert all(f"`{word}`" in text for word in words)
    capsys.readouterr()


def test_json_has_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert (
        cli.main(
            ["plan", str(RECIPES / "grpo_qwen3_8b.yaml"), "actor.zero_stage=1", "--json", str(file)]
        )
        == 1
    )
    told: dict[str, Any] = json.loads(file.read_text())
    assert (
        told["fits"] is False and told["problems"] and {"actor.zero_stage": "3"} in told["changes"]
    )
    assert told["models"]["actor"] == {
        "path": "Qwen/Qwen3-8B",
        "dtype": "bfloat16",
        "parameters": 8_190_735_360,
        "trained": 8_190_735_360,
    }
    assert told["models"]["engine"]["trained"] == 0
    assert [(m["node"], m["gpu"]) for m in told["memory"]] == [
        *((0, gpu) for gpu in range(8)),
        (0, None),
    ]
    first = told["memory"][0]
    assert first["phases"]["learn"]["engine[0]"]["weights"] == 2 * 8_190_735_360
    assert first["headroom_bytes"] == first["limit_bytes"] - first["peak_bytes"]
    sender, other = (told["memory"][gpu]["phases"]["sync"][f"actor[{gpu - 4}]"] for gpu in (4, 5))
    assert sender["sync"] > 0 and "sync" not in other
    assert told["placement"][0] == {
        "process": "engine[0]",
        "role": "engine",
        "node": 0,
        "gpus": [0],
    }
    assert sum(p["share"] for p in told["estimated_phases"].values()) == pytest.approx(1)
    capsys.readouterr()


def test_json_that_cannot_be_written_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.main(
            ["plan", str(RECIPES / "demo_sft.yaml"), "--json", str(tmp_path / "no" / "plan.json")]
        )
        == 2
    )
    assert "cannot be written" in capsys.readouterr().err
