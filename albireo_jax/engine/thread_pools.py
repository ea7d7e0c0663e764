"""Threads for long work, a pool for each kind, so that no kind of work waits behind another."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from albireo_jax.core.errors import OverloadedError

_Result = TypeVar("_Result")


class BoundedPool:
    """Runs one kind of work, `name`, on up to `threads` threads, which start when they are needed.

    At most `max_queued` pieces of work wait for a thread; more are refused with OverloadedError, which a
    server answers with 429. Any thread, and any number of event loops, may use a pool. Work whose future is
    cancelled before it began is never done and waits no longer.
    """

    def __init__(self, name: str, *, threads: int, max_queued: int) -> None:
        self.name = name
        self._max_open = threads + max_queued
        self._max_queued = max_queued
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=f"albireo-{name}")
        self._lock = threading.Lock()  # guards the next
        self._num_open = 0

    @property
    def num_open(self) -> int:
        """Pieces of work that wait or are being done."""
        return self._num_open

    def submit(self, work: Callable[[], _Result]) -> "Future[_Result]":
        """The future result of `work`. Raises OverloadedError if too much work waits already."""
        with self._lock:
            if self._num_open >= self._max_open:
                raise OverloadedError(
                    f"the server is busy: {self._max_queued} requests wait for {self.name}, "
                    "which is the limit; try again later"
                )
            self._num_open += 1
        kept = [work]  # emptied when the future ends, so that cancelled work keeps no text in memory

        def do() -> _Result:
            return kept[0]()

        def ended(_: "Future[Any]") -> None:
            kept.clear()
            with self._lock:
                self._num_open -= 1

        try:
            future = self._executor.submit(do)
        except RuntimeError:  # the pool is closed
            with self._lock:
                self._num_open -= 1
            raise
        future.add_done_callback(ended)
        return future

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """The result of `work`; the event loop goes on. Raises OverloadedError, or what `work` does."""
        return await asyncio.wrap_future(self.submit(work))

    def close(self) -> None:
        """Take no more work, and drop what has not begun; does not wait for what has."""
        self._executor.shutdown(wait=False, cancel_futures=True)
