"""Tool calls in a model's answer: text comes in pieces, and goes out as content and calls."""

from collections.abc import Callable, Generator

from albireo_jax.text.answers.answer_formats import ToolFormat
from albireo_jax.text.answers.call_reader import (
    ArgumentsText,
    CallBegun,
    CallEnded,
    CallReader,
    ContentText,
    ToolEvent,
    is_function_name,
)

__all__ = [
    "MAX_CALLS",
    "ArgumentsText",
    "CallBegun",
    "CallEnded",
    "ContentText",
    "ToolCallParser",
    "ToolEvent",
    "is_function_name",
]

MAX_CALLS = 128
"""Calls, and attempts at one, that are looked for in an answer; what follows them is content."""


class ToolCallParser:
    """An answer read in one format; `new_id` names each call."""

    def __init__(self, format: ToolFormat, *, new_id: Callable[[], str], max_calls: int = MAX_CALLS) -> None:
        self._events: list[ToolEvent] = []
        self._text = CallReader(self._events, new_id=new_id, max_calls=max_calls)
        self._parser = _PARSERS[format](self._text)
        next(self._parser)

    def push(self, text: str) -> list[ToolEvent]:
        """Read more of the answer; returns the events that are certain now."""
        self._text.add(text, final=False)
        next(self._parser)
        return self._take()

    def finish(self) -> list[ToolEvent]:
        """End the answer; returns the events that were held back."""
        self._text.add("", final=True)
        for _ in self._parser:
            raise AssertionError("a parser waits for text that will not come")
        return self._take()

    def _take(self) -> list[ToolEvent]:
        events = list(self._events)
        self._events.clear()
        return events


_Parser = Generator[None, None, None]


def _plain(text: CallReader) -> _Parser:
    """No calls at all."""
    yield
    yield from text.rest()


def _hermes(text: CallReader) -> _Parser:
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number of them."""
    yield
    opening, closing = "<tool_call>", "</tool_call>"
    is_open = False
    while marker := (yield from text.next_marker(opening, *([closing] if is_open else []))):
        if marker == closing:
            text.drop()
            is_open = False
        elif (yield from text.calls()):
            is_open = True
            while (yield from text.literal(closing)):
                text.drop()
                is_open = False
                yield from text.spaces()


def _llama3_json(text: CallReader) -> _Parser:
    """`{"name": …, "parameters": {…}}; …` on a line of its own, or after `<|python_tag|>`."""
    yield
    marker = "<|python_tag|>"
    while found := (yield from text.next_line("{[`", marker)):
        yield from text.calls(is_bare=found != marker)


def _mistral(text: CallReader) -> _Parser:
    """`[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or for each `[TOOL_CALLS]name[ARGS]{…}`."""
    yield
    while (yield from text.next_marker("[TOOL_CALLS]")):
        yield from text.spaces()
        if (yield from text.next_is("[{`")):
            if (yield from text.calls()) and (yield from text.literal("[/TOOL_CALLS]")):
                text.drop()
            continue
        found = yield from text.named_call(is_first=True)
        while found and (yield from text.spaces()):
            yield from text.literal(",")
            yield from text.spaces()
            found = yield from text.named_call(is_first=False)


_PARSERS: dict[ToolFormat, Callable[[CallReader], _Parser]] = {
    ToolFormat.NONE: _plain,
    ToolFormat.HERMES: _hermes,
    ToolFormat.LLAMA3_JSON: _llama3_json,
    ToolFormat.MISTRAL: _mistral,
}
