"""Parity with TRL: the same model, token ids and scores through TRL's trainers and through
Quatuor's learners.

    .venv/bin/python benchmarks/parity_trl.py

TRL gets an environment of its own (.venv-trl, made when missing), which borrows every other package
from the one this runs in: the two sides differ in the system, not in the version of torch. Compared
are the loss and the gradient norm of every optimizer step, and the weights after the last. Exit
code 1 when any of them differs by more than 1e-5.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from quatuor_side import Report, train_case
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification
from transformers.utils import logging as transformers_logging

TRL = "1.16.0"
TOLERANCE = 1e-5
LEAST_MOVEMENT = 1e-3  # weights that hardly moved could not tell two systems apart
MUST_ACT = ("clip_fraction", "dual_clip_fraction", "kl")

VOCAB = 40
PAD = 0
EOS = 1
GROUP_SIZE = 4
GROUPS_PER_BATCH = 3
BATCHES = 2
EPOCHS = 2
PAIRS = 12
MAX_RESPONSE = 24
TEMPERATURE = 0.7
TRL_EPS = 1e-4
MICRO_BATCHES = 3  # one batch, cut into equal rows by TRL and by length by Quatuor
MICRO_BATCH_TOKENS = 70

CONVENTIONS = f"""\
What TRL and Quatuor do differently unless told otherwise, and what both do here:
- advantages: TRL divides by std + {TRL_EPS}, Quatuor by std + 1e-06; here both add {TRL_EPS}
- KL in the loss: TRL multiplies k3 by the ratio (use_bias_correction_kl), which changes its
  gradient from the first step on, Quatuor does not; here off. The Reference has other weights than
  those the policy starts from
- aggregation: TRL's default is dapo, Quatuor's sequence_mean; here loss_type grpo is sequence_mean,
  dapo token_mean, dr_grpo constant ({MAX_RESPONSE} tokens a response). TRL's dr_grpo divides by
  std, unless scale_rewards is "none"
- mini-batches: TRL's dapo divides by their average token count, Quatuor by each one's own; here
  every optimizer step sees all {GROUPS_PER_BATCH * GROUP_SIZE} responses of a batch, {EPOCHS} times
- dual clip: TRL's delta bounds the ratio whatever the sign of the advantage; the same while
  delta > 1 + epsilon_high
- precision: TRL's default is bfloat16 autocast; here float32, no dropout, temperature {TEMPERATURE}
- masks, alike by default: the end-of-sequence token counts, and a truncated response counts like
  any other
