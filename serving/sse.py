"""Server-sent events: how a stream is streamed, and how a client that leaves or an error ends it."""

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from albireo_jax.core.errors import EngineDeadError, OverloadedError, RefusedRequestError
from albireo_jax.core.types import FinishReason
from albireo_jax.engine.choices import INCOMPLETE, ChoiceDelta, Completion, merge_deltas
from albireo_jax.engine.output_streams import AsyncOutputStream
from albireo_jax.serving.api_errors import (
    ApiError,
    answer_failed,
    bad_request,
    engine_dead,
    internal_error,
    overloaded,
    shutting_down,
)
from albireo_jax.serving.openai_objects import UsageCounter

_DONE = b"data: [DONE]\n\n"

_logger = logging.getLogger(__name__)

Chunk = Callable[[ChoiceDelta], dict[str, Any]]
"""The JSON object that streams a delta."""


def event(value: dict[str, Any]) -> bytes:
    """One event; non-ASCII is escaped, since some clients take U+2028 for the end of a line."""
    return f"data: {json.dumps(value)}\n\n".encode()


class DeltaEvents(Protocol):
    """Turns the deltas of one choice into events."""

    def encode(self, delta: ChoiceDelta) -> bytes:
        """The events of a delta; none while its text waits."""
        ...


class ChoiceEvents:
    """Events of one choice, `opening` before the first; what surrounds a text is encoded once."""

    def __init__(self, index: int, chunk: Chunk, *, opening: bytes = b"") -> None:
        mark = uuid.uuid4().hex  # drawn now, so that no name in the chunk can hold it
        around = event(chunk(ChoiceDelta(index, mark, (), None, None)))
        self._head, self._tail = around.split(b'"%b"' % mark.encode())
        self._chunk = chunk
        self._opening = opening

    def encode(self, delta: ChoiceDelta) -> bytes:
        """The events of a delta; none while its text waits."""
        opening, self._opening = self._opening, b""
        if delta.finish_reason is not None:
            return opening + event(self._chunk(delta))
        if not delta.text:
            return opening
        return b"%b%b%b%b" % (opening, self._head, json.dumps(delta.text).encode(), self._tail)


class EachDelta:
    """Events of one choice, those of `opening` and then one for each delta, with or without text."""

    def __init__(self, chunk: Chunk, *, opening: Callable[[], bytes] = bytes) -> None:
        self._chunk = chunk
        self._opening = opening

    def encode(self, delta: ChoiceDelta) -> bytes:
        """The event of a delta."""
        opening, self._opening = self._opening(), bytes
        return opening + event(self._chunk(delta))


async def stream_events(
    stream: AsyncOutputStream,
    choices: Sequence[DeltaEvents],
    *,
    usage: UsageCounter,
    last_event: Callable[[], bytes],
    interval: int,
) -> AsyncIterator[bytes]:
    """The events of a stream, those of one engine step together, to [DONE].

    An answer's event, after its first, brings `interval` tokens at least; more if its client was slow to take
    the one before.

    `last_event` gives what comes before [DONE], when `usage` has counted all. A choice that the engine could
    not complete ends the stream, the other choices too: an error event comes instead of theirs.
    """
    try:
        async for deltas in _gathered(stream, interval):
            usage.count(deltas)
            yield b"".join([choices[delta.choice].encode(delta) for delta in _completed(deltas)])
            _raise_unless_completed(deltas)
        yield last_event()
    except ApiError as error:
        yield event(error.body())
    except EngineDeadError as error:
        yield event(engine_dead(error).body())
    except RefusedRequestError as error:
        yield event(bad_request(str(error)).body())
    except OverloadedError as error:
        yield event(overloaded(error).body())
    except Exception:
        _logger.exception("a stream failed")
        yield event(internal_error().body())
    yield _DONE


async def _gathered(stream: AsyncOutputStream, interval: int) -> AsyncIterator[Sequence[ChoiceDelta]]:
    """The deltas of a stream, one for each choice at a time, when one of them has enough tokens or ends."""
    held: list[ChoiceDelta] = []
    has_begun = False
    try:
        async for deltas in stream:
            held += deltas
            merged = merge_deltas(held)
            if has_begun and not any(_is_due(delta, interval) for delta in merged):
                continue
            held, has_begun = [], True
            yield merged
    except Exception:
        if held:
            yield merge_deltas(held)
        raise


def _is_due(delta: ChoiceDelta, interval: int) -> bool:
    return delta.finish_reason is not None or len(delta.token_ids) >= interval


class EventStream(Response):
    """A response whose events are written as the stream goes on; the stream is closed when it ends.

    Starlette's own streaming response costs a task group; here one task waits for the client to
    leave, and what an engine step brought is one write.
    """

    media_type = "text/event-stream"

    def __init__(self, stream: AsyncOutputStream, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._stream = stream
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the events until the stream or the client ends."""
        del scope
        watcher = asyncio.create_task(_close_when_gone(self._stream, receive))
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            async for body in self._events:
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watcher.cancel()
            self._stream.close()


async def read_to_end(stream: AsyncOutputStream, receive: Receive) -> list[Completion]:
    """Wait for the completions of all choices of a stream; there are none if the client left.

    Raises EngineDeadError or OverloadedError, and ApiError if the engine could not complete one of the
    choices or found it wrong.
    """
    watcher = asyncio.create_task(_close_when_gone(stream, receive))
    try:
        completions = await stream.completions()
    except RefusedRequestError as error:
        raise bad_request(str(error)) from error
    else:
        _raise_unless_completed(completions)
        return completions
    finally:
        watcher.cancel()
        stream.close()


async def _close_when_gone(stream: AsyncOutputStream, receive: Receive) -> None:
    """End a stream when its client disconnects; the request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        continue
    stream.close()


def _completed(deltas: Sequence[ChoiceDelta]) -> Sequence[ChoiceDelta]:
    """The deltas before the first that ends an answer which is not complete."""
    for place, delta in enumerate(deltas):
        if delta.finish_reason in INCOMPLETE:
            return deltas[:place]
    return deltas


def _raise_unless_completed(outcomes: Iterable[ChoiceDelta | Completion]) -> None:
    """Raise the ApiError of the first answer that the engine gave up, or cut because it stops."""
    for outcome in outcomes:
        if outcome.finish_reason is FinishReason.ERROR:
            raise answer_failed()
        if outcome.finish_reason is FinishReason.ABORT:  # the client is still there: the server aborted it
            raise shutting_down()
