"""The command line. `quatuor COMMAND --help` says more; bad input exits with code 2 and one line
per problem.
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import io
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException

from actors.cluster.surroundings import token_file
from actors.run.resume import Resume
from actors.run.stop import catch_stop_signals
from launch.recipe.combinations import models_of
from launch.recipe.machine import code_problems, kernel_notices
from launch.recipe.read import KINDS, RecipeError, annotated, located, read_recipe
from launch.recipe.resumed import accepted
from launch.recipe.schema import OLD_KEYS, listing
from learners.algorithms.base import ALGORITHMS, find_algorithm
from learners.errors import UserError, in_a_line

BAD_INPUT = 2
FAILED = 1
RUNNER = "actors.begin"

TRAINING = {
    "sft": "Train a language model on answers (supervised fine-tuning).",
    "rm": "Train a reward model on pairs of a better and a worse answer.",
    "ppo": "Train a language model on scores, with a critic (PPO).",
    "grpo": "Train a language model on scores compared within groups of responses (GRPO).",
    "rl": "Train a language model on scores, by the algorithm that algorithm.kind names.",
}

app = typer.Typer(
    name="quatuor",
    help="RLHF with Ray, vLLM and DeepSpeed: the same recipe on a laptop CPU, one GPU and a "
    "cluster.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file with the keys below")]
AnyRecipe = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="YAML file; quatuor ppo --help lists a kind's keys")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE", help="replace keys of the recipe")
]
Resumed = Annotated[
    bool,
    typer.Option("--resume", help="go on with the run in run.folder from its newest checkpoint"),
]
Accept = Annotated[
    list[str] | None,
    typer.Option(
        "--accept",
        metavar="KEY",
        help="with --resume: let what this key says or names differ from what the checkpoint was "
        "made of; may be repeated",
    ),
]
TakeOver = Annotated[
    bool,
    typer.Option("--take-over", help="with --resume: take run.folder from a run that still has it"),
]
Check = Annotated[
    bool,
    typer.Option("--check", help="check the recipe, print it with all defaults, and run nothing"),
]
CheckData = Annotated[
    bool,
    typer.Option("--data", help="with --check: also read all data, as the run would"),
]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback when a run fails")]


class RecipeCommand(TyperCommand):
    """A command whose help ends with every key of its recipe."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        formatter.write(
            "\nRecipe keys (name, type, default, meaning; N is a position in a list, from 0):\n\n"
        )
        formatter.write(listing(KINDS[str(self.name)]()) + "\n")
        for kind in ALGORITHMS if self.name == "rl" else ():
            formatter.write(f"\nKeys of algorithm for kind {kind}:\n\n")
            formatter.write(listing(find_algorithm(kind).Settings, "algorithm.") + "\n")


def recipe_command(kind: str) -> Callable[..., None]:
    def command(
        recipe: RecipeFile,
        overrides: Overrides = None,
        resume: Resumed = False,
        accept: Accept = None,
        take_over: TakeOver = False,
        check: Check = False,
        data: CheckData = False,
        debug: Debug = False,
    ) -> None:
        how = wanted(resume, accept, take_over)
        if data and not check:
            raise UserError("--data: only together with --check; a run always reads its data first")
        train(kind, recipe, overrides or [], how, check, data, debug)

    return command


for kind, meaning in TRAINING.items():
    app.command(kind, cls=RecipeCommand, help=meaning)(recipe_command(kind))


@app.command()
def demo(
    seed: Annotated[
        int, typer.Option(help="every source of randomness derives from it", min=0)
    ] = 0,
    folder: Annotated[
        Path, typer.Option(help="where the demo writes; replaced if it is there")
    ] = Path("runs/demo"),
    debug: Debug = False,
) -> None:
    """Run SFT, reward model, PPO and GRPO on a small task, offline, on two CPU cores,
    in minutes.
    """
    ours = folder == Path("runs/demo") or os.path.exists(folder / ".quatuor-demo")
    if os.path.exists(folder) and (not ours or Path.cwd().is_relative_to(folder.resolve())):
        raise UserError(
            f"--folder: {folder} exists and is not a demo's; it would be replaced: choose another"
        )
    guarded(folder, debug, "launch.demo.demo", "run_demo", folder, seed)


@app.command()
def plan(
    recipe: AnyRecipe,
    overrides: Overrides = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="also write the plan here")
    ] = None,
) -> None:
    """Print what a recipe will do and need, before anything starts: batches, devices, memory,
    transfers. Exit code 1 when it does not fit.
    """
    parsed, document = read_recipe(recipe, overrides or [])
    from launch.plan.table import show_plan

    if not show_plan(parsed, json_file, document):
        raise typer.Exit(FAILED)


