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
from typing import Any, Literal

from jinja2 import Environment, meta

from learners.data.conversation import Conversation
from learners.data.example import Example, Span, encode_spans
from learners.data.tokenise import encode_text, end_of_response
from learners.errors import DataError

Messages = Sequence[dict[str, Any]]
# what a template is given beside arguments of its own
GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
GIVEN |= {"strftime_now", "raise_exception", "chat_template", "tokenize", "return_dict"}
ASKED = {"role": "user", "content": "question"}
PROBES = ("Quatuor", "quatuor")  # answers that begin with different letters
# Ends of turns as models commonly write them; the tokenizer's own are known to it.
MARKERS = re.compile(r"</s>|<eos>|<\|\w+\|>|<(?:start|end)_of_turn>")
MARK = re.compile(r"<[^<>\s]+>")  # tokens that look like one, special or not


@dataclass(frozen=True)
class _End:
    """The token that ends an assistant's turn (None: the template writes none), its text where the
    last turn's rendering has it, and all that is written behind the last turn.
    """

    id: int | None
    text: str
    after: str


@dataclass(frozen=True)
class _Turn:
    """Text of a conversation up to an assistant's turn, and where in it the turn lies."""

    text: str
    spans: tuple[Span, ...]

    def __str__(self) -> str:
        return self.text[: self.spans[-1][1]]


