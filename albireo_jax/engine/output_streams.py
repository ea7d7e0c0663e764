"""Turns and the doors where they are read: what becomes of a request's outputs off the engine thread.

A *turn* is one call, its prompts times n; each of its *choices* is a request of its own. A *door* is
where turns are read: all turns of one asyncio event loop share a door, and each synchronous call has its
own. The engine thread posts to each door the outputs of its requests, once a step::

    engine thread                     the door's thread
    door.post(outputs, when)  ----->  door.read: choice by request id -> detokenizer -> turn.deltas
                                                 stop string complete -> abort the request
                                                 wake who waits for the turn

A door, its turns and their detokenizers belong to one thread, that of the event loop or of the
synchronous caller. Only `post` is called by another, and it only passes the outputs on: no locks.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import NamedTuple, Self

from albireo_jax.core.errors import EngineDeadError
from albireo_jax.core.types import FinishReason, Request, RequestOutput, RequestScores
from albireo_jax.engine.request_metrics import RequestMetrics, Tally
from albireo_jax.engine.service import EngineService
from albireo_jax.text.detokenizer import Detokenizer
from albireo_jax.text.token_logprobs import TokenLogprob, token_logprobs

_logger = logging.getLogger(__name__)


class ChoiceDelta(NamedTuple):
    """A choice's output of one step; sample i of prompt p is choice p * n + i.

    `text` is empty while a character is incomplete or may begin a stop string. `stop_reason` is the
    stop string or the id among `stop_token_ids` that ended the choice. `logprobs` has an entry per token if
    they were asked for; `prompt_logprobs` come with the first token, one per token of the prompt, None for
    the first of those. The first token also brings how many tokens of the prompt were in the cache.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """All that a choice came to; log probabilities as in `ChoiceDelta`, empty if not asked for.

    `cached_tokens` of its prompt were in the cache.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    cached_tokens: int = 0

    def as_delta(self) -> ChoiceDelta:
        """The completion as if it had come at once."""
        return ChoiceDelta(
            self.choice,
            self.text,
            self.token_ids,
            self.finish_reason,
            self.stop_reason,
            self.logprobs,
            self.prompt_logprobs,
            self.cached_tokens,
        )


def collect(deltas: Iterable[ChoiceDelta]) -> list[Completion]:
    """The deltas of a turn that ended, put together by choice."""
    by_choice: dict[int, list[ChoiceDelta]] = {}
    for delta in deltas:
        by_choice.setdefault(delta.choice, []).append(delta)
    return [
        Completion(
            choice=choice,
            text="".join(delta.text for delta in parts),
            token_ids=tuple(token_id for delta in parts for token_id in delta.token_ids),
            finish_reason=parts[-1].finish_reason or FinishReason.ABORT,
            stop_reason=parts[-1].stop_reason,
            logprobs=tuple(entry for delta in parts for entry in delta.logprobs),
            prompt_logprobs=tuple(entry for delta in parts for entry in delta.prompt_logprobs),
            cached_tokens=sum(delta.cached_tokens for delta in parts),
        )
        for choice, parts in sorted(by_choice.items())
    ]


@dataclass(slots=True, kw_only=True, eq=False)
class Choice:
    """A request of a turn as its door sees it; `last_s` is when its latest token left the engine."""

    index: int
    request: Request
    detokenizer: Detokenizer
    last_s: float | None = None


class Turn:
    """The open choices of one call by request id, and the deltas that nobody took yet.

    Read it to its end or close it: a `with` block closes what it leaves open, which frees the pages.
    """

    def __init__(self, choices: Sequence[Choice], door: "Door") -> None:
        self.open = {choice.request.request_id: choice for choice in choices}
        self._door = door
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
        """The deltas since the last call. Raises EngineDeadError if the engine died and no more will come."""
        deltas, self._deltas = self._deltas, []
        if not deltas:
            self.raise_failure()
        return deltas

    def raise_failure(self) -> None:
        """Raise what a choice failed with, if one did."""
        if self._failure is not None:
            raise self._failure

    def wake(self) -> None:
        """Called by the door when there is news, and when the turn is closed."""

    def close(self) -> None:
        """Abort the choices that are still open; nothing more is read."""
        self._door.abort(self)
        self._deltas = []
        self._failure = None
        self.wake()

    def __enter__(self) -> Self:
        """The turn."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the turn."""
        self.close()


