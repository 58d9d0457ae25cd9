"""Chat templates: conversations rendered, what of them the assistant wrote, and the token that ends
its turns.

Where the assistant's turns lie is read off the template's generation markers or, without those, off
what the conversation up to a turn renders to. Nothing is guessed: a turn that a later one rewrites
becomes an example of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from jinja2 import Environment, meta

from learners.data.conversation import Conversation
from learners.data.tokenise import encode_text, end_of_response, said
from learners.errors import DataError

Messages = Sequence[dict[str, Any]]
# what a template is given beside arguments of its own
GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"}
GIVEN |= {"raise_exception", "continue_final_message"}
ASKED = {"role": "user", "content": "question"}
PROBES = ("Quatuor", "quatuor")  # answers that begin with different letters
# Ends of turns as models commonly write them; the tokenizer's own are known to it.
MARKERS = re.compile(r"</s>|<eos>|<\|\w+\|>|<(?:start|end)_of_turn>")


@dataclass(frozen=True)
class Example:
    """Text to learn from, its ids, and of each id whether it is learned (1) or only read (0).
    `row` is counted from 1 in its file.
    """

    row: int
    text: str
    ids: list[int]
    trained: bytes

    @property
    def first(self) -> int:
        """Position of the first trained token."""
        return self.trained.index(1)

    @property
    def end(self) -> int:
        """Position after the last trained token: what comes then moves nothing."""
        return self.trained.rindex(1) + 1

    @property
    def prompt_ids(self) -> list[int]:
        return self.ids[: self.first]

    @property
    def response_ids(self) -> list[int]:
        return self.ids[self.first : self.end]

    @property
    def loss_mask(self) -> bytes:
        """1 for every id of `response_ids` that is learned."""
        return self.trained[self.first : self.end]

    @property
    def parts(self) -> tuple[list[int], ...]:
        return self.prompt_ids, self.response_ids

    @property
    def tokens(self) -> int:
        return self.end

    @property
    def compared(self) -> dict[str, Any]:
        """Parts that must be the same for a resumed run."""
        same: dict[str, Any] = {"prompt_ids": self.prompt_ids, "response_ids": self.response_ids}
        if 0 in self.loss_mask:
            same["loss_mask"] = self.loss_mask.hex()
        return same


@dataclass(frozen=True)
class _Turn:
    """Text of a conversation up to an assistant's turn, and where in it the turn lies."""

    text: str
    start: int
    end: int

    def __str__(self) -> str:
        return self.text[: self.end]


