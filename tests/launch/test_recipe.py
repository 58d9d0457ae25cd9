"""Recipes: what is read, what is refused, and the words it is refused with."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from actors.roles import roles_of
from actors.run.resume import Resume
from actors.settings import RLRecipe
from launch.recipe.combinations import Recipe
from launch.recipe.document import Document, flat
from launch.recipe.machine import ENCODERS, function_problems, is_local
from launch.recipe.read import KINDS, RecipeError, annotated, load_recipe, read_recipe
from launch.recipe.schema import recipe_keys
from learners.settings import sources_of
from tests.launch.small_recipes import DECODER, REWARD_MODEL, TOKENS, make_model

YESTERDAY = sorted((Path(__file__).parent / "yesterday").glob("*.yaml"))
OLD_SYNC = {"gate": 0.01, "mean_gate": 0.001, "gate_prompts": 4}
NEW_SYNC = {"max_logprob_diff": 0.01, "mean_logprob_diff": 0.001, "agreement_prompts": 4}
SHIPPED = sorted((Path(__file__).parents[2] / "launch" / "recipes").glob("*.yaml"))
LONG = "x" * 300  # longer than any file's name may be
NASTY = [
    "many words " * 12,
    "a\n\nb",
    "\na",
    "a\u2028b",
    "a\x85b",
    "a\tb",
    "\x0c\x7f",
    "\ufeffa",
    "ä😀",
    "a  # b",
    "# a",
    "a: b",
    " a ",
    "on",
    "null",
    "~",
    "",
    "'",
    '"',
    "\\n",
    "- a",
    "*a",
    "!a",
    "[a",
    "|",
    "<<",
    "=",
    "1e5",
    "1.5e5",
    "-.5",
    "08",
    "0x10",
    "1_000",
    ".inf",
    "12:30:00",
    "2026-01-01",
]


LORA = "actor.model.lora.rank=8"


def problems(path: str, *overrides: str, files: bool = True, resume: bool = False) -> list[str]:
    """The problems of a recipe, functions included."""
    try:
        recipe, _ = read_recipe(path, overrides, files=files, resume=Resume() if resume else None)
    except RecipeError as error:
        return error.problems
    return [f"{p.keys[0]}: {p.message}" for p in function_problems(recipe)]


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_recipe_has_no_problems(place: Path, kind: str) -> None:
    assert problems(f"{kind}.yaml") == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_are_sound_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(again) == recipe


def test_overrides_reach_sections_lists_and_keys_nobody_wrote(place: Path) -> None:
    recipe = load_recipe(
        "grpo.yaml",
        [
            "rewards.0.weight=2",
            "actor.optimizer.learning_rate=1e-5",
            "sync.max_logprob_diff=",
            "actor.optimizer.betas=[0.8, 0.9]",
        ],
    )
    assert isinstance(recipe, RLRecipe)
    assert recipe.rewards[0].weight == 2
    assert recipe.actor.optimizer.learning_rate == 1e-5
    assert recipe.sync.max_logprob_diff is None
    assert recipe.actor.optimizer.betas == (0.8, 0.9)


def test_yaml_means_what_it_seems_to_mean(tmp_path: Path, place: Path) -> None:
    """1e-5 is a number; `on`, 08 and a date are texts."""
    recipe = load_recipe(
        "ppo.yaml", ["run.wandb_project=on", "algorithm.kl_beta=1e-5", "prompts.columns.prompt=08"]
    )
    assert isinstance(recipe, RLRecipe)
    (prompts,) = sources_of(recipe.prompts)
    assert (recipe.run.wandb_project, recipe.algorithm.kl_beta, prompts.columns.prompt) == (
        "on",
        1e-5,
        "08",
    )
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe("again.yaml") == recipe


def test_an_override_changes_one_of_two_places_that_share_an_alias(place: Path) -> None:
    text = (
        "kind: rm\nrun: {folder: runs/x}\nlearner: {model: {path: ./decoder}}\ndata: &d "
        "{path: a.jsonl}\nheld_out: *d\n"
    )
    Path("alias.yaml").write_text(text)
    recipe = load_recipe("alias.yaml", ["held_out.path=b.jsonl"])
    assert (recipe.data.path, recipe.held_out.path) == ("a.jsonl", "b.jsonl")  # type: ignore[union-attr]


def test_the_resolved_recipe_says_where_values_come_from(place: Path) -> None:
    recipe, document = read_recipe("ppo.yaml", ["step.steps=7"])
    text = annotated(recipe, document)
    assert "  steps: 7  # command line" in text
    assert "  folder: runs/new  # ppo.yaml:3" in text
    assert "  seed: 0\n" in text
    assert yaml.safe_load(text)["step"]["steps"] == 7


def reads_as_written(recipe: Recipe, document: Document) -> bool:
    """Whether the annotated recipe is the recipe, by YAML 1.1 and by ours."""
    text = annotated(recipe, document)
    return yaml.safe_load(text) == Document.parse(text, "").values == recipe.model_dump(mode="json")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_the_resolved_recipe_of_a_shipped_one_is_that_recipe(path: Path) -> None:
    assert reads_as_written(*read_recipe(path))


@pytest.mark.parametrize("value", NASTY, ids=ascii)
def test_whatever_a_text_holds_the_resolved_recipe_has_it(place: Path, value: str) -> None:
    recipe, document = read_recipe("ppo.yaml", ["run.wandb_project=x", "run.folder=x"])
    run = recipe.run.model_copy(update={"wandb_project": value, "folder": value})
    assert reads_as_written(recipe.model_copy(update={"run": run}), document)


def test_a_tilde_is_the_home_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    paths = ["prompts.path=~/prompts.jsonl", "run.folder=~/new", "actor.model.path=~/decoder"]
    assert problems("ppo.yaml", *paths) == []
    recipe = load_recipe("ppo.yaml", paths)
    assert isinstance(recipe, RLRecipe)
    found = (recipe.prompts.path, recipe.run.folder, recipe.actor.model.path)
    assert found == tuple(str(place / name) for name in ("prompts.jsonl", "new", "decoder"))


def test_every_key_of_every_recipe_is_described() -> None:
    for model in KINDS.values():
        for key in recipe_keys(model()).values():
            assert key.description or key.kind == "section" or key.name.endswith("kind"), key.name


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "a.yaml: a recipe is a list of keys and values, not nothing"),
        ("- 1\n", "a.yaml: a recipe is a list of keys and values, not a list"),
        ("kind: ppo\nrun: {folder: x\n", "a.yaml:3: not valid YAML"),
        ("kind: ppo\nrun: !!python/name:os.system x\n", "a.yaml:2: not valid YAML"),
        ("kind: ppo\nrun: &a [*a]\n", "an alias that contains itself"),
        ("run: {folder: x}\n", "a.yaml: kind: missing; one of sft, rm, ppo, grpo"),
        ("kind: dpo\n", "a.yaml:1: kind: is 'dpo'; a recipe is one of sft, rm, ppo, grpo"),
        ("kind: sft\nkind: sft\n", "a.yaml:2: kind: written twice, first at a.yaml:1"),
        (
            "kind: sft\nrun: {seed: !!int x}\n",
            "a.yaml:2: not valid YAML: 'x' cannot be read as int",
        ),
        ("kind: sft\nrun: " + "[" * 1000, "a.yaml: not valid YAML: nested too deeply"),
        (
            "kind: sft\nrun.seed: 3\n",
            "a.yaml:2: run.seed: a key with dots is for the command line; here write run: {",
        ),
    ],
)
def test_malformed_files(place: Path, text: str, told: str) -> None:
    Path("a.yaml").write_text(text)
    assert told in problems("a.yaml")[0]


def test_files_that_cannot_be_read(place: Path) -> None:
    assert problems("none.yaml") == ["none.yaml: no such recipe file"]
    assert problems(".")[0].startswith(".: cannot be read: ")
    Path("latin.yaml").write_bytes(b"kind: \xff")
    assert problems("latin.yaml") == ["latin.yaml: cannot be read: not UTF-8 text"]


def test_a_recipe_for_another_command(place: Path) -> None:
    with pytest.raises(
        RecipeError, match="this is a recipe for grpo: run quatuor grpo, not quatuor ppo"
    ):
        load_recipe("grpo.yaml", kind="ppo")


# --- keys and types -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("actor.zero_stag=2", "actor.zero_stag: unknown key; did you mean actor.zero_stage?"),
        ("actor.learning_rate=1", "unknown key; did you mean actor.optimizer.learning_rate?"),
        ("actr={}", "actr: unknown key; did you mean actor?"),
        ("rewards.0.wait=2", "rewards.0.wait: unknown key; "),
        ("rewards.3.weight=2", "rewards is a list of 1; its entries are numbered from 0"),
        ("actor.ranks.x=2", "actor.ranks: must be a whole number, not a section"),
        ("run.folder.x=2", "run.folder is 'runs/new' and has no key x"),
        ("folder", "folder: an override reads key.sub=value"),
        ("run.seed=[1", "command line: run.seed: not valid YAML"),
        (
            "run.seed=!!float x",
            "command line: run.seed: not valid YAML: 'x' cannot be read as float",
        ),
        ("run.seed=!!bool x", "'x' cannot be read as bool"),
        ("run.seed=!!timestamp x", "'x' cannot be read as timestamp"),
        (f"run.seed={'9' * 5000}", "cannot be read as int"),
        (f"run.seed=!!int 0x{'9' * 5000}", "cannot be read as int"),
        ('run.folder="\\ud800"', "cannot be read as str"),
        (f"run.seed={'[' * 100}{']' * 100}", "nested too deeply"),
        (f"run.seed={'[' * 1000}", "nested too deeply"),
        ("run.folder=''", "run.folder: must be text, not ''"),
        ("run.seed=x", "run.seed: must be a whole number, not 'x'"),
        ("run.seed=1.5", "run.seed: must be a whole number, not 1.5"),
        ("run.seed=-1", "run.seed: must be at least 0, not -1"),
        ("run.progress=yes", "run.progress: must be true or false, not 'yes'"),
        ("run.folder=3", "run.folder: must be text, not 3"),
        (
            "actor.optimizer=",
            "actor.optimizer: must be a section of keys, not nothing; leave the key out",
        ),
        (
            "actor=",
            "command line: actor: must be a section of keys, not nothing: set actor.model.path",
        ),
        ("step=", "must be a section of keys, not nothing; leave the key out"),
        ("actor.modle.path=x", "command line: actor.modle: unknown key; did you mean actor.model?"),
        ("bogus.key=1", "command line: bogus: unknown key; known here: kind, run, cluster"),
        (
            "reference={model.path: x}",
            "reference.model.path: a key with dots is for the command line; here write",
        ),
        ("actor.optimizer.learning_rate=-1", "must be at least 0, not -1"),
        ("actor.optimizer.learning_rate=.nan", "must be a finite number"),
        ("actor.optimizer.betas=[0.9]", "actor.optimizer.betas"),
        ("actor.optimizer.betas=0.9", "actor.optimizer.betas: must be a list, not 0.9"),
        ("actor.optimizer.betas=[0.9, 1]", "actor.optimizer.betas.1: must be below 1, not 1"),
        ("actor.model.dtype=fp16", "must be 'float32' or 'bfloat16', not 'fp16'"),
        ("actor.zero_stage=4", "must be at most 3, not 4"),
        ("actor.zero_stage=true", "must be a whole number, not true"),
        ("actor.zero_stage=1.0", "must be a whole number, not 1.0"),
        ("generation.kv_cache_gib=1e308", "must be at most 1e+06, not 1e+308"),
        ("cluster.gpu_memory_gib=1e308", "must be at most 1e+06, not 1e+308"),
        ("cluster.node_memory_gib=1e308", "must be at most 1e+06, not 1e+308"),
        ("actor={}", "actor.model: missing: set actor.model.path"),
    ],
)
def test_keys_and_types(place: Path, override: str, told: str) -> None:
    found = problems("grpo.yaml", override, files=False)
    assert len(found) == 1 and told in found[0], found
    assert all(line.startswith(("command line: ", "grpo.yaml:")) for line in found)


def test_problems_name_the_line(place: Path) -> None:
    lines = Path("ppo.yaml").read_text().splitlines()
    number = lines.index("step:") + 2
    lines[number - 1] = lines[number - 1].replace("prompts_per_step", "prompt_per_step")
    Path("ppo.yaml").write_text("\n".join(lines))
    assert problems("ppo.yaml", files=False) == [
        f"ppo.yaml:{number}: step.prompt_per_step: unknown key; did you mean step.prompts_per_step?"
    ]


def test_everything_wrong_is_told_at_once(place: Path) -> None:
    """Keys, types, combinations, files; what follows from a broken key is not told."""
    found = problems(
        "grpo.yaml",
        "actor.zero_stag=3",
        "step.mini_batch_size=many",
        "generation.temperature=0.5",
        "step.group_size=1",
        "evaluation.every_steps=2",
        "prompts.path=./none.jsonl",
    )
    keys = [line.split(": ")[1] for line in found]
    assert sorted(keys) == sorted(
        [
            "actor.zero_stag",
            "step.mini_batch_size",
            "generation.temperature",
            "step.group_size",
            "evaluation.every_steps",
            "prompts.path",
        ]
    )


@pytest.mark.parametrize(
    "wrong", ["rewards.0.function=nocolon", "rewards.0.kind=model", "actor.offload_parameters=true"]
)
def test_an_impossible_section_does_not_hide_the_rest(place: Path, wrong: str) -> None:
    others = [
        "generation.temperature=0.5",
        "step.mini_batch_size=7",
        "run.folder=decoder",
        "prompts.path=./gone",
    ]
    found = problems("grpo.yaml", wrong, *others)
    assert {line.split(": ")[1] for line in found} > {one.split("=")[0] for one in others}, found


def test_a_group_of_one_does_not_hide_the_mini_batch(place: Path) -> None:
    group, batch = problems("grpo.yaml", "step.group_size=1", "step.mini_batch_size=7")
    assert "step.group_size: 1 leaves nothing" in group
    assert "step.mini_batch_size: 7 does not divide prompts_per_step 8 * group_size 8 = 64" in batch


def test_only_what_every_recipe_must_say_is_required() -> None:
    keys = {kind: recipe_keys(model()) for kind, model in KINDS.items()}
    needed = {name for name, key in keys["sft"].items() if key.default == "required"}
    assert needed == {
        *("run", "run.folder", "learner", "learner.model", "learner.model.path"),
        *("data", "data.path"),
    }
    for kind, name, section in (
        ("sft", "held_out.path", "held_out"),
        ("rm", "reward_model.calibration.path", "reward_model.calibration"),
        ("grpo", "reference.model.path", "reference.model"),
        ("ppo", "rewards.N.model.path", "rewards.N.model"),
        ("ppo", "evaluation.test_prompts.path", "evaluation.test_prompts"),
    ):
        assert keys[kind][name].default == f"required in {section}"
    assert (
        keys["rm"]["held_out.path"].default == keys["ppo"]["rewards.N.name"].default == "required"
    )


@pytest.mark.parametrize(
    ("kind", "overrides", "given", "key"),
    [
        ("grpo", ["step.prompts_per_step=9"], "(step.prompts_per_step)", "step.mini_batch_size"),
        ("grpo", ["step={mini_batch_size: 7}"], "", "step.mini_batch_size"),
        ("grpo", ["rewards.00.weight=0"], "", "rewards.0.weight"),
        ("ppo", ["rewards.0.kind=function"], "(rewards.0.kind)", "rewards.0.model"),
        ("sft", ["train.evaluate_every=2", "learner.zero_stage=2"], "", "train.evaluate_every"),
    ],
)
def test_a_problem_the_command_line_brought_is_located_there(
    place: Path, kind: str, overrides: list[str], given: str, key: str
) -> None:
    found = problems(f"{kind}.yaml", *overrides)[0]
    assert found.startswith(f"command line {given}".rstrip() + f": {key}: ")


def test_a_section_begun_on_the_command_line_is_not_to_blame(place: Path) -> None:
    recipe = yaml.safe_load((place / "grpo.yaml").read_text())
    recipe["generation"]["top_p"] = 0.9
    (place / "grpo.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    (found,) = problems("grpo.yaml", "algorithm.kl_beta=0.1")
    assert found.startswith("grpo.yaml:") and ": generation.top_p: " in found


def test_a_misspelt_required_key_is_one_problem(place: Path) -> None:
    Path("sft.yaml").write_text(Path("sft.yaml").read_text().replace("folder:", "foldr:"))
    assert problems("sft.yaml") == ["sft.yaml:3: run.foldr: unknown key; did you mean run.folder?"]


# --- keys that were renamed -----------------------------------------------------------------------


def write_sync(place: Path, sync: dict[str, float]) -> None:
    recipe = yaml.safe_load((place / "grpo.yaml").read_text()) | {"sync": sync}
    (place / "grpo.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


@pytest.mark.parametrize("path", YESTERDAY, ids=lambda p: p.stem)
def test_recipes_of_yesterday_load(path: Path) -> None:
    """The bound on what long_prompts: drop leaves out is new, that reward models are evaluated
    between their steps, and that requests are seeded on GPUs too.
    """
    shipped = load_recipe(Path(__file__).parents[2] / "launch" / "recipes" / path.name)
    bounds = {"prompts.max_dropped": 0.3, "evaluation.prompts.max_dropped": 0.3}
    bounds["generation.seeded"] = True
    if shipped.kind == "rm":
        bounds["train.evaluate_every"] = 0
    said = flat(shipped.model_dump())
    new = [f"{key}={bound}" for key, bound in bounds.items() if said.get(key) == bound]
    assert load_recipe(path, new) == shipped


def test_old_names_mean_the_new_keys(place: Path) -> None:
    """In a recipe, as overrides, and inside a section that is overridden."""
    on_top = [f"sync.{key}={value}" for key, value in OLD_SYNC.items()]
    recipes = [load_recipe("grpo.yaml", on_top), load_recipe("grpo.yaml", [f"sync={OLD_SYNC}"])]
    write_sync(place, OLD_SYNC)
    recipe, document = read_recipe("grpo.yaml")
    assert reads_as_written(recipe, document) and "0.01  # grpo.yaml:" in annotated(
        recipe, document
    )
    write_sync(place, NEW_SYNC)
    assert [recipe, *recipes] == [load_recipe("grpo.yaml")] * 3
    assert recipe.sync.model_dump().items() >= NEW_SYNC.items()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("written", "given"),
    [(OLD_SYNC, "sync.max_logprob_diff"), (NEW_SYNC, "sync.gate"), (OLD_SYNC, "sync.gate")],
)
def test_an_override_replaces_the_value_under_either_name(
    place: Path, written: dict[str, float], given: str
) -> None:
    write_sync(place, written)
    recipe = load_recipe("grpo.yaml", [f"{given}=0.5"])
    assert recipe.sync.max_logprob_diff == 0.5  # type: ignore[union-attr]


def test_both_names_are_one_problem(place: Path) -> None:
    write_sync(place, OLD_SYNC | {"agreement_prompts": 4})
    (found,) = problems("grpo.yaml")
    assert found.startswith("grpo.yaml:") and found.endswith(
        ": sync.gate_prompts: is now sync.agreement_prompts, which is given too; keep one"
    )
    write_sync(place, {})
    (found,) = problems("grpo.yaml", "sync.gate=1", "sync.max_logprob_diff=1")
    assert found.startswith("command line: sync.gate: is now sync.max_logprob_diff, which")


def test_a_problem_names_the_key_as_it_is_written(place: Path) -> None:
    assert problems("grpo.yaml", "sync.gate=-1") == [
        "command line: sync.gate: must be above 0, not -1"
    ]
    write_sync(place, OLD_SYNC | {"gate_prompts": "many"})
    (found,) = problems("grpo.yaml")
    assert found.endswith(": sync.gate_prompts: must be a whole number, not 'many'")


@pytest.mark.parametrize("kind", ["sft", "rm", "ppo", "grpo"])
def test_a_run_saved_by_the_version_before_can_be_resumed(place: Path, kind: str) -> None:
    """Its config.yaml lacks the keys that are new, and has those that were renamed."""
    (place / "runs/new/checkpoints/step-000001").mkdir(parents=True)
    saved = Path(__file__).parent / "yesterday" / "saved" / f"{kind}.yaml"
    (place / "runs/new/config.yaml").write_text(saved.read_text())
    assert problems(f"{kind}.yaml", resume=True) == []
    (changed,) = problems(f"{kind}.yaml", "run.seed=7", resume=True)
    assert "run.seed: is 7, the run to resume has 0" in changed


def test_a_run_saved_with_a_kernel_that_auto_is_not_is_another_run(place: Path) -> None:
    """Gemma-2's `auto` is eager, so one saved with sdpa had other numbers."""
    config = {**DECODER, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    (place / "decoder/config.json").write_text(json.dumps(config))
    (place / "runs/new/checkpoints/step-000001").mkdir(parents=True)
    saved = (Path(__file__).parent / "yesterday" / "saved" / "sft.yaml").read_text()
    (place / "runs/new/config.yaml").write_text(saved)
    (changed,) = problems("sft.yaml", resume=True)
    assert "learner.model.attention: is 'eager', the run to resume has 'sdpa'" in changed
    same = saved.replace("attention: sdpa", "attention: eager")
    (place / "runs/new/config.yaml").write_text(same)
    assert problems("sft.yaml", resume=True) == []


@pytest.mark.parametrize("today", [OLD_SYNC, NEW_SYNC])
def test_a_run_begun_with_the_old_names_can_be_resumed(place: Path, today: dict) -> None:
    write_sync(place, today)
    (place / "runs/new/checkpoints/step-000001").mkdir(parents=True)
    before = load_recipe("grpo.yaml").model_dump(mode="json")
    before["sync"] = {"probe_tokens": 32, **OLD_SYNC, "deadline_s": 600.0}
    (place / "runs/new/config.yaml").write_text(yaml.safe_dump(before))
    assert problems("grpo.yaml", resume=True) == []


OLD_COLUMNS = {
    "sft": {"data": {"prompt_column": "prompt", "response_column": "chosen"}},
    "rm": {"data": {"chosen_column": "chosen"}, "held_out": {"margin_column": None}},
    "grpo": {
        "prompts": {"prompt_column": "prompt"},
        "evaluation": {"prompts": {"prompt_column": "answer"}},
    },
}


@pytest.mark.parametrize("kind", OLD_COLUMNS)
@pytest.mark.parametrize("where", ["file", "command line"])
def test_columns_by_their_old_names(place: Path, kind: str, where: str) -> None:
    """Recipes of earlier versions say data.prompt_column for data.columns.prompt."""
    recipe = yaml.safe_load(Path(f"{kind}.yaml").read_text())
    if kind == "grpo":
        recipe["evaluation"] = {
            "prompts": dict(recipe["prompts"]),
            "function": "rewards_of_test:exact",
        }
    old = flat(OLD_COLUMNS[kind])
    if where == "file":
        for key, column in old.items():
            *above, name = key.split(".")
            section = reduce(dict.__getitem__, above, recipe)
            section[name] = column
            section.pop("columns", None)
    else:
        recipe.get("data", {}).pop("columns", None)
    Path("old.yaml").write_text(yaml.safe_dump(recipe))
    given = [f"{key}={json.dumps(column)}" for key, column in old.items()]
    overrides = given if where == "command line" else []
    read, document = read_recipe("old.yaml", overrides)
    for key, column in old.items():
        section, name = key.removesuffix("_column").rsplit(".", 1)
        assert reduce(getattr, [*section.split("."), "columns", name], read) == column
    assert annotated(read, document).count("_column:") == 0
    (wrong,) = problems("old.yaml", *overrides, f"{key}=8")
    assert wrong == f"command line: {key}: must be text, not 8"


def test_a_column_by_both_names_is_refused(place: Path) -> None:
    text = (
        Path("sft.yaml").read_text() + "held_out:\n  path: pairs.jsonl\n  prompt_column: prompt\n"
    )
    Path("both.yaml").write_text(text + "  columns: {prompt: prompt, response: chosen}\n")
    (found,) = problems("both.yaml")
    assert "held_out.prompt_column: is now held_out.columns.prompt, which is given too" in found
    Path("both.yaml").write_text(text + "  response_column: chosen\n")
    assert problems("both.yaml", "held_out.columns.prompt=prompt") == []


@pytest.mark.parametrize("named", [True, False])
def test_a_run_begun_with_columns_by_their_old_names_can_be_resumed(
    place: Path, named: bool
) -> None:
    """Earlier versions saved every column's name, also that which was taken unless told
    otherwise.
    """
    (place / "runs/new/checkpoints/step-000001").mkdir(parents=True)
    before = load_recipe("rm.yaml").model_dump(mode="json")
    for section in ("data", "held_out"):
        before[section] |= {f"{name}_column": name for name in ("prompt", "chosen", "rejected")}
        before[section] |= {"margin_column": None, "long_prompts": "refuse"}
        for new in ("columns", "long_prompts", "roles", "where"):
            del before[section][new]
    (place / "runs/new/config.yaml").write_text(yaml.safe_dump(before))
    words = ["data.prompt_column=prompt", "held_out.columns.chosen=chosen"] if named else []
    assert problems("rm.yaml", *words, resume=True) == []
    (found,) = problems("rm.yaml", "data.split=test", *words, resume=True)
    assert "data.split: is 'test', the run to resume has 'train'" in found


# --- several sources ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "override", "told"),
    [
        ("sft", "data=[{path: a, foo: 1}]", "data.0.foo: unknown key; known here: path, split,"),
        ("sft", "data=[{path: a, limmit: 1}]", "data.0.limmit: unknown key; did you mean data.0.l"),
        ("sft", "data=[{path: a}, {limit: 1}]", "data.1.path: missing: file, folder, or hub name"),
        ("sft", "data=[{path: a, limit: x}]", "data.0.limit: must be a whole number, not 'x'"),
        ("sft", "data=[{path: a, columns: {promt: x}}]", "data.0.columns.promt: unknown key; did"),
        ("sft", "data=[]", "data: is an empty list: write one section, or a list of them"),
        ("sft", "data=[1]", "data.0: must be a section of keys, not 1"),
        ("sft", "data.foo=1", "data.foo: unknown key"),
        ("sft", "data=x", "data: must be a section of keys, not 'x'"),
        ("rm", "held_out=[{path: a, weight: 0}]", "held_out.0.weight: must be above 0, not 0"),
        ("grpo", "prompts=[{path: a, split: 1}]", "prompts.0.split: must be text, not 1"),
        ("grpo", "evaluation.prompts=[{paht: a}]", "evaluation.prompts.0.paht: unknown key; did y"),
        ("rm", "reward_model.calibration=[{a: b}]", "reward_model.calibration.0.a: unknown key"),
    ],
)
def test_what_is_wrong_in_a_list_of_sources_is_named_by_its_place(
    place: Path, kind: str, override: str, told: str
) -> None:
    found, *more = problems(f"{kind}.yaml", override, files=False)
    assert found.startswith(f"command line: {told}"), found
    assert all("0.path: missing" in line for line in more)


