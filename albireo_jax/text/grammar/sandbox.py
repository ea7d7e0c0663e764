"""Grammars are tried in processes of their own before the engine takes them in.

The limits of llguidance bound most of what a grammar costs, not all of it: 3,000 rules that name one another
overflow the stack, which kills a process, and an intersection of 40 short patterns computes for minutes. So
each grammar is first compiled elsewhere (see `sandbox_process`). All are tried with little processor time on
the *quick* lane; those that need more are tried again on the *slow* lane, where they wait for one another and
not for the others::

    check --> quick lane, 2 processes, 0.15 s each --> most grammars
                      | needs more
                      +--> slow lane, 1 process, 3 s each, at most 8 at a time

A process that is stalled or killed by others says nothing about a grammar: the caller may try again.
"""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from albireo_jax.core.errors import OverloadedError
from albireo_jax.text.grammar import sandbox_process
from albireo_jax.text.grammar.sandbox_process import TIMED_OUT, Vocabulary

TOO_COMPLEX = "too complex"
"""The beginning of an error that tells of what a grammar costs, and of no fault in it."""

_QUICK_S, _SLOW_S = 0.15, 3.0
_QUICK_PROCESSES, _SLOW_PROCESSES = 2, 1
_MAX_SLOW = 8
_WALL_S = 60.0  # of a trial and of a start, on a machine however busy


class GrammarSandbox:
    """Tries grammars in other processes; any thread may call it, several at a time are served."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._quick = _Lane(vocabulary, processes=_QUICK_PROCESSES)
        self._slow = _Lane(vocabulary, processes=_SLOW_PROCESSES, most=_MAX_SLOW)

    @property
    def _process(self) -> subprocess.Popen[bytes] | None:
        """The first process."""
        return self._quick.first.process

    def check(self, grammar: str) -> str | None:
        """The error in `grammar`, in llguidance's words, or None; takes seconds at most.

        A grammar that takes longer, or kills its process, is too complex. Raises OverloadedError if too many
        such wait already, or if the machine is too busy to find out.
        """
        code, error = self._quick.ask(grammar, limit_s=_QUICK_S)
        if code == TIMED_OUT:
            code, error = self._slow.ask(grammar, limit_s=_SLOW_S)
        if code == TIMED_OUT:
            return f"{TOO_COMPLEX}: it takes more than {_SLOW_S:g} s of processor time"
        if code != 0:
            return f"{TOO_COMPLEX}: it takes more memory or stack than it may"
        return error or None


class _Lane:
    """Processes that try grammars with the same limit, the first one that is idle the next."""

    def __init__(self, vocabulary: Vocabulary, *, processes: int, most: int | None = None) -> None:
        self.first = _Worker(vocabulary)
        self._idle = [self.first, *(_Worker(vocabulary) for _ in range(processes - 1))]
        self._order = {id(worker): place for place, worker in enumerate(self._idle)}
        self._changed = threading.Condition()  # guards _idle and _num_open
        self._num_open = 0
        self._most = most

    def ask(self, grammar: str, *, limit_s: float) -> "_Answer":
        """The answer of a process."""
        with self._worker() as worker:
            return worker.ask((grammar, limit_s))

    @contextmanager
    def _worker(self) -> "Generator[_Worker]":
        with self._changed:
            if self._most is not None and self._num_open >= self._most:
                raise OverloadedError(
                    f"the server is busy: {self._num_open} complex grammars are being tried, "
                    "which is the limit; try again later"
                )
            self._num_open += 1
            self._changed.wait_for(lambda: self._idle)
            worker = self._idle.pop(0)
        try:
            yield worker
        finally:
            with self._changed:
                self._num_open -= 1
                self._idle.append(worker)
                self._idle.sort(key=lambda idle: self._order[id(idle)])
                self._changed.notify()


_Answer = tuple[int, str]


class _Worker:
    """A process, started when it is first needed and anew after it ended; one thread at a time asks it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._vocabulary = vocabulary
        self._end = weakref.finalize(self, _nothing)

    def ask(self, message: tuple[str, float]) -> _Answer:
        """The answer to `message`; a process that others ended is asked a second time."""
        for _ in range(2):
            if self.process is None or self.process.poll() is not None:
                self.process = self._start()
            answer = _ask(self.process, message)
            if answer is not None:
                return answer
        raise OverloadedError(
            "the server is busy: it has no time or memory to try a grammar; try again later"
        )

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(sandbox_process.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a group of its own, so that its forks end with it
        )
        self._end()  # of the process before
        self._end = weakref.finalize(self, _stop, process)
        if _ask(process, vars(self._vocabulary)) is None:
            raise OverloadedError("the server is busy: a process that tries grammars does not start")
        return process


def _ask(process: subprocess.Popen[bytes], message: object) -> _Answer | None:
    """The answer to `message`; None if there is none in time, and then the process is gone."""
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(_WALL_S, _kill, [process])
    timer.daemon = True
    timer.start()
    try:
        pickle.dump(message, process.stdin)
        process.stdin.flush()
        answer = process.stdout.readline()
    except OSError:
        answer = b""
    finally:
        timer.cancel()
    if not answer.endswith(b"\n"):
        _stop(process)
        return None
    code, error = json.loads(answer)
    return code, error


def _nothing() -> None:
    """Stands for the end of a process before the first."""


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        os.killpg(process.pid, signal.SIGKILL)


def _stop(process: subprocess.Popen[bytes]) -> None:
    _kill(process)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what could not be written is of no interest
                pipe.close()
