"""Scores from a trained reward model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date

import torch
from torch import Tensor

from actors.reference import FrozenModel
from actors.rewards.reading import Reader
from actors.rewards.score import Score
from actors.rollouts.sample import Sample
from learners.checkpoints import load_reward_model, load_tokenizer, read_calibration
from learners.experience import Experience, map_rows
from learners.forward import sequence_scores
from learners.settings import ModelSettings

# Sequences scored twice for the noise: one in so many, and some.
ONE_IN = 64
FEWEST = 4
# The noise of a group is taken as so many times the largest difference seen: it has more pairs of
# scores than were tried.
MARGIN = 3.0


class RewardWorker(FrozenModel):
    """A trained reward model, frozen. Scores are calibrated with the mean and std in its config.

    With `measures_noise` it scores a few sequences again, each alone: the same sequence in another
    batch has another rounding, and scores that differ by no more say nothing. `today` is the date
    that its chat template may print.
    """

    def __init__(
        self,
        model: ModelSettings,
        actor_model: ModelSettings,
        micro_batch_tokens: int,
        device: str,
        measures_noise: bool = False,
        today: date | None = None,
    ) -> None:
        super().__init__(load_reward_model(model, pad_token_id=None), micro_batch_tokens, device)
        self.reader = Reader.of(model, load_tokenizer(actor_model), today)
        self.calibration = read_calibration(self.model.config)
        self.measures_noise = measures_noise

    def scores(self, samples: Sequence[Sample]) -> list[Score]:
        """Return one calibrated score per sample; an error for what the model cannot read."""
        if not samples:
            return []
        readings = [self.reader.read(sample) for sample in samples]
        read = [ids for ids, problem in readings if not problem]
        raw = self._raw(read, self.micro_batch_tokens)
        calibrated = (raw - self.calibration.mean) / self.calibration.std
        noise = self._noise(read, raw) if self.measures_noise else torch.zeros_like(raw)
        scores = map(Score, calibrated.tolist(), [None] * len(read), noise.tolist())
        return [Score(error=problem) if problem else next(scores) for _, problem in readings]

    def _raw(self, ids: Sequence[tuple[list[int], list[int]]], token_budget: int) -> Tensor:
        batch = Experience.from_ids([p for p, _ in ids], [r for _, r in ids])
        return map_rows(batch, token_budget, lambda b: sequence_scores(self.model, b), self.device)

    def _noise(self, ids: Sequence[tuple[list[int], list[int]]], raw: Tensor) -> Tensor:
        """Return the noise [B] of calibrated scores, from the largest difference that one of these
        sequences shows: to its copies among them, or to itself alone. What came before has no say,
        so that a run that is resumed goes on with the same noise.
        """
        wanted = max(FEWEST, math.ceil(len(ids) / ONE_IN))
        tried = range(0, len(ids), math.ceil(len(ids) / wanted) or 1)
        alone = self._raw([ids[i] for i in tried], token_budget=1)
        first: dict[tuple[int, ...], int] = {}
        copies = [first.setdefault((*p, *r), i) for i, (p, r) in enumerate(ids)]
        differences = torch.cat([raw - raw[copies], raw[list(tried)] - alone]).abs()
        largest = max(differences[differences.isfinite()].tolist(), default=0.0)
        # no score is more exact than its own last digit
        last_digit = raw.abs() * torch.finfo(self.model.dtype).eps
        return MARGIN * last_digit.clamp(min=largest) / self.calibration.std
