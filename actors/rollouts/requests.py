"""From prompts to requests for the engines, and from rollouts to samples with their texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.seeds import derive_seed
from actors.settings import GenerationSettings
from learners.data.rows import Prompt
from learners.experience import PromptRequest, Rollout


@dataclass(frozen=True)
class Sample:
    """A finished response to be scored, as ids and as text without special tokens, and the data's
    answer columns.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    prompt: str
    response: str
    finish_reason: str
    columns: dict[str, Any]


def requests_for(
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    group_size: int,
    seed_parts: tuple[int | str, ...],
    greedy: bool = False,
) -> list[PromptRequest]:
    """Return one request per prompt; sample k of the prompt in slot i is seeded from (seed_parts,
    prompt index, i, k).
    """
    return [
        PromptRequest(
            prompt_index=prompt.index,
            slot=slot,
            prompt_ids=prompt.ids,
            group_size=group_size,
            temperature=0.0 if greedy else settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            off_policy_sampling={} if greedy else settings.off_policy_sampling,
            seeds=tuple(derive_seed(*seed_parts, prompt.index, slot, k) for k in range(group_size))
            if settings.seeded and not greedy
            else None,
        )
        for slot, prompt in enumerate(prompts)
    ]


def samples_of(
    rollouts: Sequence[Rollout], prompts: Sequence[Prompt], group_size: int, tokenizer: Any
) -> list[Sample]:
    """Decode rollouts (ordered by request and sample); return them as samples with the text and
    columns of their prompts.
    """
    texts = tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)
    rows = [prompts[i // group_size] for i in range(len(rollouts))]
    return [
        Sample(
            rollout.prompt_ids,
            rollout.response_ids,
            row.text,
            text,
            rollout.finish_reason,
            row.columns,
        )
        for rollout, text, row in zip(rollouts, texts, rows, strict=True)
    ]