class Door(ABC):
    """Open choices by request id; `on_empty` is called when the last one has left."""

    def __init__(
        self, service: EngineService, metrics: RequestMetrics, *, on_empty: Callable[["Door"], None]
    ) -> None:
        self.service = service
        self._metrics = metrics
        self._on_empty = on_empty
        self._open: dict[str, tuple[Choice, Turn]] = {}

    @abstractmethod
    def post(self, outputs: list[RequestOutput], delivered_s: float) -> None:
        """Pass a step's outputs for this door to its thread; called by the engine thread, returns at once."""

    def enter(self, turn: Turn) -> None:
        """Expect outputs for a turn's choices, which are about to be submitted."""
        self._open |= {request_id: (choice, turn) for request_id, choice in turn.open.items()}

    def leave(self, turn: Turn) -> None:
        """Expect nothing more for a turn's choices."""
        for request_id in turn.open:
            del self._open[request_id]
        turn.open.clear()
        self._drop_if_empty()

    def abort(self, turn: Turn) -> None:
        """End a turn's open choices early."""
        if turn.open:
            self._metrics.record(Tally(finished=[FinishReason.ABORT] * len(turn.open)))
            self.service.abort(*turn.open)
            self.leave(turn)

    def read(self, outputs: list[RequestOutput], delivered_s: float) -> None:
        """Turn a step's outputs into deltas and wake the turns that got any."""
        tally = Tally()
        touched: dict[Turn, None] = {}
        for output in outputs:
            entry = self._open.get(output.request_id)
            if entry is None:
                continue  # its turn was closed
            choice, turn = entry
            if output.token_id is not None:
                _count_token(choice, delivered_s, tally)
            touched[turn] = None
            reason = self._read(output, choice, turn)
            if reason is not None:
                del self._open[output.request_id], turn.open[output.request_id]
                tally.finished.append(reason)
                tally.request_s.append(delivered_s - choice.request.arrived_s)
        if touched:
            self._metrics.record(tally)
            for turn in touched:
                turn.wake()
            self._drop_if_empty()

    def _read(self, output: RequestOutput, choice: Choice, turn: Turn) -> FinishReason | None:
        """Give a turn the text of an output; the reason if the choice ended by it.

        A text may end before its request does, by a stop string or because it cannot be read.
        """
        try:
            if output.finish_reason is FinishReason.ERROR:
                self.service.check_running()
            token_ids = () if output.token_id is None else (output.token_id,)
            delta = choice.detokenizer.push(token_ids, output.finish_reason, ends_with_text=output.is_text)
            choice_delta = ChoiceDelta(choice.index, *delta, cached_tokens=output.cached_tokens)
            if output.scores is not None:
                choice_delta = _scored(choice_delta, output.scores, choice.request)
        except Exception as error:
            if not isinstance(error, EngineDeadError):
                _logger.exception("the text of request %s cannot be read", output.request_id)
            turn.fail(error)
            self.service.abort(output.request_id)
            return FinishReason.ERROR
        turn.put(choice_delta)
        if output.finish_reason is None and delta.finish_reason is not None:
            self.service.abort(output.request_id)
        return delta.finish_reason

    def _drop_if_empty(self) -> None:
        if not self._open:
            self._on_empty(self)


class QueueDoor(Door):
    """The door of one synchronous call."""

    def __init__(
        self, service: EngineService, metrics: RequestMetrics, *, on_empty: Callable[[Door], None]
    ) -> None:
        super().__init__(service, metrics, on_empty=on_empty)
        self._queue: SimpleQueue[tuple[list[RequestOutput], float]] = SimpleQueue()

    def post(self, outputs: list[RequestOutput], delivered_s: float) -> None:
        """Queue a step's outputs."""
        self._queue.put((outputs, delivered_s))

    def wait(self) -> None:
        """Block until the next step's outputs are there, and read them."""
        self.read(*self._queue.get())


class LoopDoor(Door):
    """The door of one asyncio event loop."""

    def __init__(
        self, service: EngineService, metrics: RequestMetrics, *, on_empty: Callable[[Door], None]
    ) -> None:
        super().__init__(service, metrics, on_empty=on_empty)
        self.event_loop = asyncio.get_running_loop()

    def post(self, outputs: list[RequestOutput], delivered_s: float) -> None:
        """Schedule the reading of a step's outputs: one wake-up per step, however many requests it has."""
        try:
            self.event_loop.call_soon_threadsafe(self.read, outputs, delivered_s)
        except RuntimeError:  # the event loop was closed, with it all who could read
            for _, turn in list(self._open.values()):
                self.abort(turn)


class SyncTurn(Turn):
    """A turn read by the thread that opened it: iterate over lists of deltas, one list per step."""

    def __init__(self, choices: Sequence[Choice], door: QueueDoor) -> None:
        super().__init__(choices, door)
        self._queue_door = door

    def __iter__(self) -> Self:
        """The turn."""
        return self

    def __next__(self) -> list[ChoiceDelta]:
        """The next deltas; blocks. Raises EngineDeadError if the engine died."""
        while not self.has_news:
            if not self.open:
                raise StopIteration
            self._queue_door.wait()
        return self.take()


class AsyncTurn(Turn):
    """A turn read by tasks of the event loop that opened it.

    Iterate over lists of deltas (what came since the last list, so a slow reader gets longer ones), or
    await `completions` for the whole. Another task of the loop may close it meanwhile.
    """

    def __init__(self, choices: Sequence[Choice], door: LoopDoor) -> None:
        super().__init__(choices, door)
        self._event_loop = door.event_loop
        self._waiter: asyncio.Future[None] | None = None
        self._waits_for_end = False

    def wake(self) -> None:
        """Resume the task that waits, unless it waits for the end and that has not come."""
        ready = not self._waits_for_end or not self.open
        if ready and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> Self:
        """The turn."""
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


def _scored(delta: ChoiceDelta, scores: RequestScores, request: Request) -> ChoiceDelta:
    """The delta with the log probabilities that the request asked for."""
    logprobs: list[TokenLogprob] = []
    prompt_logprobs: list[TokenLogprob | None] = []
    if request.logprobs is not None:
        logprobs = token_logprobs(delta.token_ids, scores.token, num_top=request.logprobs)
    if request.prompt_logprobs is not None and scores.prompt is not None:
        prompt_logprobs.append(None)
        begin = 1
        for piece in scores.prompt:
            token_ids = request.prompt_token_ids[begin : begin + piece.count].tolist()
            prompt_logprobs += token_logprobs(token_ids, piece, num_top=request.prompt_logprobs)
            begin += piece.count
    return delta._replace(logprobs=tuple(logprobs), prompt_logprobs=tuple(prompt_logprobs))


def _count_token(choice: Choice, delivered_s: float, tally: Tally) -> None:
    tally.generated_tokens += 1
    if choice.last_s is None:
        tally.prompt_tokens += len(choice.request.prompt_token_ids)
        tally.first_token_s.append(delivered_s - choice.request.arrived_s)
    else:
        tally.inter_token_s.append(delivered_s - choice.last_s)
    choice.last_s = delivered_s