@app.command()
def inspect(
    recipe: AnyRecipe,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="rows of each source to show")] = 10,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="also write these rows here")
    ] = None,
    debug: Debug = False,
) -> None:
    """Show what the data of a recipe become: rendered texts with the trained tokens marked, ids,
    lengths, what is dropped and why, rows that repeat. No model is loaded.
    """
    parsed, _ = read_recipe(recipe, overrides or [])
    guarded(None, debug, "launch.inspect", "inspect_recipe", parsed, rows, json_file)


@app.command()
def export(
    source: Annotated[
        Path,
        typer.Argument(metavar="RUN|CHECKPOINT", help="a run's folder (its newest checkpoint)"),
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="where to write; must not exist")],
    debug: Debug = False,
) -> None:
    """Write the model of a checkpoint for plain Transformers: of PPO the Actor's. One process, no
    GPU.
    """
    guarded(None, debug, "launch.export", "export_model", source, folder)


@app.command()
def doctor(
    device: Annotated[str, typer.Option(help="cpu or cuda: what runs shall use")] = "cpu",
    start: Annotated[
        bool, typer.Option(help="also start an engine and ZeRO (half a minute)")
    ] = True,
) -> None:
    """Tell whether this machine can run: versions, devices, Ray, ports, disk, shared memory,
    engine, ZeRO.
    """
    from launch.doctor import examine

    if not examine(device, start):
        raise typer.Exit(FAILED)


@app.command()
def submit(
    recipe: AnyRecipe,
    address: Annotated[
        str, typer.Option(help="the cluster's job server, such as http://head:8265")
    ],
    overrides: Overrides = None,
    resume: Resumed = False,
    accept: Accept = None,
    take_over: TakeOver = False,
) -> None:
    """Run a recipe as a job of a Ray cluster: ship this checkout, follow the log, return the job's
    exit code.
    """
    how = wanted(resume, accept, take_over)
    parsed, _ = read_recipe(recipe, overrides or [])
    from launch.cluster.ray_job import submit_job

    raise typer.Exit(submit_job(parsed.kind, recipe, overrides or [], address, how))


@app.command()
def slurm(
    recipe: AnyRecipe,
    overrides: Overrides = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="machines; default: the recipe's cluster.nodes"),
    ] = None,
    time_limit: Annotated[str, typer.Option("--time", help="Slurm's time limit")] = "24:00:00",
    partition: Annotated[str | None, typer.Option(help="Slurm's partition")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm's account")] = None,
    script: Annotated[
        Path | None, typer.Option(metavar="FILE", help="where to write the script")
    ] = None,
    send: Annotated[bool, typer.Option("--submit", help="also hand it to sbatch")] = False,
) -> None:
    """Write an sbatch script that starts a Ray cluster on the nodes and runs the recipe there."""
    parsed, _ = read_recipe(recipe, overrides or [])
    from launch.cluster.slurm import write_job

    write_job(parsed, recipe, overrides or [], nodes, time_limit, partition, account, script, send)


@app.command()
def version() -> None:
    """Print the version."""
    try:
        print(importlib.metadata.version("quatuor"))
    except importlib.metadata.PackageNotFoundError:
        print("not installed: a checkout (make install installs it)")


def wanted(resume: bool, accept: list[str] | None, take_over: bool) -> Resume | None:
    """Return how to resume, None for a new run. Raises UserError for options that only a resume
    has.
    """
    if resume:
        return Resume(tuple(OLD_KEYS.get(key, key) for key in accept or ()), take_over)
    if accept or take_over:
        raise UserError(f"{'--accept' if accept else '--take-over'}: only together with --resume")
    return None


def train(
    kind: str,
    path: Path,
    overrides: list[str],
    resume: Resume | None,
    check: bool,
    data: bool,
    debug: bool,
) -> None:
    """Check everything that can be known before a model loads, then run the recipe and print its
    summary. With `check` nothing runs; what is in the data is then looked at on demand.
    """
    recipe, document = read_recipe(path, overrides, kind, files=True, resume=resume)
    if problems := list(code_problems(recipe)):
        raise RecipeError([located(p, document) for p in problems])
    for line in accepted(recipe, resume.accept) if resume else ():
        print(line, file=sys.stderr)
    for key, model in models_of(recipe).items():
        if model.trust_remote_code:
            print(f"{key}: Python code that comes with {model.path} will run", file=sys.stderr)
    from launch.plan.resolve import resolve

    recipe, decided = resolve(recipe, document)
    if decided:
        print(f"notice: {decided}", file=sys.stderr)
    resolved = annotated(recipe, document)
    for line in kernel_notices(recipe) if check and not data else ():  # a run's data say it too
        print(f"notice: {line}", file=sys.stderr)
    if check:
        inside = (
            guarded(None, debug, "launch.inspect", "check_data", recipe, resume) if data else []
        )
        print("\n".join([resolved, *(f"# {line}" for line in inside)]))
        return
    folder = Path(recipe.run.folder)
    summary = guarded(folder, debug, RUNNER, "run", recipe, resume=resume, config_yaml=resolved)
    _print_summary(summary, recipe.run.folder)
    print(f"the trained model is in {recipe.run.folder}/model")