class ChatTemplate:
    """A tokenizer's chat template. `ends` are ids at which its model stops besides (those of its
    generation_config.json), `today` is the date that templates may print.

    It learns what it does from the first conversation that it renders, since a template may insist
    on a system turn, or on arguments.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int] = (), today: date | None = None) -> None:
        self.tokenizer = tokenizer
        self.ends = list(ends)
        self.today = today or date.today()
        self.first: Conversation | None = None  # of the data, that was rendered
        self.lost_tools = False  # tools of the data, of which the template writes nothing
        self.opens: dict[str, int] = {}  # by what the generation prompt opens: examples without it
        self._found: dict[str, _End] = {}  # by the source of the template

    # --- what the template is ---------------------------------------------------------------------

    @property
    def source(self) -> str:
        """The template itself, or all that the tokenizer has; nothing where there is none."""
        written = self.tokenizer.chat_template
        return "".join(written.values()) if isinstance(written, dict) else written or ""

    def _source_for(self, conversation: Conversation) -> str:
        """Return the template that renders a conversation: some tokenizers have one for tools."""
        return str(self.tokenizer.get_chat_template(tools=conversation.tools))

    @property
    def turn_end(self) -> int | None:
        """The id that ends an assistant's turn; None before a conversation was rendered, and where
        the template writes none. Raises DataError where it writes one that the tokenizer has no
        token for.
        """
        return None if self.first is None else self._end(self.first).id

    @property
    def stops(self) -> list[int]:
        """The ids that end a response, those of rendered conversations first."""
        if self.first is not None:
            self._end(self.first)
        ends = (*(end.id for end in self._found.values()), self.tokenizer.eos_token_id, *self.ends)
        return [end for end in dict.fromkeys(ends) if end is not None]

    def _end(self, conversation: Conversation) -> _End:
        source = self._source_for(conversation)
        if source not in self._found:
            self._found[source] = self._find_end(conversation)
        return self._found[source]

    def _find_end(self, conversation: Conversation) -> _End:
        asked = _asked(conversation)
        after = self._behind([*asked, _answer(PROBES[0])], conversation)
        if (end := self._first_end(after)) is not None:
            name = self.tokenizer.convert_ids_to_tokens(end)
            return _End(end, name if name in after else "", after)
        if marker := MARKERS.search(after):
            raise DataError(
                f"the chat template ends an assistant's turn with {marker[0]!r}, which is no token "
                "of the tokenizer: no response could end; add the token, or give another template"
            )
        # the beginning of the next turn ends this one only where the model is known to stop there
        follows = self._behind([*asked, _answer(PROBES[0]), ASKED], conversation)
        first = self._first_end(follows)
        known = (*self.ends, self.tokenizer.eos_token_id)
        return _End(first if first in known else None, "", after)

    def _behind(self, messages: Messages, conversation: Conversation) -> str:
        """Return the text behind the answer that is a probe."""
        text = self.render(messages, conversation.tools, conversation.arguments)
        if PROBES[0] not in text:
            raise DataError("the chat template leaves out what the assistant says")
        return text.rpartition(PROBES[0])[2]

    def _first_end(self, text: str) -> int | None:
        """Return the first id of a text that may end a turn: a special token, or one that looks
        like a mark. Others, such as line breaks, stand in answers too.
        """
        added = self.tokenizer.added_tokens_decoder
        special = {i for i, token in added.items() if token.special}
        special |= {*self.ends, self.tokenizer.eos_token_id}
        name = self.tokenizer.convert_ids_to_tokens
        ids = encode_text(self.tokenizer, text)
        return next((i for i in ids if i in special or MARK.fullmatch(name(i))), None)

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
        header, whole = self._header(conversation)
        return header[_shared(header, whole) :]

    def _header(self, conversation: Conversation) -> tuple[str, str]:
        """Return a question ready for an answer, and the same with one."""
        asked = _asked(conversation)
        how = (conversation.tools, conversation.arguments)
        whole = self.render([*asked, _answer(PROBES[0])], *how)
        return self.render(asked, *how, prompt=True), whole

    @property
    def notices(self) -> list[str]:
        """Lines about the template for whoever starts the run."""
        if self.first is None:
            return []
        lines = []
        end = self.turn_end
        name = self.tokenizer.convert_ids_to_tokens
        if end is not None and end != self.tokenizer.eos_token_id:
            lines.append(
                f"the chat template ends an assistant's turn with {name(end)}, not with the "
                f"tokenizer's EOS {self.tokenizer.eos_token}: it is learned, and ends responses"
            )
        header, whole = self._header(self.first)
        written = whole[len(header) :].partition(PROBES[0])[0]
        if whole.startswith(header) and written.strip():
            lines.append(
                f"the chat template's generation prompt leaves {written!r} to the model, which "
                "learns to write it"
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
        if taken := sorted(GIVEN.intersection(arguments or ())):
            raise DataError(f"template_arguments: {taken[0]} is no argument of a template's own")
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
            words = " ".join([f"{type(error).__name__}:", *str(error).split()])[:300]
            raise DataError(f"the chat template cannot render it: {words}") from error

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

    @cached_property
    def _written_calls(self) -> list[str]:
        """Text of a call whose arguments are an object, and of one whose arguments are JSON text;
        nothing where the template raises.
        """
        first = self.first or Conversation([])
        texts = []
        for arguments in ({"argument": "value"}, '{"argument": "value"}'):
            function = {"name": "function", "arguments": arguments}
            call = {"id": "abcdefghi", "type": "function", "function": function}
            calling: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
            said = [*_asked(first), calling]
            try:
                texts.append(self._rendered(said, tools=first.tools, **first.arguments))
            except Exception:  # whatever the template raises for arguments of this kind
                texts.append("")
        return texts

    def prompt(self, conversation: Conversation, going_on: bool = False) -> tuple[str, list[int]]:
        """Return text and ids of a conversation that the assistant is to answer; with `going_on`,
        whose last turn it is to continue.
        """
        self.first = self.first or conversation
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
        self.first = self.first or conversation
        learned = conversation.learned or (True,) * len(conversation.messages)
        spoken = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        wanted = [i for i in (spoken[-1:] if train_on == "last" else spoken) if learned[i]]
        turns = [self._turn(conversation, i) for i in wanted]
        if not turns:
            return []
        if end := self._end(conversation).text:
            whole = self._upto(conversation, len(conversation.messages))
            if all(whole.startswith(str(turn)) for turn in turns):
                spans = [span for turn in turns for span in turn.spans]
                return [Example(row, whole, *encode_spans(self.tokenizer, whole, spans))]
        if rewritten_turns == "refuse" and len(turns) > 1:
            why = "rewrites earlier turns" if end else "ends no turn with a token"
            raise DataError(
                f"the chat template {why}; rewritten_turns: split learns each by itself"
            )
        return [self._alone(row, turn, bool(end)) for turn in turns]

    def _alone(self, row: int, turn: _Turn, ended: bool) -> Example:
        """Return the example of the last turn of a text."""
        if ended:
            return Example(row, turn.text, *encode_spans(self.tokenizer, turn.text, turn.spans))
        end = self.stops[0] if self.stops else end_of_response(self.tokenizer)
        ids, trained = encode_spans(self.tokenizer, str(turn), turn.spans)
        written = str(turn) + self.tokenizer.convert_ids_to_tokens(end)
        return Example(row, written, [*ids, end], trained + b"\1")

    def _upto(self, conversation: Conversation, count: int, prompt: bool = False) -> str:
        messages = conversation.messages[:count]
        return self.render(messages, conversation.tools, conversation.arguments, prompt)

    def _turn(self, conversation: Conversation, index: int) -> _Turn:
        """Return an assistant's turn as it is when it is the last one."""
        text = self._upto(conversation, index + 1)
        spans = self._marked(conversation, index, text)
        end = self._end(conversation)
        start = spans[-1][0] if spans else self._start(conversation, index, text)
        last = spans[-1][1] if spans else len(text.removesuffix(end.after))
        if end.text:
            last = text.rfind(end.text, start) + len(end.text)
            if not text[start:last].endswith(end.text):
                raise DataError(
                    f"the chat template does not end turn {index + 1}, the assistant's, with "
                    f"{end.text}, as it does with others"
                )
        return _Turn(text, (*spans[:-1], (start, max(start, last))))

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
        before = conversation.messages[:index]
        turn = conversation.messages[index]
        others = ([*before, turn | {"content": probe}] for probe in PROBES)
        how = (conversation.tools, conversation.arguments)
        common = min(_shared(text, self.render(other, *how)) for other in others)
        if header is None:
            return common
        start = min(common, _shared(header, text))
        opened = header[start:]
        self.opens[opened] = self.opens.get(opened, 0) + 1
        return start

    def _marked(self, conversation: Conversation, index: int, text: str) -> tuple[Span, ...]:
        """Return the parts of the last turn of a text between generation markers; none where the
        template marks nothing of it.
        """
        source = self._source_for(conversation)
        if not re.search(r"\{%-?\s*generation\b", source):
            return ()
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = conversation.messages[: index + 1]
        messages = list(self._with_calls(messages)) if _calls(messages) else messages
        _, (spans,) = render_jinja_template(
            [messages],
            tools=conversation.tools,
            chat_template=source,
            return_assistant_tokens_mask=True,
            strftime_now=self.today.strftime,
            **{**self.tokenizer.special_tokens_map, **conversation.arguments},
        )
        before = _shared(self._upto(conversation, index), text) if index else 0
        return tuple((start, end) for start, end in spans if before <= start < end)


def _asked(conversation: Conversation) -> list[dict[str, Any]]:
    """Return how a conversation begins, up to the user's first turn."""
    roles = [message["role"] for message in conversation.messages]
    first = roles.index("user") + 1 if "user" in roles else 0
    return conversation.messages[:first] or [ASKED]


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
