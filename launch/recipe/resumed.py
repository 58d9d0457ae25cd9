"""A recipe against the run that it resumes: what has changed since, and what of it is accepted.

What the recipe's paths name is compared when it is read (actors/run/things.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from actors.run.folder import finished_checkpoints
from actors.run.resume import Resume, differing, fewer_steps, nothing_left
from actors.settings import Recipe, RLRecipe
from launch.recipe.combinations import data_of, models_of
from launch.recipe.document import Document, flat, in_words
from launch.recipe.schema import OLD_KEYS
from learners.data.files import read_json
from learners.errors import Problem, UserError, first_wrong
from learners.kernels import AUTO, resolve_attention

# What a resumed run may be given anew: how long it goes on, where it runs, what it shows and when
# it complains.
MAY_CHANGE = (
    "run.checkpoint",
    "run.keep",
    "run.final",
    "run.patience",
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
# Of data: what decides nothing but whether the rows are refused. The rows are compared themselves.
MAY_CHANGE_OF_DATA = ("long_prompts", "max_dropped")


def no_run_to_resume(folder: str) -> str:
    """Return why the folder holds no run to go on with; nothing when it does."""
    path = Path(os.path.abspath(folder))
    there = os.path.isdir(path)
    return first_wrong(
        (not there, "does not exist: nothing to resume"),
        (
            there and not finished_checkpoints(path),
            "holds no checkpoint to resume from (run.checkpoint_every_steps)",
        ),
    )


def resume_problems(recipe: Recipe, resume: Resume) -> Iterator[Problem]:
    """Yield why the run cannot go on by this recipe, as far as the recipe alone tells."""
    yield from _changed(recipe, resume.accept)
    steps = recipe.step.steps if isinstance(recipe, RLRecipe) else recipe.train.steps
    done, _ = finished_checkpoints(Path(recipe.run.folder))[-1]
    if steps is not None:  # else the data tell
        yield from fewer_steps(recipe, steps, done)
        yield from nothing_left(recipe, steps, done)


def _changed(recipe: Recipe, accept: Collection[str]) -> Iterator[Problem]:
    """Yield what decides a resumed run's numbers, is not what it was and is not accepted: the run
    must go on as if it had never stopped.
    """
    try:
        found = changes(recipe)
    except UserError as error:
        yield Problem(("run.folder",), error.problems[0])
        return
    refused = {
        key: f"{message}; a changed recipe is a new run: choose another run.folder, or go on all "
        f"the same: --accept {key}"
        for key, message in found.items()
        if key not in accept
    }
    yield from (Problem((key, "run.folder"), message) for key, message in differing(refused))


def changes(recipe: Recipe) -> dict[str, str]:
    """Return the keys that decide a resumed run's numbers and are not what they were, with both
    values in words. Raises UserError when the run to resume does not say what it was.
    """
    before = Path(recipe.run.folder) / "config.yaml"
    missing = (
        f"{before} is missing, so nobody can tell whether the recipe is still the run's: put it "
        "back, or choose another folder"
    )
    try:
        document = Document.read(before)
    except UserError as error:
        broken = f"{error.problems[0]}; the run to resume must say what it was"
        raise UserError(broken if os.path.isfile(before) else missing) from None
    document.rename(OLD_KEYS)
    old = _comparable(_with_defaults(document.values, type(recipe)), recipe)
    new = _comparable(recipe.model_dump(mode="json"), recipe)
    # a section that one of them has and the other has not is one change, of its path
    alone = [key for key in old.keys() ^ new.keys() if f"{key}.path" in old.keys() | new.keys()]
    told = tuple(f"{key}." for key in alone)
    return {
        key: f"is {in_words(new.get(key))}, the run to resume has {in_words(old.get(key))}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
        and not key.startswith(MAY_CHANGE)
        and not key.endswith(MAY_CHANGE_OF_DATA)
        and not key.endswith(".model.like")  # for plan
        and (key.endswith(".path") or not key.startswith(told))
    }


def accepted(recipe: Recipe, accept: Collection[str]) -> Iterator[str]:
    """Yield a line for every change of the recipe that is accepted. Raises UserError for a key
    under which nothing could be.

    What lies under a path is compared once it is read (actors/run/things.py).
    """
    found = changes(recipe)
    read = {**models_of(recipe), **dict(data_of(recipe))}
    paths = [f"{key}.path" for key in read]
    for key in accept:
        if key in found:
            yield f"accepted: {key}: {found[key]}"
        elif key not in paths:
            there = ", ".join([*found, *(path for path in paths if path not in found)])
            raise UserError(
                f"--accept {key}: nothing to accept there; what could be is what has changed "
                f"under {there}"
            )


def _comparable(values: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return nested sections by dotted keys. A column that is called like its key need not be
    named: earlier versions always named it; nor a kernel that `auto` chooses.
    """
    found = {
        key: None if key.endswith(f".columns.{value}") else value
        for key, value in flat(values).items()
    }
    for key, model in models_of(recipe).items():
        if model.lora is not None and found.get(f"{key}.lora.alpha") is None:
            rank = found.get(f"{key}.lora.rank")
            found[f"{key}.lora.alpha"] = rank and 2.0 * rank  # as LoraSettings.scaled_alpha
    if found.get("reference.share", ...) is None:  # as RLRecipe.shares_reference
        lora = "actor.model.lora.rank" in found
        found["reference.share"] = lora and not found.get("reference.model.path")
    for key, model in models_of(recipe).items():
        if found.get(f"{key}.attention") == AUTO:
            auto = model.model_copy(update={"attention": AUTO})
            config = read_json(Path(model.path) / "config.json") or {}
            found[f"{key}.attention"] = resolve_attention(auto, config)
    return found


def _with_defaults(values: dict[str, Any], model: type[Recipe]) -> dict[str, Any]:
    """Return a saved recipe with today's defaults for keys that it is too old to have."""
    try:
        return model.model_validate_json(json.dumps(values)).model_dump(mode="json")
    except ValidationError:  # another kind of recipe, or one that this version cannot read
        return values
