"""Frozen models, which prove that they never change; and the Reference, which is one of them."""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor, nn

from learners.checkpoints import load_causal_lm
from learners.experience import Experience, map_rows
from learners.forward import response_logprobs
from learners.moving import Mover
from learners.settings import ModelSettings


class FrozenModel:
    """A model that never changes, and proves it with its fingerprint."""

    def __init__(self, model: nn.Module, micro_batch_tokens: int, device: str) -> None:
        self.device = device
        self.micro_batch_tokens = micro_batch_tokens
        self.model = model.to(device).eval().requires_grad_(False)
        self.mover = Mover(device)

    def offload(self, tier: str = "always") -> int:
        """Leave the GPU to others: with tier always the weights, else only memory that is not in
        use. Return the bytes copied: none but for the first time, when the copy in CPU memory is
        made from which the weights come back.
        """
        weights = [*self.model.parameters(), *self.model.buffers()] if tier == "always" else []
        moved = self.mover.leave(weights, changed=False)
        self.mover.finish_leaving()
        if self.device != "cpu":
            torch.cuda.empty_cache()
        return moved

    def reload(self) -> int:
        """Take the GPU again; return the bytes copied."""
        moved = self.mover.come_back()
        self.mover.await_back()
        return moved

    def fingerprint(self) -> str:
        """Return the XXH3-128 digest of all parameters and buffers."""
        digest = xxhash.xxh3_128()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


class ReferenceWorker(FrozenModel):
    """The SFT model, frozen."""

    def __init__(
        self, model: ModelSettings, temperature: float, micro_batch_tokens: int, device: str
    ) -> None:
        super().__init__(load_causal_lm(model), micro_batch_tokens, device)
        self.temperature = temperature

    def logprobs(self, shard: Experience) -> Tensor:
        """Return `ref_logprobs` [b,T] at the sampling temperature."""
        return map_rows(
            shard,
            self.micro_batch_tokens,
            lambda batch: response_logprobs(self.model, batch, self.temperature),
            self.device,
        )