class ChatTemplate:
    """A tokenizer's chat template. `ends` are ids at which its model stops besides (those of its
    generation_config.json), `today` is the date that templates may print.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int] = (), today: date | None = None) -> None:
        self.tokenizer = tokenizer
        self.ends = list(ends)
        self.today = today or date.today()
        self.lost_tools = False  # tools of the data, of which the template writes nothing
        self.used = False  # a conversation of the data was rendered
        self.opens: dict[str, int] = {}  # by what the generation prompt opens: examples without it

    # --- what the template is ---------------------------------------------------------------------

    @property
    def source(self) -> str:
        """The template itself; nothing where there is none."""
        written = self.tokenizer.chat_template
        return "".join(written.values()) if isinstance(written, dict) else written or ""

    @cached_property
    def turn_end(self) -> int | None:
        """The id that ends an assistant's turn; None where the template writes none. Raises
        DataError where it writes one that the tokenizer has no token for.
        """
        if not self.source:
            return None
        ids = encode_text(self.tokenizer, self._after)
        known = {*self.ends, self.tokenizer.eos_token_id, *self.tokenizer.added_tokens_decoder}
        if (end := next((i for i in ids if i in known), None)) is not None:
            return end
        if marker := MARKERS.search(self._after):
            raise DataError(
                f"the chat template ends an assistant's turn with {marker[0]!r}, which is no token "
                "of the tokenizer: no response could end; add the token, or give another template"
            )
        follows = self.render([ASKED, _answer(PROBES[0]), ASKED]).rpartition(PROBES[0])[2]
        first = next((i for i in encode_text(self.tokenizer, follows) if i in known), None)
        # the beginning of the next turn ends this one only where the model is known to stop there
        return first if first in (*self.ends, self.tokenizer.eos_token_id) else None

    @cached_property
    def _after(self) -> str:
        """The text behind an answer that is the last turn."""
        text = self.render([ASKED, _answer(PROBES[0])])
        if PROBES[0] not in text:
            raise DataError("the chat template leaves out what the assistant says")
        return text.rpartition(PROBES[0])[2]

    @cached_property
    def _end_text(self) -> str:
        """The text of `turn_end`, if the last turn's rendering has it."""
        end = self.turn_end
        text = "" if end is None else self.tokenizer.convert_ids_to_tokens(end)
        return text if text in self._after else ""

    @property
    def stops(self) -> list[int]:
        """The ids that end a response, that of conversations first if there were any."""
        ends = (self.turn_end if self.used else None, self.tokenizer.eos_token_id, *self.ends)
        return [end for end in dict.fromkeys(ends) if end is not None]

    @cached_property
    def _marked(self) -> bool:
        return re.search(r"\{%-?\s*generation\b", self.source) is not None

    @cached_property
    def _written_calls(self) -> list[str]:
        """Text of a call whose arguments are an object, and of one whose arguments are JSON text;
        nothing where the template raises.
        """
        texts = []
        for arguments in ({"argument": "value"}, '{"argument": "value"}'):
            function = {"name": "function", "arguments": arguments}
            call = {"id": "abcdefghi", "type": "function", "function": function}
            calling: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
            try:
                texts.append(self._rendered([ASKED, calling]))
            except Exception:  # whatever the template raises for arguments of this kind
                texts.append("")
        return texts

    @cached_property
    def variables(self) -> set[str]:
        """The names of what the template is given."""
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", self.source)
        return meta.find_undeclared_variables(environment.parse(plain))

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Raise DataError on an argument that the template never looks at."""
        for name in arguments if self.source else ():
            if name not in self.variables:
                known = sorted(self.variables - GIVEN - set(self.tokenizer.special_tokens_map))
                there = f"it looks at {', '.join(known)}" if known else "it has none"
                raise DataError(
                    f"template_arguments: the chat template never looks at {name}; {there}"
                )

    def opened(self, conversation: Conversation) -> str:
        """Return what the generation prompt opens that a rendered turn does not begin with, such
        as a block of thoughts; usually nothing.
        """
        arguments = conversation.arguments
        header = self.render([ASKED], None, arguments, prompt=True)
        whole = self.render([ASKED, _answer(PROBES[0])], None, arguments)
        return header[_shared(header, whole) :]

    @property
    def notices(self) -> list[str]:
        """Lines about the template for whoever starts the run."""
        if not self.used:
            return []
        lines = []
        end = self.turn_end
        name = self.tokenizer.convert_ids_to_tokens
        if end is not None and end != self.tokenizer.eos_token_id:
            lines.append(
                f"the chat template ends an assistant's turn with {name(end)}, not with the "
                f"tokenizer's EOS {self.tokenizer.eos_token}: it is learned, and ends responses"
            )
        if self.lost_tools:
            lines.append("the chat template writes nothing of the tools that the data name")
        if "strftime_now" in self.source:
            lines.append(
                f"the chat template prints today's date: it is {self.today} for the whole run, "
                "also when it is resumed"
            )
        lines += [
            f"the generation prompt opens {text!r}, which {count} rendered answers do not begin "
            "with: they are learned without it; see template_arguments"
            for text, count in self.opens.items()
        ]
        return lines

    # --- rendering --------------------------------------------------------------------------------

    def render(
        self,
        messages: Messages,
        tools: list[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
        prompt: bool = False,
        going_on: bool = False,
    ) -> str:
        """Return the text of messages; with `prompt` ready for an answer, with `going_on` ready for
        more of the last message. Raises DataError for whatever the template raises.
        """
        if not self.source:
            raise DataError(
                "chat messages, but the tokenizer has no chat template: give the model one "
                "(template: FILE)"
            )
        given = self._with_calls(messages) if _calls(messages) else messages
        self.lost_tools |= bool(tools) and "tools" not in self.variables
        try:
            return self._rendered(
                given,
                tools=tools,
                add_generation_prompt=prompt,
                continue_final_message=going_on,
                **(arguments or {}),
            )
        except Exception as error:  # Jinja's, and whatever a template's own code raises
            raise DataError(f"the chat template cannot render it: {said(error)}") from error

    def _rendered(self, messages: Messages, **how: Any) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, strftime_now=self.today.strftime, **how
        )
        return text

    def _with_calls(self, messages: Messages) -> Messages:
        """Return messages with arguments of calls as the template writes them as JSON, once. Raises
        DataError where it writes none.
        """
        if all("value" not in text for text in self._written_calls):
            raise DataError(
                "a turn calls a tool, and the chat template writes no calls: give the model one "
                "that does (template: FILE)"
            )
        as_json = [re.search(r'"argument"\s*:\s*"value"', text) for text in self._written_calls]
        if as_json[1] and not as_json[0]:
            return [_with_text_arguments(message) for message in messages]
        return messages

    def prompt(self, conversation: Conversation, going_on: bool = False) -> tuple[str, list[int]]:
        """Return text and ids of a conversation that the assistant is to answer; with `going_on`,
        whose last turn it is to continue.
        """
        self.used = True
        text = self.render(
            conversation.messages,
            conversation.tools,
            conversation.arguments,
            prompt=not going_on,
            going_on=going_on,
        )
        # The template has written its special tokens; the tokenizer would add them twice.
        return text, encode_text(self.tokenizer, text)

    # --- examples ---------------------------------------------------------------------------------

    def examples(
        self,
        conversation: Conversation,
        train_on: Literal["all", "last"] = "all",
        rewritten_turns: Literal["split", "refuse"] = "split",
        row: int = 0,
    ) -> list[Example]:
        """Return the conversation as examples in which the assistant's turns, with their ends, are
        trained: one, or one per turn where the template changes earlier turns.

        None of it where nothing is to be learned. Raises DataError where turns are rewritten and
        that is to be refused, and for whatever the template raises.
        """
        self.used = True
        learned = conversation.learned or (True,) * len(conversation.messages)
        spoken = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        wanted = [i for i in (spoken[-1:] if train_on == "last" else spoken) if learned[i]]
        turns = [self._turn(conversation, i) for i in wanted]
        if not turns:
            return []
        whole = self._upto(conversation, len(conversation.messages))
        ended = bool(self._end_text) or len(turns) == 1
        if self._end_text and all(whole.startswith(str(turn)) for turn in turns):
            return [self._example(row, whole, turns)]
        if rewritten_turns == "refuse" and len(turns) > 1:
            why = "rewrites earlier turns" if ended else "ends no turn with a token"
            raise DataError(
                f"the chat template {why}; rewritten_turns: split learns each by itself"
            )
        return [self._example(row, turn.text, [turn]) for turn in turns]

    def _upto(self, conversation: Conversation, count: int, prompt: bool = False) -> str:
        messages = conversation.messages[:count]
        return self.render(messages, conversation.tools, conversation.arguments, prompt)

    def _turn(self, conversation: Conversation, index: int) -> _Turn:
        """Return an assistant's turn as it is when it is the last one."""
        text = self._upto(conversation, index + 1)
        if self._marked:
            start, end = self._marked_span(conversation, index)
        else:
            start = self._start(conversation, index, text)
            end = len(text.removesuffix(self._after))
        if self._end_text:
            end = text.rfind(self._end_text, start) + len(self._end_text)
        if end <= start or (self._end_text and not text[:end].endswith(self._end_text)):
            raise DataError(
                f"the chat template does not end turn {index + 1}, the assistant's, with "
                f"{self._end_text or 'what it ends others with'}"
            )
        return _Turn(text, start, end)

    def _start(self, conversation: Conversation, index: int, text: str) -> int:
        """Return where the turn begins: behind the generation prompt, or where another answer would
        differ if that opens something which the turn does not have.
        """
        header = None
        if index:
            try:
                header = self._upto(conversation, index, prompt=True)
            except DataError:  # a template may want the user to have spoken last
                header = None
            if header is not None and text.startswith(header):
                return len(header)
        said_there = conversation.messages[index]
        probe = next(p for p in PROBES if p[0] != str(said_there["content"])[:1])
        other = [*conversation.messages[:index], said_there | {"content": probe}]
        differing = self.render(other, conversation.tools, conversation.arguments)
        common = _shared(text, differing)
        if header is None:
            return common
        start = min(common, _shared(header, text))
        opened = header[start:]
        self.opens[opened] = self.opens.get(opened, 0) + 1
        return start

    def _marked_span(self, conversation: Conversation, index: int) -> tuple[int, int]:
        """Return where the last generation marker of the conversation up to a turn lies."""
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = conversation.messages[: index + 1]
        messages = list(self._with_calls(messages)) if _calls(messages) else messages
        _, (spans,) = render_jinja_template(
            [messages],
            tools=conversation.tools,
            chat_template=self.tokenizer.get_chat_template(tools=conversation.tools),
            return_assistant_tokens_mask=True,
            strftime_now=self.today.strftime,
            **{**self.tokenizer.special_tokens_map, **conversation.arguments},
        )
        if not spans:
            raise DataError(f"the chat template marks nothing of turn {index + 1}, the assistant's")
        start, end = spans[-1]
        return start, end

    def _example(self, row: int, text: str, turns: Sequence[_Turn]) -> Example:
        if self._end_text:
            ids, trained = self._encoded(text, [(turn.start, turn.end) for turn in turns])
            return Example(row, text, ids, trained)
        (turn,) = turns
        end = self.stops[0] if self.stops else end_of_response(self.tokenizer)
        ids, trained = self._encoded(str(turn), [(turn.start, turn.end)])
        written = str(turn) + self.tokenizer.convert_ids_to_tokens(end)
        return Example(row, written, [*ids, end], trained + b"\1")

    def _encoded(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], bytes]:
        """Return the ids of a text, and 1 for those within the spans.

        Each part is encoded by itself, as generation does with a prompt; by tokenizers that put a
        space before each part, the whole is, and ids belong to where they begin.
        """
        tokenizer = self.tokenizer
        if self._adds_space and tokenizer.is_fast:
            encoded = encode_text(tokenizer, text, offsets=True)
            inside = [any(a <= at < b for a, b in spans) for at, _ in encoded["offset_mapping"]]
            return encoded["input_ids"], bytes(inside)
        ids: list[int] = []
        trained = b""
        cuts = [0, *(cut for span in spans for cut in span), len(text)]
        for i, (start, end) in enumerate(pairwise(cuts)):
            part = encode_text(tokenizer, text[start:end]) if end > start else []
            ids += part
            trained += bytes([i % 2]) * len(part)
        return ids, trained

    @cached_property
    def _adds_space(self) -> bool:
        first = self.tokenizer.convert_ids_to_tokens(encode_text(self.tokenizer, "a"))[:1]
        return first != [] and first[0].startswith("▁")


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _shared(one: str, other: str) -> int:
    """Return how many characters both texts begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _calls(messages: Messages) -> bool:
    return any("tool_calls" in message for message in messages)


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = [
        call | {"function": call["function"] | {"arguments": _as_text(call["function"])}}
        for call in message.get("tool_calls", ())
    ]
    return message | {"tool_calls": calls} if calls else message


def _as_text(function: dict[str, Any]) -> str:
    return json.dumps(function.get("arguments", {}), ensure_ascii=False)
