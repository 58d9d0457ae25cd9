"""A recipe against this machine: GPUs, the run folder, models' JSON files, data columns, reward
functions.

Small files alone are read, and nothing heavy is imported, except by `code_problems`.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from actors.engine.limits import engine_problem, sync_problem
from actors.run.resume import Resume
from actors.run.trial import no_new_folder
from actors.settings import (
    Recipe,
    RLRecipe,
    RMRecipe,
    model_sampling_problems,
    position_problems,
)
from launch.recipe.combinations import OWN_COLUMNS, data_of, lacking_gpus, models_of
from launch.recipe.document import in_words
from launch.recipe.resumed import no_run_to_resume, resume_problems
from launch.recipe.served import no_adapters, not_served
from learners.calibration import calibration_problem
from learners.data.files import DataFiles, find_files, format_of, json_lines, read_json
from learners.data.shapes import BESIDE, recognised
from learners.errors import Problem, UserError, first_wrong
from learners.kernels import attention_notice, refused_attention
from learners.positions import positions_of
from learners.scorers import unreadable_head
from learners.settings import ModelSettings, PairData, PromptData, SFTData, sources_of

Data = PromptData | SFTData | PairData

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
)
ENCODERS = frozenset(
    (
        "albert",
        "bert",
        "camembert",
        "convbert",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "ernie",
        "eurobert",
        "longformer",
        "modernbert",
        "mpnet",
        "nomic_bert",
        "roberta",
        "xlm-roberta",
        "xlm-roberta-xl",
    )
)


def file_problems(recipe: Recipe, resume: Resume | None = None) -> Iterator[Problem]:
    """Yield what is wrong with GPUs, the run folder, models' JSON files and data columns, as far as
    they are on this machine.

    A cluster that is joined is asked for its GPUs once it answers.
    """
    if not recipe.cluster.address and (lacking := lacking_gpus(recipe)):
        keys = ("cluster.nodes", "cluster.gpus_per_node", "cluster.device", "cluster.placement")
        yield Problem(keys, f"{lacking}, or join a cluster that has them with cluster.address")
    folder = recipe.run.folder
    if wrong := no_run_to_resume(folder) if resume else no_new_folder(Path(folder)):
        yield Problem(("run.folder",), f"{folder} {wrong}")
    elif resume:
        yield from resume_problems(recipe, resume)
    for key, model in models_of(recipe).items():
        if is_local(model.path):
            yield from _model_folder(key, model, recipe)
    for key, data in data_of(recipe):
        if is_local(data.path):
            yield from _data_file(key, data)


def kernel_notices(recipe: Recipe) -> Iterator[str]:
    """Yield a line for every model in a folder for which `auto` is another kernel than usual."""
    for key, model in models_of(recipe).items():
        config = read_json(Path(model.path) / "config.json")
        if config is not None and (line := attention_notice(key, model, config)):
            yield line


def is_local(path: str) -> bool:
    """Tell whether a path means this machine's disk: it exists, or cannot be a hub's
    `organisation/name`.
    """
    if os.path.exists(path) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        return True
    return os.path.isdir(os.path.dirname(path))


def _model_folder(key: str, model: ModelSettings, recipe: Recipe) -> Iterator[Problem]:
    """Yield what keeps a model folder from its role, by its JSON files alone."""
    path = model.path
    folder = Path(path)
    config = read_json(folder / "config.json")
    if config is None:
        wrong = first_wrong(
            (not os.path.exists(path), "no such model folder (and no hub name)"),
            (not os.path.isdir(path), "is a file, not a model folder"),
            (os.path.exists(folder / "config.json"), "config.json is not valid JSON"),
            (True, "config.json is missing: not a Hugging Face model"),
        )
        yield Problem((f"{key}.path",), f"{path}: {wrong}")
        return
    malformed = list(_malformed(config))
    needs_none = key.startswith(("critic", "reference"))
    bare = not needs_none and not any((folder / name).exists() for name in TOKENIZER_FILES)
    no_tokenizer = f"has no tokenizer ({TOKENIZER_FILES[0]} and the like)" if bare else ""
    for wrong in [no_tokenizer, *(malformed or [_unfit(key, config, recipe)])]:
        if wrong:
            yield Problem((f"{key}.path",), f"{path}: {wrong}")
    if wrong := refused_attention(model, config):
        yield Problem((f"{key}.attention", f"{key}.path"), f"{path}: {wrong}")
    if isinstance(recipe, RLRecipe) and not malformed and not key.startswith("rewards"):
        yield from position_problems(key, positions_of(config), recipe.generation)
    if isinstance(recipe, RLRecipe) and key == "actor.model" and not malformed:
        if wrong := not_served(config):
            yield Problem((f"{key}.path",), f"{path}: {wrong}")
        if wrong := sync_problem(config):
            yield Problem(("actor.model.path",), f"{path}: {wrong}")
        if wrong := engine_problem(config, model.dtype, recipe.cluster.device):
            yield Problem(("actor.model.dtype", "actor.model.path"), f"{path}: {wrong}")
        if recipe.sync.lora == "adapter" and (wrong := no_adapters(config)):
            yield Problem(("sync.lora", "actor.model.path"), f"{path}: {wrong}")
        defaults = read_json(folder / "generation_config.json") or {}
        yield from model_sampling_problems(str(folder), defaults, recipe.generation)


def _malformed(config: dict[str, Any]) -> Iterator[str]:
    """Yield what is read here and is not what Transformers writes."""
    written = (
        ("architectures", list, "a list"),
        ("model_type", str, "text"),
        ("id2label", dict, "a section"),
        ("max_position_embeddings", int, "a whole number"),
    )
    for name, kind, what in written:
        value = config.get(name)
        if value is not None and not isinstance(value, kind):
            yield f"config.json: {name} must be {what}, not {in_words(value)}"


def _unfit(key: str, config: dict[str, Any], recipe: Recipe) -> str:
    """Return what keeps a checkpoint from playing its role; nothing where none is known."""
    name = str((config.get("architectures") or [""])[0])
    kind = config.get("model_type") or name
    causal = name.endswith(("ForCausalLM", "LMHeadModel"))
    scorer = name.endswith("ForSequenceClassification")
    reads_tokens = causal or scorer or name.endswith("ForTokenClassification")
    # a config.json leaves the usual two labels unwritten
    labels = len(config.get("id2label") or range(2))
    reward = key.startswith("rewards")
    critic = key == "critic.model"
    trains_scores = isinstance(recipe, RMRecipe)  # any backbone may get a score head
    policy = not (reward or critic or trains_scores)
    encoder = _is_encoder(config)
    mean = config.get("score_mean", 0.0)
    uncalibrated = calibration_problem(mean, config.get("score_std", 1.0))
    unreadable = unreadable_head(config)
    two_parts = config.get("is_encoder_decoder") is True
    return first_wrong(
        (
            reward and not scorer,
            f"has no score head: {name or 'it'} is not a ...ForSequenceClassification; train one "
            "with quatuor rm",
        ),
        (
            scorer and not policy and labels != 1,
            f"has {labels} labels; a reward model gives one score",
        ),
        (
            critic and encoder,
            f"is an encoder ({kind}); a critic reads the Actor's tokens one by one: use a decoder",
        ),
        (
            critic and name and not reads_tokens,
            f"{name} cannot become a critic; start from a reward model or an SFT model",
        ),
        (
            policy and name and not causal,
            f"{name} has no language-model head; a ...ForCausalLM is needed",
        ),
        (unreadable and not policy and (trains_scores or scorer or two_parts), unreadable),
        ((reward or critic) and uncalibrated, f"config.json: {uncalibrated}"),
    )


def _is_encoder(config: dict[str, Any]) -> bool:
    """Tell whether a config.json is a BERT-style model's, as far as that shows without
    Transformers, which `learners.checkpoints.is_encoder` asks when the model is loaded.
    """
    masked = any(str(name).endswith("ForMaskedLM") for name in config.get("architectures") or ())
    return (masked or config.get("model_type") in ENCODERS) and not config.get("is_decoder", False)


def _data_file(key: str, data: Data) -> Iterator[Problem]:
    """Yield what is wrong with the files of a data set: there are none, it would have to be guessed
    which are meant, their format is not read or, where they hold JSON lines, their first rows lack
    a column or have a shape that nobody knows.
    """
    named = (f"{key}.path",)
    if not os.path.lexists(data.path):
        yield Problem(named, f"{data.path}: no such data file or folder (and no hub name)")
        return
    try:
        files = find_files(data.path, data.split)
        rows = _first_rows(files) if files and data.field is None else {}
    except UserError as error:
        yield Problem(named, error.problems[0])
        return
    lacking = list(_lacking(key, data, rows))
    yield from lacking
    beside = [column for name, column in data.columns if name in BESIDE and column]
    for file, row in rows.items() if not lacking else ():
        try:
            recognised(data.model_copy(update={"path": file}), [*row, *beside])
        except UserError as error:
            yield Problem((*named, f"{key}.columns"), error.problems[0])
            break


def _first_rows(files: DataFiles) -> dict[str, dict[str, Any]]:
    """Return the first row of every file of JSON lines. Raises UserError on what is none."""
    lines = [file for file in files.all if format_of(file) == "json"]
    first = {file: next(json_lines(file, empty=bool(files.folder)), None) for file in lines}
    return {file: numbered[1] for file, numbered in first.items() if numbered}


def _lacking(key: str, data: Data, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    """Yield a problem for every column that the recipe names and a file's first row has not."""
    for name, column in _columns(key, data):
        for file, row in rows.items():
            if column not in row:
                close = difflib.get_close_matches(column, row, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(row)}"
                keys = (name, f"{key}.path")
                yield Problem(keys, f"{file} has no column {column!r}; {hint}")
                break