def guarded(
    folder: Path | None, debug: bool, module: str, function: str, *args: Any, **kwargs: Any
) -> Any:
    """Import and call; a failure that is not the user's becomes one line, its traceback a file in
    the run folder, or beside it. Without a run (None) it is not kept.
    """
    try:
        with catch_stop_signals():
            return getattr(importlib.import_module(module), function)(*args, **kwargs)
    except UserError:
        raise
    except Exception as error:
        if debug:
            raise
        kept = kept_traceback(folder) if folder else "--debug shows the traceback"
        fail(f"{first_line(error, folder or 'a file')} ({kept})")
        raise typer.Exit(FAILED) from None


def kept_traceback(folder: Path) -> str:
    """Write the traceback of the error under way into the run folder, or beside it if the run left
    none; return where it is.
    """
    log = folder / "error.log" if os.path.isdir(folder) else Path(f"{folder}.error.log")
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc())
    except OSError as error:
        return f"--debug shows the traceback, {log} cannot be written: {error.strerror}"
    return f"traceback in {log}"


def first_line(error: Exception, folder: Path | str) -> str:
    """Return an error's first line; one of the system's with the file, in `folder` if it has no
    name.
    """
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or folder}: {error.strerror}"
    return in_a_line(error)


def fail(line: str) -> None:
    print(f"error: {line}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code: 0, 1 failed, 2 bad input, 75 stopped with a
    checkpoint, 128 + signal stopped without one, 130 interrupted.
    """
    show_ray_token()
    outlive_terminal()
    try:
        code = app(arguments, prog_name="quatuor", standalone_mode=False)
    except TyperException as error:  # a command line that cannot be read
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        fail(f"{message.rstrip('.')}; see quatuor --help")
        return BAD_INPUT
    except UserError as error:
        for problem in error.problems:
            fail(problem)
        return BAD_INPUT
    except OSError as error:  # of a file that a command writes
        if error.errno is None:
            raise
        fail(first_line(error, "a file"))
        return FAILED
    except SystemExit as error:  # a run that was stopped by a signal
        print(error, file=sys.stderr)
        return int(error.code or 0)
    if code == 130:
        print("interrupted", file=sys.stderr)
    return code or 0


class Terminal(io.FileIO):
    """Standard output or error. Its terminal may be closed, or its reader end: nobody reads on, but
    a run goes on.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            return len(data)


def outlive_terminal() -> None:
    """Have what this program prints neither end it where nobody reads, nor where a terminal does
    not know a letter.
    """
    for name, original in (("stdout", sys.__stdout__), ("stderr", sys.__stderr__)):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if name == "stdout":  # stderr never fails
            stream.reconfigure(errors="replace")
        if stream is original:
            stream.flush()
            text = io.TextIOWrapper(
                io.BufferedWriter(Terminal(stream.fileno(), "w", closefd=False)),
                stream.encoding,
                stream.errors,
                line_buffering=stream.line_buffering or stream.write_through,
            )
            setattr(sys, name, text)


def show_ray_token() -> None:
    """Let Ray show its token to clusters that ask for one; a client that has one but no mode is
    turned away.

    Ray reads this when it is imported. The token is made by the first cluster started on a machine.
    """
    given = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if given or token_file().is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _print_summary(summary: dict[str, Any], folder: str) -> None:
    """Print a run's final metrics: one row per metric, a column for each part of the summary."""
    from rich.console import Console
    from rich.table import Table

    parts = {name: part for name, part in summary.items() if isinstance(part, dict)}
    parts |= {"result": {k: v for k, v in summary.items() if not isinstance(v, dict)}}
    parts = {name: part for name, part in parts.items() if part}
    if not parts:
        return
    table = Table("metric", title=folder)
    for name in parts:
        table.add_column(name, justify="right")
    for metric in dict.fromkeys(metric for part in parts.values() for metric in part):
        values = [part.get(metric, "") for part in parts.values()]
        table.add_row(metric, *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    Console().print(table)
