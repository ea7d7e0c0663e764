"""The id of a request: the client's `X-Request-Id` or one made here, in every answer and in the logs."""

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from albireo_jax.serving.api_errors import internal_error

HEADER = "X-Request-Id"

MAX_REQUEST_ID = 128
"""Characters of an id that a client gives; a longer one is replaced."""

_STATE = "request_id"


def request_id(request: Request, asked: str | None = None) -> str:
    """The id of a request: its header's, or what its body `asked` for, or the one that was made.

    The answer's header then says the same.
    """
    state = request.scope["state"]
    if asked is not None and is_request_id(asked) and not _given(request.headers):
        state[_STATE] = asked
    return state[_STATE]


def is_request_id(text: str) -> bool:
    """Whether a text can be an id: visible ASCII characters, not too many."""
    return 0 < len(text) <= MAX_REQUEST_ID and all("!" <= character <= "~" for character in text)


class RequestIdMiddleware:
    """Gives every request an id, and every answer the id as a header, that of an unforeseen error too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on under its id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state[_STATE] = _given(Headers(scope=scope)) or uuid.uuid4().hex
        has_begun = False

        async def send_named(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                MutableHeaders(scope=message)[HEADER] = state[_STATE]
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except Exception:
            if not has_begun:  # Starlette's own answer would come without the headers of the middleware
                await internal_error().response()(scope, receive, send_named)
            raise


def _given(headers: Headers) -> str | None:
    """The id that a client gave, if it can be one."""
    given = headers.get(HEADER, "")
    return given if is_request_id(given) else None
