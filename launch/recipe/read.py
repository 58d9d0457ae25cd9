"""A recipe: one YAML file, read, overridden and checked. The typed models are in
actors/settings.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from actors.run.resume import Resume
from actors.settings import Recipe, RLRecipe, RMRecipe, SFTRecipe, rl_recipe
from launch.recipe.combinations import combination_problems
from launch.recipe.document import Document, in_words
from launch.recipe.machine import file_problems
from launch.recipe.schema import OLD_KEYS, lookup, recipe_keys, renamed, required, suggest
from learners.algorithms.base import ALGORITHMS
from learners.errors import Problem, UserError, first_wrong
from learners.settings import ONE, SEVERAL

KINDS: dict[str, Callable[[], type[Recipe]]] = {
    "sft": lambda: SFTRecipe,
    "rm": lambda: RMRecipe,
    "ppo": lambda: rl_recipe("ppo", "ppo"),
    "grpo": lambda: rl_recipe("grpo", "grpo"),
    "rl": lambda: RLRecipe,
}
"""What a recipe may be; the algorithm of an `rl` recipe decides its class."""


RL_KINDS = ("ppo", "grpo", "rl")


SECTION = "a section of keys"
TYPES = {  # by how pydantic's names of errors begin
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "model": SECTION,
    "dict": SECTION,
    "tuple": "a list",
}
BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


class RecipeError(UserError):
    """Everything wrong with a recipe: one line per problem, each with where it is and what would be
    right.
    """


def load_recipe(path: str | Path, overrides: Sequence[str] = (), kind: str | None = None) -> Recipe:
    """Read a recipe, apply `key.sub=value` overrides, check keys, types and combinations; files are
    not looked at.

    `kind` is what the caller can run; without it the recipe says itself. Raises RecipeError with
    every problem.
    """
    return read_recipe(path, overrides, kind)[0]


def read_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    kind: str | None = None,
    *,
    files: bool = False,
    resume: Resume | None = None,
) -> tuple[Recipe, Document]:
    """Load a recipe like load_recipe; also return where every value was written.

    `files` adds the checks of folders, models' JSON files and data columns; with `resume` the run
    folder must exist.
    """
    try:
        document = Document.read(path)
    except UserError as error:
        raise RecipeError(error.problems) from None
    for text in overrides:
        document.override(text)
    document.rename(OLD_KEYS)
    model = _model(document, kind)
    recipe, problems, broken = _validated(document, model)
    if recipe is not None:
        found = [*combination_problems(recipe), *(file_problems(recipe, resume) if files else [])]
        problems += [p for p in found if not any(_related(k, b) for k in p.keys for b in broken)]
    lines = document.problems + [located(p, document) for p in problems]
    if lines or recipe is None:
        raise RecipeError(list(dict.fromkeys(lines)))
    return recipe, document


def located(problem: Problem, document: Document) -> str:
    """Return a problem in one line: where it is, key, what is wrong and what would be right."""
    named = document.written.get(problem.keys[0], problem.keys[0])
    return f"{document.where(*problem.keys)}: {named}: {problem.message}"


def annotated(recipe: Recipe, document: Document) -> str:
    """Return the whole recipe as YAML; values that are not defaults say where they were written."""
    lines = recipe.to_yaml().splitlines()
    for key, line in Document.parse("\n".join(lines), "").origins.items():
        if key in document.origins:
            number = int(line.rpartition(":")[2]) - 1
            comment = f"  # {document.origins[key]}"
            # the first key of a list's entry stands on the line of the entry
            lines[number] = lines[number].removesuffix(comment) + comment
    return "\n".join(lines)


def _model(document: Document, kind: str | None) -> type[Recipe]:
    """Return the recipe class its `kind` asks for, and under `rl` its `algorithm.kind`."""
    known = ", ".join(KINDS)
    written = document.values.setdefault("kind", kind)
    rl = written in RL_KINDS if isinstance(written, str) else False
    sound = isinstance(written, str) and written in KINDS
    wrong = first_wrong(
        (not written, f"missing; one of {known}"),
        (not sound, f"is {in_words(written)}; a recipe is one of {known}"),
        (
            kind not in (None, written) and not (kind == "rl" and rl),
            f"this is a recipe for {written}: run quatuor {written}, not quatuor {kind}",
        ),
    )
    key = "kind" if wrong else "algorithm.kind"
    section = document.values.get("algorithm")
    algorithm = section.get("kind") if isinstance(section, dict) else None
    there = ", ".join(ALGORITHMS)
    named = rl and algorithm is not None
    wrong = wrong or first_wrong(
        (named and not isinstance(algorithm, str), f"must be text, not {in_words(algorithm)}"),
        (
            named and written not in ("rl", algorithm),
            f"must be {written!r} in a recipe for {written}, not {in_words(algorithm)}",
        ),
        (
            written == "rl" and algorithm is None,
            f"missing; one of {there}, or module:Class of your own",
        ),
    )
    if not wrong:
        try:
            return rl_recipe(str(algorithm)) if written == "rl" else KINDS[str(written)]()
        except UserError as error:
            wrong = error.problems[0]
    raise RecipeError([*document.problems, located(Problem((key,), wrong), document)])


def _validated(
    document: Document, model: type[Recipe]
) -> tuple[Recipe | None, list[Problem], set[str]]:
    """Return the typed recipe, its problems, and the keys that are not to be trusted.

    Broken keys are replaced by what was meant (or any value of the right type) until the rest can
    be read, so that the combinations among sound keys are checked in the same go. None when even
    that fails.
    """
    values: dict[str, Any] = json.loads(json.dumps(document.values))
    keys = recipe_keys(model)
    problems: list[Problem] = []
    broken: set[str] = set()
    while True:
        try:
            return model.model_validate_json(json.dumps(values), strict=True), problems, broken
        except ValidationError as error:
            errors = _located(error)
        # A misspelt required key is one mistake, not two: unknown keys first, then what is still
        # wrong.
        errors = [e for e in errors if e["type"] == "extra_forbidden"] or errors
        before = json.dumps(values)
        for one in errors:
            key = ".".join(map(str, one["loc"]))
            if not any(_related(key, b) for b in broken):
                problems.append(Problem((key,), _in_words(one, key, keys)))
        for one in errors:
            broken.add(".".join(map(str, one["loc"])))
            _repair(values, one, keys)
        if json.dumps(values) == before:
            return None, problems, broken


def _located(error: ValidationError) -> list[dict[str, Any]]:
    """Return pydantic's errors with the recipe's keys as their places."""
    errors: list[dict[str, Any]] = [dict(one) for one in error.errors(include_url=False)]
    for one in errors:
        one["loc"] = tuple(part for part in one["loc"] if part not in (ONE, SEVERAL))
    # of a list whose only entry is wrong pydantic also says that it is too short
    return [one for one in errors if one["type"] != "too_short" or not one["input"]]


def _related(one: str, other: str) -> bool:
    """Tell whether the keys are the same, or one lies inside the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _repair(values: dict[str, Any], error: dict[str, Any], keys: dict[str, Any]) -> None:
    """Make one reported key harmless: rename it, fill it in, or leave it out."""
    *path, last = error["loc"]
    holder: Any = values
    for depth, part in enumerate(path):
        if isinstance(holder[part], list) and (depth == len(path) - 1):
            path = path[:depth]  # a bad entry takes its whole list out
            last = part
            break
        holder = holder[part]
    if not isinstance(holder, dict):
        return
    name = ".".join(map(str, (*path, last)))
    if error["type"] == "missing" and (entry := lookup(name, keys)) and last not in holder:
        holder[last] = entry.stand_in
        return
    value = holder.pop(last, None)
    if (
        error["type"] == "extra_forbidden"
        and "." not in str(last)
        and (meant := renamed(name, keys))
    ):
        holder.setdefault(meant, value)