@pytest.mark.parametrize(
    ("kind", "row", "told"),
    [
        ("grpo", {"question": "1+1=", "answer": "2"}, "is read by prompt (or messages): name oth"),
        ("sft", {"prompt": "1+1=", "text": "2"}, "is read by messages (or conversations), or pro"),
        ("rm", {"prompt": "1+1=", "chosen": "2"}, "is read by chosen with rejected"),
        ("sft", {"conversations": []}, ""),
        ("sft", {"prompt": [], "completion": []}, ""),
        ("rm", {"chosen": [], "rejected": []}, ""),
    ],
)
def test_columns_of_json_lines_are_recognised_in_the_first_row(
    place: Path, kind: str, row: dict[str, Any], told: str
) -> None:
    """Tools and system messages may come in later rows; other formats are left to the reading of
    all rows.
    """
    for name in ("rows.jsonl", "rows.csv"):
        Path(name).write_text(json.dumps(row) + "\n")
    for section in ("prompts",) if kind == "grpo" else ("data", "held_out"):
        columns = f"{section}.columns={{tools: functions, system: rules}}"
        found = problems(f"{kind}.yaml", f"{section}={{path: rows.jsonl}}", columns, files=True)
        found = [line for line in found if "cannot be called" not in line]
        if told:
            assert found[0].startswith(f"command line: {section}.path: rows.jsonl: it has the col")
            assert told in found[0]
        assert len(found) == bool(told)
        words = f"{section}={{path: rows.csv}}"
        assert not any("rows.csv" in line for line in problems(f"{kind}.yaml", words))


