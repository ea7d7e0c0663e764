"""An engine in another process, as its front ends call it: `EngineService`'s protocol over the wire.

::

    caller threads:  submit, abort, first_mask …  -->  outbox  --ring-->  I/O thread  -->  engine process
    readers          <--  deliver(outputs), once a step  <--  I/O thread  <--  engine process

The engine's process may end at any time. All open requests then end with an error, at once, since the system
closes the connection of a process that ended. The I/O thread connects again when an engine listens again, and
requests are taken again: unlike a service, a remote engine may be DEAD and later be RUNNING.
"""

import atexit
import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from albireo_jax.core.errors import EngineDeadError, EngineStartingError
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import Int32s
from albireo_jax.core.types import FinishReason, Request, RequestOutput, StructuredOutput
from albireo_jax.engine import wire
from albireo_jax.engine.engine_client import EngineFigures
from albireo_jax.engine.engine_connection import EngineConnection
from albireo_jax.engine.request_metrics import MetricsSnapshot
from albireo_jax.engine.service import Deliver, ServiceState
from albireo_jax.sched.scheduler_stats import SchedulerStats

_STOP_S = 5.0
"""Time that the engine gets to confirm aborts."""

_TAKES_REQUESTS = (ServiceState.NEW, ServiceState.STARTING, ServiceState.RUNNING, ServiceState.DEAD)

_logger = logging.getLogger(__name__)


