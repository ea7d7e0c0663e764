"""Streams of outputs: one for each call, iterated by a thread or by the tasks of an event loop."""

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from albireo_jax.engine.choices import Choice, ChoiceDelta, Completion, collect


class OutputStream:
    """The choices of one call, the open ones by request id, and the deltas that were not taken yet.

    Read it to its end or close it: a `with` block closes what it leaves open, which frees the pages. `abort`
    ends the open choices of the stream that it is given.
    """

    def __init__(self, choices: Sequence[Choice], *, abort: "Callable[[OutputStream], None]") -> None:
        self.choices = tuple(choices)
        self.open = {choice.request.request_id: choice for choice in choices}
        self._abort = abort
        self._deltas: list[ChoiceDelta] = []
        self._failure: Exception | None = None

    @property
    def has_news(self) -> bool:
        """Whether `take` has something to give or to raise."""
        return bool(self._deltas) or self._failure is not None

    def put(self, delta: ChoiceDelta) -> None:
        """Keep a delta until it is taken."""
        self._deltas.append(delta)

    def fail(self, error: Exception) -> None:
        """Have `take` raise `error` after what came before it."""
        self._failure = error

    def take(self) -> list[ChoiceDelta]:
        """The deltas since the last call. Raises EngineDeadError if the engine died and no more will come,
        RefusedRequestError for a request that the engine found wrong.
        """
        deltas, self._deltas = self._deltas, []
        if not deltas:
            self.raise_failure()
        return deltas

    def raise_failure(self) -> None:
        """Raise what a choice failed with, if one did."""
        if self._failure is not None:
            raise self._failure

    def wake(self) -> None:
        """Resume the task that waits: the reader calls it when there is news, `close` at the end."""

    def close(self) -> None:
        """Abort the choices that are still open; nothing more is read."""
        self._abort(self)
        self._deltas = []
        self._failure = None
        self.wake()

    def __enter__(self) -> Self:
        """The stream."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the stream."""
        self.close()


class SyncOutputStream(OutputStream):
    """A stream read by the thread that opened it: iterate over lists of deltas, one list per step.

    `wait` blocks until the next step's outputs have been read into the stream.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        *,
        abort: "Callable[[OutputStream], None]",
        wait: Callable[[], None],
    ) -> None:
        super().__init__(choices, abort=abort)
        self._wait = wait

    def __iter__(self) -> Self:
        """The stream."""
        return self

    def __next__(self) -> list[ChoiceDelta]:
        """The next deltas; blocks. Raises EngineDeadError if the engine died."""
        while not self.has_news:
            if not self.open:
                raise StopIteration
            self._wait()
        return self.take()


class AsyncOutputStream(OutputStream):
    """A stream read by tasks of the event loop that opened it.

    Iterate over lists of deltas (what came since the last list, so a slow reader gets longer ones), or
    await `completions` for the whole. Another task of the loop may close it meanwhile.
    """

    def __init__(self, choices: Sequence[Choice], *, abort: "Callable[[OutputStream], None]") -> None:
        super().__init__(choices, abort=abort)
        self._event_loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._waits_for_end = False

    def wake(self) -> None:
        """Resume the task that waits, unless it waits for the end and that has not come."""
        ready = not self._waits_for_end or not self.open
        if ready and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> Self:
        """The stream."""
        return self

    async def __anext__(self) -> list[ChoiceDelta]:
        """The next deltas. Raises EngineDeadError if the engine died."""
        while not self.has_news:
            if not self.open:
                raise StopAsyncIteration
            await self._news()
        return self.take()

    async def completions(self) -> list[Completion]:
        """All choices at their end; raises EngineDeadError if the engine died before.

        Closed meanwhile, it gives nothing.
        """
        self._waits_for_end = True
        while self.open:
            await self._news()
        self.raise_failure()
        return collect(self.take())

    async def _news(self) -> None:
        self._waiter = self._event_loop.create_future()
        await self._waiter
