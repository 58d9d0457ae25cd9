"""The driver of PPO and GRPO. `Driver.step` is one training step, top to bottom: read that
first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from actors.cluster.layout import demands
from actors.cluster.placement import Placement
from actors.cluster.rows import gather_rows, scatter_rows
from actors.evaluation import mean, requests_for, samples_of
from actors.rewards.sources import Sample, Score
from actors.roles import Roles, RunData, start_roles
from actors.run.alarms import AlarmLog, of_evaluation, of_experience, of_metrics, of_recipe
from actors.run.folder import RunFolder
from actors.run.metrics import reduce
from actors.run.stop import Interrupted, catch_stop_signal, stop_requested
from actors.seeds import derive_seed
from actors.settings import GRPORecipe, PPORecipe
from actors.weights.agreement import DisagreementError, check_engine_agrees
from learners.advantages import kl_estimate
from learners.data import Prompt
from learners.experience import Experience, Rollout, mini_batches
from learners.models import sampling_defaults
from learners.settings import GRPOSettings, PPOSettings


def run(
    recipe: PPORecipe | GRPORecipe, resume: bool = False, config_yaml: str | None = None
) -> dict[str, Any]:
    """Train as the recipe says; returns the summary. Data and reward functions are checked before
    anything starts.

    `config_yaml`: the recipe as it is saved with the run, when it has comments to keep.
    """
    RunFolder.check(recipe.run, resume)
    data = RunData.load(recipe)
    with catch_stop_signal(), Placement(recipe.cluster, demands(recipe)) as placement:
        roles = start_roles(recipe, data, placement)
        with closing(RunFolder.open(recipe.run, config_yaml or recipe.to_yaml(), resume)) as folder:
            (folder.path / "placement.json").write_text(json.dumps(roles.nodes(), indent=2))
            try:
                summary = Driver(recipe, folder, data, roles).run(resume)
            except DisagreementError:
                if not resume:
                    folder.discard()  # nothing was begun: the name is free for another try
                raise
            folder.finish(summary)
    return summary


class Driver:
    """Conducts one run. It holds handles and small tensors, never weights."""

    def __init__(
        self, recipe: PPORecipe | GRPORecipe, folder: RunFolder, data: RunData, roles: Roles
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.data = data
        self.seed = recipe.run.seed
        self.deadline_s = recipe.cluster.call_deadline_s
        self.roles = roles
        self.algorithm = roles.algorithm
        self.alarms = AlarmLog(folder, recipe.run.max_skipped_steps)
        self.version = 0  # of the weights: the step they were learned in

    def run(self, resume: bool) -> dict[str, Any]:
        """All steps, evaluations and checkpoints, then the exported model. Returns the run's
        summary.
        """
        recipe = self.recipe
        folder = self.folder
        steps = self.recipe.step.steps
        folder.log(
            0, {f"dropped/{why}": n for why, n in self.data.prompts.dropped.items()}, phase="data"
        )
        frozen = self.roles.fingerprints()
        first = self.restore() + 1 if resume else 1
        self.roles.connect_engines(self.version)
        gap = check_engine_agrees(self.roles.engines, self.roles.actor, self.data.prompts, recipe)
        folder.log(first - 1, {"mismatch/gate": gap}, phase="gate")
        if first == 1:
            self.alarms.report(0, of_recipe(recipe, sampling_defaults(recipe.actor.model.path)))
        summary: dict[str, Any] = {"before": self.evaluate(0)} if first == 1 else {}
        for step in folder.progress(range(first, steps + 1), steps, recipe.kind):
            metrics = self.step(step)
            if (
                recipe.evaluation.every_steps
                and step % recipe.evaluation.every_steps == 0
                and step < steps
            ):
                with folder.phase("evaluate", step):
                    metrics |= self.evaluate_prompts(step, self.data.held_out, "evaluation")
            folder.log(step, metrics)
            due = (
                recipe.run.checkpoint_every_steps and step % recipe.run.checkpoint_every_steps == 0
            )
            leaving = stop_requested()
            if due or leaving or self.alarms.full:
                self.save(step)
            if self.alarms.full:
                raise self.alarms.stop(step)
            if leaving:
                raise Interrupted(step)
        self.roles.check_frozen(frozen)
        self.roles.actor.call(
            "export", str(folder.path / "model"), phase="export", deadline_s=self.deadline_s
        )
        self.data.tokenizer.save_pretrained(folder.path / "model")
        summary["after"] = self.evaluate(steps)
        return summary

    def step(self, step: int) -> dict[str, float]:
        """One step: generate, score, advantages, learn, sync. Returns its metrics."""
        recipe = self.recipe
        folder = self.folder
        roles = self.roles
        prompts = self.data.prompts_of(step, recipe.step.prompts_per_step, self.seed)
        group = recipe.step.group_size

        with folder.phase("generate", step):
            requests = requests_for(prompts, recipe.generation, group, (self.seed, step))
            rollouts = roles.engines.generate(requests, self.deadline_s)
            samples = samples_of(rollouts, prompts, group, self.data.tokenizer)
            batch = Experience.from_rollouts(rollouts)

        with folder.phase("score", step):
            pending_scores = roles.rewards.submit(samples)
            reading = {}
            if recipe.algorithm.old_logprobs == "actor":
                reading["old_logprobs"] = scatter_rows(roles.actor, "infer", batch)
            else:
                batch = replace(batch, old_logprobs=batch.rollout_logprobs)
            if roles.reference is not None:
                reading["ref_logprobs"] = scatter_rows(roles.reference, "logprobs", batch)
            if roles.critic is not None:
                reading["values"] = scatter_rows(roles.critic, "infer", batch)
            batch = replace(
                batch,
                **{k: gather_rows(v, batch, "score", self.deadline_s) for k, v in reading.items()},
            )
            scores, by_source = roles.rewards.gather(pending_scores, len(batch))

        with folder.phase("advantages", step):
            batch = with_scores(
                batch, scores, [r.finish_reason for r in rollouts], recipe.algorithm
            )
            batch, metrics = self.algorithm.advantages(batch)
            metrics |= rollout_metrics(batch, rollouts, by_source)
            metrics |= self.alarms.report(step, of_experience(batch, rollouts, by_source, recipe))
        folder.save_samples(
            step, [sample_row(*row) for row in zip(samples, rollouts, scores, strict=True)]
        )

        if step not in self.alarms.skipped:  # else neither the weights nor their version change
            with folder.phase("learn", step):
                roles.gpu_sharing.learn()
                metrics |= self.learn(batch, step)
                self.algorithm.after_step(batch)
            with folder.phase("sync", step):
                metrics["sync/probe_difference"] = roles.sync(step)
                self.version = step

        metrics |= self.alarms.report(step, of_metrics(metrics, recipe))
        return {**metrics, **folder.seconds(step)}

    def learn(self, batch: Experience, step: int) -> dict[str, float]:
        """`ppo_epochs` passes over shuffled mini-batches; Actor and Critic step at the same time.

        Returns the means (of maxima the largest, of skipped updates the number) over all
        mini-batches. Of the very first one it also gives the largest |ratio - 1| and the gradient
        norm: nothing is learned yet, the ratio must be 1, the gradient not 0. When the old
        log-probs are the engine's, that ratio is the step's mismatch.
        """
        learners = {"actor": self.roles.actor, "critic": self.roles.critic}
        history: list[dict[str, float]] = []
        for epoch in range(self.recipe.step.ppo_epochs):
            shuffle = torch.Generator().manual_seed(
                derive_seed(self.seed, step, "mini-batches", epoch)
            )
            for rows in mini_batches(len(batch), self.recipe.step.mini_batch_size, shuffle):
                part = batch.select(rows)
                learning = {
                    n: (g, scatter_rows(g, "train", part).refs)
                    for n, g in learners.items()
                    if g is not None
                }
                metrics: dict[str, float] = {}
                for name, (group, refs) in learning.items():
                    stats = group.gather(refs, "learn", self.deadline_s)[0]
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

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out prompts and, only before and after a run, the test prompts."""
        with self.folder.phase("evaluate", step):
            metrics = self.evaluate_prompts(step, self.data.held_out, "evaluation")
            metrics |= self.evaluate_prompts(step, self.data.test, "test")
        if metrics:
            self.folder.log(step, metrics, phase="evaluation")
        return metrics

    def evaluate_prompts(self, step: int, prompts: Sequence[Prompt], name: str) -> dict[str, float]:
        """Metrics of held-out prompts; where the function that judges failed, an alarm says how."""
        metrics, failures = self.roles.evaluate(prompts, name)
        return metrics | self.alarms.report(step, of_evaluation(name, failures))

    def save(self, step: int) -> None:
        """A checkpoint from which the run goes on as if it had never stopped."""
        with self.folder.phase("checkpoint", step), self.folder.checkpoint(step) as path:
            for name, group in self.roles.learners().items():
                group.call("save", str(path / name), phase="checkpoint", deadline_s=self.deadline_s)
            state = {"step": step, "version": self.version, "algorithm": self.algorithm.state()}
            (path / "driver.json").write_text(json.dumps(state))

    def restore(self) -> int:
        """Load the newest checkpoint; returns its step. Everything else a step needs derives from
        (seed, step).
        """
        found = self.folder.latest_checkpoint()
        assert found is not None, "RunFolder.resume has checked that a checkpoint exists"
        step, path = found
        for name, group in self.roles.learners().items():
            group.call("load", str(path / name), phase="restore", deadline_s=self.deadline_s)
        state = json.loads(Path(path, "driver.json").read_text())
        self.version = state["version"]
        self.algorithm.load_state(state["algorithm"])
        return step


