"""The gate before step 1: engine and Actor must give the same tokens the same log-probs, or the run
does not begin.

A difference here is what makes runs fail slowly: the ratio starts away from 1, and every update is
off-policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from actors.engines import Engines
from actors.evaluation import requests_for
from actors.groups import WorkerGroup
from actors.rows import gather_rows, scatter_rows
from actors.settings import RLRecipe
from learners.data import Prompt
from learners.experience import Experience, Rollout
from learners.settings import UserError

LONGEST_RESPONSE = (
    256  # tokens: long enough to show a drift along the response, short enough to cost little
)
PRECISION = 0.5  # nats: differences above this are more than another dtype or kernel


class GateError(UserError):
    """Engine and Actor disagree; the message says what differs most and what the likely
    causes are.
    """


def pass_gate(
    engines: Engines, actor: WorkerGroup, prompts: Sequence[Prompt], recipe: RLRecipe
) -> float:
    """Sample responses at the recipe's temperature and compare log-probs, engine against Actor, on
    the same ids.

    Returns the largest difference in nats; raises GateError when it is above the recipe's gate or
    not a number.
    """
    plain = recipe.generation.plain
    settings = plain.model_copy(
        update={"max_new_tokens": min(plain.max_new_tokens, LONGEST_RESPONSE)}
    )
    # Prompts are dealt to the engines in turn: every engine gets one.
    chosen = [prompts[i % len(prompts)] for i in range(max(recipe.sync.gate_prompts, len(engines)))]
    deadline = recipe.cluster.call_deadline_s
    rollouts = engines.generate(
        requests_for(chosen, settings, 1, (recipe.run.seed, "gate")), deadline
    )
    batch = Experience.from_rollouts(rollouts)
    logprobs = gather_rows(scatter_rows(actor, "infer", batch), batch, "gate", deadline)
    return check(rollouts, logprobs, recipe.gate, recipe.mean_gate, len(engines))


def check(
    rollouts: Sequence[Rollout],
    logprobs: Tensor,
    gate: float,
    mean_gate: float = math.inf,
    engines: int = 1,
) -> float:
    """Largest difference between the rollouts' log-probs and the Actor's [B,T].

    GateError if it is above `gate`, or the mean of all differences above `mean_gate`.
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
            over = over + (gap > gate)
            tokens = tokens + 1
            total = total + gap
    if not tokens:
        raise GateError(
            "gate: the engines sampled no token, so there is nothing to compare with the Actor"
        )
    if worst <= gate and total / tokens <= mean_gate:
        return worst
    i, t = place
    rollout = rollouts[i]
    mean = total / tokens
    raise GateError(
        [
            f"gate: engine and Actor log-probs differ by {worst:.2e} nats before step 1, "
            f"{mean:.2e} on average; "
            f"{over} of {tokens} tokens are above the gate of {gate:g} (sync.gate), "
            f"the average may be {mean_gate:g} (sync.mean_gate)",
            f"gate: largest at response token {t} (id {rollout.response_ids[t]}) of prompt "
            f"{rollout.prompt_index}: "
            f"engine[{rollout.slot % engines}] {rollout.logprobs[t]:.4f}, Actor "
            f"{float(logprobs[i, t]):.4f}",
            f"gate: likely causes: {likely_causes(worst, firsts, gate)}",
        ]
    )


def likely_causes(worst: float, firsts: float, gate: float) -> str:
    """What usually lies behind a difference of this size, seen at first tokens (`firsts`) or only
    later.
    """
    if math.isinf(worst):
        return "NaN or infinite logits: a broken checkpoint, or a dtype too narrow for this model"
    if worst <= min(100 * gate, PRECISION):
        return (
            "another dtype or attention kernel in the engine than in the Actor; "
            "if that is meant, raise sync.gate and sync.mean_gate"
        )
    if firsts > gate:
        return (
            "the engine serves other weights than the Actor (a model folder that changed, a "
            "head left stale), "
            "or its sampler changes the distribution (temperature, penalties)"
        )
    return (
        "positions or attention differ along the response (RoPE scaling, sliding window, a "
        "quantised KV cache)"
    )
