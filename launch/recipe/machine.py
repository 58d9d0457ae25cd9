"""A recipe against this machine: GPUs, the run folder, models' JSON files, data columns, reward
functions.

Small files alone are read, and nothing heavy is imported, except by `code_problems`.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from actors.run.folder import finished_checkpoints
from actors.settings import Recipe, RLRecipe, RMRecipe, model_sampling_problem
from launch.recipe.combinations import lacking_gpus, models_of
from launch.recipe.document import Document, in_words
from learners.errors import Problem, UserError
from learners.rows import check_path
from learners.settings import PairData, PromptData, SFTData

Data = PromptData | SFTData | PairData

# What a resumed run may be given anew: how long it goes on, where it runs, what it shows and when
# it complains.
MAY_CHANGE = (
    "run.checkpoint",
    "run.keep",
    "run.samples",
    "run.tensorboard",
    "run.wandb",
    "run.progress",
    "run.max_skipped",
    "run.folder",
    "step.steps",
    "train.steps",
    "train.epochs",
    "train.evaluate",
    "cluster.",
    "alarms.",
    "evaluation.",
    "generation.threads",
    "generation.max_concurrent",
    "generation.kv_cache",
    "generation.gpu_memory",
    "sync.",
)
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


def file_problems(recipe: Recipe, resume: bool = False) -> Iterator[Problem]:
    """GPUs, the run folder, models' JSON files and data columns, as far as they are on this
    machine.

    A cluster that is joined is asked for its GPUs once it answers.
    """
    if not recipe.cluster.address and (lacking := lacking_gpus(recipe)):
        keys = ("cluster.nodes", "cluster.gpus_per_node", "cluster.device", "cluster.placement")
        yield Problem(keys, f"{lacking}, or join a cluster that has them with cluster.address")
    unfit = list(_run_folder(recipe.run.folder, resume))
    yield from unfit or (_changed(recipe) if resume else ())
    for key, model in models_of(recipe).items():
        if is_local(model.path):
            yield from _model_folder(key, model.path, recipe)
    for key, data in _data(recipe):
        if is_local(data.path):
            yield from _data_file(key, data)


def is_local(path: str) -> bool:
    """Whether a path means this machine's disk: it exists, or cannot be a hub's
    `organisation/name`.
    """
    if os.path.exists(path) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        return True
    return os.path.isdir(os.path.dirname(path))


def is_encoder(config: dict[str, Any]) -> bool:
    """Whether a config.json is a BERT-style model's, as far as can be told without Transformers."""
    masked = any(str(name).endswith("ForMaskedLM") for name in config.get("architectures") or ())
    return (masked or config.get("model_type") in ENCODERS) and not config.get("is_decoder", False)


def _run_folder(folder: str, resume: bool) -> Iterator[Problem]:
    path = Path(os.path.abspath(folder))
    if resume:
        if not os.path.isdir(path):
            yield Problem(("run.folder",), f"{folder} does not exist: nothing to resume")
        elif not finished_checkpoints(path):
            yield Problem(
                ("run.folder",),
                f"{folder} holds no checkpoint to resume from (run.checkpoint_every_steps)",
            )
        return
    if os.path.exists(path):
        yield Problem(
            ("run.folder",),
            f"{folder} exists; choose another folder, or --resume to go on with that run",
        )
        return
    above = next(parent for parent in path.parents if os.path.exists(parent))
    if not above.is_dir():
        yield Problem(("run.folder",), f"{folder} cannot be made: {above} is a file")
        return
    # permissions alone do not tell: the disk may be read-only, the user root, or the name too long
    try:
        with tempfile.TemporaryDirectory(dir=above) as trial:
            Path(trial, path.relative_to(above)).mkdir(parents=True)
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or error
        yield Problem(("run.folder",), f"{folder} cannot be made: {above}: {what}")