def _in_words(error: dict[str, Any], key: str, keys: dict[str, Any]) -> str:
    """Return one validation error as a person would say it."""
    kind = error["type"]
    got = in_words(error.get("input"))
    limits = error.get("ctx", {})
    last = error["loc"][-1]
    if kind == "extra_forbidden" and "." in str(last):
        nested = last.replace(".", ": {") + ": ..." + "}" * last.count(".")
        return f"a key with dots is for the command line; here write {nested}"
    if kind == "extra_forbidden":
        return f"unknown key; {suggest(key, keys)}"
    if kind == "missing":
        listed = isinstance(last, int)
        return f"missing: {'the list is too short' if listed else required(key, keys)}"
    if kind == "too_short":
        return "is an empty list: write one section, or a list of them"
    if kind == "too_long":
        return f"must be a list of {limits['max_length']}, not of {limits['actual_length']}"
    if kind in BOUNDS:
        word, name = BOUNDS[kind]
        return f"must be {word} {limits[name]:g}, not {got}"
    if kind == "none_required":
        return "must be left out: this algorithm has none"
    if kind == "literal_error":
        return f"must be {limits['expected']}, not {got}"
    wanted = next((what for prefix, what in TYPES.items() if kind.startswith(prefix)), None)
    if wanted is None:
        return str(error["msg"]).removeprefix("Value error, ")
    hint = _left_empty(key, keys) if got == "nothing" and wanted == SECTION else ""
    return f"must be {wanted}, not {got}{hint}"


def _left_empty(key: str, keys: dict[str, Any]) -> str:
    """Return what to do about a section that was given nothing."""
    entry = lookup(key, keys)
    if entry is None:
        return ""
    return (
        f": {required(key, keys)}"
        if entry.default.startswith("required")
        else "; leave the key out for its defaults"
    )
