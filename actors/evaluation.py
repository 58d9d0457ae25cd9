"""Evaluate the Actor on held-out prompts, sampled and greedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from actors.cluster.groups import WorkerError
from actors.mixtures import evaluated_sources
from actors.rewards.score import Score
from actors.rollouts.generator import Engines
from actors.rollouts.requests import requests_for, samples_of
from actors.rollouts.sample import Sample
from actors.run.metrics import reduce
from actors.settings import RLRecipe
from learners.data.rows import Prompt, Rows
from learners.data.templates import ChatTemplate
from learners.experience import Rollout

Judge = Callable[[Sequence[Sample]], Sequence[Score]]
Keep = Callable[[str, Sequence[Sample], Sequence[Rollout], Sequence[Score]], None]
"""Takes all that was evaluated, after its kind: sampled or greedy."""


def evaluate(
    engines: Engines,
    judge: Judge,
    prompts: Rows[Prompt],
    recipe: RLRecipe,
    template: ChatTemplate,
    name: str,
    keep: Keep,
) -> tuple[dict[str, float], list[str]]:
    """Score one response per prompt by `judge`, with the same seeds every time, and `keep` them.

    Returns metrics, none without prompts, and the errors of the judge where it failed for single
    responses. Raises WorkerError when it failed for all.

    The metrics are `{name}/score`, the mean over the sampled responses; with a function
    `{name}/accuracy_sampled` and `{name}/accuracy_greedy`; the mean lengths in tokens and, where
    there are any, the share of responses without a score, which count in no mean; of a mixture also
    those of every source.
    """
    metrics: dict[str, float] = {}
    failures: list[str] = []
    if not prompts:
        return metrics, failures
    function = recipe.evaluation.function
    deadline = recipe.cluster.call_deadline_s
    on_policy = recipe.generation.on_policy()
    seed = (recipe.run.seed, name)
    for kind in ("sampled", "greedy") if recipe.evaluation.greedy else ("sampled",):
        requests = requests_for(prompts, on_policy, 1, seed, greedy=kind == "greedy")
        rollouts = engines.generate(requests, deadline)
        samples = samples_of(rollouts, prompts, 1, template)
        scores = judge(samples)
        keep(kind, samples, rollouts, scores)
        values = [s.value for s in scores if s.value is not None]
        failures += (failed := [s.error for s in scores if s.error is not None])
        if len(failed) == len(scores):
            raise WorkerError(
                f"evaluate: {function or 'a reward'} fails for every response: {failed[0]}"
            )
        mean = reduce(f"{name}/accuracy_{kind}", values)
        metrics |= {f"{name}/score": mean} if kind == "sampled" else {}
        metrics |= {f"{name}/accuracy_{kind}": mean} if function else {}
        if len(values) < len(scores):
            metrics[f"{name}/unscorable_{kind}"] = 1 - len(values) / len(scores)
        metrics[f"{name}/length_{kind}"] = fmean(len(r.response_ids) for r in rollouts)
        metrics |= evaluated_sources(name, kind, prompts.parts, scores, rollouts, bool(function))
    return metrics, failures
