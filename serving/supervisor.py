"""The supervisor of `albireo serve`: starts the engine and the front ends, and replaces those that end.

::

    supervisor -- standard input: its job --> engine process     restarted, after a pause that grows, N times
               -- and the bound socket -----> front ends         replaced, after a pause that grows

A process ends by itself when the supervisor is gone, whatever ended it. A first signal goes to the front
ends, which let open answers end; the engine follows them. A second one ends everything at once.
"""

import asyncio
import logging
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from albireo_jax.core.errors import EngineDeadError
from albireo_jax.serving.process_jobs import READY, EngineJob, FrontEndJob, write_job

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_HEALTHY_S = 600.0
"""Time after which a process counts as sound: what happened before it is forgotten."""

_ENGINE_STOP_S = 10.0
_FRONT_END_STOP_S = 15.0
"""Longer than a front end lets open answers and connections end."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ENGINE_ERROR, _INTERRUPTED = 1, 130

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPlan:
    """The processes of a server: the command and job of each kind, and how many there may be.

    An engine that ends is started anew up to `restarts` times, counted anew once one ran for ten minutes.
    """

    engine_command: Sequence[str]
    engine_job: EngineJob
    front_end_command: Sequence[str]
    front_end_job: FrontEndJob
    num_front_ends: int
    restarts: int


def supervise(plan: ServerPlan, *, ready: Callable[[str], None]) -> None:
    """Run the processes of `plan` until a signal; `ready` is called with the sizes of the first engine.

    Raises EngineDeadError when engines ended more often than they may, SystemExit with the engine's own code
    if the first one ends before it is ready, KeyboardInterrupt if a signal came before that.
    """
    asyncio.run(_Supervisor(plan, ready).run())


class _Supervisor:
    def __init__(self, plan: ServerPlan, ready: Callable[[str], None]) -> None:
        self._plan = plan
        self._ready = ready
        self._was_ready = False
        self._front_ends: set[Process] = set()
        self._engine: Process | None = None
        self._signals: list[int] = []
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Run until a signal, or until the engine must be given up."""
        event_loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            event_loop.add_signal_handler(number, self._take_signal, number)
        keepers = [asyncio.create_task(self._keep_front_end()) for _ in range(self._plan.num_front_ends)]
        engine = asyncio.create_task(self._keep_engine())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            done, _ = await asyncio.wait({engine, stopping, *keepers}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stopping.set()
            await self._end(self._front_ends, _FRONT_END_STOP_S)
            await asyncio.gather(*keepers, return_exceptions=True)
            await self._end({self._engine} if self._engine else set(), _ENGINE_STOP_S)
            await asyncio.gather(engine, return_exceptions=True)
        for task in done - {stopping}:
            task.result()
        if not self._was_ready:
            raise KeyboardInterrupt

    def _take_signal(self, number: int) -> None:
        self._signals.append(number)
        self._stopping.set()
        if len(self._signals) > 1:
            for process in (*self._front_ends, self._engine):
                if process is not None and process.returncode is None:
                    process.kill()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    async def _end(self, processes: set[Process], timeout_s: float) -> None:
        """Ask processes to end, and end those that take too long."""
        running = [process for process in processes if process.returncode is None]
        for process in running:
            process.terminate()
        waits = [asyncio.create_task(process.wait()) for process in running]
        if waits:
            await asyncio.wait(waits, timeout=timeout_s)
        for process in running:
            if process.returncode is None:
                process.kill()
        if waits:
            await asyncio.wait(waits)

    async def _keep_front_end(self) -> None:
        """Run a front end, and another one when it ends."""
        plan, pauses = self._plan, _Pauses()
        fds = (plan.front_end_job.socket_fd,)
        while not self._stopping.is_set():
            began_s = time.monotonic()
            process = await _start(plan.front_end_command, write_job(plan.front_end_job), pass_fds=fds)
            self._front_ends.add(process)
            code = await process.wait()
            self._front_ends.discard(process)
            if not self._stopping.is_set():
                _tell(f"a front end ended with code {code} and is replaced")
                await self._pause(pauses.next(began_s))

    async def _keep_engine(self) -> None:
        """Run the engine, and another one when it ends, as often as it may."""
        plan, pauses = self._plan, _Pauses()
        while not self._stopping.is_set():
            began_s = time.monotonic()
            self._engine = process = await _start(
                plan.engine_command, write_job(plan.engine_job), stdout=PIPE
            )
            await self._read_output(process)
            code = await process.wait()
            if self._stopping.is_set():
                return
            if not self._was_ready:
                raise SystemExit(code if code > 0 else _ENGINE_ERROR)
            pause_s = pauses.next(began_s)
            if pauses.count > plan.restarts:
                raise EngineDeadError(
                    f"the engine ended with code {code}, and was restarted {plan.restarts} times already"
                )
            _tell(f"the engine ended with code {code}; restart {pauses.count} of {plan.restarts}")
            await self._pause(pause_s)

    async def _read_output(self, process: Process) -> None:
        """Pass on what the engine writes, and note that it is ready."""
        assert process.stdout is not None
        while line := await process.stdout.readline():
            text = line.decode(errors="replace")
            if not text.startswith(READY):
                sys.stderr.write(text)
            elif self._was_ready:
                _tell("the engine is ready again")
            else:
                self._was_ready = True
                self._ready(text.removeprefix(READY).rstrip())

    async def _pause(self, pause_s: float) -> None:
        """Wait, unless everything is being stopped."""
        try:
            await asyncio.wait_for(self._stopping.wait(), pause_s)
        except TimeoutError:
            return


class _Pauses:
    """Pauses between the starts of a process: none is as short as the one before, up to a longest one."""

    def __init__(self) -> None:
        self.count = 0

    def next(self, began_s: float) -> float:
        """The pause behind a process that began at this moment and ended now."""
        if time.monotonic() - began_s > _HEALTHY_S:
            self.count = 0
        self.count += 1
        return min(_FIRST_PAUSE_S * 2 ** (self.count - 1), _LONGEST_PAUSE_S)


async def _start(
    command: Sequence[str], job: bytes, *, stdout: int | None = None, pass_fds: Sequence[int] = ()
) -> Process:
    """A process in a group of its own, so that a terminal's signals reach the supervisor alone."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=PIPE, stdout=stdout, pass_fds=pass_fds, process_group=0
    )
    assert process.stdin is not None
    process.stdin.write(job)
    return process


def _tell(text: str) -> None:
    sys.stderr.write(f"albireo: {text}\n")
    sys.stderr.flush()
