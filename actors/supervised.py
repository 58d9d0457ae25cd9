"""SFT and reward-model training: one loop, on the same learners and the same optimizer step as RL,
without engines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch

from actors.cluster.groups import WorkerGroup
from actors.cluster.layout import demands
from actors.cluster.placement import Placement
from actors.cluster.rows import gather_rows, scatter_rows
from actors.run.alarms import AlarmLog, of_training
from actors.run.folder import RunFolder
from actors.run.stop import Interrupted, catch_stop_signal, stop_requested
from actors.seeds import derive_seed, rows_of_step
from actors.settings import RMRecipe, SFTRecipe
from learners.data import Example, Pair, Rows, load_pairs, load_sft, tokenizer_digest
from learners.experience import Experience
from learners.models import (
    check_exportable_reward_model,
    is_encoder,
    length_problems,
    load_config,
    load_tokenizer,
    vocabulary_problems,
)
from learners.settings import UserError


def run(
    recipe: SFTRecipe | RMRecipe, resume: bool = False, config_yaml: str | None = None
) -> dict[str, Any]:
    """Train as the recipe says; returns the summary. Data is checked before anything starts."""
    RunFolder.check(recipe.run, resume)
    training = Supervised(recipe)
    with catch_stop_signal(), Placement(recipe.cluster, demands(recipe)) as placement:
        training.start(placement)
        with closing(RunFolder.open(recipe.run, config_yaml or recipe.to_yaml(), resume)) as folder:
            summary = training.run(folder, resume)
            folder.finish(summary)
    return summary


class Supervised:
    """Trains one model on rows of data; `batch_of` gpu_sharing rows into a batch."""

    def __init__(self, recipe: SFTRecipe | RMRecipe) -> None:
        """Reads and checks all data; raises UserError before any model loads."""
        self.recipe = recipe
        model = recipe.learner.model
        self.tokenizer = load_tokenizer(model)
        self.rows: Rows[Any]
        self.held_out: Sequence[Example | Pair]
        if isinstance(recipe, SFTRecipe):
            self.target = "learners.sft:SFTLearner"
            self.rows_per_unit = 1
            self.batch_of = examples_batch
            self.rows = load_sft(recipe.data, self.tokenizer)
            self.held_out = load_sft(recipe.held_out, self.tokenizer) if recipe.held_out else []
        else:
            self.target = "learners.reward_model:RewardModelLearner"
            self.rows_per_unit = 2
            self.batch_of = pairs_batch
            config = load_config(model)
            check_exportable_reward_model(config, self.tokenizer)
            encoder = is_encoder(config)
            self.rows = load_pairs(recipe.data, self.tokenizer, encoder)
            self.held_out = load_pairs(recipe.held_out, self.tokenizer, encoder)
            self.calibration = (
                load_sft(recipe.reward_model.calibration, self.tokenizer)
                if recipe.reward_model.calibration
                else []
            )
        longest = max(row.tokens for row in [*self.rows, *self.held_out])
        problems = length_problems("learner.model", model, longest)
        ids = (part for row in [*self.rows, *self.held_out] for part in row.parts)
        if problems := problems or vocabulary_problems("learner.model", model, ids):
            raise UserError(problems)
        train = recipe.train
        self.steps = train.steps or max(
            1, math.ceil(train.epochs * len(self.rows) / train.batch_size)
        )

    def start(self, placement: Placement) -> None:
        """Load the model on every rank."""
        kind = self.recipe.kind
        cluster = self.recipe.cluster
        self.group = WorkerGroup(kind, self.target, placement.options(kind))
        ranks = (cluster.device, cluster.call_deadline_s)
        self.wait(
            self.group.start(self.arguments(), cluster.start_deadline_s, distributed=ranks), "start"
        )

    def run(self, folder: RunFolder, resume: bool) -> dict[str, Any]:
        """All optimizer steps, then the exported model. Returns the held-out metrics."""
        recipe = self.recipe
        train = self.recipe.train
        first = self.restore(folder) + 1 if resume else 1
        alarms = AlarmLog(folder, recipe.run.max_skipped_steps)
        for step in folder.progress(range(first, self.steps + 1), self.steps, recipe.kind):
            picked = rows_of_step(step, train.batch_size, len(self.rows), recipe.run.seed, "rows")
            metrics = self.share("train", [self.rows[i] for i in picked])
            if train.evaluate_every and step % train.evaluate_every == 0:
                metrics |= self.evaluate()
            metrics |= alarms.report(step, of_training(metrics))
            folder.log(step, metrics)
            due = (
                recipe.run.checkpoint_every_steps and step % recipe.run.checkpoint_every_steps == 0
            )
            leaving = stop_requested()
            if due or leaving or alarms.full:
                with folder.checkpoint(step) as path:
                    self.wait(self.group.submit("save", str(path / "learner")), "checkpoint")
            if alarms.full:
                raise alarms.stop(step)
            if leaving:
                raise Interrupted(step)
        summary = self.evaluate() | {f"dropped/{why}": n for why, n in self.rows.dropped.items()}
        if isinstance(recipe, RMRecipe):
            self.wait(
                self.group.submit("remember_tokenizer", tokenizer_digest(self.tokenizer)), "export"
            )
            summary |= self.calibrate() if self.calibration else {}
        self.wait(self.group.submit("export", str(folder.path / "model")), "export")
        self.tokenizer.save_pretrained(folder.path / "model")
        folder.log(self.steps, summary, phase="evaluation")
        return summary

    def arguments(self) -> dict[str, Any]:
        """What the learner's constructor needs."""
        common = {"settings": self.recipe.learner, "total_steps": self.steps}
        if isinstance(self.recipe, SFTRecipe):
            return common
        head = {
            "pad_token_id": self.tokenizer.pad_token_id,
            "seed": derive_seed(self.recipe.run.seed, "head"),
        }
        return {**common, **head, "reward_model": self.recipe.reward_model}

    def evaluate(self) -> dict[str, float]:
        """Metrics on the held-out rows, without learning."""
        if not self.held_out:
            return {}
        return {f"held_out/{k}": v for k, v in self.share("evaluate", self.held_out).items()}

    def calibrate(self) -> dict[str, float]:
        """Set the scores' mean and std from the calibration responses."""
        batch = examples_batch(self.calibration)
        pending = scatter_rows(self.group, "infer", batch)
        scores = gather_rows(pending, batch, "calibrate", self.recipe.cluster.call_deadline_s)
        mean = float(scores.mean())
        std = float(scores.std(correction=0))
        self.wait(self.group.submit("calibrate", mean, std), "calibrate")
        return {"calibration/mean": mean, "calibration/std": std}

    def share(self, method: str, rows: Sequence[Example | Pair]) -> dict[str, float]:
        """Call a learner's method on the rows; every rank returns the metrics of all of them."""
        pending = scatter_rows(self.group, method, self.batch_of(rows), self.rows_per_unit)
        return self.wait(pending.refs, method)[0]

    def wait(self, pending: Sequence[Any], phase: str) -> list[Any]:
        cluster = self.recipe.cluster
        deadline = cluster.start_deadline_s if phase == "start" else cluster.call_deadline_s
        return self.group.gather(pending, phase, deadline)

    def restore(self, folder: RunFolder) -> int:
        found = folder.latest_checkpoint()
        assert found is not None, "RunFolder.resume has checked that a checkpoint exists"
        self.wait(self.group.submit("load", str(found[1] / "learner")), "restore")
        return found[0]


def examples_batch(rows: Sequence[Any]) -> Experience:
    return Experience.from_ids([r.prompt_ids for r in rows], [r.response_ids for r in rows])


def pairs_batch(rows: Sequence[Any]) -> Experience:
    """Row 2i is the chosen answer of pair i, row 2i+1 the rejected one."""
    batch = Experience.from_ids(
        [r.prompt_ids for r in rows for _ in range(2)],
        [ids for r in rows for ids in (r.chosen_ids, r.rejected_ids)],
    )
    return replace(
        batch, margins=torch.tensor([r.margin for r in rows for _ in range(2)], dtype=torch.float32)
    )
