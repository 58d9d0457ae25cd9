"""Stages of a batch on its way through a step: rollouts from the engines, experience for the
learners.

Shapes: `B` sequences, `L` = longest prompt + response, `T` = longest response. Everything is
right-padded; masks come from lengths and from which tokens the policy wrote, never from comparing
ids with PAD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

PER_TOKEN = (
    "old_logprobs",
    "ref_logprobs",
    "rollout_logprobs",
    "values",
    "advantages",
    "returns",
)


@dataclass(frozen=True)
class PromptRequest:
    """One prompt sent to an engine: `group_size` responses are wanted for it.

    `prompt_index` is the row in the prompt data, `slot` the position of this request in its batch
    (a prompt may come twice in one). `seeds` has one seed per response, or is None for unseeded
    sampling. Temperature 0 means greedy decoding. `off_policy_sampling` are sampling parameters
    that change the distribution (top_p, penalties), by vLLM's names.
    """

    prompt_index: int
    slot: int
    prompt_ids: list[int]
    group_size: int
    temperature: float
    max_new_tokens: int
    seeds: tuple[int, ...] | None = None
    off_policy_sampling: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rollout:
    """One response as an engine sampled it. `logprobs` are the engine's own, of each response id,
    after temperature.

    `finish_reason` is "stop" (a token that ends responses was sampled; it is the last response id)
    or "length".
    `weight_versions` are those the first and the last token were sampled with. `loss_mask` is False
    on response ids that the policy did not write (such as a tool's answer): read by every model,
    but learned by none. None: it wrote them all. Raises ValueError unless there is one for every
    id.
    """

    prompt_index: int
    slot: int
    sample_index: int
    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    weight_versions: tuple[int, int]
    loss_mask: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if self.loss_mask is not None and len(self.loss_mask) != len(self.response_ids):
            raise ValueError(
                f"the loss mask of a response of {len(self.response_ids)} tokens has "
                f"{len(self.loss_mask)} entries"
            )


@dataclass(frozen=True)
class Experience:
    """Batch of sequences (prompt + response) and what is known about them.

    `input_ids` [B,L]; `prompt_lengths`, `response_lengths` [B]; `loss_mask` [B,T] bool: True on
    response tokens (the EOS counts) that are learned from, with gaps where the policy did not write
    the text; per-token tensors [B,T], row t of `values` being the critic's reading before response
    token t; `scores` [B]; `margins` [B] (preference pairs: the chosen sequence of pair i is row 2i,
    the rejected one row 2i+1).
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    loss_mask: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    scores: Tensor | None = None
    margins: Tensor | None = None

    @classmethod
    def from_ids(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        masks: Sequence[Sequence[int]] | None = None,
    ) -> Experience:
        """Right-pad token ids (with 0: the value never matters) into one batch. Of the response
        tokens those count whose entry in the `masks` is not 0; without masks, every one.
        """
        rows = [
            torch.tensor([*p, *r], dtype=torch.long)
            for p, r in zip(prompts, responses, strict=True)
        ]
        lengths = torch.tensor([len(r) for r in responses], dtype=torch.long)
        counted = torch.arange(_longest(lengths)) < lengths[:, None]
        if masks is not None:
            counted &= _pad([torch.tensor(list(m), dtype=torch.bool) for m in masks], torch.bool)
        return cls(
            input_ids=_pad(rows, dtype=torch.long),
            prompt_lengths=torch.tensor([len(p) for p in prompts], dtype=torch.long),
            response_lengths=lengths,
            loss_mask=counted,
        )

    @classmethod
    def from_rollouts(cls, rollouts: Sequence[Rollout]) -> Experience:
        """Return the batch with the engines' `rollout_logprobs`, 0 where the loss mask is False."""
        batch = cls.from_ids([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts])
        loss_mask = _pad(
            [torch.tensor(r.loss_mask or [True] * len(r.response_ids)) for r in rollouts],
            dtype=torch.bool,
        )
        logprobs = _pad([torch.tensor(r.logprobs) for r in rollouts], dtype=torch.float32)
        return replace(
            batch, loss_mask=loss_mask, rollout_logprobs=torch.where(loss_mask, logprobs, 0.0)
        )

    @classmethod
    def placeholder(cls, rows: int = 1) -> Experience:
        """Return a batch without a single response token: a rank computes it when its share of the
        work is done.

        Collectives inside forward and backward (ZeRO-3) need every rank; a masked batch adds
        exactly nothing.
        """
        zeros = torch.zeros(rows, 1)
        return cls(
            input_ids=torch.zeros(rows, 2, dtype=torch.long),
            prompt_lengths=torch.full((rows,), 2, dtype=torch.long),
            response_lengths=torch.zeros(rows, dtype=torch.long),
            loss_mask=zeros.bool(),
            **{name: zeros for name in PER_TOKEN},
            scores=torch.zeros(rows),
            margins=torch.zeros(rows),
        )

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """[B]: tokens of prompt + response."""
        return self.prompt_lengths + self.response_lengths

    def loss_denominator(self, how: str, longest_response: int = 0) -> float:
        """Return this batch's share of a loss denominator: tokens, non-empty sequences, or
        sequences × `longest_response`.
        """
        if how == "token_mean":
            return float(self.loss_mask.sum())
        sequences = float(self.loss_mask.any(1).sum()) if len(self) else 0.0
        return sequences if how == "sequence_mean" else sequences * longest_response

    def select(self, rows: Sequence[int]) -> Experience:
        """Return the given rows, trimmed to their own longest sequence and response."""
        index = torch.as_tensor(rows, dtype=torch.long)
        widths = dict.fromkeys(("loss_mask", *PER_TOKEN), _longest(self.response_lengths[index]))
        widths["input_ids"] = _longest(self.lengths[index])
        return self._map(
            lambda name, x: x[index][:, : widths[name]] if name in widths else x[index]
        )

    def to(self, device: str | torch.device) -> Experience:
        """Return the batch on another device."""
        return self._map(lambda _, x: x.to(device))

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Experience:
        """Return the batch with `change` applied to the name and value of each tensor it has."""
        known = {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}
        return Experience(**{name: change(name, x) for name, x in known.items()})

    def shard(self, ranks: int, rows_per_unit: int = 1) -> list[list[int]]:
        """Share the rows out among ranks: `rows_per_unit` consecutive rows stay on one rank, token
        counts are balanced, nothing is dropped.

        A rank may get no rows at all.
        """
        lengths = self.lengths.reshape(-1, rows_per_unit).sum(1).tolist()
        loads = [0] * ranks
        shares: list[list[int]] = [[] for _ in range(ranks)]
        for unit in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            rank = min(range(ranks), key=lambda r: (loads[r], len(shares[r]), r))
            loads[rank] += lengths[unit]
            shares[rank].extend(range(unit * rows_per_unit, (unit + 1) * rows_per_unit))
        return shares

    def micro_batches(self, token_budget: int, rows_per_unit: int = 1) -> list[list[int]]:
        """Cut the rows into micro-batches of similar lengths: rows × longest stays within the
        budget, but each has at least `rows_per_unit` rows.
        """
        longest = self.lengths.reshape(-1, rows_per_unit).amax(1).tolist() if len(self) else []
        batches: list[list[int]] = []
        width = 0
        for unit in sorted(range(len(longest)), key=lambda i: (-longest[i], i)):
            if not batches or (len(batches[-1]) + rows_per_unit) * width > token_budget:
                batches.append([])
                width = longest[unit]  # the first unit of a micro-batch is its longest
            batches[-1].extend(range(unit * rows_per_unit, (unit + 1) * rows_per_unit))
        return batches


@torch.no_grad()
def map_rows(
    batch: Experience,
    token_budget: int,
    compute: Callable[[Experience], Tensor],
    device: str = "cpu",
    rounds: int = 0,
) -> Tensor:
    """Run `compute` without gradient over micro-batches and return its rows in the batch's own
    order, on the CPU.

    `compute` maps an Experience to [b] or [b,t]; [b,t] results are zero-padded to the batch's T.
    `rounds` asks for at least that many calls, the surplus ones on placeholders (collective
    forwards need the same number on every rank).
    """
    micro_batches = batch.micro_batches(token_budget)
    by_row: dict[int, Tensor] = {}
    for rows in micro_batches:
        by_row.update(zip(rows, compute(batch.select(rows).to(device)).cpu(), strict=True))
    for _ in range(rounds - len(micro_batches)):
        compute(Experience.placeholder().to(device))
    if not by_row:
        return torch.zeros(0)
    in_order = [by_row[row] for row in range(len(batch))]
    if in_order[0].ndim == 0:
        return torch.stack(in_order)
    return _pad(in_order, dtype=in_order[0].dtype, width=batch.loss_mask.shape[1])


def mini_batches(rows: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield one shuffled pass over `rows` in mini-batches of `size`; the last may be smaller."""
    shuffled = torch.randperm(rows, generator=generator).tolist()
    for start in range(0, rows, size):
        yield shuffled[start : start + size]


def _longest(lengths: Tensor) -> int:
    return max(1, int(lengths.max())) if len(lengths) else 1


def _pad(rows: Sequence[Tensor], dtype: torch.dtype, width: int | None = None) -> Tensor:
    width = max([width or 1, *(len(r) for r in rows)])
    out = torch.zeros(len(rows), width, dtype=dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
