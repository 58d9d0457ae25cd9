"""What each role reads from a model: log-probs, values, scores. The only file that knows of padding
in a forward pass.

Masks come from lengths: neither the padding's side nor its token ids move any number.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from learners.checkpoints import is_encoder
from learners.experience import Experience
from learners.logprobs import token_logprobs


def response_logprobs(model: Any, batch: Experience, temperature: float) -> Tensor:
    """Log-probs of the response tokens, [B,T] in float32, 0 where `batch.mask` is not set."""
    # The vocabulary is the widest dimension there is: no logits for positions that lie in every
    # row's prompt.
    length = batch.input_ids.shape[1]
    keep = min(length, length - int(batch.prompt_lengths.min()) + 1)
    output = model(
        batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=keep, use_cache=False
    )
    logprobs = token_logprobs(output.logits, batch.input_ids[:, length - keep :], temperature)
    aligned = F.pad(logprobs, (length - keep, 0))  # [B,L-1] again
    return torch.where(batch.mask, batch.response_part(aligned), 0.0)


def response_values(model: Any, batch: Experience) -> Tensor:
    """The critic's readings before each response token, [B,T] in float32, 0 where `batch.mask` is
    not set.
    """
    values = model(
        batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits.squeeze(-1)
    return torch.where(batch.mask, batch.response_part(values.float()), 0.0)


def sequence_scores(
    model: Any, batch: Experience, padding_side: Literal["left", "right"] = "right"
) -> Tensor:
    """Raw score of each sequence, [B] in float32; the padding's side does not move it.

    A decoder's `score` head is applied at the last real token. An encoder goes through its own
    pooling, which in many models reads the first column; position ids do not help that: its rows
    always start in column 0.
    """
    if is_encoder(model.config):
        inputs = _inputs(model, batch.input_ids, batch.attention_mask, _first_position(model))
        return model(**inputs).logits.squeeze(-1).float()
    ids = batch.input_ids
    mask = batch.attention_mask
    last = batch.lengths - 1
    if padding_side == "left":
        columns = torch.arange(ids.shape[1], device=ids.device) - (
            ids.shape[1] - batch.lengths[:, None]
        )
        mask = (columns >= 0).long()
        ids = ids.gather(1, columns.clamp(min=0))
        last = torch.full_like(last, ids.shape[1] - 1)
    hidden = model.base_model(
        **_inputs(model.base_model, ids, mask), use_cache=False
    ).last_hidden_state
    rows = torch.arange(len(batch), device=ids.device)
    return model.score(hidden[rows, last]).squeeze(-1).float()


def _inputs(model: Any, ids: Tensor, mask: Tensor, first_position: int = 0) -> dict[str, Tensor]:
    """Arguments of a forward pass; where the model takes positions, they count from the first real
    token.
    """
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + first_position
    return inputs


def _first_position(encoder: Any) -> int:
    """The position of the first token: RoBERTa and its kin start after their padding index."""
    table = getattr(getattr(encoder.base_model, "embeddings", None), "position_embeddings", None)
    padding_idx = getattr(table, "padding_idx", None)
    return 0 if padding_idx is None else padding_idx + 1