def test_every_source_of_a_mixture_is_looked_at(place: Path) -> None:
    sources = "data=[{path: pairs.jsonl, columns: {response: chosen}}, {path: no.jsonl}, "
    sources += "{path: pairs.jsonl, columns: {response: better}}]"
    found = problems("sft.yaml", sources)
    assert found == [
        "command line: data.1.path: no.jsonl: no such data file or folder (and no hub name)",
        "command line: data.2.columns.response: pairs.jsonl has no column 'better'; it has prompt, "
        "chosen, rejected",
    ]
    mixed = [
        "prompts=[{path: prompts.jsonl}, {path: prompts.jsonl}]",
        "rewards.0.function=rewards_of_test:exact",
    ]
    (line,) = problems("grpo.yaml", *mixed)
    assert (
        "exact: cannot be called with" in line and "missing a required argument: 'answer'" in line
    )


# --- combinations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "overrides", "told"),
    [
        (
            "grpo",
            ["step.group_size=1"],
            "step.group_size: 1 leaves nothing to compare a response with",
        ),
        (
            "ppo",
            ["step.mini_batch_size=12"],
            "12 does not divide prompts_per_step 8 * group_size 4 = 32; nearest: 8",
        ),
        ("ppo", ["step.mini_batch_size=64"], "nearest: 32"),
        (
            "grpo",
            ["generation.temperature=0.7"],
            "generation.temperature: 0.7 makes groups of near copies",
        ),
        (
            "ppo",
            ["algorithm.kl_target=6", "algorithm.kl_beta=0"],
            "algorithm.kl_target: adapts kl_beta by factors",
        ),
        ("ppo", ["rewards=[]"], "rewards: needs at least one source of scores"),
        ("ppo", ["rewards.0.weight=0"], "every weight is 0"),
        (
            "ppo",
            ["actor.model.attention=flash_attention_2"],
            "flash_attention_2 needs cluster.device cuda",
        ),
        (
            "ppo",
            ["cluster.device=cuda", "critic.model.attention=flash_attention_2"],
            "needs dtype bfloat16",
        ),
        (
            "ppo",
            ["rewards.0.model.lora.rank=8"],
            "rewards.0.model.lora: is for models that are trained (actor.model, critic.model)",
        ),
        (
            "ppo",
            ["actor.model.lora.rank=8", "actor.model.lora.dropout=0.1"],
            "actor.model.lora.dropout: 0.1 makes the policy that is updated another",
        ),
        (
            "ppo",
            ["actor.offload_optimizer=true"],
            "actor.offload_optimizer: needs cluster.device cuda",
        ),
        (
            "ppo",
            ["cluster.device=cuda", "actor.offload_optimizer=true", "actor.zero_stage=0"],
            "needs zero_stage 1, 2",
        ),
        (
            "sft",
            ["learner.model.dtype=bfloat16", "learner.zero_stage=0"],
            "learner.zero_stage: bfloat16 needs",
        ),
        (
            "sft",
            ["cluster.device=cuda", "learner.offload_parameters=true"],
            "offload_parameters: needs zero_stage 3",
        ),
        (
            "grpo",
            ["rewards.0.function=nocolon"],
            "rewards.0.function: must read module:function, not 'nocolon'",
        ),
        (
            "grpo",
            ["rewards.0.function="],
            "rewards.0.function: missing: kind function needs it: set it to module",
        ),
        (
            "ppo",
            ["rewards.0.model="],
            "rewards.0.model: missing: kind model needs it: set rewards.0.model.path",
        ),
        ("ppo", ["rewards.0.function=a:b"], "rewards.0.function: is for kind function, not model"),
        (
            "ppo",
            ["generation.tensor_parallel=2"],
            "generation.tensor_parallel: needs cluster.device cuda",
        ),
        (
            "ppo",
            ["generation.max_model_tokens=16"],
            "leaves no room for a prompt beside max_new_tokens 16",
        ),
        (
            "ppo",
            ["generation.top_p=0.9"],
            "generation.top_p: 0.9 samples from another distribution than the policy",
        ),
        ("grpo", ["generation.top_k=20"], "generation.top_k: 20 samples from another distribution"),
        ("grpo", ["generation.min_p=0.1"], "set algorithm.rollout_correction to weigh the tokens"),
        (
            "grpo",
            ["generation.repetition_penalty=1.1"],
            "generation.repetition_penalty: 1.1 samples from another",
        ),
        (
            "grpo",
            ["generation.presence_penalty=-0.5"],
            "generation.presence_penalty: -0.5 samples from another",
        ),
        (
            "grpo",
            ["generation.frequency_penalty=0.5"],
            "generation.frequency_penalty: 0.5 samples from another",
        ),
        (
            "grpo",
            ["algorithm.old_logprobs=engine", "algorithm.rollout_correction.cap=2"],
            "algorithm.old_logprobs: engine leaves nothing to correct",
        ),
        ("grpo", ["reference.share=true"], "reference.share: needs actor.model.lora"),
        (
            "grpo",
            [LORA, "reference.share=true", "reference.model.path=./decoder"],
            "reference.share: makes the Actor without its adapter the Reference: leave out",
        ),
        ("grpo", ["sync.lora=adapter"], "sync.lora: adapter needs actor.model.lora"),
        (
            "grpo",
            ["actor.model.lora.rank=513", "sync.lora=adapter"],
            "sync.lora: vLLM takes no adapter of rank 513, only up to 512",
        ),
        ("ppo", ["evaluation.every_steps=5"], "evaluation.every_steps: needs held-out prompts"),
        ("ppo", ["evaluation.function=a:b"], "evaluation.function: has nothing to score"),
        ("sft", ["train.evaluate_every=5"], "train.evaluate_every: needs held-out examples"),
    ],
)
def test_combinations(place: Path, kind: str, overrides: list[str], told: str) -> None:
    found = problems(f"{kind}.yaml", *overrides, files=False)
    assert len(found) == 1 and told in found[0], found


