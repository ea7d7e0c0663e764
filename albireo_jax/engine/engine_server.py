"""The engine's end of the wire: a thread that passes requests to a service and outputs to front ends.

::

    front end  --Submit, Abort…-->  I/O thread  --submit, abort-->  service's inbox
    front end  <--Step, Beat-----   I/O thread  <--queue, ring---   engine thread: deliver(outputs)

The engine thread appends a step's outputs to a queue and goes on. The I/O thread packs them, one message for
each front end that has requests in the step, and owns the socket. A front end that cannot be reached, or that
has not read its messages for so long that no more are kept, is forgotten: its requests are aborted.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import zmq

from albireo_jax.core.errors import AlbireoError, EngineDeadError
from albireo_jax.core.plan import Int32s
from albireo_jax.core.types import FinishReason, RequestOutput
from albireo_jax.engine import wire
from albireo_jax.engine.engine_client import EngineFigures
from albireo_jax.engine.request_metrics import MetricsSnapshot, add_metrics
from albireo_jax.engine.service import EngineService, ServiceState
from albireo_jax.engine.thread_pools import BoundedPool
from albireo_jax.engine.wakeup import Wakeup
from albireo_jax.sched.scheduler_stats import SchedulerStats

BEAT_S = 0.25
"""Time between two messages of statistics."""

_MAX_QUEUED = 2**14
"""Messages that are kept for a front end that does not read them."""

_MAX_RECEIVED = 64
"""Messages that are taken before outputs are sent again."""

_LINGER_MS = 1000

_logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class _Peer:
    """A front end: its session and its open requests, the engine's name of each by handle."""

    identity: bytes
    session: int
    open: dict[int, str] = field(default_factory=dict[int, str])


