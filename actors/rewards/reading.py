"""Texts as a reward model reads them: in which token ids, and which of them it cannot read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from learners.checkpoints import is_encoder, load_config, load_tokenizer
from learners.errors import first_wrong
from learners.settings import ModelSettings
from learners.tokenise import encode_prompt, encode_response


def positions_of(config: Any) -> int | None:
    """Return the most tokens a model reads; None where nothing bounds them."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True)
class Reader:
    """The ids in which a reward model reads prompts and responses.

    When its vocabulary is the Actor's, those are the Actor's own; otherwise texts are tokenised
    anew for it, and end like a finished response, also those that were truncated. `ending` are the
    ids of an empty response that is finished.
    """

    tokenizer: Any
    encoder: bool
    same_ids: bool
    ending: list[int]
    positions: int | None
    vocabulary: int | None

    @classmethod
    def of(cls, model: ModelSettings, actor_tokenizer: Any) -> Reader:
        """Read the model's config and tokenizer. Raises UserError where they cannot be read, or no
        token ends a response.
        """
        config = load_config(model)
        tokenizer = load_tokenizer(model)
        encoder = is_encoder(config)
        same_ids = not encoder and tokenizer.get_vocab() == actor_tokenizer.get_vocab()
        eos = actor_tokenizer.eos_token_id
        own_ending = [] if eos is None else [eos]
        return cls(
            tokenizer=tokenizer,
            encoder=encoder,
            same_ids=same_ids,
            ending=own_ending if same_ids else encode_response(tokenizer, "", encoder),
            positions=positions_of(config),
            vocabulary=getattr(config.get_text_config(), "vocab_size", None),
        )

    def prompt(self, text: str, actor_ids: list[int]) -> list[int]:
        """Return the ids of a prompt."""
        return actor_ids if self.same_ids else encode_prompt(self.tokenizer, text)

    def response(self, text: str, actor_ids: list[int]) -> list[int]:
        """Return the ids of a response."""
        if self.same_ids:
            return actor_ids
        return encode_response(self.tokenizer, text, self.encoder)

    def problem(self, ids: Sequence[int]) -> str:
        """Return what keeps the model from reading a sequence; nothing when it can."""
        highest = max(ids, default=0)
        return first_wrong(
            (not ids, "nothing to read: no token in prompt and response"),
            (
                self.positions is not None and len(ids) > self.positions,
                f"{len(ids)} tokens, the model has {self.positions} positions",
            ),
            (
                self.vocabulary is not None and highest >= self.vocabulary,
                f"token id {highest}, the model knows {self.vocabulary} ids",
            ),
        )