@pytest.mark.parametrize(
    ("overrides", "shared"),
    [
        ([LORA], True),
        ([LORA, "reference.share=true"], True),
        ([LORA, "reference.share=false"], False),
        ([LORA, "reference.model.path=./decoder"], False),
        ([], False),
        (["reference.share=false"], False),
    ],
)
def test_who_is_the_reference(place: Path, overrides: list[str], shared: bool) -> None:
    recipe = load_recipe("grpo.yaml", ["algorithm.kl_beta=0.1", *overrides])
    assert isinstance(recipe, RLRecipe)
    assert recipe.shares_reference is shared
    assert ("reference" in roles_of(recipe)) is not shared
    without = load_recipe("grpo.yaml", ["algorithm.kl_beta=0", *overrides])
    assert isinstance(without, RLRecipe)
    assert not without.shares_reference and "reference" not in roles_of(without)


def test_what_is_frozen_has_a_fingerprint(place: Path) -> None:
    roles = roles_of(load_recipe("ppo.yaml", [LORA]))
    assert {name: role.fingerprint for name, role in roles.items()} == {
        "engine": "",
        "actor": "base_fingerprint",
        "critic": "",
        "reward rm": "fingerprint",
    }


def mixture(*sources: str) -> str:
    return f"[{', '.join(sources)}]"


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ("name: b", "name: b", "prompts.1.name: 'b' is the name of prompts.0 too"),
        ("name: '1'", "limit: 2", "prompts.1.name: '1' is the name of prompts.0 too"),
        ("name: ' '", "limit: 2", "prompts.0.name: is empty"),
        ("weight: 2", "limit: 2", "prompts.1.weight: missing: give every source"),
    ],
)
def test_sources_of_a_mixture_have_names_of_their_own_and_all_a_weight_or_none(
    place: Path, first: str, second: str, told: str
) -> None:
    sources = mixture(f"{{path: a.jsonl, {first}}}", f"{{path: b.jsonl, {second}}}")
    found = problems("grpo.yaml", f"prompts={sources}", files=False)
    assert len(found) == 1 and told in found[0], found


