"""A request's tokens to text, as they are sampled.

Text waits on its way out for two reasons: bytes that do not complete a character yet, and characters that
may be the beginning of a stop string. Both waits end as soon as they can, so that at any time

    all text given out + text held back == decode(prompt + tokens) - decode(prompt),

cut where a stop string is first complete. Where two are complete at the same character the longer one
counts: what is cut does not depend on how the text was divided into tokens.
"""

import re
from codecs import utf_8_decode
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from albireo_jax.core.types import FinishReason, SamplingParams
from albireo_jax.text.token_bytes import TokenBytes
from albireo_jax.text.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_FIRST_MARK = 0xD800
_MARKS = re.compile("[\ud800-\udfff]")
"""Halves of surrogate pairs, which no decoded text has: each stands for a special token that is hidden."""

_MAX_PENDING_BYTES = 3
"""Bytes of a UTF-8 character that can be there without completing it."""


class TextDelta(NamedTuple):
    """The text that new tokens add to a request's output, and the reason if the request ended.

    A named tuple, not a dataclass: a step of 512 rows makes 512 of them. `stop_reason` is the stop string
    or the id among `stop_token_ids` that ended the request, None for any other end.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class Detokenizer:
    """Text of one request, token by token.

    `prompt_token_ids` give the context: whether the answer's first space is the text's first, and a
    character that the prompt began.
    """

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, *, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self._params = params
        self._eos_token_ids = tokenizer.eos_token_ids
        self._pieces = tokenizer.token_bytes(
            skip_special_tokens=params.skip_special_tokens, shown=params.shown_tokens
        )
        self._reader = _reader_after(tokenizer, self._pieces, prompt_token_ids)
        special = tokenizer.special_tokens_in(params.stop)
        self._marks = {token_id: chr(_FIRST_MARK + i) for i, token_id in enumerate(special)}
        needles = [(stop, stop) for stop in params.stop]
        needles += [(_marked(stop, special, self._marks), stop) for stop in params.stop if special]
        self._finder = _StopFinder(needles, keeps_stop=params.include_stop_str_in_output)
        self._num_tokens = 0
        self._finished = False

    @property
    def finished(self) -> bool:
        """Whether the text has ended, by a stop string or by the engine's reason."""
        return self._finished

    def push(
        self,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None = None,
        *,
        ends_with_text: bool = False,
    ) -> TextDelta:
        """Take in sampled tokens, and the engine's reason if it ended the request with the last of them.

        An end by STOP leaves the last token out of the text unless `ends_with_text`, because nothing could
        follow it, or `include_stop_str_in_output`. A stop string ends the text whatever the engine says:
        `finish_reason` is STOP then, and tokens after the one that completed it are left out. What is pushed
        after the end gives an empty delta.
        """
        if self._finished:
            return TextDelta("", (), None, None)
        stops = finish_reason is FinishReason.STOP and not ends_with_text
        stop_id = token_ids[-1] if stops and token_ids else None
        hides_last = stop_id is not None and not self._params.include_stop_str_in_output
        text = ""
        for count, token_id in enumerate(token_ids[:-1] if hides_last else token_ids, start=1):
            self._num_tokens += 1
            found = self._feed(self._text_of(token_id))
            text += found.text
            if found.stop is not None:
                return self._end(text, token_ids[:count], reason=FinishReason.STOP, stop=found.stop)
        if finish_reason is None:
            return TextDelta(text, tuple(token_ids), None, None)
        if hides_last and token_ids[-1] in self._marks:  # a stop string may end with the stop token
            self._num_tokens += 1
            found = self._feed(self._marks[token_ids[-1]])
            text += found.text
            if found.stop is not None:
                return self._end(text, token_ids, reason=FinishReason.STOP, stop=found.stop)
        found = self._feed(self._reader.read(b"", final=True))
        text += found.text
        if found.stop is not None:
            return self._end(text, token_ids, reason=FinishReason.STOP, stop=found.stop)
        text += _without_marks(self._finder.held)
        return self._end(text, token_ids, reason=finish_reason, stop=self._stop_reason(stop_id))

    def _text_of(self, token_id: int) -> str:
        """The text that a token adds; the mark of a hidden one that a stop string has in it."""
        data = self._pieces[token_id]
        if not data and token_id in self._marks:
            return self._marks[token_id]
        return self._reader.read(data)

    def _feed(self, text: str) -> "_Found":
        return self._finder.feed(text, searching=self._num_tokens > self._params.min_tokens)

    def _end(
        self, text: str, token_ids: Sequence[int], *, reason: FinishReason, stop: str | int | None
    ) -> TextDelta:
        self._finished = True
        return TextDelta(text, tuple(token_ids), reason, stop)

    def _stop_reason(self, stop_id: int | None) -> int | None:
        """The id, if it is the caller's own; an end-of-sequence id that counts as such is no reason."""
        is_eos = stop_id in self._eos_token_ids and not self._params.ignore_eos
        return stop_id if stop_id in self._params.stop_token_ids and not is_eos else None


