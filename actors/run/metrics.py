"""Every metric a run logs, as data: its meaning, unit and healthy range, the reduction of a step's
mini-batches to one number, and its position in the progress line and on the demo's page.

`python -m actors.run.metrics` prints docs/metrics.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """The description of a metric, or of several that one sentence explains.

    `pattern` is a name; in it `<a|b>` stands for either word and `<word>` for any text, such as a
    source's name. `reduction` makes one number of a step's mini-batches: "mean", "max", "count"
    (adds up), or "" where a step has only one. `headline` is the position in the progress line,
    `chart` the title on the demo's page. `better` says which of two values is, where that can be
    told: then `run.keep_best` may name the metric.
    """

    pattern: str
    unit: str
    meaning: str
    healthy: str = ""
    reduction: str = ""
    headline: int | None = None
    chart: str | None = None
    better: Literal["", "higher", "lower"] = ""

    @property
    def names(self) -> list[str]:
        """Every name the pattern stands for; `<word>` stays as it is."""
        parts = re.split(r"<([^<>]*\|[^<>]*)>", self.pattern)
        return ["".join(chosen) for chosen in product(*(part.split("|") for part in parts))]


ALARMS = {  # name, as a pattern: meaning
    "skipped": "Something could not be learned from: the whole step, or single updates.",
    "reward_error": "A function failed for some responses, in a step or in an evaluation.",
    "score_not_finite": "A source gave a score that is NaN, infinite or beyond 1e15.",
    "<rollout_logprobs|old_logprobs|ref_logprobs|values|advantages|returns>_not_finite": (
        "Tokens of this quantity are NaN or infinite; the step is skipped."
    ),
    "<actor|critic|learner>_<loss|gradient>_not_finite": (
        "Loss or gradient was NaN or infinite and the update was skipped (`learner` in SFT and"
        " reward-model runs)."
    ),
    "nothing_to_learn": "No response has both a token and a score; the step is skipped.",
    "unscorable": "More responses than `alarms.unscorable` have no score.",
    "equal_scores": "All scores of the step are equal: there is nothing to prefer.",
    "no_spread": "In every group all scores are equal: no response has an advantage.",
    "all_truncated": "No response ended by itself.",
    "zero_gradient": "The Actor's gradient was 0 in every mini-batch.",
    "mismatch": "A token's engine and Actor log-probs differ by more than `alarms.mismatch`.",
    "mean_mismatch": (
        "Engine and Actor log-probs differ on average by more than `alarms.mean_mismatch`."
    ),
    "clip_fraction": "More tokens than `alarms.clip_fraction` were held by the ratio clip.",
    "entropy_low": "Entropy below `alarms.least_entropy`: the Actor hardly explores.",
    "entropy_high": "Entropy above `alarms.most_entropy`: the Actor is close to noise.",
    "ignored_sampling": "The model's own sampling defaults are not applied; told before step 1.",
    "fallen": "The metric of `run.keep_best` has fallen clearly below the best.",
    "best_not_kept": "The best model so far could not be calibrated or written.",
    "final_checkpoint": "The checkpoint at the end could not be saved; the model is complete.",
    "distorted_sampling": (
        "Responses are not sampled from the policy's own distribution and are weighed; told before"
        " step 1."
    ),
}

FAMILIES: dict[str, tuple[Metric, ...]] = {
    "Held-out prompts: what the Actor really scores": (
        Metric(
            "evaluation/score",
            "score",
            "Mean score of the sampled responses to the held-out prompts: by the evaluation's"
            " function, or where there is none the weighted sum of the recipe's rewards.",
            "rises",
            better="higher",
        ),
        Metric(
            "evaluation/accuracy_sampled",
            "score",
            "Mean score by the evaluation's function, one sampled response per held-out prompt.",
            "rises",
            headline=4,
            chart="True accuracy, sampled (validation prompts)",
            better="higher",
        ),
        Metric(
            "evaluation/accuracy_greedy",
            "score",
            "Mean score by the evaluation's function, one greedy response per held-out prompt.",
            "rises",
            chart="True accuracy, greedy (validation prompts)",
            better="higher",
        ),
        Metric(
            "test/score",
            "score",
            "The same as `evaluation/score` on the test prompts, only before and after a run.",
            "higher after than before",
        ),
        Metric(
            "test/accuracy_<sampled|greedy>",
            "score",
            "Mean score on the test prompts, only before and after a run.",
            "higher after than before",
        ),
        Metric(
            "<evaluation|test>/unscorable_<sampled|greedy>",
            "share",
            "Responses that got no score, which count in no mean.",
            "absent",
        ),
        Metric(
            "<evaluation|test>/length_<sampled|greedy>",
            "tokens",
            "Mean length of the evaluated responses.",
        ),
    ),
    "Scores of a step": (
        Metric(
            "score/mean",
            "score",
            "Mean score of the step as the algorithm sees it: weighted sum of the sources, clipped,"
            " less the penalty for a missing EOS.",
            "rises",
            headline=1,
            chart="Mean score of a step (PPO: reward model, GRPO: exact match)",
        ),
        Metric("score/std", "score", "Standard deviation of these scores.", "above 0"),
        Metric(
            "score/unscorable",
            "share",
            "Responses without a score, left out of statistics and loss.",
            "below `alarms.unscorable` (0.1)",
        ),
        Metric("score/<source>", "score", "Mean score of one source, before its weight.", "rises"),
    ),
    "Sources of a mixture, where the data are several": (
        Metric(
            "source/<name>/share",
            "share",
            "Rows of the step that come from this source of the training data.",
            "its weight",
        ),
        Metric(
            "source/<name>/score",
            "score",
            "As `score/mean`, over the responses to the prompts of this source.",
            "rises",
        ),
        Metric(
            "source/<name>/length",
            "tokens",
            "As `response/length`, over the responses to the prompts of this source.",
        ),
        Metric(
            "<evaluation|test>/<name>/<score|accuracy_sampled|accuracy_greedy>",
            "score",
            "Mean score of one source of the prompts: of the sampled responses, and by the"
            " evaluation's function.",
            "rises",
        ),
        Metric(
            "<evaluation|test>/<name>/unscorable_<sampled|greedy>",
            "share",
            "Responses to the prompts of this source that got no score.",
            "absent",
        ),
        Metric(
            "<evaluation|test>/<name>/length_<sampled|greedy>",
            "tokens",
            "Mean length of the evaluated responses to the prompts of this source.",
        ),
        Metric(
            "held_out/<name>/<loss|accuracy|margin>",
            "",
            "As `held_out/loss` and its neighbours, over the held-out rows of this source.",
        ),
    ),
    "KL to the Reference": (
        Metric(
            "kl/sequence",
            "nats",
            "KL of the Actor to the Reference (`k1`), summed over a sequence, mean over sequences.",
            "0 at step 1, then grows slowly",
            headline=2,
            chart="KL to the reference, nats per sequence",
        ),
        Metric(
            "kl/beta",
            "",
            "Weight of the KL in PPO's rewards; moves only with `algorithm.kl_target`.",
        ),
    ),
    "Responses": (
        Metric(
            "response/length",
            "tokens",
            "Mean length of the responses, the token that ends them included.",
            headline=3,
            chart="Response length, tokens",
        ),
        Metric(
            "response/truncated",
            "share",
            "Responses cut at `generation.max_new_tokens`, without a token that ends them.",
            "well below 1",
        ),
    ),
    "Rewards, values and advantages": (
        Metric(
            "reward/per_sequence",
            "score",
            "A sequence's summed rewards (score less the KL penalty), mean over sequences; absent"
            " in GRPO.",
            "rises",
        ),
        Metric(
            "advantage/std",
            "score",
            "Standard deviation of the advantages, before they are whitened: over responses in"
            " GRPO, else over tokens.",
            "above 0",
        ),
        Metric("value/mean", "score", "PPO: mean value, over tokens.", "near `return/mean`"),
        Metric("return/mean", "score", "Mean return, over tokens; absent in GRPO."),
        Metric(
            "value/explained_variance",
            "",
            "PPO: 1 - Var(return - value) / Var(return): 1 when the Critic foresees every return, 0"
            " when it knows nothing.",
            "rises towards 1",
        ),
        Metric(
            "group/with_spread",
            "share",
            "GRPO: prompt groups in which the scores differ, the only ones that teach.",
            "well above 0",
        ),
    ),
    "Actor and Critic, over the mini-batches of a step": (
        Metric(
            "actor/loss",
            "",
            "The Actor's loss, near 0 where advantages have mean 0: no measure of progress.",
            reduction="mean",
        ),
        Metric(
            "critic/loss",
            "score²",
            "PPO: half the Critic's squared error, clipped.",
            "falls",
            reduction="mean",
        ),
        Metric(
            "<actor|critic>/grad_norm",
            "",
            "Norm of the gradient before it is clipped.",
            "finite, above 0",
            reduction="mean",
        ),
        Metric(
            "actor/grad_norm_first",
            "",
            "Norm of the gradient in the step's first mini-batch, where nothing is learned yet.",
            "above 0",
        ),
        Metric(
            "<actor|critic>/learning_rate", "", "The learning rate, scheduled.", reduction="mean"
        ),
        Metric(
            "<actor|critic>/skipped_updates",
            "updates",
            "Optimizer steps left out because loss or gradient was not finite.",
            "0",
            reduction="count",
        ),
        Metric(
            "actor/clip_fraction",
            "share",
            "Tokens held by the ratio clip, which have no gradient.",
            "below `alarms.clip_fraction` (0.5)",
            reduction="mean",
        ),
        Metric(
            "actor/dual_clip_fraction",
            "share",
            "Tokens held by the dual clip (with `algorithm.dual_clip`).",
            "near 0",
            reduction="mean",
        ),
        Metric("actor/ratio", "", "Mean ratio of new to old probability.", "near 1", "mean"),
        Metric(
            "actor/max_ratio_deviation",
            "",
            "Largest distance of a ratio from 1.",
            reduction="max",
        ),
        Metric(
            "actor/max_ratio_deviation_first",
            "",
            "Largest distance of a ratio from 1 in the first mini-batch, where it must be 1.",
            "rounding: 1e-4 in float32",
        ),
        Metric(
            "actor/log_ratio", "nats", "Mean size of new - old log-prob.", "small", reduction="mean"
        ),
        Metric("actor/max_log_ratio", "nats", "Largest size of new - old log-prob.", "", "max"),
        Metric(
            "actor/approx_kl",
            "nats",
            "`k3` estimate of KL(old ‖ new), per token.",
            "small, never negative",
            reduction="mean",
        ),
        Metric(
            "actor/entropy",
            "nats",
            "Entropy per token, estimated from the sampled tokens.",
            "between `alarms.least_entropy` (0.001) and `alarms.most_entropy` (9)",
            reduction="mean",
        ),
        Metric(
            "actor/kl",
            "nats",
            "GRPO: `k3` estimate of the KL to the Reference in the loss, per token (with `kl_beta`"
            " above 0).",
            "grows slowly",
            reduction="mean",
        ),
        Metric(
            "actor/rollout_weight",
            "",
            "Mean weight of the rollout correction, after its cap (with"
            " `algorithm.rollout_correction`, as the next two).",
            "near 1",
            reduction="mean",
        ),
        Metric(
            "actor/rollout_capped",
            "share",
            "Tokens whose weight is above the cap.",
            "near 0",
            reduction="mean",
        ),
        Metric(
            "actor/rollout_kl",
            "nats",
            "`k3` estimate of KL(engine ‖ Actor), per token.",
            "near 0",
            reduction="mean",
        ),
        Metric(
            "critic/clip_fraction",
            "share",
            "Tokens whose value moved further than `algorithm.value_clip` and has no gradient.",
            "well below 1",
            reduction="mean",
        ),
        Metric("critic/value", "score", "Mean new value.", "near `critic/return`", "mean"),
        Metric("critic/return", "score", "Mean return.", reduction="mean"),
    ),
    "Engine against Actor": (
        Metric(
            "mismatch/gate",
            "nats",
            "Largest difference of engine and Actor log-probs before the first step.",
            "below `sync.max_logprob_diff` (1e-4 in float32 on CPUs, 1.0 in bfloat16)",
        ),
        Metric(
            "mismatch/max",
            "nats",
            "Largest difference of engine and Actor log-probs in the step's responses.",
            "below `alarms.mismatch` (1e-3 in float32 on CPUs, 1.0 in bfloat16)",
        ),
        Metric(
            "mismatch/mean",
            "nats",
            "Mean size of the difference of engine and Actor log-probs, over tokens.",
            "below `alarms.mean_mismatch` (1e-4 in float32 on CPUs, 0.1 in bfloat16)",
        ),
        Metric("mismatch/kl", "nats", "`k3` estimate of KL(engine ‖ Actor), per token.", "near 0"),
        Metric(
            "sync/probe_difference",
            "nats",
            "Largest difference of engine and Actor log-probs on the probe after the weight sync.",
            "below `sync.max_logprob_diff`; in bfloat16 with LoRA merged, what rounding the merged"
            " weights does is part of it",
        ),
        Metric(
            "sync/adapter_effect",
            "nats",
            "LoRA: largest difference of the Actor's log-probs on the probe with its adapter and"
            " without.",
            "grows from 0",
        ),
        Metric(
            "sync/adapter_decidable",
            "",
            "LoRA: 1 where that difference is larger than engine and Actor may differ, so that the"
            " probe tells an engine with the adapter from one without; 0 where digests alone tell.",
            "1 after the first steps; in bfloat16 later",
        ),
    ),
    "SFT and reward models": (
        Metric(
            "loss",
            "nats",
            "The loss of the step: per answer token in SFT, per pair in reward-model training.",
            "falls",
            headline=5,
        ),
        Metric(
            "accuracy",
            "share",
            "Reward model: pairs whose chosen answer scores higher.",
            "rises from 0.5",
            headline=6,
        ),
        Metric("margin", "score", "Reward model: mean of chosen minus rejected score.", "above 0"),
        Metric("grad_norm", "", "Norm of the gradient before it is clipped.", "finite, above 0"),
        Metric("learning_rate", "", "The learning rate, scheduled."),
        Metric(
            "skipped_updates",
            "updates",
            "1 when loss or gradient was not finite and nothing was learned.",
            "0",
        ),
        Metric(
            "held_out/loss",
            "nats",
            "The loss on the held-out rows.",
            "falls",
            headline=7,
            better="lower",
        ),
        Metric(
            "held_out/accuracy",
            "share",
            "Reward model: held-out pairs whose chosen answer scores higher.",
            "rises from 0.5",
            headline=8,
            better="higher",
        ),
        Metric(
            "held_out/margin",
            "score",
            "Reward model: mean held-out margin.",
            "above 0",
            better="higher",
        ),
        Metric(
            "calibration/<mean|std>",
            "score",
            "Mean and standard deviation of the calibration responses' raw scores, stored with the"
            " model.",
        ),
    ),
    "Data": (
        Metric("dropped/<why>", "rows", "Rows left out of the data, by reason.", "few or absent"),
    ),
    "Time": (
        Metric(
            "seconds/start",
            "s",
            "Start of the run: data read, models loaded, on a resume the checkpoint too.",
        ),
        Metric("seconds/wall", "s", "The whole run, logged at its end."),
        Metric("seconds/step", "s", "The whole step."),
        Metric(
            "seconds/<generate|score|advantages|learn|sync|evaluate|checkpoint>",
            "s",
            "A phase, wall time.",
        ),
        Metric(
            "seconds/<start|generate|score|learn|sync>/<word>",
            "s",
            "A part of a phase: what it waits for where roles share GPUs, and the parts of a sync "
            "(gather; send, which contains the slowest engine's receive and load; probe).",
        ),
        Metric(
            "swap/bytes",
            "bytes",
            "Moved to GPUs that roles share, and off them, by all processes since the step before,"
            " evaluations included.",
            "what plan prints",
        ),
        Metric(
            "throughput/tokens_per_second",
            "tokens per s",
            "Tokens of the step's sequences, prompts included, per second of the step.",
        ),
    ),
    "Alarms: 1 in a step that raised it, else absent": tuple(
        Metric(f"alarm/{name}", "", meaning) for name, meaning in ALARMS.items()
    ),
}
METRICS = tuple(metric for family in FAMILIES.values() for metric in family)
BY_NAME = {name: metric for metric in METRICS for name in metric.names}
INTRODUCTION = """\
# Metrics

