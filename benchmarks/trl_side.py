"""TRL's half of parity_trl.py: every case through TRL's own trainers, in TRL's own environment.

    .venv-trl/bin/python benchmarks/trl_side.py FOLDER

Reads inputs.json and the models in FOLDER, writes trl.json (the reports of every optimizer step)
and trl/CASE (the weights after the last one). Nothing of TRL is replaced: its `rollout_func` hook
hands over the fixed responses.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

REPORTED = ("loss", "grad_norm", "accuracy")


def main(folder: Path) -> None:
    inputs = json.loads((folder / "inputs.json").read_text())
    reports = {}
    for case in inputs["cases"]:
        trainer = (grpo_trainer if case["kind"] == "grpo" else reward_trainer)(folder, case, inputs)
        trainer.train()
        trainer.save_model(str(folder / "trl" / case["name"]))
        reports[case["name"]] = [
            {name: log[name] for name in REPORTED if name in log}
            for log in trainer.state.log_history
            if "grad_norm" in log
        ]
    (folder / "trl.json").write_text(json.dumps(reports))


def grpo_trainer(folder: Path, case: dict[str, Any], inputs: dict[str, Any]) -> GRPOTrainer:
    groups = inputs["groups"]
    group_size = inputs["group_size"]
    rows = inputs["groups_per_batch"] * group_size
    args = GRPOConfig(
        **common(folder, case, inputs, rows),
        num_generations=group_size,
        num_iterations=inputs["epochs"],
        max_completion_length=inputs["max_response_tokens"],
        temperature=inputs["temperature"],
        shuffle_dataset=False,
        disable_dropout=True,
    )
    trainer = GRPOTrainer(
        model=str(folder / "policy"),
        reward_funcs=fixed_score,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(groups))]}),
        processing_class=tokenizer(inputs),
        rollout_func=fixed_responses(groups, case["gaps"]),
    )
    # TRL takes the policy's own start; another model makes the first KL count.
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(load_file(folder / "reference" / "model.safetensors"))
    return trainer


def fixed_responses(groups: list[dict[str, Any]], gaps: bool) -> Any:
    """Return a `rollout_func`: the prompt's text is the number of its group; every further row of
    it is its next response.
    """

    def rollout(prompts: list[str], _: GRPOTrainer) -> dict[str, list[Any] | None]:
        seen: Counter[str] = Counter()
        rows: dict[str, list[Any]] = {
            "prompt_ids": [],
            "completion_ids": [],
            "fixed": [],
            "env_mask": [],
        }
        for prompt in prompts:
            group = groups[int(prompt)]
            i = seen[prompt]
            seen[prompt] += 1
            rows["prompt_ids"].append(group["prompt"])
            rows["completion_ids"].append(group["responses"][i])
            rows["fixed"].append(group["scores"][i])
            rows["env_mask"].append(group["valid"][i])
        if not gaps:
            del rows["env_mask"]
        return {**rows, "logprobs": None}

    return rollout


def fixed_score(fixed: list[float], **_: Any) -> list[float]:
    return fixed


def reward_trainer(folder: Path, case: dict[str, Any], inputs: dict[str, Any]) -> RewardTrainer:
    pairs = inputs["pairs"]
    columns = {
        name: [pair["prompt"] + pair[name] for pair in pairs] for name in ("chosen", "rejected")
    }
    rows: dict[str, list[Any]] = {f"{name}_ids": ids for name, ids in columns.items()}
    if case["margins"]:
        rows["margin"] = [pair["margin"] for pair in pairs]
    return RewardTrainer(
        model=str(folder / "reward"),
        args=RewardConfig(**common(folder, case, inputs, len(pairs)), disable_dropout=True),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(inputs),
    )


def common(folder: Path, case: dict[str, Any], inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    """Return arguments of every trainer: all of `rows` in one optimizer step, float32 on a CPU,
    every step logged.
    """
    return {
        "output_dir": str(folder / "scratch"),
        "max_steps": inputs["steps"],
        "per_device_train_batch_size": rows // inputs["micro_batches"],
        "gradient_accumulation_steps": inputs["micro_batches"],
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **case["optimizer"][0],
        **case["trl"],
    }


def tokenizer(inputs: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one word per id: trainers insist on one, although ids alone go in."""
    words = {f"w{i}": i for i in range(inputs["vocab_size"])}
    words["<pad>"] = words.pop(f"w{inputs['pad']}")
    words["<eos>"] = words.pop(f"w{inputs['eos']}")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