def test_weights_are_for_training(place: Path) -> None:
    weighed = mixture("{path: a.jsonl, weight: 2}", "{path: b.jsonl, weight: 1}")
    (line,) = problems("rm.yaml", f"held_out={weighed}", files=False)
    assert "held_out.0.weight: is for training data; of held_out every row is used" in line
    assert not problems("rm.yaml", f"data={weighed}", files=False)


def test_distorted_sampling_is_accepted_where_its_tokens_are_weighed(place: Path) -> None:
    recipe = load_recipe(
        "grpo.yaml", ["generation.top_p=0.9", "algorithm.rollout_correction.kind=token_truncate"]
    )
    assert isinstance(recipe, RLRecipe)
    assert (
        recipe.generation.off_policy_sampling == {"top_p": 0.9}
        and recipe.generation.on_policy().off_policy_sampling == {}
    )


def test_reward_names_are_unique(place: Path) -> None:
    source = '{name: a, kind: function, function: "m:f"}'
    found = problems("grpo.yaml", f"rewards=[{source}, {source}]", files=False)
    assert found == [
        "command line: rewards.1.name: 'a' names 2 sources; each needs a name of its own"
    ]


# --- files ----------------------------------------------------------------------------------------


def test_linear_attention_on_cpus_needs_bfloat16(place: Path) -> None:
    """vLLM has its kernel for 16 bit alone, and says so with an assertion at the first prompt."""
    config = {**DECODER, "model_type": "qwen3_next"}
    (place / "decoder" / "config.json").write_text(json.dumps(config))
    (found,) = problems("grpo.yaml")
    assert "actor.model.dtype: ./decoder: on CPUs vLLM computes the linear attention" in found
    assert not [p for p in problems("grpo.yaml", "actor.model.dtype=bfloat16") if "linear" in p]
    assert problems("sft.yaml") == []


