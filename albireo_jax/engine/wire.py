"""Messages between an engine process and its front ends, as MessagePack.

A request travels once, as the plain data that it is. From then on it is a number, its *handle*, which its
front end chose. The outputs of a step travel to each front end as one `Step`, one packed array for each field
that all outputs have. An array that occurs in a message for the second time is written as its place among the
message's arrays, so that the samples of one prompt share it here too.

Everything of one greeting belongs to a *session*, numbered by the engine. What comes from an older session is
dropped: its requests have ended.
"""

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from albireo_jax.core.errors import EngineDeadError, OverloadedError, Refusal
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.types import FinishReason, Request, RequestLogprobs, RequestOutput, StructuredOutput
from albireo_jax.engine.engine_client import EngineFigures
from albireo_jax.engine.request_metrics import MetricsSnapshot
from albireo_jax.engine.service import ServiceState
from albireo_jax.sched.scheduler_stats import SchedulerStats

MAX_MESSAGE_BYTES = 2**30
"""A longer message ends the connection."""

_NO_TOKEN = -1
_REASONS: tuple[FinishReason | None, ...] = (None, *FinishReason)
_CODE_OF_REASON = {reason: code for code, reason in enumerate(_REASONS)}
_IS_TEXT = 8
_REASON_BITS = 7


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A front end greets; the engine answers with Loading or Welcome."""


class Goodbye(msgspec.Struct, frozen=True, tag="goodbye"):
    """A front end leaves; its open requests are aborted."""


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Requests under their handles, all of them to be taken or none."""

    session: int
    requests: list[tuple[int, Request]]


class AbortHandles(msgspec.Struct, frozen=True, tag="abort"):
    """Nobody waits for these requests any more."""

    handles: list[int]


class ForgetCached(msgspec.Struct, frozen=True, tag="forget"):
    """Requests behind it find no cached page of those before it."""


class AskFirstMask(msgspec.Struct, frozen=True, tag="ask-first-mask"):
    """A question, answered by Reply: the first mask of a constraint, which is compiled."""

    number: int
    structured: StructuredOutput


class AskFigures(msgspec.Struct, frozen=True, tag="ask-figures"):
    """A question, answered by Reply: the engine's figures."""

    number: int


class ClientMetrics(msgspec.Struct, frozen=True, tag="metrics"):
    """The totals of the requests that passed through the front end."""

    metrics: MetricsSnapshot


ClientMessage = (
    Hello | Goodbye | Submit | AbortHandles | ForgetCached | AskFirstMask | AskFigures | ClientMetrics
)
"""What a front end sends."""


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """The engine is not ready; `done` of `total` parts of what it does now are done, 0 of 0 if not known."""

    phase: str
    done: int = 0
    total: int = 0

    @property
    def text(self) -> str:
        """The progress in words."""
        return f"{self.phase}: {self.done} of {self.total}" if self.total else self.phase


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The engine is ready for this front end, in a new session."""

    session: int
    limits: EngineLimits
    eos_token_ids: tuple[int, ...]
    state: ServiceState
    stats: SchedulerStats


class Step(msgspec.Struct, frozen=True, tag="step"):
    """The outputs of a step: int64 handles, int32 token ids (-1: none), and a byte of reason and is_text.

    What few outputs have comes beside, by place: cached tokens, starts, scores, refusals. Starts are
    on the clock that all processes of a host share (`time.perf_counter`). The statistics
    come if a request ended: who sees an end sees its pages freed.
    """

    session: int
    handles: bytes
    token_ids: bytes
    codes: bytes
    cached: list[tuple[int, int]] = []
    starts: list[tuple[int, float]] = []
    scores: list[tuple[int, RequestLogprobs]] = []
    refusals: list[tuple[int, Refusal]] = []
    stats: SchedulerStats | None = None


class Reply(msgspec.Struct, frozen=True, tag="answer"):
    """The answer to a question of this number: a mask, figures, or why there is none."""

    number: int
    mask: bytes = b""
    figures: EngineFigures | None = None
    refusal: Refusal | None = None


class EngineBeat(msgspec.Struct, frozen=True, tag="beat"):
    """The engine's state, some times a second; `others` are the totals of all other front ends."""

    session: int
    steps: int
    state: ServiceState
    stats: SchedulerStats
    others: MetricsSnapshot | None = None


EngineMessage = Loading | Welcome | Step | Reply | EngineBeat
"""What an engine sends."""

_Message = TypeVar("_Message", ClientMessage, EngineMessage)


class MalformedMessageError(ValueError):
    """Bytes that are no message, or a message of which a part is out of range."""


