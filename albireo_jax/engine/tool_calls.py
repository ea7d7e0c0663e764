"""Tool calls in a model's answer: text comes in pieces, and goes out as content and calls.

A call is announced once its name and the brace that opens its arguments are known; from then on its
arguments are passed on as they come, exactly as the model wrote them, and are at any time the beginning of
a JSON object. What never gets that far is content. An announced call whose JSON breaks ends there,
unfinished as one that is cut off by the length limit, and content goes on with the character that does
not fit.
"""

import json
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import NamedTuple

from albireo_jax.engine.text_reader import Reading, TextReader
from albireo_jax.engine.tool_formats import ToolFormat

MAX_CALLS = 128
"""Calls, and attempts at one, that are looked for in an answer; what follows them is content."""

_MAX_MEMBERS = 16
_NAME_CHARACTERS = re.compile(r"[\w.:/-]*+")
_MAX_NAME = 256


class ContentText(NamedTuple):
    """More of what the model says to the user."""

    text: str


class CallBegun(NamedTuple):
    """Call number `call` of the answer, of the function `name`; its arguments follow."""

    call: int
    id: str
    name: str


class ArgumentsText(NamedTuple):
    """More of the JSON text of a call's arguments."""

    call: int
    text: str


class CallEnded(NamedTuple):
    """Nothing more comes of a call."""

    call: int


ToolEvent = ContentText | CallBegun | ArgumentsText | CallEnded


class ToolCallParser:
    """An answer read in one format; `new_id` names each call."""

    def __init__(self, format: ToolFormat, *, new_id: Callable[[], str], max_calls: int = MAX_CALLS) -> None:
        self._events: list[ToolEvent] = []
        self._text = _CallReader(self._events, new_id=new_id, max_calls=max_calls)
        self._parser = _PARSERS[format](self._text)
        next(self._parser)

    def push(self, text: str) -> list[ToolEvent]:
        """What is known now that `text` has come."""
        self._text.add(text, final=False)
        next(self._parser)
        return self._take()

    def finish(self) -> list[ToolEvent]:
        """What is known now that nothing more comes."""
        self._text.add("", final=True)
        for _ in self._parser:
            raise AssertionError("a parser waits for text that will not come")
        return self._take()

    def _take(self) -> list[ToolEvent]:
        events = list(self._events)
        self._events.clear()
        return events


@dataclass(slots=True)
class _Call:
    """A call that is being read. It has begun when its name is known and its arguments are open."""

    index: int
    name: str | None = None
    has_arguments: bool = False
    early: list[str] = field(default_factory=list[str])  # arguments that came before the name
    begun: bool = False
    closed: bool = False


class _CallReader(TextReader):
    """What the formats have in common: calls as JSON objects."""

    def __init__(self, events: list[ToolEvent], *, new_id: Callable[[], str], max_calls: int) -> None:
        super().__init__(self._say_content)
        self._events = events
        self._new_id = new_id
        self._max_calls = max_calls
        self._num_attempts = 0
        self._num_calls = 0
        self._after_call = False  # white space there is not content

    def next_call(self, marker: str) -> Reading:
        """Say what comes before a marker; False at the text's end, all of it said."""
        if self._num_attempts < self._max_calls:
            if (yield from self.until(marker)):
                return True
            if self._after_call:
                self.drop()
        yield from self.rest()
        return False

    def begin(self) -> _Call:
        """A call to be read."""
        self._num_attempts += 1
        return _Call(self._num_calls)

    def object_call(self) -> Generator[None, None, _Call]:
        """Read a call: an object with a name and arguments (or parameters), in whatever order.

        Of one that has begun nothing is held but what came after its arguments.
        """
        call = self.begin()
        if self._num_attempts <= self._max_calls and (yield from self.literal("{")):
            call.closed = yield from self._members(call)
        self.end(call)
        return call

    def arguments(self, call: _Call) -> Reading:
        """Read a call's arguments, an object."""
        if call.has_arguments or not (yield from self.next_is("{")):
            return False
        call.has_arguments = True
        self._announce(call)

        def take(text: str) -> None:
            if call.begun:
                self._events.append(ArgumentsText(call.index, text))
            else:
                call.early.append(text)
                self.hold(text)

        return (yield from self.value(take))

    def end(self, call: _Call) -> None:
        """Note the end of a call, if it began."""
        if call.begun:
            self._after_call = True
            self._events.append(CallEnded(call.index))

    def settle(self, call: _Call) -> None:
        """Say what is held of a call that broke; drop it if the text ended first."""
        if call.begun and self.ended:
            self.drop()
        else:
            self.release()

    def _members(self, call: _Call) -> Reading:
        """Read an object's members and its closing brace; whether they make a call."""
        for _ in range(_MAX_MEMBERS):
            yield from self.spaces()
            key = yield from self._string()
            yield from self.spaces()
            if key is None or not (yield from self.literal(":")):
                return False
            yield from self.spaces()
            if not (yield from self._member(call, key)):
                return False
            yield from self.spaces()
            if (yield from self.literal("}")):
                return call.begun
            if not (yield from self.literal(",")):
                return False
        return False

    def _member(self, call: _Call, key: str) -> Reading:
        if key == "name":
            name = yield from self._string()
            if name is None or call.name is not None or not is_function_name(name):
                return False
            call.name = name
            self._announce(call)
            return True
        if key in ("arguments", "parameters"):
            return (yield from self.arguments(call))
        return (yield from self.value(self.hold))

    def _string(self) -> Generator[None, None, str | None]:
        """Read and hold a string; None for anything else."""
        pieces: list[str] = []

        def take(text: str) -> None:
            pieces.append(text)
            self.hold(text)

        is_string = (yield from self.next_is('"')) and (yield from self.value(take))
        return json.loads("".join(pieces)) if is_string else None

    def _announce(self, call: _Call) -> None:
        if call.name is None or not call.has_arguments:
            return
        call.begun = True
        self.drop()
        self._num_calls += 1
        self._events.append(CallBegun(call.index, self._new_id(), call.name))
        if call.early:
            self._events.append(ArgumentsText(call.index, "".join(call.early)))

    def _say_content(self, text: str) -> None:
        self._after_call = False
        self._events.append(ContentText(text))