Every number a run logs stands in `metrics.jsonl` of its run folder, and under the same name in
`tensorboard/`. A line of `metrics.jsonl` begins with `step`, `phase` and `time` (Unix seconds).
Phase `train` is a step, `data` what was left out of the data, `gate` the comparison of engine and
Actor before the first step, `evaluation` an evaluation before or after the steps,
`start` and `wall` the seconds until the first step and until the end. A value that is not finite is
`null`; a metric that has nothing to say is absent.

"Over mini-batches" says how a step's mini-batches become one number; it is `null` when one of them
is not finite. An algorithm of your own may log any other name: of its mini-batches the mean is
kept, or the largest value where the name begins with `max_`.

Formulas stand in [algorithms.md](algorithms.md), what an alarm is about in
[silent-failures.md](silent-failures.md). `python -m actors.run.metrics` prints this page.

Progress shows {headlines}.
"""


def find(name: str) -> Metric | None:
    """Return the description of a metric; None for a name that is not registered."""
    return BY_NAME.get(name) or next(
        (m for known, m in BY_NAME.items() if re.fullmatch(re.sub("<.*>", ".+", known), name)), None
    )


def headlines() -> list[str]:
    """Return the metrics shown with progress, in order."""
    shown = {m.headline: m.pattern for m in METRICS if m.headline is not None}
    return [shown[position] for position in sorted(shown)]


def charts() -> dict[str, str]:
    """Return chart title to metric, for the demo's page."""
    return {m.chart: m.pattern for m in METRICS if m.chart is not None}


