"""The gate before step 1: engine and Actor must give the same tokens the same log-probs, or the run
does not begin.

A difference here is what makes runs fail slowly: the ratio starts away from 1, and every update is
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
from learners.errors import UserError
from learners.experience import Experience, Rollout
from learners.rows import Prompt

LONGEST_RESPONSE = (
    256  # tokens: long enough to show a drift along the response, short enough to cost little
)
PRECISION = 0.5  # nats: differences above this are more than another dtype or kernel


class DisagreementError(UserError):
    """Engine and Actor disagree; the message says what differs most and what the likely
    causes are.
    """


def check_engine_agrees(
    engines: Engines, actor: WorkerGroup, prompts: Sequence[Prompt], recipe: RLRecipe
) -> float:
    """Sample responses at the recipe's temperature and compare log-probs, engine against Actor, on
    the same ids.

    Returns the largest difference in nats; raises DisagreementError when it is above the recipe's
    gate or not a number.
    """
    plain = recipe.generation.on_policy()
    settings = plain.model_copy(
        update={"max_new_tokens": min(plain.max_new_tokens, LONGEST_RESPONSE)}
    )
    # Prompts are dealt to the engines in turn: every engine gets one.
    chosen = [
        prompts[i % len(prompts)] for i in range(max(recipe.sync.agreement_prompts, len(engines)))
    ]
    deadline = recipe.cluster.call_deadline_s
    rollouts = engines.generate(
        requests_for(chosen, settings, 1, (recipe.run.seed, "gate")), deadline
    )
    batch = Experience.from_rollouts(rollouts)
    logprobs = gather_rows(scatter_rows(actor, "infer", batch), batch, "gate", deadline)
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
    """Largest difference between the rollouts' log-probs and the Actor's [B,T].

    DisagreementError if it is above `gate`, or the mean of all differences above
    `mean_logprob_diff`.
    """
    worst = 0.0
    place = (0, 0)
    firsts = 0.0
    over = 0
    tokens = 0
    total = 0.0
    for i, rollout in enumerate(rollouts):
        for t, engine in enumerate(rollout.logprobs):
            gap = abs(engine - float(logprobs[i, t]))
            gap = gap if math.isfinite(gap) else math.inf
            firsts = max(firsts, gap) if t == 0 else firsts
            worst, place = max((worst, place), (gap, (i, t)))
            over = over + (gap > max_logprob_diff)
            tokens = tokens + 1
            total = total + gap
    if not tokens:
        raise DisagreementError(
            "gate: the engines sampled no token, so there is nothing to compare with the Actor"
        )
    if worst <= max_logprob_diff and total / tokens <= mean_logprob_diff:
        return worst
    i, t = place
    rollout = rollouts[i]
    mean = total / tokens
    raise DisagreementError(
        [
            f"gate: engine and Actor log-probs differ by {worst:.2e} nats before step 1, "
            f"{mean:.2e} on average; "
            f"{over} of {tokens} tokens are above the gate of {max_logprob_diff:g} "
            "(sync.max_logprob_diff), "
            f"the average may be {mean_logprob_diff:g} (sync.mean_logprob_diff)",
            f"gate: largest at response token {t} (id {rollout.response_ids[t]}) of prompt "
            f"{rollout.prompt_index}: "
            f"engine[{rollout.slot % engines}] {rollout.logprobs[t]:.4f}, Actor "
            f"{float(logprobs[i, t]):.4f}",
            f"gate: likely causes: {likely_causes(worst, firsts, max_logprob_diff)}",
        ]
    )


def likely_causes(worst: float, firsts: float, max_logprob_diff: float) -> str:
    """What usually lies behind a difference of this size, seen at first tokens (`firsts`) or only
    later.
    """
    if math.isinf(worst):
        return "NaN or infinite logits: a broken checkpoint, or a dtype too narrow for this model"
    if worst <= min(100 * max_logprob_diff, PRECISION):
        return (
            "another dtype or attention kernel in the engine than in the Actor; "
            "if that is meant, raise sync.max_logprob_diff and sync.mean_logprob_diff"
        )
    if firsts > max_logprob_diff:
        return (
            "the engine serves other weights than the Actor (a model folder that changed, a "
            "head left stale), "
            "or its sampler changes the distribution (temperature, penalties)"
        )
    return (
        "positions or attention differ along the response (RoPE scaling, sliding window, a "
        "quantised KV cache)"
    )
