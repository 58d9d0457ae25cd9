"""Readings of a model for each role: log-probs, values, scores. The only file that knows how a
batch is padded for it.

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
    """Return log-probs of the response tokens, [B,T] in float32, 0 where `loss_mask` is not set."""
    # The vocabulary is the widest dimension there is: no logits for positions that lie in every
    # row's prompt.
    length = batch.input_ids.shape[1]
    keep = min(length, length - int(batch.prompt_lengths.min()) + 1)
    output = model(
        batch.input_ids, attention_mask=attention_mask(batch), logits_to_keep=keep, use_cache=False
    )
    logprobs = token_logprobs(output.logits, batch.input_ids[:, length - keep :], temperature)
    aligned = F.pad(logprobs, (length - keep, 0))  # [B,L-1] again
    return torch.where(batch.loss_mask, response_part(batch, aligned), 0.0)


def response_values(model: Any, batch: Experience) -> Tensor:
    """Return the critic's readings before each response token, [B,T] in float32, 0 where
    `loss_mask` is not set.
    """
    values = model(
        batch.input_ids, attention_mask=attention_mask(batch), use_cache=False
    ).logits.squeeze(-1)
    return torch.where(batch.loss_mask, response_part(batch, values.float()), 0.0)


def sequence_scores(
    model: Any, batch: Experience, padding_side: Literal["left", "right"] = "right"
) -> Tensor:
    """Return the raw score of each sequence, [B] in float32; the padding's side does not move it.

    A decoder's `score` head is applied at the last real token. An encoder goes through its own
    pooling, which in many models reads the first column; position ids do not help that: its rows
    always start in column 0.
    """
    ids = batch.input_ids
    mask = attention_mask(batch)
    if is_encoder(model.config):
        inputs = _inputs(model, ids, mask, _first_position(model))
        return model(**inputs).logits.squeeze(-1).float()
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


def attention_mask(batch: Experience) -> Tensor:
    """Return the mask [B,L] that is 1 on real tokens."""
    positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    return (positions < batch.lengths[:, None]).long()


def response_part(batch: Experience, per_position: Tensor) -> Tensor:
    """Pick the T entries that belong to response tokens out of [B,L] or [B,L-1]: entry p-1+t for
    token t.

    Position p-1+t has read everything before response token t, so this serves log-probs (entry i is
    about token i+1) and values (the critic's reading before the token) alike. Entries past a
    response are arbitrary: mask them.
    """
    steps = torch.arange(batch.loss_mask.shape[1], device=per_position.device)
    index = batch.prompt_lengths[:, None] - 1 + steps
    return per_position.gather(1, index.clamp(0, per_position.shape[1] - 1))


def _inputs(model: Any, ids: Tensor, mask: Tensor, first_position: int = 0) -> dict[str, Tensor]:
    """Return arguments of a forward pass; where the model takes positions, they count from the
    first real token.
    """
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + first_position
    return inputs


def _first_position(encoder: Any) -> int:
    """Return the position of the first token: RoBERTa and its kin start after their own PAD."""
    table = getattr(getattr(encoder.base_model, "embeddings", None), "position_embeddings", None)
    padding_idx = getattr(table, "padding_idx", None)
    return 0 if padding_idx is None else padding_idx + 1