class EngineServer:
    """Listens at a ZeroMQ `address` from the start; front ends are welcome once `serve` was called."""

    def __init__(self, address: str, *, beat_s: float = BEAT_S) -> None:
        self._beat_s = beat_s
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.SNDHWM, _MAX_QUEUED)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        self._socket.bind(address)
        self._wakeup = Wakeup()
        self._is_closing = False
        self._loading = wire.Loading("starting")
        self._service: EngineService | None = None
        self._eos_token_ids: tuple[int, ...] = ()
        self._figures: Callable[[], EngineFigures] | None = None
        self._outputs: deque[tuple[list[RequestOutput], SchedulerStats]] = deque()
        self._answers: deque[tuple[bytes, wire.Reply]] = deque()
        self._measuring = BoundedPool("figures", threads=1, max_queued=64)
        # The rest is the I/O thread's own.
        self._decoder = wire.ClientMessageDecoder()
        self._sessions = itertools.count(time.time_ns())  # no two engines number alike
        self._peers: dict[bytes, _Peer] = {}
        self._waiting: set[bytes] = set()  # greeted while the engine was loading
        self._owners: dict[str, tuple[_Peer, int]] = {}  # by the engine's name of a request
        self._metrics: dict[bytes, MetricsSnapshot] = {}  # of every front end there ever was
        self._told_state: ServiceState | None = None
        self._thread = threading.Thread(target=self._run, name="albireo-engine-io", daemon=True)
        self._thread.start()

    def tell_loading(self, phase: str, *, done: int = 0, total: int = 0) -> None:
        """Tell the front ends what the engine does before it is ready; any thread may call it."""
        self._loading = wire.Loading(phase, done, total)
        self._wakeup.ring()

    def serve(
        self,
        service: EngineService,
        *,
        eos_token_ids: Sequence[int],
        figures: Callable[[], EngineFigures],
    ) -> None:
        """Start a service and welcome front ends to it; `figures` may take a while."""
        service.start(self._deliver)
        self._eos_token_ids = tuple(eos_token_ids)
        self._figures = figures
        self._service = service
        self._wakeup.ring()

    def close(self) -> None:
        """Send what waits to be sent, and leave the address; the service stays the caller's to stop."""
        self._is_closing = True
        self._wakeup.ring()
        self._thread.join()
        self._measuring.close()

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Queue a step's outputs; on the engine thread."""
        service = self._service
        assert service is not None, "outputs before the first request"
        self._outputs.append((outputs, service.stats()))
        self._wakeup.ring()

    # The I/O thread.

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wakeup.fd, zmq.POLLIN)
        beat_at_s = time.monotonic()
        try:
            while not self._is_closing:
                poller.poll(max(0, round((beat_at_s - time.monotonic()) * 1e3)))
                self._wakeup.clear()
                self._send_waiting()
                self._receive()
                if time.monotonic() >= beat_at_s:
                    beat_at_s = time.monotonic() + self._beat_s
                    self._beat()
            self._send_waiting()
        except BaseException:
            _logger.critical("the engine's end of the wire stopped on an error", exc_info=True)
            raise
        finally:
            self._socket.close()
            self._context.term()
            self._wakeup.close()

    def _send_waiting(self) -> None:
        """Send all that other threads have queued."""
        service = self._service
        if service is not None:
            while self._waiting:
                self._welcome(self._waiting.pop(), service)
        while self._outputs:
            outputs, stats = self._outputs.popleft()
            if service is not None and service.state is not self._told_state:
                self._beat()  # who reads that its request failed must know by then that the engine did
            self._send_step(outputs, stats)
        while self._answers:
            self._send(*self._answers.popleft())

    def _send_step(self, outputs: list[RequestOutput], stats: SchedulerStats) -> None:
        by_peer: dict[_Peer, list[wire.SentOutput]] = {}
        for output in outputs:
            owner = self._owners.get(output.request_id)
            if owner is None:
                continue  # its front end is gone
            peer, handle = owner
            if output.finish_reason is not None:
                del self._owners[output.request_id], peer.open[handle]
            by_peer.setdefault(peer, []).append(wire.SentOutput(handle, output))
        for peer, sent in by_peer.items():
            self._send(peer.identity, wire.pack_step(sent, session=peer.session, stats=stats))

    def _send(self, identity: bytes, message: wire.EngineMessage) -> None:
        try:
            self._socket.send_multipart((identity, wire.encode(message)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self._forget(identity)

    def _forget(self, identity: bytes) -> None:
        """Abort the requests of a front end that is gone, or does not read."""
        self._waiting.discard(identity)
        peer = self._peers.pop(identity, None)
        if peer is None:
            return
        _logger.info("a front end left, with %d open requests", len(peer.open))
        for request_id in peer.open.values():
            del self._owners[request_id]
        if self._service is not None and peer.open:
            self._service.abort(*peer.open.values())

    def _beat(self) -> None:
        """Send statistics to all, or the progress of loading."""
        service = self._service
        if service is None:
            for identity in list(self._waiting):
                self._send(identity, self._loading)
            return
        self._told_state = service.state
        stats = service.stats()
        for peer in list(self._peers.values()):
            others = [metrics for identity, metrics in self._metrics.items() if identity != peer.identity]
            beat = wire.EngineBeat(
                session=peer.session,
                steps=stats.steps,
                state=self._told_state,
                stats=stats,
                others=add_metrics(others) if others else None,
            )
            self._send(peer.identity, beat)

    def _receive(self) -> None:
        for _ in range(_MAX_RECEIVED):
            try:
                identity, *parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = self._decoder.decode(b"".join(parts))
            except wire.MalformedMessageError as error:
                _logger.warning("a message of a front end is dropped: %.500s", error)
                continue
            self._take(identity, message)

    def _take(self, identity: bytes, message: wire.ClientMessage) -> None:
        match message:
            case wire.Hello():
                self._forget(identity)  # what it had before it greeted anew
                self._waiting.add(identity)
                if self._service is None:
                    self._send(identity, self._loading)
                self._wakeup.ring()
            case wire.Goodbye():
                self._forget(identity)
            case wire.ClientMetrics():
                self._metrics[identity] = message.metrics
            case _:
                self._take_of_session(identity, message)

    def _take_of_session(self, identity: bytes, message: wire.ClientMessage) -> None:
        """Do what only a front end that was welcomed can ask for; one that was forgotten is welcomed anew."""
        peer, service = self._peers.get(identity), self._service
        if peer is None or service is None:
            self._waiting.add(identity)
            self._wakeup.ring()
            return
        match message:
            case wire.Submit():
                self._submit(peer, message, service)
            case wire.AbortHandles():
                service.abort(*[peer.open[handle] for handle in message.handles if handle in peer.open])
            case wire.ForgetCached():
                service.forget_prefixes()
            case wire.AskFirstMask():
                self._answer(identity, message.number, _mask_later(service, message), _mask_answer)
            case wire.AskFigures():
                assert self._figures is not None
                self._answer(identity, message.number, self._measuring.submit(self._figures), _figures_answer)
            case _:
                raise AssertionError(f"{type(message)} needs no session")

    def _welcome(self, identity: bytes, service: EngineService) -> None:
        self._forget(identity)
        session = next(self._sessions)
        self._peers[identity] = _Peer(identity=identity, session=session)
        welcome = wire.Welcome(
            session=session,
            limits=service.limits,
            eos_token_ids=self._eos_token_ids,
            state=service.state,
            stats=service.stats(),
        )
        self._send(identity, welcome)

    def _submit(self, peer: _Peer, message: wire.Submit, service: EngineService) -> None:
        if message.session != peer.session:
            return  # its front end was told that these requests ended
        named = {handle: f"{peer.session}.{handle}" for handle, _ in message.requests}
        try:
            if len(named) < len(message.requests) or not named.keys().isdisjoint(peer.open):
                raise ValueError("a handle is in use")
            requests = [replace(request, request_id=named[handle]) for handle, request in message.requests]
            for handle, name in named.items():
                self._owners[name] = peer, handle
            peer.open |= named
            service.submit(*requests)
        except (ValueError, EngineDeadError) as error:
            _logger.warning("%d requests of a front end cannot be taken: %.500s", len(named), error)
            for name in named.values():
                self._owners.pop(name, None)
            outputs = [
                wire.SentOutput(handle, RequestOutput(name, None, FinishReason.ERROR))
                for handle, name in named.items()
            ]
            for handle in named:
                peer.open.pop(handle, None)
            self._send(peer.identity, wire.pack_step(outputs, session=peer.session, stats=service.stats()))

    def _answer(
        self,
        identity: bytes,
        number: int,
        future: "Future[Any]",
        answer_of: Callable[[int, Any], wire.Reply],
    ) -> None:
        """Send the answer to a question when it is there."""

        def send(done: "Future[Any]") -> None:
            error = done.exception()
            if error is None:
                answer = answer_of(number, done.result())
            else:
                if not isinstance(error, ValueError | AlbireoError):
                    _logger.error("a question cannot be answered", exc_info=error)
                answer = wire.Reply(number, refusal=wire.refusal_of(error))
            self._answers.append((identity, answer))
            self._wakeup.ring()

        future.add_done_callback(send)


def _mask_later(service: EngineService, message: wire.AskFirstMask) -> "Future[Int32s]":
    """The mask, or what was wrong with the question, as a future."""
    try:
        return service.first_mask(message.structured)
    except Exception as error:  # noqa: BLE001 - the question's, and its asker is told
        failed = Future[Int32s]()
        failed.set_exception(error)
        return failed


def _mask_answer(number: int, mask: Int32s) -> wire.Reply:
    return wire.Reply(number, mask=mask.tobytes())


def _figures_answer(number: int, figures: EngineFigures) -> wire.Reply:
    return wire.Reply(number, figures=figures)
