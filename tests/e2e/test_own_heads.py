"""A family for whose scores Transformers has no class, with a tokenizer that has no PAD, through a
whole run: reward model, export, and PPO that it judges and begins the Critic of.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import AutoConfig, AutoTokenizer, GraniteConfig, GraniteForCausalLM
from transformers import PreTrainedTokenizerFast as Tokenizer

from launch.export import export_model
from tests.e2e.conftest import Run, Workshop

pytestmark = [pytest.mark.engines, pytest.mark.models]


def make_base(folder: Path, tokenizer: Tokenizer) -> None:
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    written["added_tokens"] = [t for t in written["added_tokens"] if t["content"] != "<pad>"]
    core = tokenizers.Tokenizer.from_str(json.dumps(written))
    bare = Tokenizer(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")
    bare.save_pretrained(folder)
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    GraniteForCausalLM(config).save_pretrained(folder)


def test_a_family_without_heads_judges_and_values(workshop: Workshop, sft: Run) -> None:
    base = workshop.folder / "granite"
    data = workshop.folder / "data"
    make_base(base, AutoTokenizer.from_pretrained(sft.model))
    rm = workshop.run(
        "rm",
        "rm_granite",
        f"learner.model.path={base}",
        f"data.path={data / 'pairs.jsonl'}",
        "train.steps=3",
        "train.evaluate_every=0",
        f"held_out.path={data / 'pairs_test.jsonl'}",
        "held_out.limit=32",
        f"reward_model.calibration.path={data / 'sft.jsonl'}",
        "reward_model.calibration.limit=32",
        "learner.ranks=2",
        "learner.zero_stage=3",
        "run.checkpoint_every_steps=3",
    )
    said = (rm.folder / "notices.txt").read_text()
    assert "the tokenizer has no PAD" in said and "grows from" in said
    assert said.count("no GraniteForSequenceClassification") == 1
    assert (rm.model / "README.md").is_file()
    pad = AutoTokenizer.from_pretrained(rm.model).pad_token_id
    config = AutoConfig.from_pretrained(rm.model)
    assert config.pad_token_id == pad == config.vocab_size - 1

    export_model(rm.folder, workshop.folder / "granite_again")
    for name in ("model.safetensors", "README.md"):
        again = (workshop.folder / "granite_again" / name).read_bytes()
        assert again == (rm.model / name).read_bytes()

    ppo = workshop.reinforce(
        "ppo",
        "ppo_granite",
        sft,
        f"critic.model.path={rm.model}",
        f"rewards.0.model.path={rm.model}",
        "step.steps=1",
        "step.prompts_per_step=16",
        "step.mini_batch_size=16",
        "algorithm.kl_beta=0",
        "actor.ranks=1",
        "actor.zero_stage=0",
        "evaluation.prompts=null",
        "evaluation.test_prompts=null",
        "evaluation.function=null",
        "evaluation.every_steps=0",
    )
    (step,) = ppo.steps
    assert math.isfinite(step["critic/loss"]) and step["critic/grad_norm"] > 0