def is_function_name(name: str) -> bool:
    """Whether a function may be called so: letters, digits and `_ - . : /`, 256 of them at most."""
    return 0 < len(name) <= _MAX_NAME and _NAME_CHARACTERS.fullmatch(name) is not None


_Parser = Generator[None, None, None]


def _plain(text: _CallReader) -> _Parser:
    """No calls at all."""
    yield
    yield from text.rest()


def _hermes(text: _CallReader) -> _Parser:
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number of them."""
    yield
    while (yield from text.next_call("<tool_call>")):
        yield from text.spaces()
        call = yield from text.object_call()
        if not call.begun:
            text.release()
            continue
        yield from text.spaces()
        if (yield from text.literal("</tool_call>")):  # also where the model forgot the last brace
            text.drop()
        else:
            text.settle(call)


def _llama3_json(text: _CallReader) -> _Parser:
    """`{"name": …, "parameters": {…}}; …` at the beginning, or after `<|python_tag|>`."""
    yield
    yield from text.spaces()
    if (yield from text.next_is("{")):
        yield from _calls_between(text, ";")
    while (yield from text.next_call("<|python_tag|>")):
        yield from text.spaces()
        yield from _calls_between(text, ";")


def _mistral(text: _CallReader) -> _Parser:
    """`[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or for each `[TOOL_CALLS]name[ARGS]{…}`."""
    yield
    while (yield from text.next_call("[TOOL_CALLS]")):
        yield from text.spaces()
        if not (yield from text.literal("[")):
            yield from _named_call(text)
            continue
        yield from text.spaces()
        if (yield from _calls_between(text, ",")) and (yield from text.literal("]")):
            text.drop()


def _calls_between(text: _CallReader, separator: str) -> Reading:
    """Read calls up to something else than a separator and another one; whether they were all calls."""
    while True:
        call = yield from text.object_call()
        if not call.closed:
            text.settle(call)
            return False
        text.drop()
        yield from text.spaces()
        if not (yield from text.literal(separator)):
            return True
        yield from text.spaces()


def _named_call(text: _CallReader) -> Reading:
    """`name[ARGS]{…}`, perhaps with `[CALL_ID]id` after the name."""
    call = text.begin()
    name: list[str] = []

    def take(piece: str) -> None:
        name.append(piece)
        text.hold(piece)

    yield from text.run(_NAME_CHARACTERS, take)
    if (yield from text.literal("[CALL_ID]")):
        yield from text.run(_NAME_CHARACTERS, text.hold)
    yield from text.literal("[ARGS]")
    yield from text.spaces()
    if is_function_name("".join(name)):
        call.name = "".join(name)
        call.closed = yield from text.arguments(call)
    text.end(call)
    text.settle(call)
    return call.closed


_PARSERS: dict[ToolFormat, Callable[[_CallReader], _Parser]] = {
    ToolFormat.NONE: _plain,
    ToolFormat.HERMES: _hermes,
    ToolFormat.LLAMA3_JSON: _llama3_json,
    ToolFormat.MISTRAL: _mistral,
}
