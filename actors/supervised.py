"""SFT and reward-model training: the same loop, learners and optimizer step as RL, without
engines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from actors import begin
from actors.cluster.groups import WorkerGroup
from actors.cluster.processes import Processes
from actors.cluster.rows import gather_rows, scatter_rows
from actors.export import Export
from actors.mixtures import shares_of_sources
from actors.roles import roles_of
from actors.run.alarms import AlarmLog, of_training
from actors.run.folder import RunFolder
from actors.run.resume import Resume
from actors.seeds import rows_of_mixture
from actors.settings import RMRecipe, SFTRecipe
from learners.checkpoints import embedding_rows, is_encoder, load_config, load_tokenizer
from learners.data.pad import settle_filler, settle_pad
from learners.data.rows import Example, Rows, load_pairs, load_sft, notices_of
from learners.data.store import by_part
from learners.data.templates import ChatTemplate
from learners.data.tokenise import tokenizer_digest
from learners.errors import UserError
from learners.experience import Experience
from learners.fits import (
    adapter_problems,
    kernel_notices,
    kernel_problems,
    length_problems,
    vocabulary_problems,
)
from learners.generation import ends_of_generation, generation_config
from learners.heads import head_notice
from learners.settings import ModelSettings

EVALUATIONS = 10  # in a run whose recipe does not say how many


def run(
    recipe: SFTRecipe | RMRecipe, resume: Resume | None = None, config_yaml: str | None = None
) -> dict[str, Any]:
    """Train by the recipe; return the summary."""
    return begin.run(recipe, resume, config_yaml)


@dataclass(frozen=True)
class SupervisedData:
    """Checked rows, and `batch_of`, which turns rows into a batch."""

    tokenizer: Any
    batch_of: Callable[[Sequence[Any]], Experience]
    rows: Rows[Any]
    held_out: Rows[Any]
    calibration: Rows[Example]
    stops: Sequence[int] = ()
    of_model: Sequence[str] = ()  # what there is to say about it

    @classmethod
    def load(cls, recipe: SFTRecipe | RMRecipe, today: date | None = None) -> SupervisedData:
        """Read and check all data; templates print `today`. Raises UserError before any model
        loads.
        """
        model = recipe.learner.model
        tokenizer = load_tokenizer(model)
        encoder = is_encoder(load_config(model))
        ends = [] if encoder else ends_of_generation(model)
        template = ChatTemplate(tokenizer, ends, today)
        if isinstance(recipe, SFTRecipe):
            generation_config(model, tokenizer)  # the end writes it
            held_out: Rows[Any] = Rows()
            if recipe.held_out:
                held_out = load_sft(recipe.held_out, tokenizer, template=template)
            rows = load_sft(recipe.data, tokenizer, template=template)
            said = [settle_filler(tokenizer, embedding_rows(load_config(model)))]
            data = cls(tokenizer, examples_batch, rows, held_out, Rows(), template.stops)
        else:
            pairs = load_pairs(recipe.data, tokenizer, encoder, template)
            held_out_pairs = load_pairs(recipe.held_out, tokenizer, encoder, template)
            wanted = recipe.reward_model.calibration
            calibration = load_sft(wanted, tokenizer, encoder, template) if wanted else Rows()
            said = [] if encoder else _of_reward_model(model, tokenizer, template.stops)
            data = cls(tokenizer, pairs_batch, pairs, held_out_pairs, calibration)
        problems = _unreadable("learner.model", model, data.rows, data.held_out)
        problems = problems or kernel_problems("learner.model", model)
        problems = problems or adapter_problems("learner.model", model)
        if problems := problems or _uncalibratable(model, data.calibration):
            raise UserError(problems)
        said = [*filter(None, said), *kernel_notices({"learner.model": model})]
        return replace(data, of_model=said)

    @property
    def notices(self) -> list[str]:
        """Return what there is to say about files, texts and the model, once each."""
        return [*notices_of(self.rows, self.held_out, self.calibration), *self.of_model]

    @property
    def sets(self) -> dict[str, Rows[Any]]:
        """The data sets by the recipe's key."""
        others = {"held_out": self.held_out, "reward_model.calibration": self.calibration}
        return {"data": self.rows} | {key: rows for key, rows in others.items() if rows}

    def total_steps(self, recipe: SFTRecipe | RMRecipe) -> int:
        """Return the optimizer steps of the run."""
        train = recipe.train
        return train.steps or max(1, math.ceil(train.epochs * len(self.rows) / train.batch_size))


