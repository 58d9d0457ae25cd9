"""The step of RL, by any algorithm. `Driver.step` is one training step, top to bottom: read that
first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from actors import begin
from actors.cluster.rows import gather_rows, scatter_rows
from actors.evaluation import evaluate
from actors.export import Export
from actors.mixtures import trained_sources
from actors.rewards.score import Score
from actors.rollouts.requests import requests_for, samples_of
from actors.rollouts.sample import Sample
from actors.run.alarms import AlarmLog, of_evaluation, of_experience, of_metrics, of_recipe
from actors.run.folder import RunFolder
from actors.run.metrics import reduce
from actors.run.resume import Resume
from actors.run_data import RunData
from actors.seeds import derive_seed
from actors.settings import RLRecipe
from actors.start import Workers
from actors.weights.agreement import check_engine_agrees
from learners.algorithms.base import AlgorithmSettings, find_algorithm
from learners.data.rows import Prompt, Rows
from learners.experience import Experience, Rollout, mini_batches
from learners.generation import sampling_defaults
from learners.kl import kl_estimate


def run(
    recipe: RLRecipe, resume: Resume | None = None, config_yaml: str | None = None
) -> dict[str, Any]:
    """Train by the recipe; return the summary."""
    return begin.run(recipe, resume, config_yaml)


class Driver:
    """Conducts the steps of one run. It holds handles and small tensors, never weights."""

    def __init__(
        self,
        recipe: RLRecipe,
        data: RunData,
        workers: Workers,
        folder: RunFolder,
        alarms: AlarmLog,
    ) -> None:
        self.recipe = recipe
        self.data = data
        self.workers = workers
        self.groups = workers.groups
        self.folder = folder
        folder.stopwatch = workers.gpu_sharing.stopwatch
        self.alarms = alarms
        self.seed = recipe.run.seed
        self.deadline_s = recipe.cluster.call_deadline_s
        self.total_steps = recipe.step.steps
        make_algorithm = find_algorithm(recipe.algorithm.kind)
        self.algorithm = make_algorithm(recipe.algorithm, recipe.step.group_size)
        self.export = Export(recipe, self.groups, data.tokenizer, data.stops)
        self.version = 0  # of the weights: the step they were learned in

    def begin(self, first: int) -> dict[str, Any]:
        """Connect the engines, check that they agree with the Actor, and evaluate it untrained."""
        recipe = self.recipe
        dropped = {f"dropped/{why}": float(n) for why, n in self.data.prompts.dropped.items()}
        self.folder.log(0, dropped, phase="data")
        self.workers.weights.connect(self.version)
        gap = check_engine_agrees(
            self.workers.engines, self.workers.actor, self.data.prompts, recipe
        )
        known = of_recipe(recipe, sampling_defaults(recipe.actor.model.path))
        alarms = self.alarms.report(0, known) if first == 1 else {}
        self.folder.log(first - 1, {"mismatch/gate": gap} | alarms, phase="gate")
        return {} if first > 1 else {"before": self.evaluate_all(0)}

    def step(self, step: int) -> tuple[dict[str, float], int]:
        """Collect, learn, sync; return the step's metrics and its tokens."""
        batch, metrics = self.collect(step)
        if step not in self.alarms.skipped:  # else neither the weights nor their version change
            with self.folder.phase("learn", step):
                self.workers.gpu_sharing.learn()
                metrics |= self.learn(batch, step)
                self.algorithm.after_step(batch)
            with self.folder.phase("sync", step):
                metrics |= self.workers.weights.sync(step)
                self.version = step
        metrics |= self.alarms.report(step, of_metrics(metrics, self.recipe))
        metrics |= self.workers.gpu_sharing.metrics()
        return metrics, int(batch.lengths.sum())

    def collect(self, step: int) -> tuple[Experience, dict[str, float]]:
        """Generate, score and compute advantages; return the step's experience and its metrics."""
        recipe = self.recipe
        workers = self.workers
        prompts = self.data.prompts_of(step, recipe.step.prompts_per_step, self.seed)
        group_size = recipe.step.group_size

        with self.folder.phase("generate", step):
            requests = requests_for(prompts, recipe.generation, group_size, (self.seed, step))
            rollouts = workers.engines.generate(requests, self.deadline_s)
            samples = samples_of(rollouts, prompts, group_size, self.data.template)
            batch = Experience.from_rollouts(rollouts)

        with self.folder.phase("score", step):
            pending_scores = workers.rewards.submit(samples)
            batch = self.read_models(batch)
            scores, by_source = workers.rewards.gather(pending_scores, samples)

        with self.folder.phase("advantages", step):
            reasons = [r.finish_reason for r in rollouts]
            batch = with_scores(batch, scores, reasons, recipe.algorithm)
            batch, metrics = self.algorithm.advantages(batch)
            metrics |= rollout_metrics(batch, rollouts, by_source)
            parts = self.data.prompts.parts
            metrics |= trained_sources(parts, step, recipe.step, batch, rollouts)
            metrics |= self.alarms.report(step, of_experience(batch, rollouts, by_source, recipe))
        rows = [sample_row(*row) for row in zip(samples, rollouts, scores, strict=True)]
        self.folder.save_samples(step, rows)
        return batch, metrics

    def read_models(self, batch: Experience) -> Experience:
        """Add log-probs and values, which Actor, Reference and Critic compute at the same time."""
        workers = self.workers
        reading = {}
        if self.recipe.algorithm.old_logprobs == "actor":
            reading["old_logprobs"] = scatter_rows(workers.actor, "infer", batch)
        else:
            batch = replace(batch, old_logprobs=batch.rollout_logprobs)
        if workers.reference is not None:
            reading["ref_logprobs"] = scatter_rows(*workers.reference, batch)
        if workers.critic is not None:
            reading["values"] = scatter_rows(workers.critic, "infer", batch)
        read = {k: gather_rows(v, batch, "score", self.deadline_s) for k, v in reading.items()}
        return replace(batch, **read)

    def learn(self, batch: Experience, step: int) -> dict[str, float]:
        """Pass `ppo_epochs` times over shuffled mini-batches; Actor and Critic step at the same
        time.

        Returns the means (of maxima the largest, of skipped updates the number) over all
        mini-batches. Of the very first one it also gives the largest |ratio - 1| and the gradient
        norm: nothing is learned yet, the ratio must be 1, the gradient not 0. When the old
        log-probs are the engine's, that ratio is the step's mismatch.
        """
        learners = self.workers.learners.items()
        history: list[dict[str, float]] = []
        for epoch in range(self.recipe.step.ppo_epochs):
            shuffle = torch.Generator().manual_seed(
                derive_seed(self.seed, step, "mini-batches", epoch)
            )
            for rows in mini_batches(len(batch), self.recipe.step.mini_batch_size, shuffle):
                part = batch.select(rows)
                learning = {n: (g, scatter_rows(g, "train", part)) for n, g in learners}
                metrics: dict[str, float] = {}
                for name, (group, pending) in learning.items():
                    stats = group.gather(pending.refs, "learn", self.deadline_s)[0]
                    metrics |= {f"{name}/{key}": value for key, value in stats.items()}
                history.append(metrics)
        first = {
            f"{key}_first": history[0][key]
            for key in ("actor/max_ratio_deviation", "actor/grad_norm")
        }
        if self.recipe.algorithm.old_logprobs == "engine":
            shown = {"mean": "log_ratio", "max": "max_log_ratio", "kl": "approx_kl"}
            first |= {f"mismatch/{name}": history[0][f"actor/{key}"] for name, key in shown.items()}
        return {k: reduce(k, [m[k] for m in history]) for k in history[0]} | first

    def evaluation_due(self, step: int) -> bool:
        """Tell whether to evaluate after this step; the last one is evaluated after the run."""
        every = self.recipe.evaluation.every_steps
        return bool(every) and step % every == 0 and step < self.total_steps

    def evaluate(self, step: int) -> dict[str, float]:
        """Return metrics of the held-out prompts."""
        return self._evaluate(step, self.data.held_out, "evaluation")

    def evaluate_all(self, step: int) -> dict[str, float]:
        """Evaluate held-out and test prompts, before and after a run; return and log the
        metrics.
        """
        with self.folder.phase("evaluate", step):
            metrics = self.evaluate(step) | self._evaluate(step, self.data.test, "test")
        if metrics:
            seconds = self.folder.seconds(step)
            self.folder.log(step, metrics | seconds, phase="evaluation")
        return metrics

    def _evaluate(self, step: int, prompts: Rows[Prompt], name: str) -> dict[str, float]:
        def keep(kind: str, *answers: Any) -> None:
            rows = [sample_row(*row) for row in zip(*answers, strict=True)]
            self.folder.save_answers(name, step, kind, rows)

        engines = self.workers.engines
        metrics, failures = evaluate(
            engines, self.judge, prompts, self.recipe, self.data.template, name, keep
        )
        return metrics | self.alarms.report(step, of_evaluation(name, failures))

    def judge(self, samples: Sequence[Sample]) -> Sequence[Score]:
        """Return the scores of evaluated samples: by the evaluation's function or, where there is
        none, by the recipe's rewards.
        """
        evaluator = self.workers.evaluator
        if evaluator is None:
            return self.workers.rewards.alone(samples)
        deadline_s = self.deadline_s
        (scores,) = evaluator.call("scores", samples, phase="evaluate", deadline_s=deadline_s)
        return scores

    def save(self, folder: Path, step: int) -> None:
        """Write a checkpoint from which the run goes on as if it had never stopped. Nobody comes
        back to shared GPUs for it: what is away is written from CPU memory.
        """
        for name, group in self.workers.learners.items():
            group.call_without_swap(
                "save", str(folder / name), phase="checkpoint", deadline_s=self.deadline_s
            )
        state = {"step": step, "version": self.version, "algorithm": self.algorithm.state()}
        (folder / "driver.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint. Everything else a step needs derives from (seed, step)."""
        for name, group in self.workers.learners.items():
            group.call("load", str(folder / name), phase="restore", deadline_s=self.deadline_s)
        state = json.loads((folder / "driver.json").read_text())
        self.version = state["version"]
        self.algorithm.load_state(state["algorithm"])

    def complete_model(self) -> dict[str, float]:
        """Leave the Actor as it is: all of it was trained."""
        return {}

    def end(self, step: int) -> dict[str, Any]:
        """Check that the frozen models have not changed, and evaluate the Actor."""
        self.workers.check_frozen()
        return {"after": self.evaluate_all(step)}


def with_scores(
    batch: Experience,
    scores: Sequence[Score],
    finish_reasons: Sequence[str],
    algorithm: AlgorithmSettings,
) -> Experience:
    """Add `scores` [B]: clipped, then less the penalty for a missing EOS. A NaN score takes its
    whole row out.
    """
    # differences within a group may lie behind float32's digits
    values = [math.nan if score.value is None else score.value for score in scores]
    raw = torch.tensor(values, dtype=torch.float64)
    clip = math.inf if algorithm.score_clip is None else algorithm.score_clip
    truncated = torch.tensor([reason != "stop" for reason in finish_reasons])
    final = raw.clamp(-clip, clip) - algorithm.missing_eos_penalty * truncated
    return replace(batch, scores=final, loss_mask=batch.loss_mask & ~raw.isnan()[:, None])


def rollout_metrics(
    batch: Experience, rollouts: Sequence[Rollout], by_source: Mapping[str, Sequence[Score]]
) -> dict[str, float]:
    """Return metrics of the responses and their scores, and of the distance between the engine's
    log-probs and the Actor's.
    """
    assert batch.scores is not None
    scored = batch.scores[~batch.scores.isnan()]
    metrics = {
        "response/length": fmean(len(r.response_ids) for r in rollouts),
        "response/truncated": fmean(r.finish_reason != "stop" for r in rollouts),
        "score/mean": float(scored.mean()) if len(scored) else math.nan,
        "score/std": float(scored.std(correction=0)) if len(scored) else math.nan,
        "score/unscorable": 1 - len(scored) / len(rollouts),
    }
    for name, scores in by_source.items():
        values = [s.value for s in scores if s.value is not None]
        metrics[f"score/{name}"] = reduce(f"score/{name}", values)
    return metrics | mismatch(batch)


def mismatch(batch: Experience) -> dict[str, float]:
    """Compare engine and Actor log-probs on the same tokens: |difference| in nats, and k3 of
    KL(engine || Actor) per token.

    Returns nothing when the engine's are the old log-probs: then the first mini-batch's ratio shows
    the difference.
    """
    old = batch.old_logprobs
    engine = batch.rollout_logprobs
    mask = batch.loss_mask
    assert old is not None and engine is not None
    if old is engine or not mask.any():
        return {}
    gap = (old - engine)[mask].abs()
    kl = kl_estimate(engine, old, "k3", mask)[mask]
    return {
        "mismatch/mean": float(gap.mean()),
        "mismatch/max": float(gap.max()),
        "mismatch/kl": float(kl.mean()),
    }


def sample_row(sample: Sample, rollout: Rollout, score: Score) -> dict[str, Any]:
    """Return one line of the samples file."""
    return {
        "prompt": sample.prompt,
        "response": sample.response,
        "score": score.value,
        "finish_reason": sample.finish_reason,
        "weight_versions": rollout.weight_versions,
        "response_ids": sample.response_ids,
        "columns": sample.columns,
    }


PARTS = begin.Parts(
    read=RunData.load,
    start=Workers,
    training=Driver,
    fingerprints=lambda workers: workers.loaded,
)
