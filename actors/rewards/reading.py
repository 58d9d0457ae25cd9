"""Texts as a reward model reads them: in which token ids, and which of them it cannot read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from actors.rollouts.sample import Sample
from learners.checkpoints import is_encoder, load_config, load_tokenizer
from learners.data.example import for_encoder
from learners.data.pad import same_words
from learners.data.rows import Prompt
from learners.data.templates import ChatTemplate
from learners.data.tokenise import encode_prompt, encode_response
from learners.errors import DataError
from learners.generation import ends_of_generation
from learners.positions import positions_of
from learners.settings import ModelSettings

AT_ONCE = 10_000  # prompts whose texts are in memory


@dataclass(frozen=True)
class Reader:
    """The ids in which a reward model reads prompts and responses, and the ids it can read.

    Conversations are rendered by its `template`, if it has one, as they were when it was trained:
    what the Actor read and wrote may differ from that, in an open block of thoughts or in the token
    that ends the response. Else, when its vocabulary is the Actor's (`same_ids`), the ids are the
    Actor's own; otherwise texts are tokenised anew for it. What is rendered or tokenised anew ends
    like a finished response, also where that was truncated.

    `as_long`: what it reads is as long as what the Actor read and wrote.
    """

    tokenizer: Any
    encoder: bool
    same_ids: bool
    positions: int | None
    vocabulary: int | None
    template: ChatTemplate | None = None
    as_long: bool = False

    @classmethod
    def of(cls, model: ModelSettings, actor_tokenizer: Any, today: date | None = None) -> Reader:
        """Read the model's config and tokenizer; its template prints `today`. Raises UserError
        where they cannot be read.
        """
        config = load_config(model)
        tokenizer = load_tokenizer(model)
        encoder = is_encoder(config)
        same_ids = not encoder and same_words(tokenizer, actor_tokenizer)
        renders = bool(tokenizer.chat_template)
        alike = _written_by(tokenizer) == _written_by(actor_tokenizer)
        ends = [] if encoder else ends_of_generation(model)
        return cls(
            tokenizer=tokenizer,
            encoder=encoder,
            same_ids=same_ids,
            positions=positions_of(config),
            vocabulary=getattr(config.get_text_config(), "vocab_size", None),
            template=ChatTemplate(tokenizer, ends, today) if renders else None,
            as_long=same_ids and (alike or not renders),
        )

    def ids(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Return the ids of prompt and response. Raises DataError where the model's tokenizer has
        none to end a response with, or its template cannot render the conversation.
        """
        if self.template is not None and sample.answered is not None:
            (example,) = self.template.examples(sample.answered, "last")
            example = for_encoder(self.tokenizer, example) if self.encoder else example
            return example.prompt_ids, example.response_ids
        if self.same_ids:
            return sample.prompt_ids, sample.response_ids
        prompt = encode_prompt(self.tokenizer, sample.prompt)
        return prompt, encode_response(self.tokenizer, sample.response, self.encoder)

    def read(self, sample: Sample) -> tuple[tuple[list[int], list[int]], str]:
        """Return the ids of prompt and response, and what keeps the model from reading them, or
        nothing.
        """
        try:
            prompt, response = self.ids(sample)
        except DataError as error:  # a letter that its tokenizer does not know
            return ([], []), error.problems[0]
        return (prompt, response), self.problem([*prompt, *response])

    def unsure_of(self, prompts: Sequence[Prompt]) -> Iterator[int]:
        """Yield which prompts must be looked at to know that the model can read them: all that its
        own template renders, and the doubtful ones of the others.
        """
        for start in range(0, len(prompts), AT_ONCE):
            texts: dict[int, str] = {}
            for i, prompt in enumerate(prompts[start : start + AT_ONCE], start):
                if self.template is not None and prompt.conversation is not None:
                    yield i
                else:
                    texts[i] = prompt.text
            places = list(texts)
            yield from (places[i] for i in self.doubtful(list(texts.values())))

    def doubtful(self, texts: Sequence[str]) -> list[int]:
        """Return which texts may be too long or hold unknown letters, in a fraction of the time
        that tokenising all would take. A word that cannot be encoded although its letters can is
        none of them.
        """
        every = list(range(len(texts)))
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        too_many = self.vocabulary is not None and len(self.tokenizer) > self.vocabulary
        if self.same_ids or core is None or too_many:
            return every
        try:
            encode_response(self.tokenizer, "".join(sorted(set().union(*texts))), self.encoder)
        except DataError:  # some letter is unknown, or all are to a tokenizer of words
            return every
        if self.positions is None:
            return []
        # no token is less than a byte of the text as its rules rewrite it; a mark before the first
        # word and the end of the answer come on top
        rewritten = core.normalizer.normalize_str if core.normalizer else str
        room = self.positions - self.tokenizer.num_special_tokens_to_add() - 2
        return [i for i in every if len(rewritten(texts[i]).encode()) > room]

    def problem(self, ids: Sequence[int]) -> str:
        """Return what keeps the model from reading a sequence; nothing when it can."""
        if not ids:
            return "nothing to read: no token in prompt and response"
        if self.positions is not None and len(ids) > self.positions:
            return f"{len(ids)} tokens, the model has {self.positions} positions"
        if self.vocabulary is not None and max(ids) >= self.vocabulary:
            return f"token id {max(ids)}, the model knows {self.vocabulary} ids"
        return ""


def _written_by(tokenizer: Any) -> tuple[Any, ...]:
    """Return all that decides what a tokenizer's template writes."""
    return tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token
