"""How fast a file of chat prompts is loaded and what memory it takes: the loader against a plain
loop that keeps a Python list.

    .venv/bin/python benchmarks/data.py --rows 1000000

Writes N rows of JSON lines into a temporary folder, makes a small tokenizer with a chat template,
and loads the rows with each, in a process of its own. Prints one line of JSON: rows per second, the
peak of each process' memory, and what of it was there before the first row.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WORDS = 2000
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
Load = Callable[[Path, Any], Sequence[Any]]


def write_rows(file: Path, count: int, words: int) -> None:
    """Write chat prompts: a system message and a question of so many words, with its answer."""
    choose = random.Random(0)
    with file.open("w") as out:
        for i in range(count):
            question = " ".join(f"w{choose.randrange(WORDS)}" for _ in range(words))
            prompt = [
                {"role": "system", "content": "w1 w2 w3"},
                {"role": "user", "content": question},
            ]
            out.write(json.dumps({"prompt": prompt, "answer": str(i)}) + "\n")


def write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    words = [*special, *(f"w{i}" for i in range(WORDS))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|end|>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def load(file: Path, tokenizer: Any) -> Sequence[Any]:
    """Load prompts as a run does."""
    from learners.data.rows import load_prompts
    from learners.settings import PromptData

    return load_prompts(PromptData(path=str(file), answer_columns=("answer",)), tokenizer)


def plain_loop(file: Path, tokenizer: Any) -> Sequence[Any]:
    """Load prompts with nothing checked and everything kept."""
    rows = []
    with file.open() as lines:
        for line in lines:
            row = json.loads(line)
            text = tokenizer.apply_chat_template(
                row["prompt"], tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            rows.append((text, ids, row["prompt"], row["answer"]))
    return rows


LOADERS: dict[str, Load] = {"loader": load, "plain": plain_loop}


def measure(which: str, folder: Path) -> dict[str, float]:
    """Load the rows in this process, then visit them in random order, as training does."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain_loop(folder / "few.jsonl", tokenizer)
    LOADERS[which](folder / "few.jsonl", tokenizer)  # imports count before, not as rows
    before = peak_mib()
    start = time.perf_counter()
    busy = time.process_time()
    rows = LOADERS[which](folder / "rows.jsonl", tokenizer)
    seconds = time.perf_counter() - start
    busy = time.process_time() - busy
    peak = peak_mib()
    visited = random.Random(0).sample(range(len(rows)), min(len(rows), 10_000))
    start = time.perf_counter()
    for i in visited:
        rows[i]
    visit = time.perf_counter() - start
    return {
        "rows": len(rows),
        "seconds": round(seconds, 2),
        "rows_per_second": round(len(rows) / seconds, 1),
        "rows_per_second_of_processor": round(len(rows) / busy, 1),
        "peak_mib": round(peak, 1),
        "peak_mib_of_rows": round(peak - before, 1),
        "microseconds_per_visit": round(1e6 * visit / len(visited), 1),
    }


def peak_mib() -> float:
    """Return the peak of this process' memory in MiB. It counts pages of mapped files, which the
    system may take back, so it is read before rows are visited.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how data are loaded.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=30, help="words of a question")
    parser.add_argument("--measure", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", options.rows, options.words)
        write_rows(folder / "few.jsonl", 100, options.words)
        write_tokenizer(folder)
        found = {}
        for which in LOADERS:
            command = [sys.executable, __file__, "--measure", which, "--folder", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[which] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
