"""What types cannot say about a recipe: combinations that make no sense, and files that are not what they should be.

Everything here reads the recipe and small files only; nothing heavy is imported, except by `function_problems`.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.layout import demands, layout, nodes_needed, sharing_problems
from actors.settings import (
    GRPORecipe,
    PPORecipe,
    RewardSettings,
    RLRecipe,
    RMRecipe,
    SFTRecipe,
    model_sampling_problem,
)
from launch.document import Document, in_words
from learners.data import check_path
from learners.settings import LearnerSettings, ModelSettings, PairData, PromptData, SFTData, UserError

Recipe = SFTRecipe | RMRecipe | PPORecipe | GRPORecipe
Data = PromptData | SFTData | PairData

LEAST_GRPO_TEMPERATURE = 0.7
USUAL_GROUP = 8
# What a resumed run may be given anew: how long it goes on, where it runs, what it shows and when it complains.
MAY_CHANGE = (
    "run.checkpoint", "run.keep", "run.samples", "run.tensorboard", "run.wandb", "run.progress", "run.max_skipped",
    "run.folder", "step.steps", "train.steps", "train.epochs", "train.evaluate", "cluster.", "alarms.", "evaluation.",
    "generation.threads", "generation.max_concurrent", "generation.kv_cache", "generation.gpu_memory", "sync.",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")
ENCODERS = frozenset((
    "albert", "bert", "camembert", "convbert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "eurobert",
    "longformer", "modernbert", "mpnet", "nomic_bert", "roberta", "xlm-roberta", "xlm-roberta-xl",
))  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Something wrong: the keys it comes from (the first is the one to name) and what would be right."""

    keys: tuple[str, ...]
    message: str


# --- combinations -----------------------------------------------------------------------------------------------------


def combination_problems(recipe: Recipe) -> Iterator[Problem]:
    """Keys that are fine one by one and impossible together."""
    for key, model in _models(recipe):
        yield from _attention(key, model, recipe.cluster.device)
    for key, learner in _learners(recipe):
        yield from _offload(key, learner, recipe.cluster.device)
        if learner.model.dtype == "bfloat16" and learner.zero_stage == 0:
            message = "bfloat16 needs zero_stage 1, 2 or 3, which keep float32 master weights; else small steps vanish"
            yield Problem((f"{key}.zero_stage", f"{key}.model.dtype"), message)
    if isinstance(recipe, RLRecipe):
        yield from _batches(recipe)
        yield from _rewards(recipe)
        yield from _evaluation(recipe)
        yield from _generation(recipe)
    if isinstance(recipe, PPORecipe | GRPORecipe):
        yield from _distortions(recipe)
        yield from (Problem(keys, message) for keys, message in sharing_problems(recipe))
    if isinstance(recipe, PPORecipe) and recipe.algorithm.kl_target is not None and recipe.algorithm.kl_beta == 0:
        keys = ("algorithm.kl_target", "algorithm.kl_beta")
        yield Problem(keys, "adapts kl_beta by factors, so kl_beta must start above 0")
    if isinstance(recipe, SFTRecipe) and recipe.train.evaluate_every and recipe.held_out is None:
        yield Problem(("train.evaluate_every", "held_out"), "needs held-out examples: set held_out.path")


def _attention(key: str, model: ModelSettings, device: str) -> Iterator[Problem]:
    if model.attention != "flash_attention_2":
        return
    if device == "cpu":
        keys = (f"{key}.attention", "cluster.device")
        yield Problem(keys, "flash_attention_2 needs cluster.device cuda; on cpu use sdpa")
    elif model.dtype != "bfloat16":
        yield Problem(
            (f"{key}.attention", f"{key}.dtype"), f"flash_attention_2 needs dtype bfloat16, not {model.dtype}"
        )


