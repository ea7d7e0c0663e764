"""Output readers: they take the engine thread's outputs to the streams of their own thread.

A *stream* is one call, its prompts times n; each of its *choices* is a request of its own. All streams of one
asyncio event loop share a *reader*, and each synchronous call has its own. The engine thread posts to each
reader the outputs of its requests, once a step::

    engine thread                       the reader's thread
    reader.post(outputs, when)  ----->  reader.read: choice by request id -> detokenizer -> stream.deltas
                                                     stop string complete -> abort the request
                                                     wake the task that waits for the stream

A reader, its streams and their detokenizers belong to one thread, that of the event loop or of the
synchronous caller. Only `post` is called by another thread, and it only passes the outputs on: no locks.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from queue import SimpleQueue

from albireo_jax.core.errors import EngineDeadError
from albireo_jax.core.types import FinishReason, RequestOutput
from albireo_jax.engine.choices import Choice, ChoiceDelta, with_logprobs
from albireo_jax.engine.engine_client import EngineClient
from albireo_jax.engine.output_streams import OutputStream
from albireo_jax.engine.request_metrics import RequestMetrics, Tally

_logger = logging.getLogger(__name__)


class OutputReader(ABC):
    """Open choices by request id; `on_empty` is called when the last one has left."""

    def __init__(
        self, service: EngineClient, metrics: RequestMetrics, *, on_empty: Callable[["OutputReader"], None]
    ) -> None:
        self.service = service
        self._metrics = metrics
        self._on_empty = on_empty
        self._open: dict[str, tuple[Choice, OutputStream]] = {}

    @abstractmethod
    def post(self, outputs: list[RequestOutput], delivered_s: float) -> None:
        """Pass a step's outputs to the reader's thread. The engine thread calls it; it returns at once."""

    def enter(self, stream: OutputStream) -> None:
        """Expect outputs for a stream's choices, which are about to be submitted."""
        self._open |= {request_id: (choice, stream) for request_id, choice in stream.open.items()}

    def leave(self, stream: OutputStream) -> None:
        """Expect nothing more for a stream's choices."""
        for request_id in stream.open:
            del self._open[request_id]
        stream.open.clear()
        self._drop_if_empty()

    def abort(self, stream: OutputStream) -> None:
        """End a stream's open choices early."""
        if stream.open:
            for choice in stream.open.values():
                choice.finish_reason = FinishReason.ABORT
            self._metrics.record(Tally(finished=[FinishReason.ABORT] * len(stream.open)))
            self.service.abort(*stream.open)
            self.leave(stream)

    def read(self, outputs: list[RequestOutput], delivered_s: float) -> None:
        """OutputStream a step's outputs into deltas and wake the streams that got any."""
        tally = Tally()
        touched: dict[OutputStream, None] = {}
        for output in outputs:
            entry = self._open.get(output.request_id)
            if entry is None:
                continue  # its stream was closed
            choice, stream = entry
            if output.token_id is not None:
                _count_token(choice, output, delivered_s, tally=tally)
            touched[stream] = None
            reason = self._read(output, choice, stream)
            if reason is not None:
                del self._open[output.request_id], stream.open[output.request_id]
                choice.finish_reason = reason
                tally.finished.append(reason)
                _count_end(choice, delivered_s, tally)
        if touched:
            self._metrics.record(tally)
            for stream in touched:
                stream.wake()
            self._drop_if_empty()

    def _read(self, output: RequestOutput, choice: Choice, stream: OutputStream) -> FinishReason | None:
        """Give a stream the text of an output; the reason if the choice ended by it.

        A text may end before its request does, by a stop string or because it cannot be read.
        """
        if output.refusal is not None:
            stream.fail(output.refusal.error())
            return output.finish_reason
        try:
            if output.finish_reason is FinishReason.ERROR:
                self.service.check_running()
            token_ids = () if output.token_id is None else (output.token_id,)
            delta = choice.detokenizer.push(token_ids, output.finish_reason, ends_with_text=output.is_text)
            choice_delta = ChoiceDelta(choice.index, *delta, cached_tokens=output.cached_tokens)
            if output.scores is not None:
                choice_delta = with_logprobs(choice_delta, output.scores, choice.request)
        except Exception as error:
            if not isinstance(error, EngineDeadError):
                _logger.exception("the text of request %s cannot be read", output.request_id)
            stream.fail(error)
            self.service.abort(output.request_id)
            return FinishReason.ERROR
        stream.put(choice_delta)
        if output.finish_reason is None and delta.finish_reason is not None:
            self.service.abort(output.request_id)
        return delta.finish_reason

    def _drop_if_empty(self) -> None:
        if not self._open:
            self._on_empty(self)


class QueueReader(OutputReader):
    """The reader of one synchronous call."""

    def __init__(
        self, service: EngineClient, metrics: RequestMetrics, *, on_empty: Callable[[OutputReader], None]
    ) -> None:
        super().__init__(service, metrics, on_empty=on_empty)
        self._queue: SimpleQueue[tuple[list[RequestOutput], float]] = SimpleQueue()

    def post(self, outputs: list[RequestOutput], delivered_s: float) -> None:
        """Queue a step's outputs."""
        self._queue.put((outputs, delivered_s))

    def wait(self) -> None:
        """Block until the next step's outputs are there, and read them."""
        self.read(*self._queue.get())


class EventLoopReader(OutputReader):
    """The reader of one asyncio event loop."""

    def __init__(
        self, service: EngineClient, metrics: RequestMetrics, *, on_empty: Callable[[OutputReader], None]
    ) -> None:
        super().__init__(service, metrics, on_empty=on_empty)
        self.event_loop = asyncio.get_running_loop()

    def post(self, outputs: list[RequestOutput], delivered_s: float) -> None:
        """Schedule the reading of a step's outputs: one wake-up per step, however many requests it has."""
        try:
            self.event_loop.call_soon_threadsafe(self.read, outputs, delivered_s)
        except RuntimeError:  # the event loop was closed, with it all who could read
            for _, stream in list(self._open.values()):
                self.abort(stream)


def _count_token(choice: Choice, output: RequestOutput, delivered_s: float, *, tally: Tally) -> None:
    """Note a token of a choice; the first one tells how long the request waited and was prepared."""
    choice.num_tokens += 1
    tally.generated_tokens += 1
    if choice.last_s is not None:
        tally.inter_token_s.append(delivered_s - choice.last_s)
    else:
        choice.first_s, choice.started_s = delivered_s, output.started_s
        choice.cached_tokens = output.cached_tokens
        tally.prompt_tokens += len(choice.request.prompt_token_ids)
        tally.first_token_s.append(delivered_s - choice.request.arrived_s)
        if output.started_s is not None:
            tally.queue_s.append(output.started_s - choice.request.arrived_s)
            tally.prefill_s.append(delivered_s - output.started_s)
    choice.last_s = delivered_s


def _count_end(choice: Choice, delivered_s: float, tally: Tally) -> None:
    """Note how long a choice took that ended."""
    tally.request_s.append(delivered_s - choice.request.arrived_s)
    if choice.first_s is not None:
        tally.decode_s.append(delivered_s - choice.first_s)
