"""Peak memory of one optimizer step, all weights against an adapter, each in a process of its own.

    .venv/bin/python benchmarks/lora.py --json FILE [--device cuda]

The model is drawn at random, of 27M parameters. On a CPU the peak is the process's
resident memory above what it had before the model was loaded; on a GPU what torch had allocated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python looks beside it alone

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
RANK = 8
SEQUENCES = 8
TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="file for the numbers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        for name, rank in (("full", None), ("lora", RANK)):
            with context.Pool(1) as pool:
                found[name] = pool.apply(measure, (folder, rank, arguments.device))
            print(f"{name}: {found[name]}")
    arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def save_model(folder: str) -> None:
    """Write a model of random weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SHAPE)).save_pretrained(folder)


def measure(folder: str, rank: int | None, device: Literal["cpu", "cuda"]) -> dict[str, Any]:
    """Return the peak in MiB of two steps (the second has the optimizer's moments), and how many
    parameters are trained.
    """
    import torch

    from learners.experience import Experience
    from learners.settings import LearnerSettings, Rank
    from learners.sft import SFTLearner

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model: dict[str, Any] = {"path": folder, "lora": {"rank": rank} if rank else None}
    settings = LearnerSettings.model_validate(
        {"model": model, "zero_stage": 0, "micro_batch_tokens": TOKENS}
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    learner = SFTLearner(settings, 2, Rank(0, 1, "127.0.0.1", port, device))
    ids = torch.randint(0, SHAPE["vocab_size"], (SEQUENCES, TOKENS)).tolist()
    batch = Experience.from_ids([row[:4] for row in ids], [row[4:] for row in ids])
    for _ in range(2):
        learner.train(batch)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    parameters = list(learner.model.parameters())
    return {
        "peak_mib": round(peak, 1),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters": sum(p.numel() for p in parameters),
    }


if __name__ == "__main__":
    main()