def _changed(recipe: Recipe) -> Iterator[Problem]:
    """A resumed run goes on as if it had never stopped: what decides its numbers must be what it
    was.
    """
    before = Path(recipe.run.folder) / "config.yaml"
    if not os.path.isfile(before):
        message = (
            f"{before} is missing, so nobody can tell whether the recipe is still the run's: put "
            "it back, or choose another folder"
        )
        yield Problem(("run.folder",), message)
        return
    try:
        old = flat(Document.read(before).values)
        new = flat(recipe.model_dump(mode="json"))
    except UserError as error:
        yield Problem(
            ("run.folder",), f"{error.problems[0]}; the run to resume must say what it was"
        )
        return
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE):
            message = (
                f"is {in_words(new.get(key))}, the run to resume has {in_words(old.get(key))}; "
            )
            yield Problem(
                (key, "run.folder"),
                f"{message}a changed recipe is a new run: choose another run.folder",
            )


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections and lists as key.sub names."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(values, dict):
        items = values.items()
    elif isinstance(values, list):
        items = enumerate(values)
    if not isinstance(values, dict | list) or not values:
        return {prefix: values}
    return {
        k: v
        for name, value in items
        for k, v in flat(value, f"{prefix}.{name}".lstrip(".")).items()
    }


def _model_folder(key: str, path: str, recipe: Recipe) -> Iterator[Problem]:
    named = (f"{key}.path",)
    folder = Path(path)
    if not os.path.isdir(path):
        what = (
            "is a file, not a model folder"
            if os.path.exists(path)
            else "no such model folder (and no hub name)"
        )
        yield Problem(named, f"{path}: {what}")
        return
    config = read_json(folder / "config.json")
    if config is None:
        what = (
            "is not valid JSON"
            if (folder / "config.json").exists()
            else "is missing: not a Hugging Face model"
        )
        yield Problem(named, f"{path}: config.json {what}")
        return
    if not key.startswith(("critic", "reference")) and not any(
        (folder / f).exists() for f in TOKENIZER_FILES
    ):
        yield Problem(named, f"{path}: has no tokenizer ({TOKENIZER_FILES[0]} and the like)")
    if malformed := list(_malformed(config)):
        yield from (Problem(named, f"{path}: config.json: {message}") for message in malformed)
        return
    message = _wrong_architecture(key, config, recipe)
    if message is None and isinstance(recipe, RMRecipe) and not is_encoder(config):
        message = pad_problem(folder, config)
    if message is not None:
        yield Problem(named, f"{path}: {message}")
    if isinstance(recipe, RLRecipe) and key == "actor.model":
        yield from _room_for_a_prompt(config, recipe)
        yield from _model_sampling(folder, recipe)


def _malformed(config: dict[str, Any]) -> Iterator[str]:
    """What is read here and is not what Transformers writes."""
    written = (
        ("architectures", list, "a list"),
        ("model_type", str, "text"),
        ("id2label", dict, "a section"),
        ("max_position_embeddings", int, "a whole number"),
    )
    for name, kind, what in written:
        value = config.get(name)
        if value is not None and not isinstance(value, kind):
            yield f"{name} must be {what}, not {in_words(value)}"


def _room_for_a_prompt(config: dict[str, Any], recipe: RLRecipe) -> Iterator[Problem]:
    longest = config.get("max_position_embeddings")
    wanted = recipe.generation.max_new_tokens
    if longest is not None and wanted >= longest:
        keys = ("generation.max_new_tokens", "actor.model.path")
        yield Problem(
            keys, f"{wanted} leaves no room for a prompt in the model's {longest} positions"
        )


def _model_sampling(folder: Path, recipe: RLRecipe) -> Iterator[Problem]:
    """Sampling defaults that came with the model. They are never applied; whoever expects them
    should know.
    """
    message = model_sampling_problem(
        read_json(folder / "generation_config.json") or {}, recipe.generation
    )
    if message is not None:
        yield Problem(("actor.model.path", "generation.model_sampling"), f"{folder}: {message}")