@pytest.mark.parametrize(
    ("kind", "override", "told"),
    [
        ("ppo", "actor.model.path=./none", "./none: no such model folder"),
        ("ppo", "actor.model.path=prompts.jsonl", "is a file, not a model folder"),
        ("ppo", "actor.model.path=.", "config.json is missing: not a Hugging Face model"),
        ("ppo", "actor.model.path=./encoder", "BertForMaskedLM has no language-model head"),
        ("ppo", "critic.model.path=./encoder", "is an encoder (bert)"),
        ("ppo", "rewards.0.model.path=./decoder", "has no score head: Qwen3ForCausalLM"),
        (
            "ppo",
            "generation.max_new_tokens=64",
            "64 leaves no room for a prompt in the model's 64 positions",
        ),
        (
            "ppo",
            "generation.max_model_tokens=65",
            "generation.max_model_tokens: 65 is more than the model's 64 positions",
        ),
        ("ppo", "prompts.path=./none.jsonl", "./none.jsonl: no such data file"),
        (
            "ppo",
            "prompts.columns.prompt=promt",
            "prompts.jsonl has no column 'promt'; did you mean 'prompt'?",
        ),
        (
            "ppo",
            "prompts.prompt_column=promt",
            "prompts.prompt_column: prompts.jsonl has no column 'promt'; did you mean 'prompt'?",
        ),
        (
            "ppo",
            "prompts.answer_columns=[solution]",
            "prompts.answer_columns.0: prompts.jsonl has no column 'solution'",
        ),
        (
            "rm",
            "data.columns.chosen=better",
            "data.columns.chosen: pairs.jsonl has no column 'better'; it has prompt,",
        ),
        (
            "rm",
            "held_out.columns.margin=margin",
            "held_out.columns.margin: pairs.jsonl has no column 'margin'",
        ),
        ("sft", "run.folder=decoder", "run.folder: decoder exists"),
        ("sft", "run.folder=pairs.jsonl/run", "is a file"),
        ("sft", f"run.folder={LONG}", "cannot be made"),
        ("sft", f"run.folder=runs/{LONG}", "File name too long"),
        ("sft", 'run.folder="a\\0b"', "null byte"),
        ("sft", f"learner.model.path={LONG}", "no such model folder"),
        ("sft", f"data.path={LONG}", "no such data file"),
        ("sft", "data.path=rewards_of_test.py", "must be one of .jsonl, .json, .csv, "),
        ("sft", "data.path=empty", "the folder holds no .jsonl, .json, .csv, "),
        ("sft", "data.path=empty.parquet", "the file is empty"),
    ],
)
def test_files(place: Path, kind: str, override: str, told: str) -> None:
    Path("empty").mkdir()
    Path("empty.parquet").touch()
    before = sorted(place.rglob("*"))
    found = problems(f"{kind}.yaml", override)
    assert any(told in line for line in found), found
    assert sorted(place.rglob("*")) == before


