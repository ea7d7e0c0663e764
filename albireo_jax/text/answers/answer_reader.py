"""A model's answer as a message has it: reasoning, content and tool calls, told apart as they come."""

import random
import string
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from albireo_jax.text.answers.answer_formats import ToolFormat
from albireo_jax.text.answers.call_reader import (
    ArgumentsText,
    CallBegun,
    CallEnded,
    ContentText,
    ToolEvent,
)
from albireo_jax.text.answers.reasoning import ReasoningDelta, ReasoningSplitter, Thinking
from albireo_jax.text.answers.tool_calls import ToolCallParser
from albireo_jax.text.messages import short_call_id

_MISTRAL_ID_CHARACTERS = 9


class ReasoningText(NamedTuple):
    """More of what the model thinks before it answers."""

    text: str


AnswerEvent = ReasoningText | ToolEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call as a message has it; `arguments` is JSON text, cut off if the answer was."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """All of an answer."""

    reasoning: str
    content: str
    calls: tuple[ToolCall, ...]


class AnswerReader:
    """Reads one answer, calls in the format `tools`; one call at most if not `parallel`."""

    def __init__(self, tools: ToolFormat, thinking: Thinking, *, parallel: bool = True) -> None:
        self._parallel = parallel
        self._num_broken = 0
        is_over = thinking is Thinking.OVER
        self._splitter = None if is_over else ReasoningSplitter(inside=thinking is Thinking.BEGUN)
        self._parser = ToolCallParser(tools, new_id=lambda: new_call_id(tools))

    def push(self, text: str) -> list[AnswerEvent]:
        """Read more of the answer; returns the events that are certain now."""
        if self._splitter is None:
            return self._wanted(self._parser.push(text))
        return self._answered(self._splitter.push(text))

    def finish(self) -> list[AnswerEvent]:
        """End the answer; returns the events that were held back."""
        events = self._answered(self._splitter.finish()) if self._splitter is not None else []
        return events + self._wanted(self._parser.finish())

    def read(self, text: str, *, cut_off: bool = False) -> Answer:
        """A whole answer; see `collect_answer`."""
        return collect_answer(self.push(text) + self.finish(), cut_off=cut_off)

    def _answered(self, delta: ReasoningDelta) -> list[AnswerEvent]:
        events: list[AnswerEvent] = [ReasoningText(delta.reasoning)] if delta.reasoning else []
        return events + self._wanted(self._parser.push(delta.content)) if delta.content else events

    def _wanted(self, events: list[ToolEvent]) -> list[AnswerEvent]:
        """All events, or without the calls after the first that is whole."""
        wanted: list[AnswerEvent] = []
        for event in events:
            if self._parallel or isinstance(event, ContentText) or event.call <= self._num_broken:
                wanted.append(event)
                self._num_broken += isinstance(event, CallEnded) and bool(event.broken)
        return wanted


def collect_answer(events: Iterable[AnswerEvent], *, cut_off: bool = False) -> Answer:
    """The events of a whole answer, put together.

    A call whose arguments are no JSON object is content, as it was written; only an answer that was `cut_off`
    by its length ends with a call that is cut off too.
    """
    reasoning: list[str] = []
    content: list[str] = []
    begun: dict[int, CallBegun] = {}
    arguments: dict[int, list[str]] = {}
    for event in events:
        match event:
            case ReasoningText(text):
                reasoning.append(text)
            case ContentText(text):
                content.append(text)
            case CallBegun(call):
                begun[call] = event
                arguments[call] = []
            case ArgumentsText(call, text):
                arguments[call].append(text)
            case CallEnded(call, broken, is_last):
                if broken and not (is_last and cut_off):
                    content.append(broken)
                    del begun[call]
    calls = (
        ToolCall(id=event.id, name=event.name, arguments="".join(arguments[call]))
        for call, event in begun.items()
    )
    return Answer(reasoning="".join(reasoning), content="".join(content), calls=tuple(calls))


def new_call_id(format: ToolFormat) -> str:
    """A name for a call; Mistral's templates insist on nine letters and digits."""
    if format is ToolFormat.MISTRAL:
        return "".join(random.choices(string.ascii_letters + string.digits, k=_MISTRAL_ID_CHARACTERS))
    return f"call_{uuid.uuid4().hex[:24]}"


def fitting_call_id(format: ToolFormat, id: str) -> str:
    """A caller's name for a call as templates accept it: for Mistral's the last nine letters and digits."""
    if format is not ToolFormat.MISTRAL:
        return id
    return short_call_id(id)