def _of_reward_model(model: ModelSettings, tokenizer: Any, stops: Sequence[int]) -> list[str]:
    """Settle the PAD of a decoder reward model whose texts end with one of `stops`; return what
    there is to say about that and about its head.
    """
    config = load_config(model)
    named = config.eos_token_id
    ends = {*stops, *(named if isinstance(named, list) else [named])}
    return [settle_pad(tokenizer, embedding_rows(config), ends), head_notice(config)]


def _unreadable(key: str, model: ModelSettings, *data_sets: Sequence[Any]) -> list[str]:
    """Return why the model could not read the rows: too few positions, or unknown ids."""
    problems = length_problems(key, model, max(row.tokens for row in chain(*data_sets)))
    ids = (part for row in chain(*data_sets) for part in row.parts)
    return problems or vocabulary_problems(key, model, ids)


def _uncalibratable(model: ModelSettings, rows: Sequence[Example]) -> list[str]:
    """Return why these rows could not calibrate the model at the end; nothing without rows."""
    if not rows:
        return []
    key = "reward_model.calibration"
    if len({(*row.prompt_ids, *row.response_ids) for row in rows}) < 2:
        return [
            f"{key}: {len(rows)} row(s) of one and the same text: a standard deviation needs the "
            "scores of at least two different ones"
        ]
    return _unreadable(key, model, rows)


def start_learner(
    recipe: SFTRecipe | RMRecipe, data: SupervisedData, processes: Processes
) -> WorkerGroup:
    """Have the learner's ranks load their model; return their group."""
    facts = {
        "total_steps": data.total_steps(recipe),
        "pad_token_id": data.tokenizer.pad_token_id,
    }
    group = processes.start(facts)[recipe.kind]
    if isinstance(recipe, RMRecipe):
        digest = tokenizer_digest(data.tokenizer)
        deadline_s = recipe.cluster.call_deadline_s
        group.call("remember_tokenizer", digest, phase="start", deadline_s=deadline_s)
    return group


