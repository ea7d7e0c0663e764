"""Run an app with uvicorn until a signal says stop."""

import logging
import signal
import socket

import uvicorn
from starlette.types import ASGIApp

_logger = logging.getLogger(__name__)

_GRACE_S = 5
"""Time that open answers get to end after a first signal; then they are cut off."""


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, port 0 for any that is free; not listening yet.

    Binding before a model is loaded tells at once that a port is taken. Raises ValueError.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be between 0 and 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ValueError(f"cannot listen at {host} port {port}: {error}") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ValueError(f"cannot listen at {host} port {port}: {error}") from error
    return bound


def address_of(bound: socket.socket) -> str:
    """URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: ASGIApp, bound: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, then let open answers end for a few seconds; main thread only."""
    # uvicorn raises the signal again once it has shut down; the caller still has an engine to close.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        make_server(app).run(sockets=[bound])
    except KeyboardInterrupt:
        _logger.info("stopped by a signal")
    finally:
        signal.signal(signal.SIGTERM, previous)


def make_server(app: ASGIApp) -> uvicorn.Server:
    """A uvicorn server for `app`, on uvloop if it is installed; it logs warnings but no requests."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            access_log=False,
            log_level="warning",
            timeout_graceful_shutdown=_GRACE_S,
            server_header=False,
        )
    )
