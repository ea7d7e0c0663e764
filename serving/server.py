"""Run an app with uvicorn until a signal says stop or the engine dies."""

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from albireo_jax.engine.engine_client import EngineClient
from albireo_jax.serving.http_protocol import KEEP_ALIVE_S, HttpProtocol

_logger = logging.getLogger(__name__)

_BACKLOG = 2048
"""Connections that wait to be accepted."""

_GRACE_S = 5
"""Time that open answers get to end after a first signal; then the engine ends them with an error."""

_CUT_S = 3
"""Time in which clients can be told so; then connections are closed, whatever they wait for."""

_DEAD_S = 2.0
"""Time in which the server of a dead engine still answers, so that probes and open streams are told."""

_LAST_S = 9.0
"""Time after which a process whose engine is dead ends, whatever holds it up."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket at an address, port 0 for any that is free.

    Listening before a model is loaded tells at once that a port is taken, and takes it. Raises ValueError.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be between 0 and 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"cannot listen at {host} port {port}: {error}") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise ValueError(f"cannot listen at {host} port {port}: {error}") from error
    return bound


def address_of(bound: socket.socket) -> str:
    """URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: FastAPI, bound: socket.socket) -> None:
    """Serve an app of `create_app` until SIGINT, SIGTERM or the death of its engine; main thread only.

    After the first signal open answers get a few seconds to end; any later one ends the process at once.
    Raises EngineDeadError when the engine dies: for two seconds everybody is told so, then the server stops.
    A process that is still there nine seconds after that death ends with exit code 1.
    """
    service: EngineClient = app.state.engine.service
    # uvicorn raises the signal again once it has shut down; the caller still has an engine to close.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = _WatchingServer(_config(app), service)
    try:
        server.run(sockets=[bound])
    except KeyboardInterrupt:
        _logger.info("stopped by a signal")
    finally:
        server.forget_death()
        signal.signal(signal.SIGTERM, previous)
        if server.was_stopped:
            _leave_signals_to_the_system()
    if service.is_over:
        service.check_running()


def make_server(app: ASGIApp) -> uvicorn.Server:
    """A uvicorn server for `app`, on uvloop if it is installed; it logs warnings but no requests."""
    return uvicorn.Server(_config(app))


def _config(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        http=HttpProtocol,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACE_S + _CUT_S,
        server_header=False,
        backlog=_BACKLOG,
    )


class _WatchingServer(uvicorn.Server):
    """Stops when the engine is dead, and leaves a second signal to the system, which ends the process."""

    def __init__(self, config: uvicorn.Config, service: EngineClient) -> None:
        super().__init__(config)
        self.was_stopped = False
        self._service = service
        self._died_s: float | None = None
        self._last = threading.Timer(_LAST_S, os._exit, (1,))
        self._last.daemon = True

    def forget_death(self) -> None:
        """Let the process live on although the engine died."""
        self._last.cancel()

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop; called ten times a second."""
        if self._died_s is None and self._service.is_over:
            self._died_s = time.monotonic()
            self._last.start()
        is_over = self._died_s is not None and time.monotonic() - self._died_s >= _DEAD_S
        return await super().on_tick(counter) or is_over

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let open answers end, and have the engine end those that take too long."""
        event_loop = asyncio.get_running_loop()
        cut = event_loop.call_later(_GRACE_S, event_loop.run_in_executor, None, self._service.stop)
        await super().shutdown(sockets)
        cut.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take the first signal: stop gracefully."""
        super().handle_exit(sig, frame)
        self.was_stopped = True
        _leave_signals_to_the_system()


def _leave_signals_to_the_system() -> None:
    """Let the next signal end the process at once: it is ending already."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