def _offload(key: str, learner: LearnerSettings, device: str) -> Iterator[Problem]:
    for name in ("offload_optimizer", "offload_parameters"):
        if getattr(learner, name) and device == "cpu":
            yield Problem((f"{key}.{name}", "cluster.device"), "needs cluster.device cuda: on cpu all is in CPU memory")
    if learner.offload_optimizer and learner.zero_stage == 0:
        yield Problem((f"{key}.offload_optimizer", f"{key}.zero_stage"), "needs zero_stage 1, 2 or 3, not 0")
    if learner.offload_parameters and learner.zero_stage != 3:
        keys = (f"{key}.offload_parameters", f"{key}.zero_stage")
        yield Problem(keys, f"needs zero_stage 3, not {learner.zero_stage}")


def _batches(recipe: RLRecipe) -> Iterator[Problem]:
    step = recipe.step
    prompts, group, mini = step.prompts_per_step, step.group_size, step.mini_batch_size
    if isinstance(recipe, GRPORecipe) and group < 2:
        message = f"1 leaves nothing to compare a response with; GRPO needs 2 or more ({USUAL_GROUP} is usual)"
        yield Problem(("step.group_size",), message)
        group = USUAL_GROUP  # what follows is judged as if this were put right
    sequences = prompts * group
    if sequences % mini:
        around = (n for d in range(mini) for n in (mini - d, mini + d))
        nearest = sequences if mini > sequences else next(n for n in around if sequences % n == 0)
        yield Problem(
            ("step.mini_batch_size", "step.prompts_per_step", "step.group_size"),
            f"{mini} does not divide prompts_per_step {prompts} * group_size {group} = {sequences}; nearest: {nearest}",
        )
    if isinstance(recipe, PPORecipe) and recipe.algorithm.kl_target and recipe.algorithm.kl_horizon < sequences:
        message = f"{recipe.algorithm.kl_horizon} is less than one step of {sequences} sequences; take several steps"
        yield Problem(("algorithm.kl_horizon",), message)


def _rewards(recipe: RLRecipe) -> Iterator[Problem]:
    if not recipe.rewards:
        yield Problem(("rewards",), "needs at least one source of scores")
    elif all(r.weight == 0 for r in recipe.rewards):
        keys = tuple(f"rewards.{i}.weight" for i in range(len(recipe.rewards)))
        yield Problem(keys, "every weight is 0, so every score would be 0")
    for name, count in Counter(r.name for r in recipe.rewards).items():
        if count > 1:
            keys = tuple(f"rewards.{i}.name" for i, r in enumerate(recipe.rewards) if r.name == name)
            yield Problem(keys[::-1], f"{name!r} names {count} sources; each needs a name of its own")
    for i, reward in enumerate(recipe.rewards):
        yield from _source(f"rewards.{i}", reward)


def _source(key: str, reward: RewardSettings) -> Iterator[Problem]:
    """A source of scores has the key that is named like its kind, and not the other."""
    hint = {"model": f"set {key}.model.path", "function": "set it to module:function"}
    for name in hint:
        given = getattr(reward, name) is not None
        if given != (name == reward.kind):
            what = f"is for kind {name}, not {reward.kind}" if given else f"missing: kind {name} needs it: {hint[name]}"
            yield Problem((f"{key}.{name}", f"{key}.kind"), what)
    yield from _function_name(f"{key}.function", reward.function)


def _function_name(key: str, name: str | None) -> Iterator[Problem]:
    if name is not None and name.count(":") != 1:
        yield Problem((key,), f"must read module:function, not {name!r}")


def _evaluation(recipe: RLRecipe) -> Iterator[Problem]:
    settings = recipe.evaluation
    prompts = [k for k in ("prompts", "test_prompts") if getattr(settings, k) is not None]
    if settings.every_steps and settings.prompts is None:
        keys = ("evaluation.every_steps", "evaluation.prompts")
        yield Problem(keys, "needs held-out prompts: set evaluation.prompts.path")
    if prompts and settings.function is None:
        named = (f"evaluation.{prompts[0]}", "evaluation.function")
        yield Problem(named, "needs the true score of a response: set evaluation.function to module:function")
    yield from _function_name("evaluation.function", settings.function)
    if settings.function is not None and not prompts:
        unset = ("evaluation.function", "evaluation.prompts", "evaluation.test_prompts")
        yield Problem(unset, "has nothing to judge: set evaluation.prompts.path or evaluation.test_prompts.path")


