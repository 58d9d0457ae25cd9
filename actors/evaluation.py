"""Evaluate the Actor on held-out prompts, sampled and greedy."""

from __future__ import annotations

from statistics import fmean

from actors.cluster.groups import WorkerError, WorkerGroup
from actors.mixtures import evaluated_sources
from actors.rollouts.generator import Engines
from actors.rollouts.requests import requests_for, samples_of
from actors.run.metrics import reduce
from actors.settings import RLRecipe
from learners.data.rows import Prompt, Rows
from learners.data.templates import ChatTemplate


def evaluate(
    engines: Engines,
    evaluator: WorkerGroup | None,
    prompts: Rows[Prompt],
    recipe: RLRecipe,
    template: ChatTemplate,
    name: str,
) -> tuple[dict[str, float], list[str]]:
    """Score one response per prompt by the evaluation's function, with the same seeds every time.

    Returns metrics, none without prompts or evaluator, and the errors of the function where it
    failed for single responses. Raises WorkerError when it failed for all.

    The metrics are `{name}/accuracy_sampled`, `{name}/accuracy_greedy`, the mean lengths in tokens
    and, where there are any, the share of responses without a score, which count in no mean; of a
    mixture also those of every source.
    """
    metrics: dict[str, float] = {}
    failures: list[str] = []
    if evaluator is None or not prompts:
        return metrics, failures
    deadline = recipe.cluster.call_deadline_s
    on_policy = recipe.generation.on_policy()
    seed = (recipe.run.seed, name)
    for kind in ("sampled", "greedy") if recipe.evaluation.greedy else ("sampled",):
        requests = requests_for(prompts, on_policy, 1, seed, greedy=kind == "greedy")
        rollouts = engines.generate(requests, deadline)
        samples = samples_of(rollouts, prompts, 1, template)
        (scores,) = evaluator.call("scores", samples, phase="evaluate", deadline_s=deadline)
        values = [s.value for s in scores if s.value is not None]
        failures += (failed := [s.error for s in scores if s.error is not None])
        if len(failed) == len(scores):
            raise WorkerError(
                f"evaluate: {recipe.evaluation.function} fails for every response: {failed[0]}"
            )
        accuracy = f"{name}/accuracy_{kind}"
        metrics[accuracy] = reduce(accuracy, values)
        if len(values) < len(scores):
            metrics[f"{name}/unscorable_{kind}"] = 1 - len(values) / len(scores)
        metrics[f"{name}/length_{kind}"] = fmean(len(r.response_ids) for r in rollouts)
        metrics |= evaluated_sources(name, kind, prompts.parts, scores, rollouts)
    return metrics, failures
