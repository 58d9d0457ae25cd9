"""The registry of metrics: its page, what it says of mini-batches, and that whatever is logged
stands in it.
"""

from __future__ import annotations

import ast
import fnmatch
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.run.metrics import BY_NAME, METRICS, charts, find, headlines, page, reduce
from learners.actor import ActorLearner
from learners.algorithms.base import ALGORITHMS, Algorithm, find_algorithm
from learners.critic import CriticLearner
from learners.experience import Experience
from learners.learner import Learner
from learners.reward_model import RewardModelLearner
from learners.settings import RewardModelSettings
from learners.sft import SFTLearner

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "actors").rglob("*.py"), *(ROOT / "learners").rglob("*.py")])


def test_the_page_is_what_the_registry_prints() -> None:
    """To write it again: python -m actors.run.metrics > docs/metrics.md"""
    assert (ROOT / "docs" / "metrics.md").read_text() == page()


def test_no_name_is_registered_twice() -> None:
    assert len(BY_NAME) == sum(len(metric.names) for metric in METRICS)


def test_a_name_is_found_exactly_or_by_its_pattern() -> None:
    assert find("score/mean") is not find("score/my source")
    assert find("score/my source") is find("score/other") is not None
    assert find("critic/grad_norm") is find("actor/grad_norm") is not None
    assert find("dropped/too long") and find("alarm/values_not_finite") and find("held_out/loss")
    for unknown in ("score", "score/", "nothing/known", "alarm/nothing_known", "critic/entropy"):
        assert find(unknown) is None


def test_readers_are_shown_names_in_their_order() -> None:
    assert headlines()[:4] == [
        "score/mean",
        "kl/sequence",
        "response/length",
        "evaluation/accuracy_sampled",
    ]
    assert headlines()[4:] == ["loss", "accuracy", "held_out/loss", "held_out/accuracy"]
    assert list(charts().values()) == [
        "evaluation/accuracy_sampled",
        "evaluation/accuracy_greedy",
        "score/mean",
        "kl/sequence",
        "response/length",
    ]


def test_metrics_of_mini_batches() -> None:
    assert reduce("actor/loss", [1.0, 3.0]) == 2.0
    assert reduce("actor/max_log_ratio", [1.0, 3.0]) == 3.0
    assert reduce("actor/skipped_updates", [1.0, 1.0, 0.0]) == 2.0
    assert math.isnan(reduce("actor/loss", [math.inf, -math.inf]))
    assert reduce("actor/mine", [1.0, 3.0]) == 2.0 and reduce("actor/max_mine", [1.0, 3.0]) == 3.0


def test_learners_and_registry_agree_on_what_a_maximum_is() -> None:
    """A learner reduces its micro-batches by the prefix."""
    reduced = {name: metric.reduction for name, metric in BY_NAME.items() if metric.reduction}
    assert {name for name, how in reduced.items() if how == "max"} == {
        name for name in reduced if "/max_" in name
    }


# --- what is logged is registered -----------------------------------------------------------------


def test_every_name_written_in_the_code_is_registered() -> None:
    """Also of names with a part that is known only later, and of alarms."""
    written = {name for file in FILES for name in names_written(ast.parse(file.read_text()))}
    assert {"score/mean", "seconds/*", "alarm/no_spread", "alarm/*_not_finite"} <= written
    written -= {"learner/*"}  # read by the alarms, never logged
    assert not {name for name in written if not fnmatch.filter(BY_NAME, name)}


def names_written(code: ast.AST) -> Iterator[str]:
    """Every `family/metric` and `alarm/name`, with * for what is known only later."""
    for node in ast.walk(code):
        if re.fullmatch(r"[a-z_*]+/[a-z_*]+", text := text_of(node)):
            yield text
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Alarm":
            yield f"alarm/{text_of(node.args[0])}"


def text_of(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else "*"


BATCH = replace(
    Experience.from_ids([[5, 6]] * 2, [[7]] * 2),
    scores=torch.tensor([1.0, 0.0]),
    **dict.fromkeys(
        ("old_logprobs", "ref_logprobs", "rollout_logprobs", "values", "advantages", "returns"),
        torch.tensor([[-1.0], [-2.0]]),
    ),
)
WEIGHED = {"dual_clip": 3.0, "rollout_correction": {"kind": "token_mask", "cap": 2.0}}


def learner(kind: type[Learner], outputs: list[Any], **known: Any) -> Learner:
    """A learner without a model, an optimizer or other ranks: its loss, on given outputs."""
    alone = object.__new__(kind)
    vars(alone).update(
        known,
        engine=SimpleNamespace(get_lr=lambda: [0.1]),
        _step=lambda: 1.0,
        _pass=lambda shard, learn: alone.loss(torch.tensor(outputs), shard, 1.0)[1],
    )
    return alone


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_what_an_algorithm_and_its_learners_report_is_registered(kind: str) -> None:
    found = find_algorithm(kind)
    algorithm: Algorithm[Any] = found(found.Settings(kind=kind, **WEIGHED), 2)
    actor = learner(ActorLearner, [[-1.0], [-2.0]], algorithm=algorithm, max_response_tokens=4)
    critic = learner(CriticLearner, [[0.5], [0.0]], value_clip=0.2)
    learned = {f"actor/{name}" for name in actor.train(BATCH)}
    learned |= {f"critic/{name}" for name in critic.train(BATCH)}
    assert {"actor/rollout_kl", "actor/dual_clip_fraction", "critic/grad_norm"} <= learned
    assert not {name for name in algorithm.advantages(BATCH)[1] if find(name) is None}
    assert not {name for name in learned if not (find(name) and find(name).reduction)}


def test_what_sft_and_reward_models_report_is_registered() -> None:
    sft = learner(SFTLearner, [[-1.0], [-2.0]])
    model = SimpleNamespace(config=SimpleNamespace())
    settings = RewardModelSettings()
    rm = learner(RewardModelLearner, [1.0, 0.0], reward_model=settings, model=model)
    names = {*sft.train(BATCH), *rm.train(BATCH)}
    names |= {f"held_out/{name}" for name in {*sft.evaluate(BATCH), *rm.evaluate(BATCH)}}
    assert {"skipped_updates", "held_out/margin"} <= names
    assert not {name for name in names if find(name) is None}