def _generation(recipe: RLRecipe) -> Iterator[Problem]:
    settings = recipe.generation
    if settings.tensor_parallel > 1 and recipe.cluster.device == "cpu":
        keys = ("generation.tensor_parallel", "cluster.device")
        yield Problem(keys, "needs cluster.device cuda; on cpu use more engines or threads")
    if settings.max_model_tokens is not None and settings.max_new_tokens >= settings.max_model_tokens:
        keys = ("generation.max_model_tokens", "generation.max_new_tokens")
        total = settings.max_model_tokens
        yield Problem(keys, f"{total} leaves no room for a prompt beside max_new_tokens {settings.max_new_tokens}")
    if isinstance(recipe, GRPORecipe) and settings.temperature <= LEAST_GRPO_TEMPERATURE:
        message = f"{settings.temperature:g} makes groups of near copies; GRPO needs above {LEAST_GRPO_TEMPERATURE}"
        yield Problem(("generation.temperature",), message)


def _distortions(recipe: PPORecipe | GRPORecipe) -> Iterator[Problem]:
    """Sampling that is not the policy's own breaks the ratio new / old, unless its tokens are weighed."""
    correction, engine = recipe.algorithm.rollout_correction, recipe.algorithm.old_logprobs == "engine"
    for name, value in recipe.generation.distortions.items():
        if correction is None:
            way_out = "" if engine else ", or set algorithm.rollout_correction to weigh the tokens"
            message = f"{value:g} samples from another distribution than the policy the ratio is computed with; "
            keys = (f"generation.{name}", "algorithm.rollout_correction")
            yield Problem(keys, f"{message}leave it out{way_out}")
    if engine and correction is not None:
        keys = ("algorithm.old_logprobs", "algorithm.rollout_correction")
        yield Problem(keys, "engine leaves nothing to correct: use actor, or remove algorithm.rollout_correction")


def _learners(recipe: Recipe) -> Iterator[tuple[str, LearnerSettings]]:
    for key in ("learner", "actor", "critic"):
        if hasattr(recipe, key):
            yield key, getattr(recipe, key)


def _models(recipe: Recipe) -> Iterator[tuple[str, ModelSettings]]:
    """Every model of the recipe with its key."""
    for key, learner in _learners(recipe):
        yield f"{key}.model", learner.model
    if isinstance(recipe, RLRecipe):
        if recipe.reference.model is not None:
            yield "reference.model", recipe.reference.model
        for i, reward in enumerate(recipe.rewards):
            if reward.model is not None:
                yield f"rewards.{i}.model", reward.model


def lacking_gpus(recipe: Recipe) -> str | None:
    """Why the recipe's nodes have too few GPUs for its processes, and what would be enough; None when they have."""
    cluster, bundles = recipe.cluster, layout(recipe.cluster, demands(recipe)).bundles
    enough, sizes = nodes_needed(bundles, cluster.gpus_per_node), [int(bundle.get("GPU", 0)) for bundle in bundles]
    if enough is not None and enough <= cluster.nodes:
        return None
    one = f"{max(sizes)} of them must be on one node: raise cluster.gpus_per_node"
    has = f"the cluster has {cluster.nodes} x {cluster.gpus_per_node}"
    return f"{sum(sizes)} GPUs are needed, {has}: {f'ask for {enough} nodes' if enough else one}"


# --- this machine -----------------------------------------------------------------------------------------------------