class TextOffsets:
    """For each token of an answer, or of an echoed prompt and its answer, where its text begins.

    The offset of a token is the number of characters that the tokens before it gave. `echo` is the text of
    the prompt if it is given back; special tokens that it does not spell give nothing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        prompt_token_ids: Sequence[int] = (),
        echo: str | None = None,
    ) -> None:
        pieces = tokenizer.token_bytes(
            skip_special_tokens=params.skip_special_tokens, shown=params.shown_tokens
        )
        self._answer = _reader_after(tokenizer, pieces, prompt_token_ids), pieces
        self._length = 0
        self._echo = echo
        self._num_echoed = 0 if echo is None else len(prompt_token_ids)
        self._echoed = _Utf8Reader(pending=b"", drops_space=tokenizer.drops_first_space)
        self._all_pieces = tokenizer.token_bytes(skip_special_tokens=False)
        self._is_special = tokenizer.is_special

    def next(self, token_id: int) -> int:
        """The offset of the next token."""
        offset = self._length
        if self._num_echoed:
            self._num_echoed -= 1
            self._length += self._echoed_length(token_id)
            if not self._num_echoed:
                self._length = len(self._echo or "")
        else:
            reader, pieces = self._answer
            self._length += len(reader.read(pieces[token_id]))
        return offset

    def _echoed_length(self, token_id: int) -> int:
        data = self._all_pieces[token_id]
        if self._is_special(token_id) and not (self._echo or "").startswith(data.decode(), self._length):
            return 0
        return len(self._echoed.read(data))


class _Utf8Reader:
    """Bytes in, text out; what does not complete a character waits for the next bytes."""

    def __init__(self, *, pending: bytes, drops_space: bool) -> None:
        self._pending = pending
        self._drops_space = drops_space
        self._drops_replacement = bool(pending)  # the prompt's text ends with one for these bytes

    def read(self, data: bytes, *, final: bool = False) -> str:
        """Characters that are complete now; with `final` also U+FFFD for bytes that will never be."""
        if self._drops_space and data:
            self._drops_space = False
            data = data.removeprefix(b" ")
        if self._pending:
            data = self._pending + data
        text, used = utf_8_decode(data, "replace", final)
        self._pending = data[used:]
        if self._drops_replacement and text:
            self._drops_replacement = False
            return text.removeprefix(_REPLACEMENT)
        return text


def _reader_after(tokenizer: Tokenizer, pieces: TokenBytes, prompt_token_ids: Sequence[int]) -> _Utf8Reader:
    """The reader of an answer to a prompt."""
    begins_text = not any(pieces[token_id] for token_id in prompt_token_ids)
    return _Utf8Reader(
        pending=_incomplete_end(pieces, prompt_token_ids),
        drops_space=begins_text and tokenizer.drops_first_space,
    )


def _incomplete_end(pieces: TokenBytes, token_ids: Sequence[int]) -> bytes:
    """The bytes with which the tokens' text breaks off inside a character, if it does."""
    end = b""
    for token_id in reversed(token_ids):
        end = pieces[token_id] + end
        if len(end) >= _MAX_PENDING_BYTES:
            break
    return end[utf_8_decode(end, "replace", False)[1] :]


class _Found(NamedTuple):
    """Text that may go out, and the stop string that ends it if there is one."""

    text: str
    stop: str | None


class _StopFinder:
    """Holds back the end of a text while it may be the beginning of a stop string.

    Each of `needles` is looked for, and stands for the stop string beside it. Marks in a text stand for
    hidden tokens: they are looked for, but not given out.
    """

    def __init__(self, needles: Sequence[tuple[str, str]], *, keeps_stop: bool) -> None:
        self._needles = dict(needles)
        self._first_chars = frozenset(needle[0] for needle in self._needles)
        self._keeps_stop = keeps_stop
        self.held = ""

    def feed(self, text: str, *, searching: bool) -> _Found:
        """Add `text`; returns the text that may go out, if `searching` only up to a completed stop string."""
        if not self.held and self._first_chars.isdisjoint(text):
            return _Found(_without_marks(text), None)
        buffer = self.held + text
        match = self._first_match(buffer) if searching else None
        if match is not None:
            kept = match.stop if self._keeps_stop else ""
            return _Found(_without_marks(buffer[: match.start]) + kept, match.stop)
        cut = len(buffer) - max(_overlap(buffer, needle) for needle in self._needles)
        self.held = buffer[cut:]
        return _Found(_without_marks(buffer[:cut]), None)

    def _first_match(self, buffer: str) -> "_Match | None":
        """The first stop string to be complete in `buffer`, beyond what was held; the longest of those."""
        matches: list[_Match] = []
        for needle, stop in self._needles.items():
            start = buffer.find(needle, max(0, len(self.held) - len(needle) + 1))
            if start >= 0:
                matches.append(_Match(end=start + len(needle), start=start, stop=stop))
        return min(matches, default=None)


class _Match(NamedTuple):
    """A stop string's place; ordered by its end, then by its start."""

    end: int
    start: int
    stop: str


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return len(text) - start if start >= 0 else 0


def _marked(stop: str, special: Mapping[int, str], marks: Mapping[int, str]) -> str:
    """A stop string with marks in the place of special tokens, longer ones first."""
    for token_id, text in sorted(special.items(), key=lambda item: -len(item[1])):
        stop = stop.replace(text, marks[token_id])
    return stop


def _without_marks(text: str) -> str:
    return text if text.isascii() else _MARKS.sub("", text)