class RemoteEngine:
    """The engine that listens at a ZeroMQ `address`; any thread may call it.

    `wait_welcome` waits until it is ready; `start` can be called from then on.
    """

    def __init__(self, address: str) -> None:
        self._changed = threading.Condition()  # guards the ones down to _is_closing
        self._state = ServiceState.NEW
        self._failure: BaseException | None = None
        self._welcome: wire.Welcome | None = None
        self._is_connected = False
        self._loading = wire.Loading("connecting")
        self._open: dict[str, int] = {}  # handles of what was accepted and has not ended, oldest first
        self._request_ids: dict[int, str] = {}  # the same by handle
        self._questions: dict[int, Future[Any]] = {}
        self._is_closing = False
        self._stats: SchedulerStats | None = None
        self._others: MetricsSnapshot | None = None
        self._read_metrics: Callable[[], MetricsSnapshot] | None = None
        self._reported: MetricsSnapshot | None = None
        self._deliver: Deliver | None = None
        self._handles = itertools.count()
        self._connection = EngineConnection(
            address, take=self._take, lost=self._lose, report=self._report, ended=self._end
        )
        self._connection.open()

    @property
    def limits(self) -> EngineLimits:
        """The limits that `submit` checks: those of the engine that welcomed this front end first."""
        return self._known().limits

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a request unless it ignores them."""
        return self._known().eos_token_ids

    @property
    def loading(self) -> wire.Loading:
        """The engine's last report of its start."""
        return self._loading

    @property
    def others(self) -> MetricsSnapshot | None:
        """Totals of the requests of all other front ends, a moment ago; None if there are none."""
        return self._others

    @property
    def state(self) -> ServiceState:
        """Whether requests are taken, and why not."""
        return self._state

    @property
    def failure(self) -> BaseException | None:
        """The error that ended the engine, as far as it is known here."""
        return self._failure

    def stats(self) -> SchedulerStats:
        """The scheduler's figures of a moment ago; never blocks."""
        return self._stats or self._known().stats

    def check_running(self) -> None:
        """Raise EngineDeadError, EngineStartingError while a model is loaded, unless requests are taken."""
        if self._state is ServiceState.DEAD:
            raise EngineDeadError("the engine stopped on an internal error") from self._failure
        if self._state is ServiceState.STARTING:
            raise EngineStartingError(f"the model is still loading: {self._loading.text}")
        if self._state is not ServiceState.RUNNING:
            raise EngineDeadError(f"the engine is {self._state}")

    def wait_welcome(self, timeout_s: float | None = None) -> bool:
        """Wait until the engine is ready; False if it is not after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._welcome is not None, timeout_s)

    def share_metrics(self, read: Callable[[], MetricsSnapshot]) -> None:
        """Report the totals that `read` gives to the engine, so that other front ends know them."""
        self._read_metrics = read

    def start(self, deliver: Deliver) -> None:
        """Hand the outputs of each step to `deliver`, on the I/O thread.

        A remote engine that nobody stops is stopped when the interpreter exits.
        """
        with self._changed:
            if self._state is not ServiceState.NEW:
                raise RuntimeError(f"a service starts once, this one is {self._state}")
            self._deliver = deliver
            self._state = ServiceState.RUNNING if self._is_connected else ServiceState.STARTING
        atexit.register(self.stop)

    def first_mask(self, structured: StructuredOutput) -> "Future[Int32s]":
        """Compile a constraint for requests to come; the words of the tokens that an answer may begin with.

        The future raises ValueError saying what is wrong with it, OverloadedError if too many wait to be
        compiled, EngineDeadError if the engine ends; the call does if it does not run.
        """
        return self._ask(lambda number: wire.AskFirstMask(number, structured))

    def figures(self) -> "Future[EngineFigures]":
        """The engine's measurements beside its statistics; raises EngineDeadError as `first_mask` does."""
        return self._ask(wire.AskFigures)

    def submit(self, *requests: Request) -> None:
        """Send requests, all of them or none.

        Raises ValueError if the engine could never finish one or one of the same id is open, EngineDeadError
        if the engine does not run.
        """
        limits = self.limits
        for request in requests:
            limits.check(request)
        with self._changed:
            self.check_running()
            handles = {request.request_id: next(self._handles) for request in requests}
            if len(handles) < len(requests) or not handles.keys().isdisjoint(self._open):
                raise ValueError(f"a request id among {list(handles)} is in use")
            self._open |= handles
            self._request_ids |= {handle: request_id for request_id, handle in handles.items()}
            session = self._known().session
            sent = [(handles[request.request_id], request) for request in requests]
            self._post(wire.Submit(session, sent))

    def abort(self, *request_ids: str) -> None:
        """End requests early and free what they hold; one that already ended is left alone."""
        with self._changed:
            handles = [self._open[each] for each in request_ids if each in self._open]
            if handles:
                self._post(wire.AbortHandles(handles))

    def forget_prefixes(self) -> None:
        """Let requests that are submitted from now on find no cached page of earlier ones."""
        with self._changed:
            self._post(wire.ForgetCached())

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until no request is open; False if some still are after `timeout_s`.

        Raises EngineDeadError if the engine died.
        """
        with self._changed:
            idle = self._changed.wait_for(lambda: not self._open, timeout_s)
            if self._state is ServiceState.DEAD:
                self.check_running()
            return idle

    def stop(self) -> None:
        """Abort what is open, and leave the engine, which goes on for others."""
        with self._changed:
            if self._state in _TAKES_REQUESTS and self._state is not ServiceState.DEAD:
                self._state = ServiceState.STOPPING
                if self._open:
                    self._post(wire.AbortHandles(list(self._open.values())))
                self._changed.wait_for(lambda: not self._open or self._is_closing, _STOP_S)
            self._is_closing = True
        self._connection.close()
        atexit.unregister(self.stop)

    def _known(self) -> wire.Welcome:
        if self._welcome is None:
            raise EngineStartingError(f"the model is still loading: {self._loading.text}")
        return self._welcome

    def _post(self, message: wire.ClientMessage) -> None:
        """Queue a message; the caller holds the lock."""
        if not self._is_closing:
            self._connection.post(wire.encode(message))

    def _ask(self, question: Callable[[int], wire.ClientMessage]) -> "Future[Any]":
        future = Future[Any]()
        future.set_running_or_notify_cancel()  # nobody can cancel what the engine is asked already
        with self._changed:
            self.check_running()
            number = next(self._handles)
            self._questions[number] = future
            self._post(question(number))
        return future

    # The connection's thread.

    def _take(self, message: wire.EngineMessage) -> None:
        match message:
            case wire.Step():
                if self._is_session(message.session):
                    self._take_step(message)
            case wire.EngineBeat():
                if self._is_session(message.session):
                    self._take_beat(message)
            case wire.Reply():
                self._answer(message)
            case wire.Welcome():
                self._begin_session(message)
            case wire.Loading():
                with self._changed:
                    self._loading = message
                    if self._state is ServiceState.DEAD and not self.is_over:
                        self._state = ServiceState.STARTING

    def _is_session(self, session: int) -> bool:
        return self._is_connected and self._welcome is not None and self._welcome.session == session

    def _begin_session(self, welcome: wire.Welcome) -> None:
        """Take requests: of the first engine, of a new one, or of one that had forgotten this front end."""
        self._lose(EngineDeadError("the engine had lost this front end, and ended its requests"))
        with self._changed:
            if self._welcome is not None and self._welcome.limits != welcome.limits:
                self._failure = RuntimeError("the engine that is there now has other limits")
                self._state = ServiceState.DEAD
                _logger.critical("%s", self._failure)
            self._welcome, self._is_connected = welcome, True
            self._stats = welcome.stats
            if self._state in (ServiceState.DEAD, ServiceState.STARTING) and not self.is_over:
                self._state = welcome.state
            self._changed.notify_all()

    @property
    def is_over(self) -> bool:
        """Whether requests are never taken again: outputs could not be handed out, or limits changed."""
        return self._failure is not None and not isinstance(self._failure, EngineDeadError)

    def _take_step(self, step: wire.Step) -> None:
        outputs = wire.unpack_step(step, self._request_ids)
        if step.stats is not None:
            self._stats = step.stats
        self._give(outputs)
        self._close([output.request_id for output in outputs if output.finish_reason is not None])

    def _take_beat(self, beat: wire.EngineBeat) -> None:
        self._stats, self._others = beat.stats, beat.others
        with self._changed:
            if beat.state is not ServiceState.RUNNING and self._state is ServiceState.RUNNING:
                self._failure = EngineDeadError("the engine's thread ended; its log says why")
                self._state = beat.state
                self._changed.notify_all()

    def _answer(self, answer: wire.Reply) -> None:
        with self._changed:
            future = self._questions.pop(answer.number, None)
        if future is None:
            return
        if answer.refusal is not None:
            future.set_exception(answer.refusal.error())
        elif answer.figures is not None:
            future.set_result(answer.figures)
        else:
            future.set_result(np.frombuffer(answer.mask, np.int32))

    def _give(self, outputs: list[RequestOutput]) -> None:
        """Hand outputs to who reads them; an error of theirs ends this end of the wire for good."""
        if not outputs or self._deliver is None:
            return
        try:
            self._deliver(outputs)
        except BaseException as error:
            _logger.critical("outputs cannot be handed out", exc_info=error)
            self._break(error)

    def _break(self, error: BaseException) -> None:
        with self._changed:
            if self.is_over:
                return
            self._failure, self._state = error, ServiceState.DEAD
            self._post(wire.AbortHandles(list(self._open.values())))
        self._end_open(FinishReason.ERROR, error)

    def _report(self) -> wire.ClientMetrics | None:
        """The totals of this front end, if they are others than those that were reported last."""
        metrics = None if self._read_metrics is None else self._read_metrics()
        if metrics is None or metrics == self._reported or not self._is_connected:
            return None
        self._reported = metrics
        return wire.ClientMetrics(metrics)

    def _end(self) -> None:
        """End what is open, since the connection is closed."""
        self._end_open(FinishReason.ABORT, EngineDeadError("the engine is stopped"))
        with self._changed:
            self._is_closing = True
            if self._state is not ServiceState.DEAD:
                self._state = ServiceState.STOPPED
            self._changed.notify_all()

    def _lose(self, failure: EngineDeadError) -> None:
        """End everything that belongs to the engine that was there."""
        with self._changed:
            if not self._is_connected:
                return
            self._is_connected = False
            self._reported = None
            self._connection.drop_posted()
            if self._state is ServiceState.RUNNING:
                self._failure, self._state = failure, ServiceState.DEAD
        self._end_open(FinishReason.ERROR, failure)

    def _end_open(self, reason: FinishReason, failure: BaseException) -> None:
        with self._changed:
            outputs = [RequestOutput(request_id, None, reason) for request_id in self._open]
            self._open.clear()
            self._request_ids.clear()
            questions, self._questions = self._questions, {}
            self._changed.notify_all()
        for future in questions.values():
            error = EngineDeadError("the engine stopped on an internal error")
            error.__cause__ = failure
            future.set_exception(error)
        self._give(outputs)

    def _close(self, request_ids: list[str]) -> None:
        """Forget requests that ended."""
        if request_ids:
            with self._changed:
                for request_id in request_ids:
                    handle = self._open.pop(request_id, None)
                    if handle is not None:
                        del self._request_ids[handle]
                self._changed.notify_all()
