"""A wish to resume: what may differ from the run that was, and whether its folder is taken over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from actors.settings import Recipe, RLRecipe
from learners.errors import Problem

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


def fewer_steps(recipe: Recipe, total: int, done: int) -> Iterator[Problem]:
    """Yield a problem when the run would have fewer steps than its checkpoint has `done`."""
    if isinstance(recipe, RLRecipe):
        key = "step.steps"
    else:
        key = "train.steps" if recipe.train.steps else "train.epochs"
    if total < done:
        yield Problem(
            (key,),
            f"makes a run of {total} steps, and the checkpoint to resume from has done {done}; "
            f"give as many as make {done} or more",
        )


def differing(messages: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield keys and messages of what differs, in `MOST_LINES` lines; the last one then names all
    keys that are left.
    """
    keys = list(messages)
    shown = len(keys) if len(keys) <= MOST_LINES else MOST_LINES - 1
    yield from ((key, messages[key]) for key in keys[:shown])
    if rest := keys[shown:]:
        yield rest[0], f"differs too, as do {', '.join(rest[1:])}: --accept each to go on"
