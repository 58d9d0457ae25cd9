"""Additions of numbers up to 20, asked in plain words: conversations, preference pairs and prompts
for a chat model, and the reward that checks a sum.

.venv/bin/python -m launch.tasks.additions --out data/additions

A sum is either for training or held out, in all three kinds of data alike, so that what one model
was taught is never what another is asked.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Annotated, Any

import typer

LARGEST = 20
HELD_OUT = 100  # of 441 sums
CONVERSATIONS = 400
PAIRS = 600
CHATTER = (
    "This is a classic example of how numbers are added in mathematics.",
    "In this case, the numbers are added from left to right, one after the other.",
    "Addition is one of the four basic operations, beside subtraction and others.",
)
EVASIONS = (
    "To add two numbers, you first have to understand what addition means.",
    "I'm sorry, but I can't answer that without knowing more about the numbers.",
    "The sum of two numbers depends on the numbers that are added.",
)

Message = dict[str, str]
Sum = tuple[int, int]


def right_sum(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    """Reward 1 where the last number of the response is the right one, else 0."""
    return [
        float(_last_number(response) == right)
        for response, right in zip(responses, answer, strict=True)
    ]


def sums(held_out: bool) -> list[Sum]:
    """Return the sums of one split in a fixed, mixed order; the two splits make up all of them."""
    every = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    random.Random("additions").shuffle(every)
    return every[:HELD_OUT] if held_out else every[HELD_OUT:]


def make_prompts(held_out: bool) -> list[dict[str, Any]]:
    """Return one row a sum: `prompt` (messages) and `answer`, what the reward needs."""
    return [{"prompt": [question(s)], "answer": str(sum(s))} for s in sums(held_out)]


def make_conversations(n: int, seed: int, held_out: bool) -> list[dict[str, Any]]:
    """Return `n` rows of `messages`: one to three sums, each answered plainly."""
    rng = random.Random(f"conversations {seed}")
    rows = []
    for _ in range(n):
        asked = rng.sample(sums(held_out), k=rng.randint(1, 3))
        rows.append({"messages": [turn for s in asked for turn in (question(s), said(plain(s)))]})
    return rows


def make_pairs(n: int, seed: int, held_out: bool) -> list[dict[str, Any]]:
    """Return `n` rows of `chosen` and `rejected`, each the whole conversation as messages.

    The plain right answer is chosen; rejected are, in equal shares, a wrong sum, the right one
    followed by chatter, and an evasion.
    """
    rng = random.Random(f"pairs {seed}")
    rows = []
    for s in rng.choices(sums(held_out), k=n):
        worse = rng.choice(
            (wrong(s, rng), f"{plain(s)}\n\n{rng.choice(CHATTER)}", rng.choice(EVASIONS))
        )
        rows.append(
            {"chosen": [question(s), said(plain(s))], "rejected": [question(s), said(worse)]}
        )
    return rows


def question(s: Sum) -> Message:
    return {"role": "user", "content": f"What is {s[0]} + {s[1]}?"}


def said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def plain(s: Sum) -> str:
    """Return the answer as it is taught: "7 + 5 = 12"."""
    return f"{s[0]} + {s[1]} = {sum(s)}"


def wrong(s: Sum, rng: random.Random) -> str:
    """Return a plain answer that is off by one to ten."""
    near = [n for n in range(max(0, sum(s) - 10), sum(s) + 11) if n != sum(s)]
    return f"{s[0]} + {s[1]} = {rng.choice(near)}"


def _last_number(text: str) -> str | None:
    numbers = re.findall(r"\d+", text)
    return numbers[-1] if numbers else None


def write(
    out: Annotated[Path, typer.Option(help="folder for the parquet files")],
    seed: Annotated[int, typer.Option(help="another seed draws other rows", min=0)] = 0,
) -> None:
    """Write parquet files: conversations (SFT), pairs (reward model) and prompts (GRPO), each for
    training and held out.
    """
    from pyarrow import Table, parquet

    files = {
        "conversations": make_conversations(CONVERSATIONS, seed, held_out=False),
        "conversations_held_out": make_conversations(HELD_OUT, seed, held_out=True),
        "pairs": make_pairs(PAIRS, seed, held_out=False),
        "pairs_held_out": make_pairs(2 * HELD_OUT, seed, held_out=True),
        "prompts": make_prompts(held_out=False),
        "prompts_held_out": make_prompts(held_out=True),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        parquet.write_table(Table.from_pylist(rows), out / f"{name}.parquet")
        print(f"{len(rows)} rows in {out / name}.parquet")


if __name__ == "__main__":
    typer.run(write)
