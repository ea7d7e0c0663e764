"""The engine loop on a thread of its own, fed by an inbox of plain messages.

Who runs what::

    caller threads:  submit(request) --> check limits --+            +--> deliver(outputs)
                     abort(request_id) -----------------+--> inbox   |    (engine thread, once a step)
                     forget_prefixes() -----------------+
    compile pool:    constraints of requests -----------+--> inbox
    engine thread:   take the inbox -> scheduler.add / abort / forget_prefixes -> loop.step() -> publish

An error that one request caused, while it is added or aborted, ends that request alone. Any other end of
the thread, by an error, a panic of an extension module or a request to exit, ends all requests: the
service is DEAD from then on. Callers are told that much and no more, since the error's text may hold
another caller's; the log has it whole, and Python callers find it chained.

A request's constraint is compiled beside the engine thread (see `constraint_compiler`). The request waits for
it outside the scheduler, and those behind it go on.

Requests and outputs are plain data (`Request`, `RequestOutput`, `SchedulerStats`), so that they can cross a
process border. The scheduler is touched by the engine thread only. One condition
guards the inbox, the open requests and the state; it is never held while the loop steps or while
outputs are delivered.
"""

import atexit
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum

from albireo_jax.core.errors import EngineDeadError, OverloadedError, Refusal
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import Int32s, TokenConstraint
from albireo_jax.core.types import FinishReason, Request, RequestOutput, StructuredOutput
from albireo_jax.engine.constraint_compiler import Compiler, ConstraintCompiler, NoCompiler
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.sched.scheduler_stats import SchedulerStats

Deliver = Callable[[list[RequestOutput]], None]
"""Takes one step's outputs on the engine thread; must return at once. The engine dies of what it raises."""

MAX_MESSAGES = 256
"""Messages that are passed on before one step; the others wait, so that a burst does not delay the step."""

_logger = logging.getLogger(__name__)