def _wrong_architecture(key: str, config: dict[str, Any], recipe: Recipe) -> str | None:
    """What keeps a checkpoint from playing its role, by its config.json alone."""
    names = config.get("architectures") or []
    name = str(names[0]) if names else ""
    causal = name.endswith(("ForCausalLM", "LMHeadModel"))
    scorer = name.endswith("ForSequenceClassification")
    if key.startswith("rewards"):
        # a config.json leaves the usual two labels unwritten
        labels = len(config.get("id2label") or range(2))
        if not scorer:
            return (
                f"has no score head: {name or 'it'} is not a ...ForSequenceClassification; "
                "train one with quatuor rm"
            )
        return None if labels == 1 else f"has {labels} labels; a reward model gives one score"
    if key == "critic.model" and is_encoder(config):
        kind = config.get("model_type") or name
        return (
            f"is an encoder ({kind}); a critic reads the Actor's tokens one by one: use a decoder"
        )
    if key == "critic.model":
        fits = causal or scorer or name.endswith("ForTokenClassification")
        return (
            None
            if fits or not name
            else f"{name} cannot become a critic; start from a reward model or an SFT model"
        )
    if isinstance(recipe, RMRecipe):
        return None  # any backbone may get a score head
    return (
        None
        if causal or not name
        else f"{name} has no language-model head; a ...ForCausalLM is needed"
    )


def pad_problem(folder: Path, config: dict[str, Any]) -> str | None:
    """Whether a decoder reward model exported from here would know PAD from EOS, by its JSON
    files.
    """
    tokens = {
        **(read_json(folder / "special_tokens_map.json") or {}),
        **{
            k: v
            for k, v in (read_json(folder / "tokenizer_config.json") or {}).items()
            if v is not None
        },
    }
    pad = _token(tokens.get("pad_token"))
    eos = _token(tokens.get("eos_token"))
    if pad is None:
        pad = config.get("pad_token_id")
        eos = config.get("eos_token_id")
    if pad is None:
        return (
            "its tokenizer has no PAD token, which an exported reward model needs; add one that "
            "is not EOS"
        )
    if pad == eos or (isinstance(eos, list) and pad in eos):
        return (
            f"PAD equals EOS ({pad}), so an exported reward model would skip the EOS; give PAD "
            "a token of its own"
        )
    return None


def _token(written: Any) -> str | None:
    return written.get("content") if isinstance(written, dict) else written


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _data(recipe: Recipe) -> Iterator[tuple[str, Data]]:
    """Every data set of the recipe with its key."""
    written: dict[str, Data | None]
    if isinstance(recipe, RLRecipe):
        evaluation = recipe.evaluation
        written = {"prompts": recipe.prompts, "evaluation.prompts": evaluation.prompts}
        written["evaluation.test_prompts"] = evaluation.test_prompts
    else:
        written = {"data": recipe.data, "held_out": recipe.held_out}
    if isinstance(recipe, RMRecipe):
        written["reward_model.calibration"] = recipe.reward_model.calibration
    yield from ((key, data) for key, data in written.items() if data is not None)