def _columns(key: str, data: Data) -> Iterator[tuple[str, str]]:
    """Yield the columns that every row of a data set must have, each with the key that names it.
    Tools and system messages are left out: JSON lines write them only where there are some.
    """
    for name, column in data.columns:
        if column is not None and name not in BESIDE:
            yield f"{key}.columns.{name}", column
    for i, column in enumerate(getattr(data, "answer_columns", ())):
        yield f"{key}.answer_columns.{i}", column


# --- functions ------------------------------------------------------------------------------------


def code_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield what is wrong with code that is not ours: the recipe's functions, and models that bring
    some unasked.
    """
    for key, model in models_of(recipe).items():
        if not model.trust_remote_code and brings_code(Path(model.path)):
            from learners.checkpoints import OWN_CODE, needs_own_code

            if needs_own_code(model):
                message = f"{model.path} {OWN_CODE}; set {key}.trust_remote_code: true to run it"
                yield Problem((f"{key}.path", f"{key}.trust_remote_code"), message)
    yield from function_problems(recipe)


def brings_code(folder: Path) -> bool:
    """Tell whether a model's or its tokenizer's JSON files name classes that lie beside them. It
    may still do without, where Transformers has classes for it too.
    """
    names = ("config.json", "tokenizer_config.json")
    return any("auto_map" in (read_json(folder / name) or {}) for name in names)


def function_problems(recipe: Recipe) -> Iterator[Problem]:
    """Import the recipe's Python functions, as the workers will, and yield what is wrong with them.
    User code may import anything, so this comes last.
    """
    from actors.functions import load_function

    for key, name, columns in _functions(recipe):
        try:
            _check_signature(name, load_function(name), columns)
        except UserError as error:
            yield Problem((key,), error.problems[0])


def _functions(recipe: Recipe) -> Iterator[tuple[str, str, set[str]]]:
    """Yield key, module:function and the columns it will be offered."""
    if not isinstance(recipe, RLRecipe):
        return
    for i, reward in enumerate(recipe.rewards):
        if reward.function is not None:
            yield f"rewards.{i}.function", reward.function, _answer_columns(recipe.prompts)
    evaluation = recipe.evaluation
    scored = [d for d in (evaluation.prompts, evaluation.test_prompts) if d is not None]
    if not scored:
        return
    columns = set.intersection(*map(_answer_columns, scored))
    if evaluation.function is not None:
        yield "evaluation.function", evaluation.function, columns
        return
    for i, reward in enumerate(recipe.rewards):  # which then judge the evaluation
        if reward.function is not None:
            yield f"rewards.{i}.function", reward.function, columns


def _answer_columns(data: PromptData | tuple[PromptData, ...]) -> set[str]:
    """Return the columns that functions are offered: of a mixture those of every source, which are
    None in the rows of the others.
    """
    return {column for source in sources_of(data) for column in source.answer_columns}


def _check_signature(name: str, function: Any, columns: set[str]) -> None:
    """Raise UserError unless function(prompts, responses, **columns) can be called."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built-in functions have none to look at
        return
    offered = columns.union(OWN_COLUMNS).difference(("prompts", "responses"))
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    given: dict[str, Any] = {n: [] for n in offered if takes_all or n in signature.parameters}
    try:
        signature.bind([], [], **given)
    except TypeError as error:
        have = ", ".join(sorted(offered))
        raise UserError(
            f"{name}: cannot be called with prompts, responses and the columns {have}: {error}; "
            "see answer_columns of prompts and of the evaluation's prompts"
        ) from None