def encode(message: ClientMessage | EngineMessage | Reply) -> bytes:
    """A message as bytes; any thread may call it."""
    places: dict[int, int] = {}

    def encoded(value: object) -> object:
        if not isinstance(value, np.ndarray):
            raise NotImplementedError(f"no message holds a {type(value)}")
        values: NDArray[Any] = value
        if id(values) in places:
            return places[id(values)]
        places[id(values)] = len(places)
        return values.tobytes() if values.ndim == 1 else (values.shape, values.tobytes())

    return msgspec.msgpack.Encoder(enc_hook=encoded).encode(message)


class ClientMessageDecoder:
    """Reads what front ends send; one thread at a time."""

    def __init__(self) -> None:
        self._arrays = _Arrays()
        self._decoder = msgspec.msgpack.Decoder(ClientMessage, dec_hook=self._arrays.decode)

    def decode(self, data: bytes) -> ClientMessage:
        """The message. Raises MalformedMessageError."""
        self._arrays.clear()
        try:
            return self._decoder.decode(data)
        except Exception as error:  # whatever the checks of plain data make of random bytes
            raise MalformedMessageError(f"{type(error).__name__}: {error}") from error


class EngineMessageDecoder:
    """Reads what an engine sends; one thread at a time."""

    def __init__(self) -> None:
        self._arrays = _Arrays()
        self._decoder = msgspec.msgpack.Decoder(EngineMessage, dec_hook=self._arrays.decode)

    def decode(self, data: bytes) -> EngineMessage:
        """The message. Raises MalformedMessageError."""
        self._arrays.clear()
        try:
            return self._decoder.decode(data)
        except Exception as error:  # as above
            raise MalformedMessageError(f"{type(error).__name__}: {error}") from error


class _Arrays:
    """The arrays of the message that is being read, in their order."""

    def __init__(self) -> None:
        self._read: list[NDArray[Any]] = []

    def clear(self) -> None:
        self._read.clear()

    def decode(self, kind: Any, content: Any) -> NDArray[Any]:
        """The array, read-only, that was written as bytes, as shape and bytes, or as its place."""
        if isinstance(content, int):
            return self._read[content]
        shape, data = content if isinstance(content, list) else ((-1,), content)
        dtype = get_args(get_args(kind)[1])[0]
        values = np.frombuffer(data, dtype).reshape(shape)
        self._read.append(values)
        return values


class SentOutput(NamedTuple):
    """An output, and the handle under which its front end knows the request."""

    handle: int
    output: RequestOutput


def pack_step(sent: Sequence[SentOutput], *, session: int, stats: SchedulerStats) -> Step:
    """The message of a step's outputs for one front end."""
    outputs = [each.output for each in sent]
    ended = any(output.finish_reason is not None for output in outputs)
    tokens = [_NO_TOKEN if output.token_id is None else output.token_id for output in outputs]
    return Step(
        session=session,
        handles=array("q", [each.handle for each in sent]).tobytes(),
        token_ids=array("i", tokens).tobytes(),
        codes=bytes(
            [_CODE_OF_REASON[output.finish_reason] | _IS_TEXT * output.is_text for output in outputs]
        ),
        cached=[(i, output.cached_tokens) for i, output in enumerate(outputs) if output.cached_tokens],
        starts=[(i, output.started_s) for i, output in enumerate(outputs) if output.started_s is not None],
        scores=[(i, output.scores) for i, output in enumerate(outputs) if output.scores is not None],
        refusals=[(i, output.refusal) for i, output in enumerate(outputs) if output.refusal is not None],
        stats=stats if ended else None,
    )


def unpack_step(step: Step, request_ids: Mapping[int, str]) -> list[RequestOutput]:
    """The outputs of a step whose requests are known, by handle. Raises MalformedMessageError."""
    try:
        handles = memoryview(step.handles).cast("q").tolist()
        token_ids = memoryview(step.token_ids).cast("i").tolist()
        outputs = [
            RequestOutput(
                request_ids.get(handle, ""),
                None if token_id == _NO_TOKEN else token_id,
                _REASONS[code & _REASON_BITS],
                is_text=bool(code & _IS_TEXT),
            )
            for handle, token_id, code in zip(handles, token_ids, step.codes, strict=True)
        ]
        for place, cached_tokens in step.cached:
            outputs[place] = outputs[place]._replace(cached_tokens=cached_tokens)
        for place, started_s in step.starts:
            outputs[place] = outputs[place]._replace(started_s=started_s)
        for place, scores in step.scores:
            outputs[place] = outputs[place]._replace(scores=scores)
        for place, refusal in step.refusals:
            outputs[place] = outputs[place]._replace(refusal=refusal)
    except (IndexError, TypeError, ValueError) as error:
        raise MalformedMessageError(f"{type(error).__name__}: {error}") from error
    return [output for output in outputs if output.request_id]


def refusal_of(error: BaseException) -> Refusal:
    """An error of a question as plain data."""
    if isinstance(error, ValueError | OverloadedError | EngineDeadError):
        return Refusal(str(error), is_overload=isinstance(error, OverloadedError))
    return Refusal("the engine could not answer; its log says why", is_overload=True)