def _data_file(key: str, data: Data) -> Iterator[Problem]:
    """The file is there, in a format we read and, when it holds JSON lines, its first row has the
    columns.
    """
    named = (f"{key}.path",)
    path = Path(data.path)
    if not os.path.exists(path):
        yield Problem(named, f"{data.path}: no such data file or folder (and no hub name)")
        return
    try:
        check_path(data.path)
    except UserError as error:
        yield Problem(named, error.problems[0])
        return
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))[:1]
    if not files or files[0].suffix not in (".jsonl", ".json"):
        return
    try:
        with files[0].open(encoding="utf-8") as lines:
            number, line = next(
                ((n, text) for n, text in enumerate(lines, 1) if text.strip()), (0, "")
            )
    except (OSError, UnicodeDecodeError):
        yield Problem(named, f"{files[0]}: cannot be read as UTF-8 text")
        return
    if not line:
        yield Problem(named, f"{files[0]}: has no rows")
        return
    if line.lstrip().startswith("[") or (files[0].suffix == ".json" and line.strip() == "{"):
        return  # one JSON value over many lines: learners.rows reads and checks it
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        yield Problem(named, f"{files[0]}:{number}: not a line of JSON")
        return
    if not isinstance(row, dict):
        yield Problem(
            named, f'{files[0]}:{number}: not a row of columns, such as {{"prompt": "..."}}'
        )
        return
    for name, column in _columns(key, data):
        if column not in row:
            close = difflib.get_close_matches(column, row, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(row)}"
            yield Problem((name, *named), f"{files[0]} has no column {column!r}; {hint}")


def _columns(key: str, data: Data) -> Iterator[tuple[str, str]]:
    """The columns a data set must have, each with the key that names it."""
    for name, value in data:
        if name.endswith("_column") and value is not None:
            yield f"{key}.{name}", value
    for i, column in enumerate(getattr(data, "answer_columns", ())):
        yield f"{key}.answer_columns.{i}", column


# --- functions ------------------------------------------------------------------------------------


def code_problems(recipe: Recipe) -> Iterator[Problem]:
    """What is wrong with code that is not ours: the recipe's functions, and models that bring some
    unasked.
    """
    for key, model in models_of(recipe).items():
        if not model.trust_remote_code and brings_code(Path(model.path)):
            from learners.checkpoints import OWN_CODE, needs_own_code

            if needs_own_code(model):
                message = f"{model.path} {OWN_CODE}; set {key}.trust_remote_code: true to run it"
                yield Problem((f"{key}.path", f"{key}.trust_remote_code"), message)
    yield from function_problems(recipe)


def brings_code(folder: Path) -> bool:
    """Whether a model's or its tokenizer's JSON files name classes that lie beside them. It may
    still do without, where Transformers has classes for it too.
    """
    names = ("config.json", "tokenizer_config.json")
    return any("auto_map" in (read_json(folder / name) or {}) for name in names)


def function_problems(recipe: Recipe) -> Iterator[Problem]:
    """Import the recipe's Python functions, as the workers will. User code may import anything, so
    this comes last.
    """
    for key, name, columns in _functions(recipe):
        from actors.functions import load_function

        try:
            function = load_function(name)
        except UserError as error:
            yield Problem((key,), error.problems[0])
        else:
            if message := _signature_problem(function, columns):
                yield Problem((key,), f"{name}: {message}")


def _functions(recipe: Recipe) -> Iterator[tuple[str, str, set[str]]]:
    """Key, module:function and the columns it will be offered."""
    if not isinstance(recipe, RLRecipe):
        return
    for i, reward in enumerate(recipe.rewards):
        if reward.function is not None:
            yield f"rewards.{i}.function", reward.function, set(recipe.prompts.answer_columns)
    evaluation = recipe.evaluation
    scored = [d for d in (evaluation.prompts, evaluation.test_prompts) if d is not None]
    if evaluation.function is not None and scored:
        columns = set.intersection(*(set(d.answer_columns) for d in scored))
        yield "evaluation.function", evaluation.function, columns


def _signature_problem(function: Any, columns: set[str]) -> str | None:
    """Whether f(prompts, responses, **columns) can be called."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built-in functions have none to look at
        return None
    offered = columns | {"finish_reasons"}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    given = {name: [] for name in offered if takes_all or name in signature.parameters}  # type: ignore[var-annotated]
    try:
        signature.bind([], [], **given)
    except TypeError as error:
        have = ", ".join(sorted(offered))
        return (
            f"cannot be called with prompts, responses and the columns {have}: {error}; see "
            "prompts.answer_columns"
        )
    return None
