"""The demo's task: sort the digits of a string and remove duplicates, as in "uniq:800299=" ->
"0289".

Everything the demo needs of it: tokenizer, untrained model, data, and the reward that checks an
answer. Data are drawn from a seed alone. A prompt's checksum decides its split, so no prompt is
ever in two splits.
"""

from __future__ import annotations

import json
import random
import string
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "validation", "test"]
SPECIAL = ("<pad>", "<bos>", "<eos>")  # ids 0, 1, 2
CHARACTERS = string.digits + string.ascii_lowercase + " :=+-*/,.?!()"
MAX_POSITIONS = 64


def make_tokenizer(folder: str | Path) -> None:
    """Save a tokenizer with one token per character; it puts BOS before a text and EOS nowhere."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos = SPECIAL
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=MAX_POSITIONS,
    ).save_pretrained(str(folder))


def make_model(folder: str | Path, seed: int) -> None:
    """Save an untrained Qwen3 decoder of 597,568 parameters in float32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    config = Qwen3Config(
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        initializer_range=0.05,
        max_position_embeddings=MAX_POSITIONS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype=torch.float32,
    )
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(str(folder))


def answer(prompt: str) -> str:
    """Return the right answer: "uniq:800299=" -> "0289"."""
    return "".join(sorted(set(_digits(prompt))))


def slip(prompt: str) -> str:
    """Return the mistake most demonstrations teach: sorted, duplicates kept. Right when there are
    none.
    """
    return "".join(sorted(_digits(prompt)))


def corrupt(text: str, rng: random.Random) -> str:
    """Return a right answer with a random small error; always different from it, and
    never empty.
    """
    (edit,) = rng.choices(list(EDITS), list(EDITS.values()))
    changed = edit(text, rng)
    return changed if changed not in (text, "") else corrupt(text, rng)


def split_of(prompt: str) -> Split:
    """Return a prompt's split: a tenth of all prompts is for the test, a tenth for validation
    (curves and tuning), the rest for training.
    """
    return {0: "test", 1: "validation"}.get(zlib.crc32(prompt.encode()) % 10, "train")  # type: ignore[return-value]


def make_prompts(n: int, seed: int, split: Split) -> list[dict[str, str]]:
    """Return `n` rows of `prompt` and `answer`; a prompt may come twice."""
    rng = random.Random(seed)
    prompts: list[str] = []
    while len(prompts) < n:
        prompt = f"uniq:{''.join(rng.choices(string.digits, k=rng.randint(4, 10)))}="
        if split_of(prompt) == split:
            prompts.append(prompt)
    return [{"prompt": p, "answer": answer(p)} for p in prompts]


def make_demonstrations(n: int, seed: int, split: Split = "train") -> list[dict[str, str]]:
    """Return `n` rows of `prompt` and `response`: 45 % right, 45 % with the slip, 10 % corrupted.

    An SFT model of these is partly competent on purpose: it leaves reinforcement learning something
    to do.
    """
    rng = random.Random(f"demonstrations {seed}")

    def respond(prompt: str) -> str:
        (kind,) = rng.choices(("right", "slip", "corrupted"), (0.45, 0.45, 0.10))
        if kind == "slip":
            return slip(prompt)
        return answer(prompt) if kind == "right" else corrupt(answer(prompt), rng)

    return [
        {"prompt": row["prompt"], "response": respond(row["prompt"])}
        for row in make_prompts(n, seed, split)
    ]


def make_pairs(
    prompts: Sequence[str], sampled: Sequence[Sequence[str]], seed: int
) -> list[dict[str, str]]:
    """Return preference pairs to train on: `prompt`, `chosen` (right), `rejected`.

    `sampled[i]` are a model's responses to `prompts[i]`. The rejected answer is one of its wrong
    ones with probability one half, otherwise (and where none is wrong) a corruption of the right
    answer.
    """
    rng = random.Random(seed)
    rows = []
    for prompt, responses in zip(prompts, sampled, strict=True):
        wrong = [r for r in responses if r != answer(prompt)]
        from_model = bool(wrong) and rng.random() < 0.5
        rejected = rng.choice(wrong) if from_model else corrupt(answer(prompt), rng)
        rows.append({"prompt": prompt, "chosen": answer(prompt), "rejected": rejected})
    return rows


def make_sampled_pairs(
    prompts: Sequence[str], sampled: Sequence[Sequence[str]]
) -> list[dict[str, str]]:
    """Return preference pairs to measure with: rejected is the model's first wrong response, if
    there is one.
    """
    wrong = [
        [r for r in responses if r != answer(p)]
        for p, responses in zip(prompts, sampled, strict=True)
    ]
    return [
        {"prompt": p, "chosen": answer(p), "rejected": responses[0]}
        for p, responses in zip(prompts, wrong, strict=True)
        if responses
    ]


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, one row each."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def exact_match(
    prompts: list[str], responses: list[str], finish_reasons: list[str], answer: list[str]
) -> list[float]:
    """Reward 1 for the right answer ended by EOS, else 0."""
    return [
        float(response == right and reason == "stop")
        for response, reason, right in zip(responses, finish_reasons, answer, strict=True)
    ]


def _digits(prompt: str) -> str:
    return prompt.removeprefix("uniq:").removesuffix("=")


def _substitute(text: str, rng: random.Random) -> str:
    i = rng.randrange(len(text))
    return text[:i] + rng.choice(string.digits) + text[i + 1 :]


def _swap(text: str, rng: random.Random) -> str:
    i = rng.randrange(len(text))
    return text[:i] + text[i : i + 2][::-1] + text[i + 2 :]


def _drop(text: str, rng: random.Random) -> str:
    i = rng.randrange(len(text))
    return text[:i] + text[i + 1 :]


def _double(text: str, rng: random.Random) -> str:
    i = rng.randrange(len(text))
    return text[:i] + text[i] + text[i:]


def _stop_early(text: str, rng: random.Random) -> str:
    return text[: rng.randrange(len(text))]


EDITS: dict[Callable[[str, random.Random], str], float] = {
    _substitute: 0.3,
    _swap: 0.2,
    _drop: 0.2,
    _double: 0.15,
    _stop_early: 0.15,
}