def test_sampling_defaults_that_came_with_the_model_are_refused(place: Path) -> None:
    defaults = {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": None,
        "repetition_penalty": 1.0,
        "eos_token_id": 2,
    }
    Path("decoder/generation_config.json").write_text(json.dumps(defaults))
    (found,) = problems("grpo.yaml")
    assert (
        "actor.model.path: decoder: generation_config.json asks for top_p 0.95, which would break"
        in found
    )
    assert "generation.model_sampling: ignore" in found
    assert problems("grpo.yaml", "generation.model_sampling=ignore") == []


def test_broken_files(place: Path) -> None:
    for text, told in [
        ("", "the file is empty"),
        ("\n", "has no rows"),
        ("not json\n", "data.jsonl:1: not a line of JSON"),
        ("3\n", "not a row"),
    ]:
        Path("data.jsonl").write_text(text)
        assert told in problems("grpo.yaml", "prompts.path=data.jsonl")[0]
    Path("decoder/config.json").write_text("{")
    assert "config.json is not valid JSON" in problems("grpo.yaml")[0]
    make_model(place / "bare", DECODER)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (place / "bare" / file).unlink()
    assert "has no tokenizer" in problems("grpo.yaml", "actor.model.path=./bare")[0]


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({}, {**TOKENS, "pad_token": "<eos>"}),
        ({"pad_token_id": 2, "eos_token_id": [1, 2]}, {}),
        ({}, {"eos_token": "<eos>"}),
    ],
)
def test_no_pad_is_in_the_way_of_a_reward_model(place: Path, config: dict, tokens: dict) -> None:
    """One is chosen when the data are read."""
    make_model(place / "base", {**DECODER, **config}, tokens)
    assert problems("rm.yaml", "learner.model.path=./base") == []


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "ctrl", "architectures": ["CTRLLMHeadModel"]}, "ctrl has no head named"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5 is an encoder-decoder"),
    ],
)
def test_models_whose_score_cannot_be_read(place: Path, config: dict, told: str) -> None:
    make_model(place / "base", {**DECODER, **config})
    assert told in problems("rm.yaml", "learner.model.path=./base")[0]
    scorer = {**REWARD_MODEL, **config, "architectures": ["SomeForSequenceClassification"]}
    make_model(place / "scorer", scorer)
    found = problems("ppo.yaml", "rewards.0.model.path=./scorer", "critic.model.path=./scorer")
    assert len(found) == 2 and all(told in line for line in found)
    if "is_encoder_decoder" in config:
        make_model(place / "half", {**DECODER, **config})
        assert told in problems("ppo.yaml", "critic.model.path=./half")[0]


def test_encoders_known_by_json_are_encoders_when_they_are_loaded() -> None:
    from learners.checkpoints import is_encoder

    assert all(is_encoder(SimpleNamespace(model_type=kind)) for kind in ENCODERS)


def test_two_labels_are_not_a_score(place: Path) -> None:
    config = {**DECODER, "architectures": ["Qwen3ForSequenceClassification"]}
    make_model(place / "two", config)
    assert "has 2 labels" in problems("ppo.yaml", "rewards.0.model.path=./two")[0]
    assert "has 2 labels" in problems("ppo.yaml", "critic.model.path=./two")[0]
    assert "has 2 labels" in problems("rm.yaml", "learner.model.path=./two")[0]