class Supervised:
    """Trains one model on rows of data."""

    def __init__(
        self,
        recipe: SFTRecipe | RMRecipe,
        data: SupervisedData,
        group: WorkerGroup,
        folder: RunFolder,
        alarms: AlarmLog,
    ) -> None:
        self.recipe = recipe
        self.data = data
        self.group = group
        self.groups: dict[str, WorkerGroup] = {recipe.kind: group}
        self.folder = folder
        self.alarms = alarms
        self.total_steps = data.total_steps(recipe)
        self.export = Export(recipe, self.groups, data.tokenizer, data.stops)
        self.calibrated: dict[str, float] = {}
        self.rows_per_unit = roles_of(recipe)[recipe.kind].rows_per_unit

    def begin(self, first: int) -> dict[str, Any]:
        return {}

    def step(self, step: int) -> tuple[dict[str, float], int]:
        """Take one optimizer step; return its metrics and its tokens."""
        rows = self.data.rows
        size = self.recipe.train.batch_size
        picked = rows_of_mixture(step, size, rows.parts, self.recipe.run.seed, "rows")
        batch = self.data.batch_of([rows[i] for part in picked for i in part])
        with self.folder.phase("learn", step):
            metrics = self.share("train", batch) | shares_of_sources(rows.parts, picked)
        metrics |= self.alarms.report(step, of_training(metrics))
        return metrics, int(batch.lengths.sum())

    def evaluation_due(self, step: int) -> bool:
        every = self.recipe.train.evaluate_every
        if every is None:  # the end evaluates the last step
            every = math.ceil(self.total_steps / EVALUATIONS)
            return step % every == 0 and step < self.total_steps
        return bool(every) and step % every == 0

    def evaluate(self, step: int) -> dict[str, float]:
        """Return metrics on the held-out rows, without learning."""
        rows = self.data.held_out
        found: dict[str, dict[str, float]] = {}
        counts: dict[str, int] = {}
        for part, own in by_part(rows.parts, rows):
            batch = self.data.batch_of(own)
            found[part.name] = self.share("evaluate", batch)
            counts[part.name] = self.counted(batch)
        parts = {
            f"held_out/{part}/{name}": value
            for part, metrics in found.items()
            for name, value in metrics.items()
        }
        whole = {f"held_out/{name}": value for name, value in weighted(found, counts).items()}
        return whole | (parts if len(found) > 1 else {})

    def counted(self, batch: Experience) -> int:
        """Return over how many things the learner's metrics of a batch are means: tokens that are
        trained, or pairs.
        """
        if self.rows_per_unit > 1:
            return len(batch) // self.rows_per_unit
        return int(batch.loss_mask.sum())

    def save(self, folder: Path, step: int) -> None:
        self.call("save", str(folder / "learner"), phase="checkpoint")

    def load(self, folder: Path) -> None:
        self.call("load", str(folder / "learner"), phase="restore")

    def complete_model(self) -> dict[str, float]:
        """Set the mean and std of a reward model's scores from the calibration responses; return
        them.
        """
        if not self.data.calibration:
            return {}
        batch = examples_batch(self.data.calibration)
        pending = scatter_rows(self.group, "infer", batch)
        scores = gather_rows(pending, batch, "calibrate", self.recipe.cluster.call_deadline_s)
        mean = float(scores.mean())
        std = float(scores.std(correction=0))
        self.call("calibrate", mean, std, phase="calibrate")
        self.calibrated = {"calibration/mean": mean, "calibration/std": std}
        return self.calibrated

    def end(self, last: int) -> dict[str, Any]:
        """Evaluate; return and log the metrics."""
        with self.folder.phase("evaluate", last):
            summary = self.evaluate(last)
        summary |= {f"dropped/{why}": float(n) for why, n in self.data.rows.dropped.items()}
        summary |= self.calibrated
        self.folder.log(last, summary | self.folder.seconds(last), phase="evaluation")
        return summary

    def share(self, method: str, batch: Experience) -> dict[str, float]:
        """Call a learner's method on the batch; every rank returns the metrics of all of it."""
        pending = scatter_rows(self.group, method, batch, self.rows_per_unit)
        return self.group.gather(pending.refs, method, self.recipe.cluster.call_deadline_s)[0]

    def call(self, method: str, *args: Any, phase: str) -> None:
        """Call a learner's method on every rank and wait for it."""
        deadline = self.recipe.cluster.call_deadline_s
        self.group.call(method, *args, phase=phase, deadline_s=deadline)


def weighted(
    means: Mapping[str, Mapping[str, float]], counts: Mapping[str, int]
) -> dict[str, float]:
    """Return the means over all parts from those over each, of so many things."""
    if len(means) == 1:  # to its last digit
        return dict(*means.values())
    names = dict.fromkeys(name for metrics in means.values() for name in metrics)
    return {
        name: sum(metrics[name] * counts[part] for part, metrics in means.items())
        / sum(counts.values())
        for name in names
    }


def examples_batch(rows: Sequence[Any]) -> Experience:
    return Experience.from_ids(
        [r.prompt_ids for r in rows], [r.response_ids for r in rows], [r.loss_mask for r in rows]
    )


def pairs_batch(rows: Sequence[Any]) -> Experience:
    """Return a batch in which row 2i is the chosen answer of pair i, row 2i+1 the rejected one."""
    batch = examples_batch([answer for r in rows for answer in (r.chosen, r.rejected)])
    return replace(
        batch, margins=torch.tensor([r.margin for r in rows for _ in range(2)], dtype=torch.float32)
    )


PARTS = begin.Parts(read=SupervisedData.load, start=start_learner, training=Supervised)
