"""From prompts to requests for the engines, and from rollouts to samples with their texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actors.rollouts.sample import Sample
from actors.seeds import derive_seed
from actors.settings import GenerationSettings
from learners.data.conversation import Conversation
from learners.data.rows import Prompt
from learners.data.templates import ChatTemplate
from learners.experience import PromptRequest, Rollout


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
    rollouts: Sequence[Rollout],
    prompts: Sequence[Prompt],
    group_size: int,
    template: ChatTemplate,
) -> list[Sample]:
    """Decode rollouts (ordered by request and sample); return them as samples with the text,
    conversation and columns of their prompts.
    """
    texts = texts_of(rollouts, template.tokenizer)
    opened = Opened(template)
    rows = [prompts[i // group_size] for i in range(len(rollouts))]
    return [
        Sample(
            rollout.prompt_ids,
            rollout.response_ids,
            row.text,
            text,
            rollout.finish_reason,
            row.columns,
            row.conversation,
            opened.by(row.conversation),
        )
        for rollout, text, row in zip(rollouts, texts, rows, strict=True)
    ]


class Opened:
    """Text that a template's generation prompt opens, found once for each of its arguments."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self.found: dict[str, str] = {}

    def by(self, conversation: Conversation | None) -> str:
        """Return the text that is open at the end of a prompt; nothing if that is raw text."""
        if conversation is None:
            return ""
        arguments = repr(conversation.arguments)
        if arguments not in self.found:
            self.found[arguments] = self.template.opened(conversation)
        return self.found[arguments]


def texts_of(rollouts: Sequence[Rollout], tokenizer: Any) -> list[str]:
    """Return responses as text: without EOS, PAD and the token that ended them, but with all other
    special tokens, which may be the answer's own marks.
    """
    unsaid = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    ended = ((r.response_ids, r.finish_reason == "stop") for r in rollouts)
    said = [[i for i in (ids[:-1] if end else ids) if i not in unsaid] for ids, end in ended]
    texts: list[str] = tokenizer.batch_decode(said, skip_special_tokens=False)
    return texts
