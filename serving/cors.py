"""Pages of other origins in a browser: which may call, and that their preflights need no key."""

from collections.abc import Sequence
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from albireo_jax.serving.request_id import HEADER

ALL_ORIGINS = ("*",)
"""Every page may call, as other servers have it: a server that has to be guarded has a key."""

_METHODS = ("GET", "HEAD", "POST", "OPTIONS")


def add_cors(app: FastAPI, origins: Sequence[str]) -> None:
    """Let pages of these origins read the answers of `app`; no origin for none.

    Must be the last middleware that is added, so that it answers preflights before a key is asked for.
    Raises ValueError for what is neither `*` nor an origin.
    """
    for origin in origins:
        check_origin(origin)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=(HEADER, "Retry-After"),
        )


def origins_of(flags: Sequence[str] | None) -> Sequence[str]:
    """The origins that a command line names: all where it names none, none where it says `none`.

    Raises ValueError for what is not an origin.
    """
    if flags is None:
        return ALL_ORIGINS
    origins = [] if list(flags) == ["none"] else list(flags)
    for origin in origins:
        check_origin(origin)
    return origins


def check_origin(origin: str) -> None:
    """Refuse what no browser would send as an origin; raises ValueError."""
    if origin in ("*", "null"):
        return
    parts = urlsplit(origin)
    if not parts.scheme or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
        raise ValueError(
            f"allow_origin must be * or an origin as http://localhost:3000, without a path, "
            f"got {origin!r:.200}"
        )
