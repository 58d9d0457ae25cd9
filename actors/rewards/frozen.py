"""Frozen inference: ReferenceWorker (log-probs) and RewardWorker (scores). No optimizer, no
gradient, eval mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor, nn

from actors.rewards.sources import Sample
from learners.data import encode_texts
from learners.experience import Experience, map_rows
from learners.models import (
    is_encoder,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    read_calibration,
    response_logprobs,
    sequence_scores,
)
from learners.settings import ModelSettings


class Frozen:
    """A model that never changes, and can prove it."""

    def __init__(self, model: nn.Module, micro_batch_tokens: int, device: str) -> None:
        self.device = device
        self.micro_batch_tokens = micro_batch_tokens
        self.model = model.to(device).eval().requires_grad_(False)

    def offload(self) -> None:
        """Leave the GPU: the weights wait in CPU memory."""
        self.model.to("cpu")
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """Take the GPU again."""
        self.model.to(self.device)

    def fingerprint(self) -> str:
        """Digest of every parameter and buffer, bit by bit."""
        digest = xxhash.xxh3_128()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


class ReferenceWorker(Frozen):
    """The SFT model, frozen."""

    def __init__(
        self, model: ModelSettings, temperature: float, micro_batch_tokens: int, device: str
    ) -> None:
        super().__init__(load_causal_lm(model), micro_batch_tokens, device)
        self.temperature = temperature

    def logprobs(self, shard: Experience) -> Tensor:
        """`ref_logprobs` [b,T] at the sampling temperature."""
        return map_rows(
            shard,
            self.micro_batch_tokens,
            lambda batch: response_logprobs(self.model, batch, self.temperature),
            self.device,
        )


class RewardWorker(Frozen):
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

    def scores(self, samples: Sequence[Sample]) -> list[float]:
        """One calibrated score per sample."""
        if not samples:
            return []
        ids = [self._ids(c) for c in samples]
        batch = Experience.from_ids([p for p, _ in ids], [r for _, r in ids])
        raw = map_rows(
            batch, self.micro_batch_tokens, lambda b: sequence_scores(self.model, b), self.device
        )
        return ((raw - self.calibration.mean) / self.calibration.std).tolist()

    def _ids(self, sample: Sample) -> tuple[list[int], list[int]]:
        if self.same_ids:
            return sample.prompt_ids, sample.response_ids
        return encode_texts(self.tokenizer, sample.prompt, sample.response, self.encoder)
