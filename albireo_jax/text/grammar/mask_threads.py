"""Threads that make the masks of constrained rows, so that no grammar delays a step beyond a bound.

Most masks take 10 µs; the worst that pass a grammar's trial take 25 ms, and a client may ask for many of
them at once. An answer's masks are made in one of two lanes, by the processor time that they took lately, so
that slow ones keep each other waiting and nobody else::

    engine thread:  commit step -> make(answers) -> wait for the quick ones, a few ms at most -> plan the rest
    quick lane:        one thread, in the order of the steps
    other lane:        two threads, quickest first; new answers before all that are known to be slow

The library lets go of the interpreter while it makes a mask, though not while it takes in a token, which
takes a few ms at worst.
"""

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakKeyDictionary

from albireo_jax.sched.constraints import ConstrainedAnswer

_QUICK_S = 0.001
_PATIENCE_S = 0.004
_SLOW_THREADS = 2
_UNKNOWN_S = 0.0


class ThreadedMaskMaker:
    """A `MaskMaker` that waits up to `patience_s` for masks that are probably quick, and for no others."""

    def __init__(
        self, *, patience_s: float = _PATIENCE_S, clock: Callable[[], float] = time.thread_time
    ) -> None:
        self._patience_s = patience_s
        self._quick = _Lane("quick-masks", threads=1, made=self._note, clock=clock)
        self._other = _Lane("masks", threads=_SLOW_THREADS, made=self._note, clock=clock)
        self._changed = threading.Condition()  # guards the next two
        self._took_s = WeakKeyDictionary[ConstrainedAnswer, float]()
        self._awaited: set[ConstrainedAnswer] = set()

    def make(self, answers: Sequence[ConstrainedAnswer]) -> None:
        """Have all of them made, and wait for those that are quick or new, until the time is over."""
        if not answers:
            return
        with self._changed:
            expected = [self._took_s.get(answer, _UNKNOWN_S) for answer in answers]
            work = list(zip(expected, answers, strict=True))
            self._awaited = {answer for took_s, answer in work if took_s <= _QUICK_S}
        self._quick.put([(0.0, answer) for took_s, answer in work if _UNKNOWN_S < took_s <= _QUICK_S])
        self._other.put([each for each in work if not _UNKNOWN_S < each[0] <= _QUICK_S])
        with self._changed:
            self._changed.wait_for(lambda: not self._awaited, self._patience_s)

    def wait(self, answers: Sequence[ConstrainedAnswer], timeout_s: float) -> None:
        """Return when one of `answers` is made, or at the end of the time."""
        with self._changed:
            self._changed.wait_for(lambda: any(answer.is_made for answer in answers), timeout_s)

    def _note(self, answer: ConstrainedAnswer, took_s: float) -> None:
        """Wake who waits for an answer that was made; one that was slow is forgiven little by little."""
        with self._changed:
            self._took_s[answer] = max(took_s, self._took_s.get(answer, _UNKNOWN_S) / 2)
            self._awaited.discard(answer)
            self._changed.notify_all()


class _Lane:
    """Threads that make what is put here, those first that are expected to take the shortest time.

    They start when they are needed, and end with the interpreter, or with the lane.
    """

    def __init__(
        self,
        name: str,
        *,
        threads: int,
        made: Callable[[ConstrainedAnswer, float], None],
        clock: Callable[[], float],
    ) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"albireo-{name}")
        self._made = made
        self._clock = clock
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # guards the next two
        self._heap: list[tuple[float, int, ConstrainedAnswer]] = []
        self._idle = threads

    def put(self, work: Sequence[tuple[float, ConstrainedAnswer]]) -> None:
        """Have answers made that are expected to take so long."""
        with self._lock:
            for expected_s, answer in work:
                heapq.heappush(self._heap, (expected_s, next(self._numbers), answer))
            starting = min(self._idle, len(work))
            self._idle -= starting
        for _ in range(starting):
            try:
                self._pool.submit(self._work)
            except RuntimeError:  # the interpreter is about to end, and starts no more work
                self._work()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._heap:
                    self._idle += 1
                    return
                *_, answer = heapq.heappop(self._heap)
            begin_s = self._clock()
            answer.make()
            self._made(answer, self._clock() - begin_s)
