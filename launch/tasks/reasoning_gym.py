"""reasoning-gym: puzzles that are generated, and verified by the package itself. Prompts to a file,
and the reward.

python -m launch.tasks.reasoning_gym --task gcd --task lcm --size 10000 --out data/train.jsonl
python -m launch.tasks.reasoning_gym --task gcd --task lcm --size 500 --seed 1 --without
data/train.jsonl --out …
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import reasoning_gym
import typer
from reasoning_gym.utils import SYSTEM_PROMPTS, extract_answer

INSTRUCTION = SYSTEM_PROMPTS["default"]  # asks for the answer between <answer> and </answer>


def score(prompts: list[str], responses: list[str], entry: list[str]) -> list[float]:
    """Score by the package's own verifier: 0 to 1 per response, 0 without an answer between the
    tags.
    """
    return [
        _verify(extract_answer(response), json.loads(one))
        for response, one in zip(responses, entry, strict=True)
    ]


def rows(task: str, size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield rows of `prompt` (chat messages) and `entry` (what the verifier needs, as JSON text).

    An entry whose own answer is not scored 1 after its way through JSON could never be rewarded: it
    is left out.
    """
    # The package seeds puzzle i with seed + i: neighbouring seeds would give the same puzzles,
    # shifted by one.
    for entry in reasoning_gym.create_dataset(task, size=size, seed=seed * 1_000_000):
        text = json.dumps(entry, default=str, ensure_ascii=False)
        if _verify(entry["answer"], json.loads(text)) == 1:
            messages = [
                {"role": "system", "content": INSTRUCTION},
                {"role": "user", "content": entry["question"]},
            ]
            yield {"prompt": messages, "entry": text}


def _verify(answer: str | None, entry: dict[str, Any]) -> float:
    if answer is None:
        return 0.0
    return float(_verifier(entry["metadata"]["source_dataset"])(answer, entry=entry))


@cache
def _verifier(task: str) -> Any:
    return reasoning_gym.get_score_answer_fn(task)


def _question(row: dict[str, Any]) -> str:
    return str(row["prompt"][-1]["content"])


def write(
    out: Annotated[Path, typer.Option(help="JSON-lines file to write")],
    task: Annotated[
        list[str], typer.Option(help="name of a reasoning-gym task; give several for a mixture")
    ],
    size: Annotated[int, typer.Option(help="puzzles, over all tasks", min=1)] = 10_000,
    seed: Annotated[int, typer.Option(help="another seed gives other puzzles", min=0)] = 0,
    without: Annotated[
        Path | None, typer.Option(help="leave out the prompts of this file, for held-out data")
    ] = None,
) -> None:
    """Write prompts for a reasoning-gym recipe."""
    known = set(reasoning_gym.factory.DATASETS)
    if unknown := [name for name in task if name not in known]:
        raise typer.BadParameter(
            f"no task {', '.join(unknown)}; there are {', '.join(sorted(known))}"
        )
    seen = (
        {_question(json.loads(line)) for line in without.open(encoding="utf-8")}
        if without
        else set()
    )
    share = -(-size // len(task))
    found = [row for name in task for row in rows(name, share, seed)]
    kept = [row for row in found if _question(row) not in seen]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8"
    )
    print(
        f"{len(kept)} prompts in {out}; left out {share * len(task) - len(kept)} (unverifiable, "
        "or in --without)"
    )


if __name__ == "__main__":
    typer.run(write)
