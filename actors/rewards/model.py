"""Scores from a trained reward model."""

from __future__ import annotations

from collections.abc import Sequence

from actors.reference import FrozenModel
from actors.rewards.score import Score
from actors.rollouts.requests import Sample
from learners.checkpoints import is_encoder, load_reward_model, load_tokenizer, read_calibration
from learners.experience import Experience, map_rows
from learners.forward import sequence_scores
from learners.settings import ModelSettings
from learners.tokenise import encode_prompt, encode_response


class RewardWorker(FrozenModel):
    """A trained reward model, frozen. Scores are calibrated with the mean and std in its config.

    When its vocabulary is the Actor's, it reads the Actor's token ids; otherwise texts are
    tokenised anew for it (and end like a finished response, also those that were truncated).
    """

    def __init__(
        self, model: ModelSettings, actor_model: ModelSettings, micro_batch_tokens: int, device: str
    ) -> None:
        super().__init__(load_reward_model(model, pad_token_id=None), micro_batch_tokens, device)
        self.tokenizer = load_tokenizer(model)
        self.encoder = is_encoder(self.model.config)
        self.same_ids = (
            not self.encoder
            and self.tokenizer.get_vocab() == load_tokenizer(actor_model).get_vocab()
        )
        self.calibration = read_calibration(self.model.config)

    def scores(self, samples: Sequence[Sample]) -> list[Score]:
        """Return one calibrated score per sample."""
        if not samples:
            return []
        ids = [self._ids(c) for c in samples]
        batch = Experience.from_ids([p for p, _ in ids], [r for _, r in ids])
        raw = map_rows(
            batch, self.micro_batch_tokens, lambda b: sequence_scores(self.model, b), self.device
        )
        calibrated = (raw - self.calibration.mean) / self.calibration.std
        return [Score(value) for value in calibrated.tolist()]

    def _ids(self, sample: Sample) -> tuple[list[int], list[int]]:
        if self.same_ids:
            return sample.prompt_ids, sample.response_ids
        prompt = encode_prompt(self.tokenizer, sample.prompt)
        return prompt, encode_response(self.tokenizer, sample.response, self.encoder)