class ServiceState(StrEnum):
    """An engine's stages of life; it never goes back.

    Only an engine in another process is STARTING: a new one may take the place of one that died.
    """

    NEW = "new"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    DEAD = "dead"


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Inbox message: nobody waits for this request any more."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetPrefixes:
    """Inbox message: requests behind it find no cached page of those before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """Inbox message: a request, and its constraint if it asked for one."""

    request: Request
    constraint: "Future[TokenConstraint] | None"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """Inbox message: the constraint that a request waited for is there, or could not be made."""

    submitted: Submitted


InboxMessage = Submitted | Compiled | Abort | ForgetPrefixes
"""What the inbox takes."""


class EngineService:
    """Runs an engine loop on one thread; `submit` and `abort` may be called from any thread.

    Every request that `submit` accepted ends with exactly one output that has a finish reason, whatever
    happens: ABORT when it was aborted or the service stopped, ERROR when it could not be added, its
    constraint could not be compiled, or the engine thread ended. Without a `compiler` all constraints are
    refused.
    """

    def __init__(self, loop: EngineLoop, limits: EngineLimits, *, compiler: Compiler | None = None) -> None:
        self._loop = loop
        self._limits = limits
        self._constraints = ConstraintCompiler(compiler or NoCompiler())
        self._compiling: dict[str, Submitted] = {}  # of the engine thread
        self._thread: threading.Thread | None = None
        self._stats = loop.scheduler.stats()  # replaced whole by the engine thread, read by any
        self._changed = threading.Condition()  # guards the four below
        self._state = ServiceState.NEW
        self._inbox: deque[InboxMessage] = deque()
        self._open: dict[str, None] = {}  # accepted and not ended, oldest first
        self._failure: BaseException | None = None

    @property
    def limits(self) -> EngineLimits:
        """The limits that `submit` checks."""
        return self._limits

    @property
    def state(self) -> ServiceState:
        """The service's stage of life."""
        return self._state

    @property
    def failure(self) -> BaseException | None:
        """The error that ended the engine thread, if one did."""
        return self._failure

    @property
    def is_over(self) -> bool:
        """Whether requests are never taken again, though nobody stopped the service."""
        return self._state is ServiceState.DEAD

    def stats(self) -> SchedulerStats:
        """The scheduler's figures after the latest step; never blocks."""
        return self._stats

    def check_running(self) -> None:
        """Raise EngineDeadError, the cause chained, unless requests are taken."""
        if self._state is ServiceState.DEAD:
            raise EngineDeadError("the engine stopped on an internal error") from self._failure
        if self._state is not ServiceState.RUNNING:
            raise EngineDeadError(f"the engine is {self._state}")

    def start(self, deliver: Deliver) -> None:
        """Start the engine thread, which hands the outputs of each step to `deliver`.

        A service that nobody stops is stopped when the interpreter exits.
        """
        with self._changed:
            if self._state is not ServiceState.NEW:
                raise RuntimeError(f"a service starts once, this one is {self._state}")
            self._state = ServiceState.RUNNING
            self._thread = threading.Thread(
                target=self._run, args=(deliver,), name="albireo-engine", daemon=True
            )
            self._thread.start()
        atexit.register(self.stop)

    def first_mask(self, structured: StructuredOutput) -> "Future[Int32s]":
        """Compile a constraint for requests to come; the words of the tokens that an answer may begin with.

        The future, or the call, raises ValueError saying what is wrong with it, OverloadedError if too many
        wait to be compiled, EngineDeadError if the engine does not run.
        """
        self.check_running()
        return self._constraints.first_mask(structured)

    def submit(self, *requests: Request) -> None:
        """Queue requests, all of them or none.

        Raises ValueError if the engine could never finish one or has an open request of the same id,
        EngineDeadError (the cause chained) if the engine does not run.
        """
        for request in requests:
            self._limits.check(request)
        request_ids = dict.fromkeys(request.request_id for request in requests)
        with self._changed:
            self.check_running()
            if len(request_ids) < len(requests) or any(
                request_id in self._open for request_id in request_ids
            ):
                raise ValueError(f"a request id among {list(request_ids)} is in use")
            self._open |= request_ids
            self._inbox += [
                Submitted(request=request, constraint=self._constraints.constraint(request))
                for request in requests
            ]
            self._changed.notify_all()

    def abort(self, *request_ids: str) -> None:
        """End requests early and free what they hold; one that already ended is left alone."""
        with self._changed:
            self._inbox += [Abort(request_id=each) for each in request_ids if each in self._open]
            self._changed.notify_all()

    def forget_prefixes(self) -> None:
        """Let requests that are submitted from now on find no cached page of earlier ones.

        For when what was cached is no longer what would be computed; may be called in any state.
        """
        self._post(ForgetPrefixes())

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
        """Abort what is open, let the steps in flight end, and join the thread."""
        with self._changed:
            if self._state is ServiceState.NEW:
                self._state = ServiceState.STOPPED
            if self._state is ServiceState.RUNNING:
                self._state = ServiceState.STOPPING
                self._inbox += [Abort(request_id=request_id) for request_id in self._open]
                self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._constraints.close()
        atexit.unregister(self.stop)

    def _post(self, message: InboxMessage) -> None:
        with self._changed:
            self._inbox.append(message)
            self._changed.notify_all()

    # The engine thread.

    def _run(self, deliver: Deliver) -> None:
        try:
            self._serve(deliver)
        except BaseException as error:  # noqa: BLE001 - whatever it is, who waits for an answer must be told
            outputs = self._die(error)
            try:
                deliver(outputs)
            finally:
                _logger.critical("the engine stopped on an error", exc_info=error)

    def _serve(self, deliver: Deliver) -> None:
        """Step until the service is stopped; raises what a step or the delivery of its outputs raises."""
        clock = self._loop.timeline.clock
        while (messages := self._take()) is not None:
            outputs = self._apply(messages)
            outputs += self._loop.step()
            self._stats = self._loop.scheduler.stats()  # first: who sees an end sees its pages freed
            if outputs:
                begin_s = clock()
                deliver(outputs)
                self._close(outputs)
                self._loop.timeline.record_delivery(begin_s, clock())
            if not self._loop.has_work:
                self._loop.scheduler.check_idle()

    def _take(self) -> list[InboxMessage] | None:
        """The oldest messages, after a wait if there is nothing to compute; None when the service ends."""
        with self._changed:
            while not (self._inbox or self._loop.has_work):
                if self._state is not ServiceState.RUNNING:
                    self._state = ServiceState.STOPPED
                    return None
                self._changed.wait()
            return [self._inbox.popleft() for _ in range(min(len(self._inbox), MAX_MESSAGES))]

    def _apply(self, messages: list[InboxMessage]) -> list[RequestOutput]:
        """Pass messages on to the scheduler; the outputs of requests that end by it."""
        outputs: list[RequestOutput] = []
        for message in messages:
            match message:
                case Submitted():
                    output = self._begin(message)
                case Compiled():
                    output = self._resume(message.submitted)
                case Abort():
                    output = self._abort(message.request_id)
                case ForgetPrefixes():
                    output = self._loop.scheduler.forget_prefixes()
            if output is not None:
                outputs.append(output)
        return outputs

    def _begin(self, submitted: Submitted) -> RequestOutput | None:
        """Add a request to the scheduler now, or when its constraint is compiled."""
        compiled = submitted.constraint
        if compiled is None:
            return self._add(submitted.request, None)
        self._compiling[submitted.request.request_id] = submitted
        if compiled.done():
            return self._resume(submitted)
        compiled.add_done_callback(lambda _: self._post(Compiled(submitted=submitted)))
        return None

    def _resume(self, submitted: Submitted) -> RequestOutput | None:
        """Add a request whose constraint is compiled, or end it with what is wrong; None if it has ended."""
        request_id, compiled = submitted.request.request_id, submitted.constraint
        if compiled is None or self._compiling.get(request_id) is not submitted:
            return None
        del self._compiling[request_id]
        error = compiled.exception()
        if error is None:
            return self._add(submitted.request, compiled.result())
        refusal = None
        if isinstance(error, ValueError | OverloadedError):
            refusal = Refusal(str(error), is_overload=isinstance(error, OverloadedError))
        else:
            _logger.error("the constraint of request %s cannot be compiled", request_id, exc_info=error)
        return RequestOutput(request_id, None, FinishReason.ERROR, refusal=refusal)

    def _abort(self, request_id: str) -> RequestOutput | None:
        if self._compiling.pop(request_id, None) is not None:
            return RequestOutput(request_id, None, FinishReason.ABORT)
        return self._loop.scheduler.abort(request_id)

    def _add(self, request: Request, constraint: TokenConstraint | None) -> RequestOutput | None:
        """Add a request to the scheduler; one that cannot be added ends, and the others go on."""
        scheduler = self._loop.scheduler
        try:
            return scheduler.add(request, constraint)
        except Exception:
            _logger.exception("request %s cannot be added", request.request_id)
            scheduler.abort(request.request_id)
            return RequestOutput(request.request_id, None, FinishReason.ERROR)

    def _close(self, outputs: list[RequestOutput]) -> None:
        """Forget the requests that ended."""
        ended = [output.request_id for output in outputs if output.finish_reason is not None]
        if ended:
            with self._changed:
                for request_id in ended:
                    del self._open[request_id]
                self._changed.notify_all()

    def _die(self, error: BaseException) -> list[RequestOutput]:
        """Refuse everything from now on; the outputs that end what was open."""
        with self._changed:
            self._state = ServiceState.DEAD
            self._failure = error
            outputs = [RequestOutput(request_id, None, FinishReason.ERROR) for request_id in self._open]
            self._open.clear()
            self._inbox.clear()
            self._changed.notify_all()
            return outputs
