"""A request's tokens to text, as they are sampled.

Text waits on its way out for two reasons: bytes that do not complete a character yet, and characters that
may be the beginning of a stop string. Both waits end as soon as they can, so that at any time

    all text given out + text held back == decode(prompt + tokens) - decode(prompt),

cut where a stop string is first complete. Where two are complete at the same character the longer one
counts: what is cut does not depend on how the text was divided into tokens.
"""

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import NamedTuple

from albireo_jax.core.types import FinishReason, SamplingParams
from albireo_jax.engine.token_bytes import TokenBytes
from albireo_jax.engine.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_PENDING_BYTES = 3
"""Bytes of a UTF-8 character that can be there without completing it."""


class TextDelta(NamedTuple):
    """What new tokens add to a request's text, and how it ended if it did.

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
        begins_text = not any(self._pieces[token_id] for token_id in prompt_token_ids)
        self._reader = _Utf8Reader(
            pending=_incomplete_end(self._pieces, prompt_token_ids),
            drops_space=begins_text and tokenizer.drops_first_space,
        )
        self._finder = _StopFinder(params.stop, keeps_stop=params.include_stop_str_in_output)
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
            found = self._feed(self._reader.read(self._pieces[token_id]))
            text += found.text
            if found.stop is not None:
                return self._end(text, token_ids[:count], reason=FinishReason.STOP, stop=found.stop)
        if finish_reason is None:
            return TextDelta(text, tuple(token_ids), None, None)
        found = self._feed(self._reader.read(b"", final=True))
        text += found.text
        if found.stop is not None:
            return self._end(text, token_ids, reason=FinishReason.STOP, stop=found.stop)
        text += self._finder.held
        return self._end(text, token_ids, reason=finish_reason, stop=self._stop_reason(stop_id))

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
    """Holds back the end of a text while it may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str], *, keeps_stop: bool) -> None:
        self._stops = stops
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._keeps_stop = keeps_stop
        self.held = ""

    def feed(self, text: str, *, searching: bool) -> _Found:
        """What may go out now that `text` has come; if `searching`, up to a stop string that it completes."""
        if not self.held and self._first_chars.isdisjoint(text):
            return _Found(text, None)
        buffer = self.held + text
        match = self._first_match(buffer) if searching else None
        if match is not None:
            return _Found(buffer[: match.end if self._keeps_stop else match.start], match.stop)
        cut = len(buffer) - max(_overlap(buffer, stop) for stop in self._stops)
        self.held = buffer[cut:]
        return _Found(buffer[:cut], None)

    def _first_match(self, buffer: str) -> "_Match | None":
        """The first stop string to be complete in `buffer`, beyond what was held; the longest of those."""
        matches: list[_Match] = []
        for stop in self._stops:
            start = buffer.find(stop, max(0, len(self.held) - len(stop) + 1))
            if start >= 0:
                matches.append(_Match(end=start + len(stop), start=start, stop=stop))
        return min(matches, default=None)


class _Match(NamedTuple):
    """Where a stop string is; ordered by its end, then by its start."""

    end: int
    start: int
    stop: str


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return len(text) - start if start >= 0 else 0