def with_scores(
    batch: Experience,
    scores: Sequence[float],
    finish_reasons: Sequence[str],
    algorithm: PPOSettings | GRPOSettings,
) -> Experience:
    """Add `scores` [B]: clipped, then less the penalty for a missing EOS. A NaN score takes its
    whole row out.
    """
    # differences within a group may lie behind float32's digits
    raw = torch.tensor(scores, dtype=torch.float64)
    clip = math.inf if algorithm.score_clip is None else algorithm.score_clip
    truncated = torch.tensor([reason != "stop" for reason in finish_reasons])
    final = raw.clamp(-clip, clip) - algorithm.missing_eos_penalty * truncated
    valid = ~raw.isnan()[:, None].expand_as(batch.mask)
    return replace(batch, scores=final, valid=valid)


def rollout_metrics(
    batch: Experience, rollouts: Sequence[Rollout], by_source: Mapping[str, Sequence[Score]]
) -> dict[str, float]:
    """What was sampled and how it was scored; and how far the engine's log-probs are from the
    Actor's.
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
        metrics[f"score/{name}"] = mean([s for s in scores if isinstance(s, float)])
    return metrics | mismatch(batch)


def mismatch(batch: Experience) -> dict[str, float]:
    """Engine against Actor log-probs on the same tokens: |difference| in nats, and k3 of KL(engine
    || Actor) per token.

    Nothing when the engine's are the old log-probs: then the first mini-batch's ratio shows the
    difference.
    """
    old = batch.old_logprobs
    engine = batch.rollout_logprobs
    mask = batch.mask
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


def sample_row(sample: Sample, rollout: Rollout, score: float) -> dict[str, Any]:
    """One line of the samples file."""
    return {
        "prompt": sample.prompt,
        "response": sample.response,
        "score": score,
        "finish_reason": sample.finish_reason,
        "weight_versions": rollout.weight_versions,
        "response_ids": sample.response_ids,
        "columns": sample.columns,
    }
