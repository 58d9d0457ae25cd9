"""TRL's GRPO on the work of gpu_grpo.yaml, run where TRL is installed.

    PYTHON benchmarks/gpu_trl.py MODEL PROMPTS --json FILE --device cuda --steps 4 --prompts 32 ...

On a GPU it generates with vLLM in its own process, without sleep mode; on a CPU, where TRL's vLLM
is not to be had, with Transformers. Seconds of a step are those between the beginnings of two
generations.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import zlib
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

MICRO_BATCH = 16  # responses of one forward and backward pass


def spread(completions: list[str], **_: Any) -> list[float]:
    """Return the scores that our side gives."""
    return [zlib.crc32(text.encode()) % 1000 / 1000 for text in completions]


def config(options: argparse.Namespace) -> GRPOConfig:
    """Return the recipe in TRL's words."""
    responses = options.prompts * options.group
    micro = min(MICRO_BATCH, options.mini_batch)
    on_gpu: dict[str, Any] = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.35,
        "vllm_max_model_length": options.tokens + 128,
        "bf16": True,
    }
    return GRPOConfig(
        output_dir=str(options.json.with_suffix("")),
        max_steps=options.steps * responses // options.mini_batch,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=options.mini_batch // micro,
        steps_per_generation=responses // micro,
        num_generations=options.group,
        max_completion_length=options.tokens,
        temperature=1.0,
        beta=0.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=1,
        **(on_gpu if options.device == "cuda" else {"use_cpu": True, "bf16": False}),
    )


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    for name in ("--steps", "--prompts", "--group", "--mini-batch", "--tokens"):
        parser.add_argument(name, type=int, required=True)
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.data.read_text().splitlines()]
    trainer = GRPOTrainer(
        model=options.model,
        reward_funcs=spread,
        args=config(options),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )
    marks: list[float] = []
    generate = trainer._generate_and_score_completions

    def marked(inputs: Any) -> Any:
        synchronise(options.device)
        marks.append(time.perf_counter())
        return generate(inputs)

    trainer._generate_and_score_completions = marked
    trainer.train()
    synchronise(options.device)
    marks.append(time.perf_counter())
    steps = [after - before for before, after in pairwise(marks)]
    found: dict[str, Any] = {"steps": steps, "step_s": median(steps[1:] or steps)}
    found["dtype"] = str(next(trainer.model.parameters()).dtype)
    if options.device == "cuda":
        found["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
    options.json.write_text(json.dumps(found))
    os._exit(0)  # vLLM's threads would keep it for a while


if __name__ == "__main__":
    main()