def test_resume_needs_a_run_with_checkpoints(place: Path) -> None:
    assert problems("sft.yaml", resume=True) == [
        "sft.yaml:3: run.folder: runs/new does not exist: nothing to resume"
    ]
    (place / "runs/new/checkpoints/step-000002.tmp").mkdir(parents=True)
    assert "holds no checkpoint" in problems("sft.yaml", resume=True)[0]
    (place / "runs/new/checkpoints/step-000002.bak").mkdir()
    assert "holds no checkpoint" in problems("sft.yaml", resume=True)[0]
    (place / "runs/new/checkpoints/step-000001").mkdir()
    (place / "runs/new/config.yaml").write_text(load_recipe("sft.yaml").to_yaml())
    assert problems("sft.yaml", resume=True) == []


def test_resume_needs_the_recipe_of_the_run(place: Path) -> None:
    (place / "runs/new/checkpoints/step-000001").mkdir(parents=True)
    assert problems("sft.yaml", resume=True) == [
        "sft.yaml:3: run.folder: runs/new/config.yaml is missing, so nobody can tell whether the "
        "recipe is still the run's: put it back, or choose another folder"
    ]


@pytest.mark.parametrize("before", [b"a: [", b"\xff", b"", b"- 1\n"])
def test_resume_needs_a_recipe_to_compare_with(place: Path, before: bytes) -> None:
    (place / "runs/new/checkpoints/step-000001").mkdir(parents=True)
    (place / "runs/new/config.yaml").write_bytes(before)
    (found,) = problems("sft.yaml", resume=True)
    assert (
        found.startswith("sft.yaml:3: run.folder: runs/new/config.yaml")
        and "must say what it was" in found
    )


@pytest.mark.parametrize("kind", ["sft", "rm", "ppo", "grpo"])
@pytest.mark.parametrize(
    ("written", "told"),
    [
        ({"architectures": 3}, "config.json: architectures must be a list, not 3"),
        ({"model_type": ["qwen3"]}, "config.json: model_type must be text, not a list"),
        ({"id2label": 1}, "config.json: id2label must be a section, not 1"),
        (
            {"max_position_embeddings": "64"},
            "config.json: max_position_embeddings must be a whole number, not '64'",
        ),
    ],
)
def test_models_that_say_what_no_model_says(
    place: Path, kind: str, written: dict[str, object], told: str
) -> None:
    (place / "decoder/config.json").write_text(json.dumps(DECODER | written))
    (found,) = problems(f"{kind}.yaml")
    assert told in found


def test_more_gpus_than_the_cluster_has(place: Path) -> None:
    many = ["cluster.device=cuda", "generation.engines=12"]
    (found,) = problems("grpo.yaml", *many)
    assert (
        "cluster.nodes: 13 GPUs are needed, the cluster has 1 x 8: ask for 2 nodes, or join"
        in found
    )
    (found,) = problems(
        "grpo.yaml", "cluster.device=cuda", "cluster.nodes=4", "generation.tensor_parallel=16"
    )
    told = (
        "17 GPUs are needed, the cluster has 4 x 8: 16 of them must be on one node: raise cluster"
    )
    assert told in found
    assert problems("grpo.yaml", *many, "cluster.nodes=2") == []
    assert problems("grpo.yaml", *many, "cluster.address=auto") == []  # Ray knows what that has


def test_local_paths_and_hub_names(place: Path) -> None:
    assert all(
        is_local(path) for path in ("./a", "/a/b", "../a", "a", "a/b/c", "decoder", "decoder/x")
    )
    assert not any(is_local(path) for path in ("Qwen/Qwen3-8B", "OpenRLHF/prompt-collection-v0.1"))


# --- functions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_such_module_of_test:f", "No module named 'no_such_module_of_test'"),
        ("rewards_of_test:nothing", "no attribute 'nothing'"),
        ("rewards_of_test:number", "is a int, not a function"),
        ("broken_of_test:f", "ZeroDivisionError"),
        ("rewards_of_test:needs_more", "missing a required argument: 'difficulty'"),
    ],
)
def test_reward_functions(place: Path, name: str, told: str) -> None:
    (found,) = problems("grpo.yaml", f"rewards.0.function={name}")
    assert told in found and "\n" not in found


def test_rewards_that_judge_the_evaluation_need_its_columns(place: Path) -> None:
    """Without a function of its own, the evaluation is scored by the rewards."""
    held_out = "evaluation.prompts={path: prompts.jsonl, answer_columns: [answer]}"
    assert not problems("grpo.yaml", held_out)
    (found,) = problems("grpo.yaml", "evaluation.prompts.path=prompts.jsonl")
    assert found.startswith("rewards.0.function: ") and "'answer'" in found
    assert "see answer_columns of prompts and of the evaluation's prompts" in found


def test_reasoning_gym_rows_are_scored_by_the_package(tmp_path: Path) -> None:
    from launch.tasks.reasoning_gym import rows, score

    found = list(rows("gcd", 3, seed=0))
    assert [row["prompt"][0]["role"] for row in found] == ["system"] * 3
    answers = [f"so <answer>{json.loads(row['entry'])['answer']}</answer>" for row in found]
    assert score([""] * 3, answers, entry=[row["entry"] for row in found]) == [1, 1, 1]
    assert score(
        [""] * 3, ["", "7", "<answer>no</answer>"], entry=[row["entry"] for row in found]
    ) == [0, 0, 0]
    assert not {row["entry"] for row in found} & {row["entry"] for row in rows("gcd", 3, seed=1)}
    # it comes without an answer, so nothing could be rewarded
    assert list(rows("boxnet", 1, seed=0)) == []


def test_a_resumed_recipe_may_spell_out_what_lora_takes_by_default(place: Path) -> None:
    """Its alpha, and whose base is the Reference."""
    (place / "runs/new/checkpoints/step-000001").mkdir(parents=True)
    given = ["actor.model.lora.rank=4"]
    recipe = load_recipe("grpo.yaml", given, "grpo")
    (place / "runs/new/config.yaml").write_text(recipe.to_yaml())
    same = [*given, "actor.model.lora.alpha=8", "reference.share=true"]
    assert problems("grpo.yaml", *same, resume=True) == []
    (changed,) = problems("grpo.yaml", *given, "actor.model.lora.alpha=4", resume=True)
    assert "actor.model.lora.alpha: is 4.0, the run to resume has 8.0" in changed