def reduce(name: str, values: Sequence[float]) -> float:
    """Return one number for a metric's values, by its registered reduction: those of mini-batches,
    or of single responses. NaN without values, and where one of them is not finite.

    For a name that is not registered: the largest where it begins with "max_", else the mean.
    """
    if not values or not all(map(math.isfinite, values)):
        return math.nan
    known = find(name)
    if known is None:
        how = "max" if name.split("/")[-1].startswith("max_") else "mean"
    else:
        how = known.reduction
    if how == "max":
        return max(values)
    return sum(values) if how == "count" else fmean(values)


def page() -> str:
    """Return docs/metrics.md: the introduction, and a table for every family."""
    shown = ", ".join(f"`{name}`" for name in headlines())
    parts = [INTRODUCTION.format(headlines=shown)]
    for title, metrics in FAMILIES.items():
        parts.append(f"\n## {title}\n\n{_table(metrics)}")
    return "".join(parts)


def _table(metrics: Sequence[Metric]) -> str:
    """Return a table with one row per metric, without the columns that would be empty."""
    columns = {
        "metric": [", ".join(f"`{name}`" for name in m.names) for m in metrics],
        "unit": [m.unit for m in metrics],
        "meaning": [m.meaning for m in metrics],
        "healthy": [m.healthy for m in metrics],
        "over mini-batches": [m.reduction for m in metrics],
    }
    kept = {title: cells for title, cells in columns.items() if any(cells)}
    rows = [list(kept), ["---"] * len(kept), *zip(*kept.values(), strict=True)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    print(page(), end="")
