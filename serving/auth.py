"""The API key, checked before anything else is looked at, and what it keeps apart."""

import hashlib
import hmac
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from albireo_jax.serving.errors import ApiError

OPEN_PATHS = ("/health", "/metrics")
"""Served without a key: probes and scrapers have none."""


def cache_salt(headers: Headers, asked: str | None) -> str:
    """A salt for the prefixes of a client: of the hash of its key, and of what it `asked` for besides.

    So one key's prompts cannot be guessed by how fast another's are answered. Clients without a key share.
    """
    key = hashlib.sha256(headers.get("authorization", "").encode()).hexdigest()
    return f"{key}/{asked or ''}"


class ApiKeyMiddleware:
    """Answers 401 to requests without `Authorization: Bearer <key>`, except on the open paths."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._is_allowed(scope):
            await self._app(scope, receive, send)
            return
        refusal = ApiError(
            HTTPStatus.UNAUTHORIZED,
            "the API key is missing or wrong: send it as Authorization: Bearer KEY",
            code="invalid_api_key",
        )
        answer = JSONResponse(refusal.body(), refusal.status, headers={"WWW-Authenticate": "Bearer"})
        await answer(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        # Constant time, so that the answer's delay does not tell how much of a guess is right.
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._key)
