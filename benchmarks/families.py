"""The matrix of model families: what works with which family, tried on tiny random models.

    .venv/bin/python benchmarks/families.py --json runs/families.json --page docs/models.md

Every family is examined in a process of its own, engine included, so that a crash is an answer like
any other. `--only` takes some; what the JSON file says of the others stays.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python looks beside it alone

CELLS = {  # in the order of the table's columns
    "actor": "Actor",
    "engine": "engine",
    "sync": "weight sync",
    "reward_model": "reward model",
    "plain_reward_model": "its export in plain Transformers",
    "critic_from_sft": "Critic from SFT",
    "critic_from_reward_model": "Critic from reward model",
    "export": "export",
    "bfloat16": "bfloat16",
}
WITH_ENGINE = ("engine", "sync")
LIMIT_S = 150.0
TABLE = ("<!-- table -->", "<!-- /table -->")

Cells = dict[str, str]


def examine_apart(
    name: str, cells: Sequence[str] = tuple(CELLS), limit_s: float = LIMIT_S
) -> Cells:
    """Return what was found of a family, in a process of its own: "yes" or words for every cell.

    A process that dies or takes longer than `limit_s` leaves words in the cells it owes.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=examine, args=(name, tuple(cells), theirs, folder))
        process.start()
        theirs.close()
        found, late = _received(ours, len(cells), time.monotonic() + limit_s)
        process.join(0 if late else 20)
        process.kill()
        process.join()
    why = f"no answer within {limit_s:.0f} s" if late else f"crashed ({process.exitcode})"
    return {cell: found.get(cell, why) for cell in cells}


def _received(pipe: Connection, count: int, deadline: float) -> tuple[Cells, bool]:
    """Return up to `count` answers, and whether the deadline was why there are no more."""
    found: Cells = {}
    with contextlib.suppress(EOFError):  # the process has ended
        while len(found) < count:
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                return found, True
            cell, words = pipe.recv()
            found[cell] = words
    return found, False


def examine(name: str, cells: Sequence[str], answers: Connection, folder: str) -> None:
    """Examine a family and send (cell, "yes" or words) as soon as each is known."""
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    silent = os.open(os.devnull, os.O_WRONLY)  # loading bars and warnings of every library
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    import torch

    torch.set_num_threads(1)
    from benchmarks import family_checks as checks
    from benchmarks.family_shapes import ENGINE_IN_BFLOAT16, SHAPES
    from learners.settings import ModelSettings

    def answer(cell: str, check: Any, *arguments: Any) -> None:
        if cell in cells:
            answers.send((cell, checks.words_of(folder, check, *arguments)))

    path = checks.make_model(SHAPES[name], Path(folder, "model"))
    reward_model = Path(folder, "reward_model")
    answer("actor", checks.check_actor, path)
    answer("export", checks.check_export, path, Path(folder, "export"))
    answer("bfloat16", checks.check_bfloat16, path)
    answer("reward_model", checks.check_reward_model, path, reward_model)
    answer("plain_reward_model", checks.check_plain_reward_model, path, reward_model)
    answer("critic_from_sft", checks.check_critic, path, Path(folder, "critic"))
    answer("critic_from_reward_model", checks.check_critic_of_reward_model, path, reward_model)
    if set(cells) & set(WITH_ENGINE):
        dtype = "bfloat16" if name in ENGINE_IN_BFLOAT16 else "float32"
        settings = ModelSettings(path=path, dtype=dtype)
        for cell, words in checks.with_engine(folder, settings).items():
            if cell in cells:
                answers.send((cell, words))
    answers.close()


def table(families: dict[str, Cells]) -> str:
    """Return the matrix as Markdown: what is not a plain yes is a number, explained below."""
    notes: dict[str, int] = {}
    lines = [f"| | {' | '.join(CELLS.values())} |", "|---|" + "---|" * len(CELLS)]
    for name, cells in families.items():
        shown = (_shown(cells.get(cell, "not tried"), notes) for cell in CELLS)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", *(f"{number}. {words}" for words, number in notes.items())])


def _shown(words: str, notes: dict[str, int]) -> str:
    return words if words == "yes" else f"no [{notes.setdefault(words, len(notes) + 1)}]"


def write_table(page: Path, families: dict[str, Cells]) -> None:
    """Put the matrix into a page, between its two marks."""
    text = page.read_text()
    before, begin, rest = text.partition(TABLE[0])
    _, end, after = rest.partition(TABLE[1])
    if not begin or not end:
        raise typer.BadParameter(f"{page}: has no {TABLE[0]} … {TABLE[1]} to write the table in")
    page.write_text(f"{before}{begin}\n\n{table(families)}\n\n{end}{after}")


def main(
    json_file: Annotated[Path, typer.Option("--json", help="what was found, by family and cell")],
    only: Annotated[str, typer.Option(help="names of families, separated by commas")] = "",
    page: Annotated[Path | None, typer.Option(help="Markdown page to write the table in")] = None,
) -> None:
    from benchmarks.family_shapes import SHAPES

    names = [name.strip() for name in only.split(",")] if only else list(SHAPES)
    if unknown := [name for name in names if name not in SHAPES]:
        raise typer.BadParameter(f"no family {unknown[0]!r}; there are {', '.join(SHAPES)}")
    known = json.loads(json_file.read_text())["families"] if json_file.exists() else {}
    for name in names:
        began = time.monotonic()
        known[name] = examine_apart(name)
        print(f"{name} ({time.monotonic() - began:.0f} s)", flush=True)
        for cell, words in known[name].items():
            print(f"  {CELLS[cell]}: {words}", flush=True)
        ordered = {name: known[name] for name in SHAPES if name in known}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"families": ordered}, indent=1) + "\n")
    if page is not None:
        write_table(page, ordered)


if __name__ == "__main__":
    typer.run(main)