def file_problems(recipe: Recipe, resume: bool = False) -> Iterator[Problem]:
    """GPUs, the run folder, models' JSON files and data columns, as far as they are on this machine.

    A cluster that is joined is asked for its GPUs once it answers.
    """
    if not recipe.cluster.address and (lacking := lacking_gpus(recipe)):
        keys = ("cluster.nodes", "cluster.gpus_per_node", "cluster.device", "cluster.placement")
        yield Problem(keys, f"{lacking}, or join a cluster that has them with cluster.address")
    yield from _run_folder(recipe.run.folder, resume)
    if resume:
        yield from _changed(recipe)
    for key, model in _models(recipe):
        if is_local(model.path):
            yield from _model_folder(key, model.path, recipe)
    for key, data in _data(recipe):
        if is_local(data.path):
            yield from _data_file(key, data)


def is_local(path: str) -> bool:
    """Whether a path means this machine's disk: it exists, or cannot be a hub's `organisation/name`."""
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
        elif all(checkpoint.suffix == ".tmp" for checkpoint in path.glob("checkpoints/step-*")):
            yield Problem(("run.folder",), f"{folder} holds no checkpoint to resume from (run.checkpoint_every_steps)")
        return
    if os.path.exists(path):
        yield Problem(("run.folder",), f"{folder} exists; choose another folder, or --resume to go on with that run")
        return
    above = next(parent for parent in path.parents if os.path.exists(parent))
    if not above.is_dir():
        yield Problem(("run.folder",), f"{folder} cannot be made: {above} is a file")
        return
    try:  # permissions alone do not tell: the disk may be read-only, the user root, or the name too long
        with tempfile.TemporaryDirectory(dir=above) as trial:
            Path(trial, path.relative_to(above)).mkdir(parents=True)
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or error
        yield Problem(("run.folder",), f"{folder} cannot be made: {above}: {what}")


def _changed(recipe: Recipe) -> Iterator[Problem]:
    """A resumed run goes on as if it had never stopped: what decides its numbers must be what it was."""
    before = Path(recipe.run.folder) / "config.yaml"
    if not os.path.isfile(before):
        return
    try:
        old, new = flat(Document.read(before).values), flat(recipe.model_dump(mode="json"))
    except UserError as error:
        yield Problem(("run.folder",), f"{error.problems[0]}; the run to resume must say what it was")
        return
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE):
            message = f"is {in_words(new.get(key))}, the run to resume has {in_words(old.get(key))}; "
            yield Problem((key, "run.folder"), f"{message}a changed recipe is a new run: choose another run.folder")


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections and lists as key.sub names."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if items is None or not values:
        return {prefix: values}
    return {k: v for name, value in items for k, v in flat(value, f"{prefix}.{name}".lstrip(".")).items()}


def _model_folder(key: str, path: str, recipe: Recipe) -> Iterator[Problem]:
    named = (f"{key}.path",)
    folder = Path(path)
    if not os.path.isdir(path):
        what = "is a file, not a model folder" if os.path.exists(path) else "no such model folder (and no hub name)"
        yield Problem(named, f"{path}: {what}")
        return
    config = read_json(folder / "config.json")
    if config is None:
        what = "is not valid JSON" if (folder / "config.json").exists() else "is missing: not a Hugging Face model"
        yield Problem(named, f"{path}: config.json {what}")
        return
    if not key.startswith(("critic", "reference")) and not any((folder / f).exists() for f in TOKENIZER_FILES):
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
    longest, wanted = config.get("max_position_embeddings"), recipe.generation.max_new_tokens
    if longest is not None and wanted >= longest:
        keys = ("generation.max_new_tokens", "actor.model.path")
        yield Problem(keys, f"{wanted} leaves no room for a prompt in the model's {longest} positions")


def _model_sampling(folder: Path, recipe: RLRecipe) -> Iterator[Problem]:
    """Sampling defaults that came with the model. They are never applied; whoever expects them should know."""
    message = model_sampling_problem(read_json(folder / "generation_config.json") or {}, recipe.generation)
    if message is not None:
        yield Problem(("actor.model.path", "generation.model_sampling"), f"{folder}: {message}")


