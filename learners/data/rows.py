"""Prompts, SFT examples and preference pairs: rows checked, and tokenised once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from learners.data.conversation import Conversation, Preference, Said
from learners.data.example import Example, for_encoder
from learners.data.files import some
from learners.data.notices import Notices
from learners.data.reading import read
from learners.data.shapes import (
    check_late,
    demonstration_of,
    preference_of,
    prompt_of,
    recognised,
)
from learners.data.store import Part, Rows
from learners.data.templates import ChatTemplate
from learners.data.tokenise import encode_prompt, encode_response, end_of_response
from learners.errors import DataError
from learners.settings import DataSettings, PairData, PromptData, SFTData, sources_of

T = TypeVar("T")
D = TypeVar("D", PromptData, SFTData, PairData)


@dataclass(frozen=True)
class Prompt:
    """Prompt as text and as ids. `index` is its place among the rows of the data, from 0, `row`
    that in its file, from 1; reward functions see `text`, the answer `columns` and, where the
    prompt is not raw text, the messages of its `conversation`.
    """

    index: int
    ids: list[int]
    text: str
    columns: dict[str, Any]
    row: int = 0
    conversation: Conversation | None = None

    @property
    def compared(self) -> dict[str, Any]:
        """Parts that must be the same for a resumed run."""
        names = ("index", "ids", "text", "columns")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Pair:
    """Prompt with two answers; `margin` is the difference in score that the chosen one must win
    by.
    """

    row: int
    chosen: Example
    rejected: Example
    margin: float

    @property
    def parts(self) -> tuple[list[int], ...]:
        return self.chosen.ids, self.rejected.ids

    @property
    def tokens(self) -> int:
        """Length of the longer sequence."""
        return max(self.chosen.tokens, self.rejected.tokens)

    @property
    def compared(self) -> dict[str, Any]:
        """Parts that must be the same for a resumed run."""
        return {
            "prompt_ids": self.chosen.prompt_ids,
            "chosen_ids": self.chosen.response_ids,
            "rejected_ids": self.rejected.response_ids,
            "margin": self.margin,
        }


def notices_of(*data_sets: Rows[Any]) -> list[str]:
    """Return the notices of all, once each: a run may read one file for several purposes."""
    return list(dict.fromkeys(line for rows in data_sets for line in rows.notices))


def load_prompts(
    data: PromptData | tuple[PromptData, ...],
    tokenizer: Any,
    template: ChatTemplate | None = None,
    max_model_tokens: int | None = None,
) -> Rows[Prompt]:
    """Load prompts. Raises DataError on bad rows and, on prompts over `max_prompt_tokens` or with
    which `max_model_tokens` leave no room for an answer, as `long_prompts` and `max_dropped` say.
    """
    loader = _Loader(tokenizer, template)
    loader.max_model_tokens = max_model_tokens
    return loader.load(data, loader.prompt)


def check_dropped(data: PromptData, part: Part, limit: str) -> None:
    """Raise DataError where more prompts were dropped as too long for `limit` than may be."""
    dropped = part.dropped["too long"]
    if dropped > data.max_dropped * (dropped + part.size):
        raise DataError(
            f"{data.path}: {dropped} of {dropped + part.size} prompts are too long for {limit}; "
            f"at most {data.max_dropped:.0%} may be dropped (max_dropped): raise one of them"
        )


def load_sft(
    data: SFTData | tuple[SFTData, ...],
    tokenizer: Any,
    encoder: bool = False,
    template: ChatTemplate | None = None,
) -> Rows[Example]:
    """Load SFT examples, or texts that an `encoder` is to score; those over `max_tokens` are
    dropped. Raises DataError on bad rows and empty answers.
    """
    loader = _Loader(tokenizer, template, encoder)
    return loader.load(data, loader.demonstration)


def load_pairs(
    data: PairData | tuple[PairData, ...],
    tokenizer: Any,
    encoder: bool,
    template: ChatTemplate | None = None,
) -> Rows[Pair]:
    """Load preference pairs; those over `max_tokens` and those of equal answers are dropped. Raises
    DataError on bad rows.
    """
    loader = _Loader(tokenizer, template, encoder)
    return loader.load(data, loader.preference)


Made = Iterator[T | str]
"""What a row becomes: usable rows, and reasons why it, or a part of it, is dropped."""


class _Loader:
    """Makes usable rows of raw ones, for one tokenizer."""

    def __init__(
        self, tokenizer: Any, template: ChatTemplate | None, encoder: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template or ChatTemplate(tokenizer)
        self.encoder = encoder
        self.index = 0  # of the row, over all sources
        self.place = ""
        self.row = 0
        self.notices = Notices(tokenizer)
        self.max_model_tokens: int | None = None
        self.raw = 0  # texts of the source that no template renders

    def load(
        self,
        data: D | tuple[D, ...],
        make: Callable[[D, Mapping[str, str], dict[str, Any]], Made[T]],
    ) -> Rows[T]:
        """Return the usable rows of all sources. Raises DataError when one of them has none."""
        rows: Rows[T] = Rows()
        for i, one in enumerate(sources_of(data)):
            source = read(one)
            names: dict[str, str] = recognised(one, source.columns)
            self.notices = Notices(self.tokenizer)
            self.raw = 0
            if one.template_arguments:
                self.template.check_arguments(one.template_arguments)
            part = Part(one.name or str(i), one.weight)
            for row in source:
                self.place = row.place
                self.row = row.number
                with row.located():
                    check_late(one, source.columns, row.values)
                    for made in make(one, names, row.values):
                        if isinstance(made, str):
                            part.dropped[made] += 1
                        else:
                            rows.append(made)
                            part.size += 1
                self.index += 1
            if not part.size:
                reasons = ", ".join(f"{count} {reason}" for reason, count in part.dropped.items())
                raise DataError(f"{one.path}: no row can be used: {reasons}")
            if isinstance(one, PromptData):
                check_dropped(one, part, self._limit(one)[1])
            rows.close_part(part)
            rows.notices += [source.notice] if source.notice else []
            rows.notices += self._of_source(one, [*names.values()], source.columns, part.size)
            rows.notices += self.notices.lines(one.path, part.size)
        rows.notices += self.template.notices
        return rows

    def _of_source(
        self, data: DataSettings, read_columns: Sequence[str], columns: Sequence[str], size: int
    ) -> Iterator[str]:
        """Yield lines about a source: columns that are not read, texts that no template renders."""
        known = {*read_columns, *data.where}
        known |= {*data.answer_columns} if isinstance(data, PromptData) else set()
        if unread := [column for column in columns if column not in known]:
            yield f"{data.path}: columns not read: {some(unread)}"
        if not self.raw or not self.template.source or self.encoder:
            return
        what = "all" if self.raw >= size else f"{self.raw} of {size}"
        yield (
            f"{data.path}: {what} rows are text that is read as it stands, although the tokenizer "
            "has a chat template; apply_template: true renders it as turns"
        )

    # --- one kind of row each ---------------------------------------------------------------------

    def prompt(
        self, data: PromptData, names: Mapping[str, str], row: dict[str, Any]
    ) -> Made[Prompt]:
        column = names["prompt"]
        if missing := [name for name in data.answer_columns if name not in row]:
            raise DataError(f"columns {missing} missing; it has {list(row)}")
        said = prompt_of(data, row, names)
        text, ids = self._prompt(said, column, data.trailing_assistant == "continue")
        most, limit = self._limit(data)
        if len(ids) > most:
            if data.long_prompts == "refuse":
                raise DataError(
                    f"the prompt has {len(ids)} tokens, too many for {limit}; raise it, or set "
                    "long_prompts: drop"
                )
            yield "too long"
            return
        self.notices.see(self.place, column, text, ids)
        columns = {name: row[name] for name in data.answer_columns}
        if empty := [name for name, value in columns.items() if value is None]:
            self.notices.note("null in answer columns", self.place, empty[0], empty)
        conversation = None if isinstance(said, str) else said
        self.raw += conversation is None
        yield Prompt(self.index, ids, text, columns, self.row, conversation)

    def _limit(self, data: PromptData) -> tuple[int, str]:
        """Return the tokens that a prompt may have, and what limits them."""
        own = (data.max_prompt_tokens, f"max_prompt_tokens {data.max_prompt_tokens}")
        if self.max_model_tokens is None:
            return own
        limit = f"generation.max_model_tokens {self.max_model_tokens}, answer included"
        return min(own, (self.max_model_tokens - 1, limit))

    def demonstration(
        self, data: SFTData, names: Mapping[str, str], row: dict[str, Any]
    ) -> Made[Example]:
        shown = demonstration_of(data, row, names)
        if isinstance(shown, tuple):
            columns = (names["prompt"], names["response"])
            made = [self._text(shown[0], shown[1], columns)]
        else:
            column = names.get("messages") or names["response"]
            made = self._chat(shown, column, data.train_on, data.rewritten_turns)
        if not made:
            yield "nothing to learn"
        for example in made:
            yield example if example.tokens <= data.max_tokens else "too long"

    def preference(
        self, data: PairData, names: Mapping[str, str], row: dict[str, Any]
    ) -> Made[Pair]:
        pair = preference_of(data, row, names)
        if pair.notice:
            self.notices.note(pair.notice, self.place, names["chosen"])
        chosen, rejected = (self._answer(pair, names, name) for name in ("chosen", "rejected"))
        made = Pair(self.row, chosen, rejected, pair.margin)
        if chosen.ids == rejected.ids:
            yield "equal answers"
        elif made.tokens > data.max_tokens:
            yield "too long"
        else:
            yield made

    def _answer(self, pair: Preference, names: Mapping[str, str], name: str) -> Example:
        """Return one of the two answers of a pair, with its prompt."""
        answer = getattr(pair, name)
        if isinstance(pair.prompt, str):
            columns = (names.get("prompt", names[name]), names[name])
            return self._text(pair.prompt, answer, columns)
        # the score is read at the end of the last turn, which all of the answer leads to
        (example,) = self._chat(pair.prompt.answered(*answer), names[name], "last", "split")
        return example

    # --- texts and conversations to ids -----------------------------------------------------------

    def _prompt(self, said: Said, column: str, going_on: bool = False) -> tuple[str, list[int]]:
        """Return text and ids of a prompt."""
        with _about(column):
            if isinstance(said, str):
                text = said
                ids = encode_prompt(self.tokenizer, said)
            else:
                going_on = going_on and said.messages[-1]["role"] == "assistant"
                text, ids = self.template.prompt(said, going_on)
            self._check_bos(ids)
        if not text or not ids:
            raise DataError("the prompt is empty")
        return text, ids

    def _check_bos(self, ids: Sequence[int]) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and list(ids[:2]) == [bos] * 2:
            raise DataError(
                f"begins with {self.tokenizer.bos_token} twice; leave BOS to the tokenizer"
            )

    def _text(self, prompt: str, answer: str, columns: tuple[str, str]) -> Example:
        """Return a text prompt with its answer, which ends with EOS ([SEP] on an encoder)."""
        self.raw += 1
        text, ids = self._prompt(prompt, columns[0])
        with _about(columns[1]):
            answered = encode_response(self.tokenizer, answer, self.encoder)
        self.notices.see(self.place, columns[0], text, ids)
        self.notices.see_answer(self.place, columns[1], answer, answered)
        end = end_of_response(self.tokenizer, self.encoder)
        whole = text + answer.removesuffix(name := self.tokenizer.convert_ids_to_tokens(end)) + name
        return Example(self.row, whole, ids + answered, bytes(len(ids)) + b"\1" * len(answered))

    def _chat(
        self, conversation: Conversation, column: str, train_on: Any, rewritten: Any
    ) -> list[Example]:
        """Return a conversation as examples."""
        with _about(column):
            made = self.template.examples(conversation, train_on, rewritten, self.row)
            for example in made:
                self._check_bos(example.ids)
        for example in made:
            self.notices.see(self.place, column, example.text, example.ids)
        for message in conversation.messages:
            self.notices.see_message(self.place, column, message)
        return [for_encoder(self.tokenizer, one) for one in made] if self.encoder else made


@contextmanager
def _about(column: str) -> Iterator[None]:
    """Name the column in what rendering or tokenising it raises."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{column}: {error}") from error.__cause__
