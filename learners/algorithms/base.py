"""Base of every algorithm: its settings, the clipped policy objective, and the registry.

An algorithm is one file: its settings, its advantages and its policy objective. Recipes are checked
without torch, so an algorithm's file imports torch where it computes and not at the top.
"""

from __future__ import annotations

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import Field

from learners.errors import Problem, UserError, first_wrong
from learners.naming import load_named
from learners.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from learners.experience import Experience
    from learners.losses import Stats

ALGORITHMS = {
    "ppo": "learners.algorithms.ppo:PPO",
    "grpo": "learners.algorithms.grpo:GRPO",
    "reinforce_plus_plus": "learners.algorithms.reinforce_plus_plus:ReinforcePlusPlus",
}
"""Registered algorithms by the `algorithm.kind` of a recipe; a recipe may also name a class of its
own, as module:Class."""


class RolloutCorrectionSettings(Settings):
    """Weights that make up for the difference between the engine's log-probs and the Actor's."""

    kind: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = Field(
        "token_truncate",
        description="weight per token or per response; bounded by the cap, or left out above it",
    )
    cap: float = Field(2.0, gt=0, description="largest weight")


Aggregation = Literal["token_mean", "sequence_mean", "constant"]


class AlgorithmSettings(Settings):
    """Settings that every algorithm has. A subclass adds its own and says which models it needs."""

    needs_critic: ClassVar[bool] = False
    compares_groups: ClassVar[bool] = False  # a group of one response then teaches nothing

    kind: str = Field(description="a registered algorithm, or a class of your own: module:Class")
    clip_low: float = Field(0.2, gt=0, description="ratio clip below 1")
    clip_high: float = Field(0.2, gt=0, description="ratio clip above 1")
    dual_clip: float | None = Field(
        None, gt=1, description="bound on the ratio for negative advantages"
    )
    score_clip: float | None = Field(
        None, gt=0, description="clamp scores to ± this before they become rewards or advantages"
    )
    missing_eos_penalty: float = Field(
        0.0, ge=0, description="subtracted from the score of a truncated response"
    )
    loss_aggregation: Aggregation = Field(
        "token_mean", description="how the losses of tokens become one number"
    )
    old_logprobs: Literal["actor", "engine"] = Field(
        "actor",
        description="log-probs the ratio starts from: the Actor reads them anew, or the "
        "engine's (saves a forward)",
    )
    rollout_correction: RolloutCorrectionSettings | None = Field(
        None, description="weigh tokens by Actor / engine probability; null: off"
    )

    @property
    def needs_reference(self) -> bool:
        """True where `ref_logprobs` are read, so that a Reference is started."""
        return False

    def critic_arguments(self) -> dict[str, Any]:
        """Return arguments of the Critic's learner beside its own settings."""
        return {}

    def problems(self, sequences: int) -> Iterator[Problem]:
        """Yield settings that contradict each other or a step of so many `sequences`."""
        yield from ()


S = TypeVar("S", bound=AlgorithmSettings)


class Algorithm(ABC, Generic[S]):
    """One way of learning from scores.

    The driver calls `advantages` once a step, and `after_step` unless the step is skipped; the
    Actor's ranks call `actor_loss` on every micro-batch.
    """

    Settings: ClassVar[type[AlgorithmSettings]] = AlgorithmSettings

    def __init__(self, settings: S, group_size: int = 1) -> None:
        self.settings = settings
        self.group_size = group_size

    @abstractmethod
    def advantages(self, batch: Experience) -> tuple[Experience, dict[str, float]]:
        """Fill `advantages` [B,T] from `scores` [B] and the log-probs and values; return metrics
        too.
        """

    def after_step(self, batch: Experience) -> None:
        """Adapt what depends on the step, unless it was skipped; by default nothing does."""

    def policy_objective(
        self, logprobs: Tensor, batch: Experience, ratio: str = "token"
    ) -> tuple[Tensor, Stats]:
        """Return the clipped loss per token [B,T], weighed if the recipe asks for it, and
        statistics.
        """
        from learners.losses import policy_loss, rollout_correction

        s = self.settings
        assert batch.old_logprobs is not None and batch.advantages is not None
        per_token, stats = policy_loss(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.loss_mask,
            clip_low=s.clip_low,
            clip_high=s.clip_high,
            dual_clip=s.dual_clip,
            ratio=ratio,
        )
        if s.rollout_correction is None:
            return per_token, stats
        assert batch.rollout_logprobs is not None
        weights, more = rollout_correction(
            batch.old_logprobs,
            batch.rollout_logprobs,
            batch.loss_mask,
            kind=s.rollout_correction.kind,
            cap=s.rollout_correction.cap,
        )
        return per_token * weights, stats | more

    def actor_loss(
        self, logprobs: Tensor, batch: Experience, denominator: float
    ) -> tuple[Tensor, Stats]:
        """Return a micro-batch's loss, divided by the mini-batch's `denominator`, and
        statistics.
        """
        from learners.losses import aggregate

        per_token, stats = self.policy_objective(logprobs, batch)
        loss = aggregate(
            per_token,
            batch.loss_mask,
            how=self.settings.loss_aggregation,
            denominator=denominator,
        )
        return loss, stats

    def state(self) -> dict[str, float]:
        """Return the numbers that a checkpoint must keep."""
        return {}

    def load_state(self, state: dict[str, float]) -> None:
        """Continue from `state`."""
        assert not state


def find_algorithm(kind: str) -> type[Algorithm[Any]]:
    """Return the class that `algorithm.kind` names; raise UserError where there is none."""
    if ":" not in kind and kind not in ALGORITHMS:
        close = difflib.get_close_matches(kind, ALGORITHMS, 1)
        hint = f"did you mean {close[0]}?" if close else f"registered are {', '.join(ALGORITHMS)}."
        raise UserError(
            f"there is no algorithm {kind!r}; {hint} Name a class of your own as module:Class"
        )
    found = load_named(ALGORITHMS.get(kind, kind), "algorithm")
    algorithm = isinstance(found, type) and issubclass(found, Algorithm)
    settings = getattr(found, "Settings", None)
    wrong = first_wrong(
        (not algorithm, "is not a subclass of learners.algorithms.base.Algorithm"),
        (inspect.isabstract(found), "has no method advantages(batch)"),
        (
            not (isinstance(settings, type) and issubclass(settings, AlgorithmSettings)),
            "its Settings are not a subclass of learners.algorithms.base.AlgorithmSettings",
        ),
    )
    if wrong:
        raise UserError(f"algorithm {kind}: {wrong}")
    return found