- optimizer: constant rate, weight decay on matrices only; AdamW's eps is 1e-5, because a smaller
  one turns rounding errors into steps wherever a gradient is almost 0"""

Both = tuple[dict[str, Any], dict[str, Any]]
"""One and the same choice, in TRL's words and in Quatuor's."""

LIKE_NAMED = {"learning_rate": 3e-3, "weight_decay": 0.1, "max_grad_norm": 0.0}
SGD = (
    {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.5},
    {"kind": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.5},
)
ADAMW = (
    {"optim": "adamw_torch", "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-5}
    | LIKE_NAMED,
    {"kind": "adamw", "betas": (0.9, 0.95), "eps": 1e-5} | LIKE_NAMED,
)


@dataclass(frozen=True)
class Case:
    """One configuration in two vocabularies: fields of TRL's config, and of Quatuor's settings."""

    name: str
    optimizer: Both
    trl: dict[str, Any]
    quatuor: dict[str, Any]
    kind: str = "grpo"  # or "reward"
    gaps: bool = False  # take tokens out of the responses' masks
    margins: bool = False


GRPO = ({"loss_type": "grpo"}, {"loss_aggregation": "sequence_mean"})
DAPO = (
    {"loss_type": "dapo", "epsilon_high": 0.28},
    {"loss_aggregation": "token_mean", "clip_high": 0.28},
)
DR_GRPO = (
    {"loss_type": "dr_grpo", "scale_rewards": "none"},
    {"loss_aggregation": "constant", "advantage": "dr_grpo"},
)
KL = ({"beta": 0.1, "use_bias_correction_kl": False}, {"kl_beta": 0.1})
DUAL_CLIP = ({"delta": 1.3}, {"dual_clip": 1.3})
SEQUENCE_RATIO = (
    {"importance_sampling_level": "sequence", "epsilon": 0.1},
    {"ratio": "sequence", "clip_low": 0.1, "clip_high": 0.1},
)


def case(name: str, optimizer: Both, *choices: Both, **more: Any) -> Case:
    trl, quatuor = (
        {key: value for choice in choices for key, value in choice[side].items()} for side in (0, 1)
    )
    return Case(name, optimizer, trl, quatuor, **more)


CASES = (
    case("grpo, SGD", SGD, GRPO),
    case("grpo", ADAMW, GRPO),
    case("grpo, KL", ADAMW, GRPO, KL),
    case("grpo, dual clip", ADAMW, GRPO, DUAL_CLIP),
    case("grpo, sequence ratio", ADAMW, GRPO, SEQUENCE_RATIO),
    case("dr_grpo", ADAMW, DR_GRPO),
    case("dr_grpo, KL", ADAMW, DR_GRPO, KL),
    case("dapo", ADAMW, DAPO),
    case("dapo, KL", ADAMW, DAPO, KL),
    case("dapo, gaps in the mask", ADAMW, DAPO, gaps=True),
    case("reward model, SGD", SGD, kind="reward"),
    case("reward model", ADAMW, kind="reward"),
    case("reward model, margin", ADAMW, kind="reward", margins=True),
    case(
        "reward model, centring",
        ADAMW,
        ({"center_rewards_coefficient": 0.05}, {"centring": 0.05}),
        kind="reward",
    ),
)


class Row(NamedTuple):
    case: str
    quantity: str
    trl: float  # of the last step
    quatuor: float
    difference: float  # the largest of all steps
    passed: bool


def main(
    venv: Annotated[Path, typer.Option(help="TRL's environment; made when missing")] = Path(
        ".venv-trl"
    ),
    zero_stage: Annotated[
        int, typer.Option(min=0, max=3, help="DeepSpeed ZeRO stage of Quatuor's side")
    ] = 2,
) -> None:
    """Run both sides, print what they computed, exit with 1 where they differ."""
    began = time.monotonic()
    console = Console(width=118)
    prepare(venv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = make_inputs()
        (folder / "inputs.json").write_text(json.dumps(inputs))
        make_models(folder)
        run_trl(venv, folder)
        theirs = json.loads((folder / "trl.json").read_text())
        ours = {
            case["name"]: train_case(folder, case, inputs, zero_stage) for case in inputs["cases"]
        }
        rows = [
            row
            for case in CASES
            for row in compare(folder, case, theirs[case.name], ours[case.name])
        ]
    console.print(CONVENTIONS, highlight=False)
    show(console, rows)
    clipped = [
        steps[-1]["clip_fraction"] for steps in ours.values() if "clip_fraction" in steps[-1]
    ]
    console.print(
        f"In the last step the clip held {min(clipped):.0%} to {max(clipped):.0%} of the tokens."
    )
    failed = [row for row in rows if not row.passed]
    console.print(
        f"{len(rows) - len(failed)} of {len(rows)} agree; {time.monotonic() - began:.0f} s"
    )
    raise typer.Exit(1 if failed else 0)


# --- TRL's side -----------------------------------------------------------------------------------


def prepare(venv: Path) -> None:
    """Make TRL's environment: TRL alone, and a path to the packages this process uses."""
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)}))
    if not (venv / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        (venv / ".gitignore").write_text("*\n")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if not (packages / f"trl-{TRL}.dist-info").exists():
        pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "--no-deps", f"trl=={TRL}"], check=True)


def run_trl(venv: Path, folder: Path) -> None:
    script = Path(__file__).with_name("trl_side.py")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    log = folder / "trl.log"
    with log.open("w") as output:
        command = [str(venv / "bin" / "python"), str(script), str(folder)]
        code = subprocess.run(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        ).returncode
    if code:
        sys.exit(f"{log.read_text()}\nTRL's side ended with code {code}")


# --- inputs ---------------------------------------------------------------------------------------


def make_inputs() -> dict[str, Any]:
    """Return all that both sides must agree on: token ids of very different lengths, scores,
    settings.
    """
    draw = random.Random(0)
    return {
        "cases": [asdict(case) for case in CASES],
        "groups": [make_group(draw, i) for i in range(BATCHES * GROUPS_PER_BATCH)],
        "pairs": [make_pair(draw) for _ in range(PAIRS)],
        "groups_per_batch": GROUPS_PER_BATCH,
        "group_size": GROUP_SIZE,
        "epochs": EPOCHS,
        "steps": BATCHES * EPOCHS,
        "micro_batches": MICRO_BATCHES,
        "micro_batch_tokens": MICRO_BATCH_TOKENS,
        "max_response_tokens": MAX_RESPONSE,
        "temperature": TEMPERATURE,
        "advantage_eps": TRL_EPS,
        "vocab_size": VOCAB,
        "pad": PAD,
        "eos": EOS,
    }


