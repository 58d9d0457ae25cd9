"""The agreement of engine and Actor before step 1: the run begins only if both give the same tokens
the same log-probs.

A difference here makes runs fail slowly: the ratio starts away from 1, and every update is
off-policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from actors.cluster.groups import WorkerGroup
from actors.cluster.rows import gather_rows, scatter_rows
from actors.rollouts.generator import Engines
from actors.rollouts.requests import requests_for
from actors.settings import RLRecipe
from learners.data.rows import Prompt
from learners.errors import DisagreementError
from learners.experience import Experience, Rollout

# tokens: long enough to show a drift along the response, short enough to cost little
LONGEST_RESPONSE = 256

PRECISION = 0.5  # nats: differences above this are more than another dtype or kernel


def check_engine_agrees(
    engines: Engines, actor: WorkerGroup, prompts: Sequence[Prompt], recipe: RLRecipe
) -> float:
    """Sample responses at the recipe's temperature and compare log-probs, engine against Actor, on
    the same ids.

    Returns the largest difference in nats. Raises DisagreementError when it is not within the
    recipe's `max_logprob_diff`, or the mean difference not within `mean_logprob_diff`.
    """
    settings = recipe.generation.on_policy()
    longest = min(settings.max_new_tokens, LONGEST_RESPONSE)
    settings = settings.model_copy(update={"max_new_tokens": longest})
    # Prompts are dealt to the engines in order: every engine gets one.
    count = max(recipe.sync.agreement_prompts, len(engines))
    chosen = [prompts[i % len(prompts)] for i in range(count)]
    deadline = recipe.cluster.call_deadline_s
    requests = requests_for(chosen, settings, 1, (recipe.run.seed, "gate"))
    rollouts = engines.generate(requests, deadline)
    batch = Experience.from_rollouts(rollouts)
    logprobs = gather_rows(scatter_rows(actor, "infer", batch), batch, "before step 1", deadline)
    return check(
        rollouts, logprobs, recipe.max_logprob_diff, recipe.mean_logprob_diff, len(engines)
    )


def check(
    rollouts: Sequence[Rollout],
    logprobs: Tensor,
    max_logprob_diff: float,
    mean_logprob_diff: float = math.inf,
    engines: int = 1,
) -> float:
    """Return the largest difference between the rollouts' log-probs and the Actor's [B,T].

    Raises DisagreementError when it is above `max_logprob_diff`, when the mean of all differences
    is above `mean_logprob_diff`, and when there is no token to compare.
    """
    gaps = {  # by row and token; infinite where it is not a number
        (i, t): gap if math.isfinite(gap := abs(engine - float(logprobs[i, t]))) else math.inf
        for i, rollout in enumerate(rollouts)
        for t, engine in enumerate(rollout.logprobs)
    }
    if not gaps:
        raise DisagreementError(
            "before step 1: the engines sampled no token, so there is nothing to compare with the "
            "Actor"
        )
    worst, (i, t) = max((gap, position) for position, gap in gaps.items())
    mean = sum(gaps.values()) / len(gaps)
    if worst <= max_logprob_diff and mean <= mean_logprob_diff:
        return worst
    over = sum(gap > max_logprob_diff for gap in gaps.values())
    first_token = max(gap for (_, token), gap in gaps.items() if token == 0)
    rollout = rollouts[i]
    raise DisagreementError(
        [
            f"before step 1: engine and Actor log-probs differ by {worst:.2e} nats, {mean:.2e} on "
            f"average; {over} of {len(gaps)} tokens are above {max_logprob_diff:g} "
            "(sync.max_logprob_diff), "
            f"the average may be {mean_logprob_diff:g} (sync.mean_logprob_diff)",
            f"before step 1: largest at response token {t} (id {rollout.response_ids[t]}) of "
            f"prompt {rollout.prompt_index}: "
            f"engine[{rollout.slot % engines}] {rollout.logprobs[t]:.4f}, Actor "
            f"{float(logprobs[i, t]):.4f}",
            f"before step 1: likely causes: {likely_causes(worst, first_token, max_logprob_diff)}",
        ]
    )


def likely_causes(worst: float, first_token: float, max_logprob_diff: float) -> str:
    """Return the usual causes of a difference of this size, seen at first tokens (`first_token` is
    the largest there) or only later.
    """
    if math.isinf(worst):
        return "NaN or infinite logits: a broken checkpoint, or a dtype too narrow for this model"
    if worst <= min(100 * max_logprob_diff, PRECISION):
        return (
            "another dtype or attention kernel in the engine than in the Actor; "
            "if that is meant, raise sync.max_logprob_diff and sync.mean_logprob_diff"
        )
    if first_token > max_logprob_diff:
        return (
            "the engine serves other weights than the Actor (a model folder that changed, a head "
            "left stale), or its sampler changes the distribution (temperature, penalties)"
        )
    return (
        "positions or attention differ along the response (RoPE scaling, sliding window, a "
        "quantised KV cache)"
    )
