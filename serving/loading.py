"""Answers that the model is still loading, until the app takes over the socket."""

import json
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn

from albireo_jax.serving.api_errors import loading

LOADING = "the model is still loading"

_POLL_S = 0.05
_CLIENT_S = 5.0
"""Time that a client gets to send its request and to take the answer."""


@contextmanager
def answers_loading(
    bound: socket.socket, progress: Callable[[], str] = lambda: LOADING
) -> Generator[None, None, None]:
    """Within, requests at the listening socket are answered with 503 and the `progress`; `bound` stays open.

    Probes so learn at once that the server is there and not ready. Connections that come at the end of it
    wait for who listens next.
    """
    server = _LoadingServer(bound, progress)
    thread = threading.Thread(
        target=server.serve_forever, args=(_POLL_S,), name="albireo-loading", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _LoadingServer(ThreadingMixIn, TCPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, bound: socket.socket, progress: Callable[[], str]) -> None:
        super().__init__(bound.getsockname(), _LoadingHandler, bind_and_activate=False)
        self.progress = progress
        self.socket.close()
        self.socket = bound.dup()

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: a client that leaves before it is answered is no fault of ours."""


class _LoadingHandler(BaseHTTPRequestHandler):
    timeout = _CLIENT_S
    server: _LoadingServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        """Answer 503, and close the connection when the client has sent all."""
        refusal = loading(self.server.progress())
        body = json.dumps(refusal.body()).encode()
        self.close_connection = True
        self.send_response(refusal.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (refusal.headers or {}).items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)
        self.connection.shutdown(socket.SHUT_WR)
        while self.connection.recv(2**16):  # unread bytes would make the system reset the connection
            pass

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: requests are not logged by the server either."""
