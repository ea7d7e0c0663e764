"""Reasoning set apart from the answer: what a model writes between `<think>` and `</think>`.

White space beside the tags belongs to neither side. Only the first pair at the very beginning counts.
"""

from collections.abc import Generator
from enum import Enum, auto
from typing import NamedTuple

from albireo_jax.text.answers.answer_formats import ReasoningFormat
from albireo_jax.text.answers.incremental_parser import IncrementalParser

OPEN, CLOSE = "<think>", "</think>"
_PROMPT_END = 64
"""Characters at a prompt's end in which a tag can be its last word."""


class ReasoningDelta(NamedTuple):
    """More of the reasoning, then more of the answer."""

    reasoning: str
    content: str


class Thinking(Enum):
    """The beginning of an answer: inside reasoning, perhaps with a tag that opens it, or after reasoning."""

    BEGUN = auto()
    POSSIBLE = auto()
    OVER = auto()


def thinking(format: ReasoningFormat, prompt: str, *, continued: str = "") -> Thinking:
    """The state in which an answer begins: `prompt` may open the reasoning, or close it at once.

    `continued` is the beginning of the answer, if the prompt ends with one.
    """
    if format is not ReasoningFormat.NONE and continued.strip():
        return Thinking.BEGUN if OPEN in continued and CLOSE not in continued else Thinking.OVER
    end = prompt[-_PROMPT_END:].rstrip()
    if format is ReasoningFormat.NONE or end.endswith(CLOSE):
        return Thinking.OVER
    begun = format is ReasoningFormat.DEEPSEEK_R1 or end.endswith(OPEN)
    return Thinking.BEGUN if begun else Thinking.POSSIBLE


class ReasoningSplitter:
    """An answer divided as it comes; `inside` if it begins with reasoning even without a tag."""

    def __init__(self, *, inside: bool) -> None:
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._text = IncrementalParser(self._content.append)
        self._parser = self._split(inside)
        next(self._parser)

    def push(self, text: str) -> ReasoningDelta:
        """Read more of the answer; returns the reasoning and content that are certain now."""
        self._text.add(text, final=False)
        next(self._parser)
        return self._take()

    def finish(self) -> ReasoningDelta:
        """End the answer; returns the reasoning and content that were held back."""
        self._text.add("", final=True)
        for _ in self._parser:
            raise AssertionError("a parser waits for text that will not come")
        return self._take()

    def _split(self, inside: bool) -> Generator[None, None, None]:
        yield
        text = self._text
        yield from text.spaces()
        opened = yield from text.literal(OPEN)
        if not opened and not inside:
            yield from text.rest()
            return
        yield from text.spaces()
        text.drop()
        text.say = self._reasoning.append
        yield from text.until(CLOSE)
        yield from text.spaces()
        text.drop()
        text.say = self._content.append
        yield from text.rest()

    def _take(self) -> ReasoningDelta:
        delta = ReasoningDelta("".join(self._reasoning), "".join(self._content))
        self._reasoning.clear()
        self._content.clear()
        return delta
