"""A wish to resume: what may differ from the run that was, and whether its folder is taken over."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.roles import roles_of
from actors.settings import Recipe, RLRecipe
from learners.data.files import read_json
from learners.errors import Problem
from learners.schedules import schedule

STATE_FILE = "loop.json"  # in a checkpoint: how long the run was to be, and its best model

MOST_LINES = 3  # of what differs


@dataclass(frozen=True)
class Resume:
    """A wish to go on from the newest checkpoint. `accept` names the recipe's keys under which
    something may differ; `take_over` takes the folder from a run that still has it.
    """

    accept: tuple[str, ...] = ()
    take_over: bool = False

    @property
    def options(self) -> list[str]:
        """The same on a command line."""
        accepted = [word for key in self.accept for word in ("--accept", key)]
        return ["--resume", *accepted, *(["--take-over"] if self.take_over else [])]


def write_state(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Write the loop's own part of a checkpoint."""
    (checkpoint / STATE_FILE).write_text(json.dumps(state))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the loop's own part of a checkpoint; nothing of a version that had none."""
    return read_json(checkpoint / STATE_FILE) or {}


def fewer_steps(recipe: Recipe, total: int, done: int) -> Iterator[Problem]:
    """Yield a problem when the run would have fewer steps than its checkpoint has `done`."""
    if total < done:
        yield Problem(
            (_steps_key(recipe),),
            f"makes a run of {total} steps, and the checkpoint to resume from has done {done}; "
            f"give as many as make {done} or more",
        )


def nothing_left(recipe: Recipe, total: int, done: int) -> Iterator[Problem]:
    """Yield a problem when the run came to its end at its newest checkpoint, of step `done`, and is
    to have no more steps than that.
    """
    folder = Path(recipe.run.folder)
    summary = read_json(folder / "summary.json") or {}
    if summary.get("steps") != done:
        return
    ended = f"the run has ended after step {done}, its model is in {folder / 'model'}"
    idle = summary.get("evaluations_without_gain", 0)
    patience = recipe.run.patience
    if total <= done:
        yield Problem((_steps_key(recipe),), f"{ended}; give more than {done} steps to go on")
    elif idle and patience is not None and patience <= idle:
        what = f"{ended}: {idle} evaluations without gain; give more, or null, to go on"
        yield Problem(("run.patience",), what)


def bent_schedules(recipe: Recipe, total: int, before: int, done: int) -> str:
    """Return in a line which learning rates go on from another value than they ended at, as the run
    now has `total` steps and had `before`, of which `done` are done; nothing where none does.
    """
    updates = recipe.updates_per_step if isinstance(recipe, RLRecipe) else 1
    bent = []
    for role in roles_of(recipe).values() if done and total != before else ():
        if role.learner is None or role.learner.optimizer.schedule == "constant":
            continue
        optimizer = role.learner.optimizer
        old, new = (schedule(optimizer, updates * steps) for steps in (before, total))
        peak = optimizer.learning_rate
        was, planned = (peak * old(updates * done + i) for i in (-1, 0))
        now = peak * new(updates * done)
        if abs(now - planned) > 1e-9 * peak:
            bent.append(
                f"{role.section}.optimizer.schedule: {optimizer.schedule} over {total} steps, no "
                f"longer {before}: the learning rate was {was:.3g} in step {done} and goes on "
                f"from {now:.3g}"
            )
    return "; ".join(bent)


def _steps_key(recipe: Recipe) -> str:
    if isinstance(recipe, RLRecipe):
        return "step.steps"
    return "train.steps" if recipe.train.steps else "train.epochs"


def differing(messages: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield keys and messages of what differs, in `MOST_LINES` lines; the last one then names all
    keys that are left.
    """
    keys = list(messages)
    shown = len(keys) if len(keys) <= MOST_LINES else MOST_LINES - 1
    yield from ((key, messages[key]) for key in keys[:shown])
    if rest := keys[shown:]:
        yield rest[0], f"differs too, as do {', '.join(rest[1:])}: --accept each to go on"
