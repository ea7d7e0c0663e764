"""A front end's connection to an engine process: a thread that sends, receives, and connects again."""

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable

import zmq
from zmq.utils.monitor import recv_monitor_message

from albireo_jax.core.errors import EngineDeadError
from albireo_jax.engine import wire
from albireo_jax.engine.wakeup import Wakeup

REPORT_S = 0.25
"""Time between two reports to the engine."""

_RECONNECT_MS = 20
_LINGER_MS = 500

_logger = logging.getLogger(__name__)


class EngineConnection:
    """Connects to a ZeroMQ `address` and greets each engine that listens there, one after the other.

    One thread calls `take` with each message, `lost` when the engine's process is gone, `report` some times a
    second for a message to send, and `ended` at the end. Any thread may post.
    """

    def __init__(
        self,
        address: str,
        *,
        take: Callable[[wire.EngineMessage], None],
        lost: Callable[[EngineDeadError], None],
        report: Callable[[], wire.ClientMessage | None],
        ended: Callable[[], None],
    ) -> None:
        self._address = address
        self._take = take
        self._lost = lost
        self._report = report
        self._ended = ended
        self._outbox: deque[bytes] = deque()
        self._lock = threading.Lock()  # guards the outbox against being dropped in the middle
        self._is_closing = False
        self._wakeup = Wakeup()
        self._decoder = wire.EngineMessageDecoder()
        self._context = zmq.Context(io_threads=1)
        self._thread = threading.Thread(target=self._run, name="albireo-remote-engine", daemon=True)

    def open(self) -> None:
        """Begin to connect."""
        self._thread.start()

    def post(self, data: bytes) -> None:
        """Queue a message for the engine; nothing is sent once the connection is closed."""
        with self._lock:
            if not self._is_closing:
                self._outbox.append(data)
                self._wakeup.ring()

    def drop_posted(self) -> None:
        """Forget what was not sent yet."""
        with self._lock:
            self._outbox.clear()

    def close(self) -> None:
        """Send what was posted, say goodbye, and end the thread."""
        with self._lock:
            if not self._is_closing:
                self._is_closing = True
                self._wakeup.ring()
        self._thread.join()

    def _run(self) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, uuid.uuid4().bytes)
        socket.setsockopt(zmq.IMMEDIATE, 1)  # what is sent to one engine must never reach the next
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, _LINGER_MS)
        socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        socket.connect(self._address)
        try:
            self._serve(socket, monitor)
        except BaseException:
            _logger.critical("the connection to the engine stopped on an error", exc_info=True)
            raise
        finally:
            with self._lock:
                self._is_closing = True
            self._ended()
            socket.disable_monitor()
            monitor.close()
            socket.close()
            self._context.term()
            self._wakeup.close()

    def _serve(self, socket: "zmq.Socket[bytes]", monitor: "zmq.Socket[bytes]") -> None:
        """Pass messages on until the connection is closed."""
        poller = zmq.Poller()
        for polled in (socket, monitor, self._wakeup.fd):
            poller.register(polled, zmq.POLLIN)
        report_at_s = time.monotonic()
        while not self._is_closing:
            poller.poll(max(0, round((report_at_s - time.monotonic()) * 1e3)))
            self._wakeup.clear()
            self._receive(socket)
            self._watch(socket, monitor)
            self._send_posted(socket)
            if time.monotonic() >= report_at_s:
                report_at_s = time.monotonic() + REPORT_S
                report = self._report()
                if report is not None:
                    self._send(socket, wire.encode(report))
        self._send_posted(socket)
        self._send(socket, wire.encode(wire.Goodbye()))

    def _watch(self, socket: "zmq.Socket[bytes]", monitor: "zmq.Socket[bytes]") -> None:
        """Greet an engine that is there now; tell of one that is gone."""
        while monitor.poll(0):
            event = recv_monitor_message(monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._send(socket, wire.encode(wire.Hello()))
            elif event == zmq.EVENT_DISCONNECTED:
                self._receive(socket)  # what it said before
                self._lost(EngineDeadError("the engine's process ended; its log says why"))

    def _send_posted(self, socket: "zmq.Socket[bytes]") -> None:
        """Send what is queued, as far as the engine takes it; the rest waits."""
        while True:
            with self._lock:
                if not self._outbox or not self._send(socket, self._outbox[0]):
                    return
                self._outbox.popleft()

    def _send(self, socket: "zmq.Socket[bytes]", data: bytes) -> bool:
        try:
            socket.send(data, zmq.NOBLOCK)
        except zmq.Again:  # nobody is connected
            return False
        return True

    def _receive(self, socket: "zmq.Socket[bytes]") -> None:
        while True:
            try:
                data = b"".join(socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            try:
                self._take(self._decoder.decode(data))
            except wire.MalformedMessageError as error:
                _logger.warning("a message of the engine is dropped: %.500s", error)
