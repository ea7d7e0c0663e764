"""HTTP/1.1 connections: uvicorn's protocol on h11, with time limits, strict framing, and errors in JSON.

h11 and not httptools: it refuses what two servers could read in two ways, and bounds the head of a request.

What a connection waits for, and how long::

    a request's first byte    `_IDLE_S` on a new connection, `KEEP_ALIVE_S` after an answer, then it is closed
    the rest of a request     `_IDLE_S` without a byte, `_REQUEST_S` in all, then 408
    an answer                 for ever; a client that closed its connection ends it

A client may shut down its sending side and still wait for its answer. To the server that looks like a client
that has gone, until something is sent: so the first bytes that every answer begins with are sent at once, and
who has gone resets the connection.
"""

import asyncio
import socket
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.utils import is_ssl
from uvicorn.server import ServerState

from albireo_jax.serving.api_errors import ApiError

MAX_HEAD_BYTES = 2**15
"""Of a request's line and headers."""

KEEP_ALIVE_S = 30
"""Longer than clients keep idle connections (httpx 5 s, aiohttp 15 s): they would send into closed ones."""

_IDLE_S = 15.0
_REQUEST_S = 120.0
_LINGER_S = 2.0
"""Time in which a refused client can read why, before its unread bytes reset the connection."""

_FIRST_LOOK_S, _LAST_LOOK_S = 0.01, 0.5
"""Between looks whether a client that stopped sending is still there; each doubles the time to the next."""

_BEGINNING = b"HTTP/1.1 "
"""The first bytes of every answer."""


class StrictConnection(h11.Connection):
    """Refuses heads that are too long, and bodies whose length is told in two ways; keeps what was wrong."""

    fault: h11.RemoteProtocolError | None = None
    has_begun = False
    """Whether the beginning of the next answer was sent already."""

    def next_event(self) -> Any:
        """As of h11. Raises h11.RemoteProtocolError."""
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check_head(event)
        except h11.RemoteProtocolError as error:
            self.fault = error
            raise
        return event

    # h11 declares an overload for each kind of event; one signature serves them all.
    def send(self, event: h11.Event) -> bytes | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As of h11, without what was sent already."""
        data = super().send(event)
        if self.has_begun and data and isinstance(event, h11.Response):
            self.has_begun = False
            return data.removeprefix(_BEGINNING)
        return data


def _check_head(request: h11.Request) -> None:
    if request.http_version not in (b"1.0", b"1.1"):
        raise h11.RemoteProtocolError(
            "its version is not 1.0 or 1.1", error_status_hint=HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
        )
    names = {name for name, _ in request.headers}
    if {b"content-length", b"transfer-encoding"} <= names:
        raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding exclude each other")
    size = len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)
    if size > MAX_HEAD_BYTES:
        raise h11.RemoteProtocolError(
            "too long", error_status_hint=HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        )


class HttpProtocol(H11Protocol):
    """One connection."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._strict = self.conn = StrictConnection(h11.SERVER, MAX_HEAD_BYTES)
        self._timer: asyncio.TimerHandle | None = None
        self._began_s: float | None = None  # when the request that is being read began
        self._has_ended = False  # the client sends nothing more
        self._lingers = False  # the last answer was given, nothing is read any more

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the running request that its client has gone."""
        super().connection_lost(exc)
        self._stop_timer()

    def data_received(self, data: bytes) -> None:
        """Read on, unless the last answer was given."""
        if self._lingers:
            return
        if self._began_s is None:
            self._began_s = self.loop.time()
        super().data_received(data)
        self._watch()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Go on with a request that is complete; refuse one that is not. False closes the connection."""
        if self._lingers or is_ssl(self.transport):
            return False
        if self._has_ended:
            return True
        self._has_ended = True
        if self._is_answering() and not self.cycle.more_body:
            if not self.cycle.response_started:
                self._strict.has_begun = True
                self.transport.write(_BEGINNING)
            self._look_whether_there(_FIRST_LOOK_S)
            return True
        if self._is_answering() or self.conn.trailing_data[0]:
            self._refuse(HTTPStatus.BAD_REQUEST, "the request ended before it was complete")
            return True
        return False

    def on_response_complete(self) -> None:
        """Read the next request; none will come from a client that has stopped sending."""
        super().on_response_complete()
        if self._has_ended and not self._is_answering():
            self.transport.close()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or more of it than is read."""
        fault = self._strict.fault
        status = HTTPStatus(fault.error_status_hint) if fault is not None else HTTPStatus.BAD_REQUEST
        if status is HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            msg = f"the head of the request exceeds the limit of {MAX_HEAD_BYTES} bytes"
        elif fault is not None:
            msg = f"this is not a valid HTTP request: {fault}"
        self._refuse(status, msg)

    def shutdown(self) -> None:
        """Close the connection, or let its answer end first."""
        if self._lingers:
            self.transport.close()
        elif self._is_answering() and self.cycle.more_body:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "the server is shutting down")
        else:
            super().shutdown()

    def _should_upgrade(self) -> bool:
        return False  # no other protocol is spoken; the request is answered in this one

    def _is_answering(self) -> bool:
        """Whether a request is being answered, or its body read."""
        return self._had_request() and not self.cycle.response_complete

    def _had_request(self) -> bool:
        """Whether the connection had a request; uvicorn declares the cycle of a request that never came."""
        return self.cycle is not None  # pyright: ignore[reportUnnecessaryComparison]

    def _watch(self) -> None:
        """Limit the time for what the client has to send next."""
        self._stop_timer()
        if self._lingers or self.transport.is_closing():
            return
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._began_s = None
            return
        wait_s = KEEP_ALIVE_S if self._had_request() and self._began_s is None else _IDLE_S
        if self._began_s is not None:
            wait_s = min(wait_s, self._began_s + _REQUEST_S - self.loop.time())
        self._timer = self.loop.call_later(max(wait_s, 0), self._time_out)

    def _time_out(self) -> None:
        if self._began_s is None:
            self.transport.close()
        else:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "the request was not complete in time")

    def _look_whether_there(self, next_s: float) -> None:
        """End the request of a client that has gone: the system tells by an error on the socket."""
        self._stop_timer()
        if self.transport.is_closing():
            return
        connection: socket.socket = self.transport.get_extra_info("socket")
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        elif self._is_answering():
            again_s = min(2 * next_s, _LAST_LOOK_S)
            self._timer = self.loop.call_later(next_s, self._look_whether_there, again_s)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Answer with an error, if nothing else was answered yet, and take nothing more."""
        if self._is_answering():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = ApiError(status, message).response()
            headers = [*answer.raw_headers, (b"connection", b"close")]
            reason = status.phrase.encode()
            for event in (
                h11.Response(status_code=status, headers=headers, reason=reason),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self._stop_timer()
        self._unset_keepalive_if_required()
        self._lingers = True
        if self._has_ended or not self.transport.can_write_eof():
            self.transport.close()
        else:
            self.transport.write_eof()
            self.flow.resume_reading()
            self._timer = self.loop.call_later(_LINGER_S, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