def make_group(draw: random.Random, number: int) -> dict[str, Any]:
    # the longest was truncated: no EOS
    lengths = [
        1,
        draw.randint(2, 6),
        draw.randint(8, 16),
        MAX_RESPONSE,
    ]
    responses = [
        words(draw, n) if n == MAX_RESPONSE else [*words(draw, n - 1), EOS] for n in lengths
    ]
    # The second group has no spread: nothing is to be learned from it.
    scores = [0.5] * GROUP_SIZE if number == 1 else [round(draw.gauss(0, 1), 3) for _ in responses]
    valid = [[int(i % 3 != 1) for i in range(n)] for n in lengths]  # for the case with gaps
    return {
        "prompt": words(draw, draw.randint(2, 9)),
        "responses": responses,
        "scores": scores,
        "valid": valid,
    }


def make_pair(draw: random.Random) -> dict[str, Any]:
    chosen, rejected = ([*words(draw, draw.randint(0, 15)), EOS] for _ in range(2))
    prompt = words(draw, draw.randint(2, 9))
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "margin": round(draw.uniform(0, 1), 3),
    }


def words(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(EOS + 1, VOCAB) for _ in range(count)]


def make_models(folder: Path) -> None:
    """Save two-layer models with random weights: the policy, another one as Reference, and a reward
    model.
    """
    transformers_logging.disable_progress_bar()
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        num_labels=1,
        dtype="float32",
    )
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(folder / name)
    Qwen3ForSequenceClassification(config).save_pretrained(folder / "reward")


# --- comparison -----------------------------------------------------------------------------------


def compare(folder: Path, case: Case, theirs: Report, ours: Report) -> Iterator[Row]:
    """Yield a row for each quantity of the optimizer steps, then one for the weights after the
    last, with how far they moved.
    """
    steps = list(zip(theirs, ours, strict=True))
    for name in ("loss", "grad_norm") if case.kind == "grpo" else ("loss", "grad_norm", "accuracy"):
        gap = largest(abs(a[name] - b[name]) / max(1.0, abs(a[name])) for a, b in steps)
        yield Row(case.name, name, theirs[-1][name], ours[-1][name], gap, gap <= TOLERANCE)
    before = load_file(
        folder / ("policy" if case.kind == "grpo" else "reward") / "model.safetensors"
    )
    after = [
        load_file(folder / side / case.name / "model.safetensors") for side in ("trl", "quatuor")
    ]
    a, b = (largest_difference(before, weights) for weights in after)
    gap = largest_difference(*after)
    passed = gap <= TOLERANCE and min(a, b) >= LEAST_MOVEMENT and acted(ours)
    yield Row(case.name, "weights (moved)", a, b, gap, passed)


def acted(ours: Report) -> bool:
    """Tell whether clip, dual clip and KL, where they are on, had an effect: otherwise they were
    not compared.
    """
    return all(max(step[name] for step in ours) > 0 for name in MUST_ACT if name in ours[0])


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    if a.keys() != b.keys():
        sys.exit(f"weights that only one side has: {sorted(a.keys() ^ b.keys())}")
    return largest(float((a[name] - b[name]).abs().max()) for name in a)


def largest(numbers: Iterable[float]) -> float:
    """Return the largest number, or NaN if one of them is: Python's max may step over it."""
    return float(torch.tensor(list(numbers), dtype=torch.float64).max())


def show(console: Console, rows: list[Row]) -> None:
    table = Table(
        title=f"last of {BATCHES * EPOCHS} optimizer steps; largest difference of all steps"
    )
    for column in ("case", "quantity", f"TRL {TRL}", "Quatuor", "difference"):
        table.add_column(column, justify="left" if column in ("case", "quantity") else "right")
    case = ""
    for row in rows:
        name = "" if row.case == case else row.case
        case = row.case
        cells = (
            name,
            row.quantity,
            f"{row.trl:.7f}",
            f"{row.quatuor:.7f}",
            f"{row.difference:.1e}",
        )
        table.add_row(
            *cells,
            style="" if row.passed else "bold red",
            end_section=row.quantity.startswith("weights"),
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
