"""The API key, checked before anything else is looked at, and what it keeps apart."""

import hashlib
import hmac
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from albireo_jax.serving.api_errors import ApiError

OPEN_PATHS = ("/health", "/ping", "/load", "/metrics")
"""Served without a key: probes and scrapers have none."""


def check_api_key(key: str) -> None:
    """Refuse a key that no client could send in a header; raises ValueError, which does not tell the key."""
    if not key:
        raise ValueError("api_key is empty: give at least 1 character, or no key for a server without one")
    for place, character in enumerate(key):
        if not "!" <= character <= "~":
            raise ValueError(
                f"api_key has the character U+{ord(character):04X} at position {place}; "
                "a header can carry only the visible ASCII characters, ! to ~"
            )


def cache_salt(headers: Headers, asked: str | None) -> str:
    """A salt for the prefixes of a client: of the hash of its key, and of what it `asked` for besides.

    So one key's prompts cannot be guessed by how fast another's are answered. Clients without a key share.
    """
    key = hashlib.sha256(headers.get("authorization", "").encode()).hexdigest()
    return f"{key}/{asked or ''}"


class ApiKeyMiddleware:
    """Answers 401 to requests without `Authorization: Bearer <key>`, except on the open paths.

    Raises ValueError for a key that cannot be sent.
    """

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        check_api_key(api_key)
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
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refusal.response()(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        # Constant time, so that the answer's delay does not tell how much of a guess is right.
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._key)