def _wrong_architecture(key: str, config: dict[str, Any], recipe: Recipe) -> str | None:
    """What keeps a checkpoint from playing its role, by its config.json alone."""
    names = config.get("architectures") or []
    name = str(names[0]) if names else ""
    causal = name.endswith(("ForCausalLM", "LMHeadModel"))
    scorer = name.endswith("ForSequenceClassification")
    if key.startswith("rewards"):
        labels = len(config.get("id2label") or range(2))  # a config.json leaves the usual two labels unwritten
        if not scorer:
            return f"has no score head: {name or 'it'} is not a ...ForSequenceClassification; train one with quatuor rm"
        return None if labels == 1 else f"has {labels} labels; a reward model gives one score"
    if key == "critic.model" and is_encoder(config):
        kind = config.get("model_type") or name
        return f"is an encoder ({kind}); a critic reads the Actor's tokens one by one: use a decoder"
    if key == "critic.model":
        fits = causal or scorer or name.endswith("ForTokenClassification")
        return None if fits or not name else f"{name} cannot become a critic; start from a reward model or an SFT model"
    if isinstance(recipe, RMRecipe):
        return None  # any backbone may get a score head
    return None if causal or not name else f"{name} has no language-model head; a ...ForCausalLM is needed"


def pad_problem(folder: Path, config: dict[str, Any]) -> str | None:
    """Whether a decoder reward model exported from here would know PAD from EOS, by its JSON files."""
    tokens = {
        **(read_json(folder / "special_tokens_map.json") or {}),
        **{k: v for k, v in (read_json(folder / "tokenizer_config.json") or {}).items() if v is not None},
    }
    pad, eos = _token(tokens.get("pad_token")), _token(tokens.get("eos_token"))
    if pad is None:
        pad, eos = config.get("pad_token_id"), config.get("eos_token_id")
    if pad is None:
        return "its tokenizer has no PAD token, which an exported reward model needs; add one that is not EOS"
    if pad == eos or (isinstance(eos, list) and pad in eos):
        return f"PAD equals EOS ({pad}), so an exported reward model would skip the EOS; give PAD a token of its own"
    return None


def _token(written: Any) -> str | None:
    return written.get("content") if isinstance(written, dict) else written


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
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
    """The file is there, in a format we read and, when it holds JSON lines, its first row has the columns."""
    named, path = (f"{key}.path",), Path(data.path)
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
            number, line = next(((n, text) for n, text in enumerate(lines, 1) if text.strip()), (0, ""))
    except (OSError, UnicodeDecodeError):
        yield Problem(named, f"{files[0]}: cannot be read as UTF-8 text")
        return
    if not line:
        yield Problem(named, f"{files[0]}: has no rows")
        return
    if line.lstrip().startswith("[") or (files[0].suffix == ".json" and line.strip() == "{"):
        return  # one JSON value over many lines: learners.data reads and checks it
    try:
        row = json.loads(line)
    except ValueError:
        yield Problem(named, f"{files[0]}:{number}: not a line of JSON")
        return
    if not isinstance(row, dict):
        yield Problem(named, f'{files[0]}:{number}: not a row of columns, such as {{"prompt": "..."}}')
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


# --- functions --------------------------------------------------------------------------------------------------------


def function_problems(recipe: Recipe) -> Iterator[Problem]:
    """Import the recipe's Python functions, as the workers will. User code may import anything, so this comes last."""
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
    judged = [d for d in (evaluation.prompts, evaluation.test_prompts) if d is not None]
    if evaluation.function is not None and judged:
        columns = set.intersection(*(set(d.answer_columns) for d in judged))
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
        return f"cannot be called with prompts, responses and the columns {have}: {error}; see prompts.answer_columns"
    return None
