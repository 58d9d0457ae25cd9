"""The beginning of every run, from its recipe to its summary. What it needs is started before it is
read: Ray and the processes beside the driver's own imports.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from actors.cluster.placement import Placement
from actors.cluster.processes import Processes
from actors.roles import roles_of
from actors.run.folder import RunFolder
from actors.run.lock import RunLock
from actors.run.outcome import accounted_for
from actors.run.progress import say
from actors.run.resume import Resume, bent_schedules, fewer_steps, nothing_left, read_state
from actors.run.things import Things, found_by, weights_of
from actors.settings import Recipe, RLRecipe
from learners.data.store import Rows
from learners.errors import UserError
from learners.imports import imported
from learners.spans import Stopwatch

if TYPE_CHECKING:
    from actors.loop import Training


class Data(Protocol):
    """All that is read and checked before anything starts."""

    @property
    def notices(self) -> list[str]:
        """Return lines about files and texts for whoever starts the run."""

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the trained model."""

    @property
    def sets(self) -> Mapping[str, Rows[Any]]:
        """Rows as they were loaded, by the recipe's key of the data set."""

    def total_steps(self, recipe: Any) -> int:
        """Return the steps of the whole run."""


def nothing_frozen(workers: Any) -> dict[str, list[str]]:
    """Return the fingerprints of a training whose every model is trained."""
    return {}


class Parts(NamedTuple):
    """A kind of training. `read` reads and checks the data, with the date that templates print (a
    resumed run renders what it rendered before), `start` has the processes load, `fingerprints` are
    those of its models that are not trained, by role, and `training` is made of all of them.
    """

    read: Callable[[Any, date], Any]
    start: Callable[[Any, Any, Processes], Any]
    training: Callable[..., Training]
    fingerprints: Callable[[Any], Mapping[str, Sequence[str]]] = nothing_frozen


def parts_of(recipe: Recipe) -> Parts:
    """Import a kind of training, and with it torch and Transformers."""
    module = "actors.driver" if isinstance(recipe, RLRecipe) else "actors.supervised"
    parts: Parts = imported(module).PARTS
    imported("actors.loop")
    return parts


def run(
    recipe: Recipe,
    resume: Resume | None = None,
    config_yaml: str | None = None,
    parts: Callable[[Any], Parts] = parts_of,
) -> dict[str, Any]:
    """Run a recipe from its data to its summary, and return that. `config_yaml` is the recipe's own
    text, kept with the run for its comments.

    Nothing is loaded before the data are read and checked. A signal can be answered only in the
    main thread, so Ray starts in that, and `parts` imports in another.
    """
    clock = time.perf_counter()
    path = Path(recipe.run.folder)
    RunFolder.check(recipe.run, bool(resume))
    lock = RunLock(path, take_over=resume is not None and resume.take_over)
    stopwatch = Stopwatch()
    with accounted_for(recipe.run.folder), lock, ExitStack() as stack:
        things = Things(path, resume)
        aside = ThreadPoolExecutor(1)
        importing = aside.submit(parts, recipe)
        aside.shutdown(wait=False)
        with stopwatch("ray"):
            placement = stack.enter_context(Placement(recipe.cluster, roles_of(recipe)))
            processes = Processes(roles_of(recipe), placement)
        with stopwatch("import driver"):
            kind = importing.result()
        with stopwatch("data"):
            data = kind.read(recipe, things.today)
            look_at(data, things, recipe)

        def opened() -> RunFolder:
            text = config_yaml or recipe.to_yaml()
            return stack.enter_context(RunFolder.open(recipe.run, text, bool(resume), lock))

        # what a new run needs is tried before any model loads; the folder of one to resume stays
        # as it is until everything has
        early = None if resume else opened()
        workers = kind.start(recipe, data, processes)
        stopwatch.add(processes.stopwatch.take())
        things.add(weights_of(recipe, kind.fingerprints(workers)))
        things.check_accepted()
        folder = early or opened()
        folder.things = things.table
        folder.keep_notices(data.notices)
        from actors.loop import Loop
        from actors.run.alarms import AlarmLog

        alarms = AlarmLog(folder, recipe.run.max_skipped_steps)
        made = kind.training(recipe, data, workers, folder, alarms)
        nodes = {name: [node.id for node in group.nodes] for name, group in made.groups.items()}
        (folder.path / "placement.json").write_text(json.dumps(nodes, indent=2))
        folder.stopwatch.add(stopwatch.take())
        summary = Loop(recipe, made, folder, alarms, clock).run(bool(resume))
        folder.finish(summary)
    return summary


def look_at(data: Data, things: Things, recipe: Recipe) -> None:
    """Say what there is to say about the data. Raises UserError where a resumed run's are others,
    or leave fewer steps than it has done.
    """
    for line in data.notices:
        say(f"notice: {line}")
    things.add(found_by(recipe, data.tokenizer, data.sets))
    things.check_accepted(loaded=False)
    total = data.total_steps(recipe)
    for find in (fewer_steps, nothing_left) if things.checkpoint else ():
        for problem in find(recipe, total, things.step):
            raise UserError(str(problem))
    before = read_state(things.checkpoint).get("total_steps", total) if things.checkpoint else total
    if bent := bent_schedules(recipe, total, before, things.step):
        say(f"notice: {bent}")
