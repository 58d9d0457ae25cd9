"""Held-out prompts: what the Actor really scores, sampled and greedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from actors.cluster.groups import WorkerError, WorkerGroup
from actors.rewards.sources import Sample
from actors.rollouts.generator import Engines
from actors.seeds import derive_seed
from actors.settings import GenerationSettings, GRPORecipe, PPORecipe
from learners.experience import PromptRequest, Rollout
from learners.rows import Prompt


def requests_for(
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    group_size: int,
    seed_parts: tuple[int | str, ...],
    greedy: bool = False,
) -> list[PromptRequest]:
    """One request per prompt; sample k of the prompt in slot i is seeded from (seed_parts, prompt
    index, i, k).
    """
    return [
        PromptRequest(
            prompt_index=prompt.index,
            slot=slot,
            prompt_ids=prompt.ids,
            group_size=group_size,
            temperature=0.0 if greedy else settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            off_policy_sampling={} if greedy else settings.off_policy_sampling,
            seeds=tuple(derive_seed(*seed_parts, prompt.index, slot, k) for k in range(group_size))
            if settings.seeded and not greedy
            else None,
        )
        for slot, prompt in enumerate(prompts)
    ]


def samples_of(
    rollouts: Sequence[Rollout], prompts: Sequence[Prompt], group_size: int, tokenizer: Any
) -> list[Sample]:
    """Rollouts (ordered by request and sample) as text, with the text and columns of their
    prompts.
    """
    texts = tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)
    rows = [prompts[i // group_size] for i in range(len(rollouts))]
    return [
        Sample(
            rollout.prompt_ids,
            rollout.response_ids,
            row.text,
            text,
            rollout.finish_reason,
            row.columns,
        )
        for rollout, text, row in zip(rollouts, texts, rows, strict=True)
    ]


def mean(scores: Sequence[float]) -> float:
    """NaN without scores, and when one of them is not finite: infinities of both signs have no
    mean.
    """
    return fmean(scores) if scores and all(map(math.isfinite, scores)) else math.nan


def evaluate(
    engines: Engines,
    evaluator: WorkerGroup,
    prompts: Sequence[Prompt],
    recipe: PPORecipe | GRPORecipe,
    tokenizer: Any,
    name: str,
) -> tuple[dict[str, float], list[str]]:
    """One response per prompt, scored by the evaluation's function, with the same seeds every time.

    Returns metrics, and what the function said where it failed; raises WorkerError when it failed
    everywhere.

    Gives `{name}/accuracy_sampled`, `{name}/accuracy_greedy`, the mean lengths in tokens and, where
    there are any, the share of responses without a score, which count in no mean.
    """
    deadline = recipe.cluster.call_deadline_s
    metrics: dict[str, float] = {}
    failures: list[str] = []
    for kind in ("sampled", "greedy") if recipe.evaluation.greedy else ("sampled",):
        requests = requests_for(
            prompts,
            recipe.generation.on_policy(),
            1,
            (recipe.run.seed, name),
            greedy=kind == "greedy",
        )
        rollouts = engines.generate(requests, deadline)
        samples = samples_of(rollouts, prompts, 1, tokenizer)
        (scores,) = evaluator.call("scores", samples, phase="evaluate", deadline_s=deadline)
        scored = [s for s in scores if isinstance(s, float)]
        failures += (failed := [s for s in scores if isinstance(s, str)])
        if len(failed) == len(scores):
            raise WorkerError(
                f"evaluate: {recipe.evaluation.function} fails for every response: {failed[0]}"
            )
        metrics[f"{name}/accuracy_{kind}"] = mean(scored)
        if len(scored) < len(scores):
            metrics[f"{name}/unscorable_{kind}"] = 1 - len(scored) / len(scores)
        metrics[f"{name}/length_{kind}"] = fmean(len(r.response_ids) for r in rollouts)
    return metrics, failures
