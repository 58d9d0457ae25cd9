"""Real runs on a real cluster, each started once: what they left behind is what the tests
look at.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from actors import driver, supervised
from actors.run.resume import Resume
from launch.demo.demo import RECIPES
from launch.recipe.read import load_recipe
from launch.tasks import unique_digits as task

SEED = 3


@dataclass(frozen=True)
class Run:
    """A finished run: its summary and everything in its folder."""

    folder: Path
    summary: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Metrics of the training steps, in order."""
        rows = [
            json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()
        ]
        return [row for row in rows if row["phase"] == "train"]

    @property
    def figures(self) -> list[dict[str, float]]:
        """Metrics of the training steps without times."""
        return [
            {
                k: v
                for k, v in row.items()
                if k not in ("phase", "time") and not k.startswith(("seconds/", "throughput/"))
            }
            for row in self.steps
        ]

    def samples(self, step: int) -> list[dict[str, Any]]:
        lines = (self.folder / "samples" / f"step-{step:06d}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def alarms(self) -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in (self.folder / "alarms.jsonl").read_text().splitlines()
        ]


@dataclass(frozen=True)
class Workshop:
    """Runs the demo's recipes on small data, in one folder and one Ray cluster."""

    folder: Path

    def run(self, kind: str, name: str, *overrides: str, resume: bool = False) -> Run:
        """Run a demo recipe with overrides; paths of data and models must be among them."""
        folder = self.folder / name
        fixed = [
            f"run.folder={folder}",
            f"run.seed={SEED}",
            "run.progress=false",
            "run.tensorboard=false",
            "run.final_checkpoint=false",
        ]
        recipe = load_recipe(RECIPES / f"demo_{kind}.yaml", [*fixed, *overrides], kind)
        module = supervised if kind in ("sft", "rm") else driver
        return Run(folder, module.run(recipe, resume=Resume() if resume else None))

    def logged(self) -> set[str]:
        """Names of the metrics of all runs so far, also of those that were stopped."""
        files = self.folder.glob("*/metrics.jsonl")
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return {name for row in rows for name in row} - {"step", "phase", "time"}

    def quick(self, name: str, sft: Run, *overrides: str, resume: bool = False) -> Run:
        """Two steps of GRPO with as few processes as there can be: no Reference, no evaluation."""
        few = ["algorithm.kl_beta=0", "evaluation.prompts=null", "evaluation.test_prompts=null"]
        few += [
            "evaluation.function=null",
            "evaluation.every_steps=0",
            "actor.ranks=1",
            "actor.zero_stage=0",
        ]
        size = ["step.steps=2", "step.prompts_per_step=8", "step.mini_batch_size=32"]
        return self.reinforce("grpo", name, sft, *few, *size, *overrides, resume=resume)

    def reinforce(
        self, kind: str, name: str, sft: Run, *overrides: str, resume: bool = False
    ) -> Run:
        """Run PPO or GRPO from an SFT run."""
        data = self.folder / "data"
        judged = {"prompts": "validation", "test_prompts": "test"}
        judged = {
            key: name for key, name in judged.items() if f"evaluation.{key}=null" not in overrides
        }
        paths = [
            f"actor.model.path={sft.model}",
            f"prompts.path={data / 'prompts.jsonl'}",
            *(f"evaluation.{key}.path={data / f'{name}.jsonl'}" for key, name in judged.items()),
            "evaluation.greedy=false",
            "run.samples_per_step=1000",
        ]
        return self.run(kind, name, *paths, *overrides, resume=resume)


@pytest.fixture(scope="session")
def workshop(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("runs")
    task.make_tokenizer(folder / "base")
    task.make_model(folder / "base", SEED)
    task.write_rows(folder / "data" / "sft.jsonl", task.make_demonstrations(8000, SEED))
    for name, split, count in (
        ("prompts", "train", 1000),
        ("validation", "validation", 100),
        ("test", "test", 400),
    ):
        task.write_rows(folder / "data" / f"{name}.jsonl", task.make_prompts(count, SEED, split))
    rows = [row["prompt"] for row in task.make_prompts(3000, SEED, "train")]
    pairs = task.make_pairs(rows, [[task.slip(prompt)] for prompt in rows], SEED)
    task.write_rows(folder / "data" / "pairs.jsonl", pairs[:-200])
    task.write_rows(folder / "data" / "pairs_test.jsonl", pairs[-200:])
    return Workshop(folder)


@pytest.fixture(scope="session")
def sft(workshop: Workshop) -> Run:
    """An SFT model that is right in roughly two of five answers."""
    base = workshop.folder / "base"
    data = workshop.folder / "data" / "sft.jsonl"
    return workshop.run(
        "sft",
        "sft",
        f"learner.model.path={base}",
        f"data.path={data}",
        "train.steps=120",
        f"held_out.path={data}",
        "held_out.limit=64",
        "learner.optimizer.warmup_steps=20",
    )


@pytest.fixture(scope="session")
def reward_model(workshop: Workshop, sft: Run) -> Run:
    """A decoder reward model, left-padded in training, calibrated."""
    data = workshop.folder / "data"
    return workshop.run(
        "rm",
        "rm",
        f"learner.model.path={sft.model}",
        f"data.path={data / 'pairs.jsonl'}",
        "train.steps=40",
        f"held_out.path={data / 'pairs_test.jsonl'}",
        "reward_model.padding_side=left",
        f"reward_model.calibration.path={data / 'sft.jsonl'}",
        "reward_model.calibration.limit=200",
    )


@pytest.fixture(scope="session")
def encoder_reward_model(workshop: Workshop) -> Run:
    """A BERT-style reward model with a tokenizer of its own."""
    base = workshop.folder / "encoder"
    data = workshop.folder / "data"
    make_encoder(base)
    return workshop.run(
        "rm",
        "rm_encoder",
        f"learner.model.path={base}",
        f"data.path={data / 'pairs.jsonl'}",
        "train.steps=40",
        f"held_out.path={data / 'pairs_test.jsonl'}",
        "reward_model.calibration=null",
        "learner.zero_stage=3",
        "learner.micro_batch_tokens=700",
    )


def make_encoder(folder: Path) -> None:
    """Save an untrained BERT of two layers and a character tokenizer with [CLS] and [SEP]."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *task.CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(
        zip(
            ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True
        )
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(str(folder))
    torch.manual_seed(SEED)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        pad_token_id=0,
        architectures=["BertModel"],
    )
    BertModel(config).save_pretrained(str(folder))
