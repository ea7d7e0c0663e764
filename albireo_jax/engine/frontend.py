"""Text in, text out: prompts and sampling parameters become requests, and their outputs become text.

Any thread may call a `Frontend`, and any number of event loops. The threads share the *routes*, a dict from
request id to the reader of its outputs (see `output_readers`). The engine thread posts to each reader only
the outputs of its own requests, and drops a route with the last output of its request. A reader knows a
stream's choices, and their routes are known, before the requests are submitted: no output can come too
early. An output that comes too late, because its stream was closed, finds no choice and is dropped. The
service ends every request that it accepted with an output, so a stream that is read to its end or closed
leaves nothing behind, neither here nor in the engine.
"""

import asyncio
import logging
import operator
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeGuard

from albireo_jax.core.errors import EngineDeadError
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import Int32s
from albireo_jax.core.sampling_defaults import NO_DEFAULTS, SamplingDefaults
from albireo_jax.core.types import RequestOutput, SamplingParams, StructuredOutput
from albireo_jax.engine.choices import Choice, Completion, collect
from albireo_jax.engine.engine_client import EngineClient
from albireo_jax.engine.output_readers import EventLoopReader, OutputReader, QueueReader
from albireo_jax.engine.output_streams import AsyncOutputStream, SyncOutputStream
from albireo_jax.engine.request_metrics import RequestMetrics
from albireo_jax.engine.request_writer import PromptFree, RequestWriter
from albireo_jax.text.chat_template import ConversationMessage
from albireo_jax.text.detokenizer import Detokenizer
from albireo_jax.text.tokenizer import Tokenizer

_logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Sequence[ConversationMessage]
"""A text, token ids, or the messages of a chat."""


class Frontend:
    """Opens streams on an engine, which it starts; `close` stops it.

    `eos_token_ids` end a request unless it ignores them. `clock` gives the seconds of all latencies.
    `defaults` are the model's own sampling parameters, for those who make parameters of what a caller gives.
    """

    def __init__(
        self,
        service: EngineClient,
        tokenizer: Tokenizer,
        *,
        limits: EngineLimits,
        eos_token_ids: Sequence[int],
        clock: Callable[[], float] = time.perf_counter,
        defaults: SamplingDefaults = NO_DEFAULTS,
    ) -> None:
        self.metrics = RequestMetrics()
        self.defaults = defaults
        self._service = service
        self._tokenizer = tokenizer
        self._limits = limits
        self._requests = RequestWriter(
            tokenizer,
            limits,
            eos_token_ids=eos_token_ids,
            clock=clock,
            compile_first=service.first_mask,
        )
        self._clock = clock
        self._lock = threading.Lock()  # guards the replacing of _readers
        self._readers: tuple[OutputReader, ...] = ()
        self._routes: dict[str, OutputReader] = {}  # by request id; single operations only, they need no lock
        service.start(self._deliver)

    @property
    def num_readers(self) -> int:
        """Event loops and synchronous calls that have open requests."""
        return len(self._readers)

    def encode(
        self, prompt: Prompt, *, add_special_tokens: bool = True, must_fit: bool = False
    ) -> tuple[int, ...]:
        """Token ids of a prompt; raises ValueError for what is none of text, ids and messages.

        If it `must_fit` into the engine, ContextLengthError may be raised before all of it is tokenized.
        """
        context_len = self._limits.max_sequence_len if must_fit else None
        if isinstance(prompt, str):
            return tuple(
                self._tokenizer.encode(prompt, add_special_tokens=add_special_tokens, context_len=context_len)
            )
        if _is_chat(prompt):
            return tuple(self._tokenizer.encode_chat(prompt, context_len=context_len))
        token_ids: Sequence[Any] = prompt
        if must_fit:
            self._limits.check_prompt_len(len(token_ids))
        try:
            return tuple(map(operator.index, token_ids))
        except TypeError as error:
            raise ValueError(
                f"a prompt is a text, token ids or chat messages, got {prompt!r:.100}"
            ) from error

    def prepare(self, structured: StructuredOutput) -> "Future[Int32s]":
        """Compile the grammar of requests to come now; it may take seconds. Otherwise `stream` waits for it.

        The future, or the call, raises ValueError for a grammar that is malformed or too complex,
        OverloadedError if too many wait.
        """
        return self._requests.prepare(structured)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        cache_salt: str = "",
        priority: int | Sequence[int] = 0,
    ) -> list[Completion]:
        """All completions of `prompts`, in the order of the choices; blocks until the last has ended."""
        with self.stream(prompts, params, cache_salt=cache_salt, priority=priority) as stream:
            return collect(delta for deltas in stream for delta in deltas)

    def stream(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        cache_salt: str = "",
        priority: int | Sequence[int] = 0,
    ) -> SyncOutputStream:
        """A stream for the calling thread to iterate.

        `params` and `priority` are the same for all prompts or one for each. Prefixes that calls with another
        `cache_salt` computed are not found. Raises ValueError for what the engine cannot do, EngineDeadError
        if it does not run; nothing is left open then.
        """
        choices = self.write(prompts, params, cache_salt=cache_salt, priority=priority)
        reader = QueueReader(self._service, self.metrics, on_empty=self._remove_reader)
        stream = SyncOutputStream(choices, abort=reader.abort, wait=reader.wait)
        self._open(choices, stream, reader)
        return stream

    def stream_async(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        cache_salt: str = "",
        priority: int | Sequence[int] = 0,
    ) -> AsyncOutputStream:
        """A stream for tasks of the running event loop to read; otherwise as `stream`."""
        return self.open_async(self.write(prompts, params, cache_salt=cache_salt, priority=priority))

    def open_async(self, choices: Sequence[Choice]) -> AsyncOutputStream:
        """A stream over choices that another thread may have written; otherwise as `stream_async`."""
        reader = self._loop_reader()
        stream = AsyncOutputStream(choices, abort=reader.abort)
        self._open(choices, stream, reader)
        return stream

    def close(self) -> None:
        """Stop the engine; open streams end as aborted."""
        self._service.stop()

    def write(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        cache_salt: str = "",
        priority: int | Sequence[int] = 0,
    ) -> list[Choice]:
        """The choices of a stream that is not open yet; any thread may write them. Raises ValueError."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(each)} sampling parameters")
        priorities = [priority] * len(prompts) if isinstance(priority, int) else priority
        if len(priorities) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(priorities)} priorities")
        choices: list[Choice] = []
        prompt_free: dict[int, PromptFree] = {}
        for prompt, prompt_params, own_priority in zip(prompts, each, priorities, strict=True):
            token_ids = self.encode(prompt, must_fit=True)
            if id(prompt_params) not in prompt_free:
                prompt_free[id(prompt_params)] = self._requests.prompt_free(prompt_params)
            requests = self._requests.write(
                token_ids,
                prompt_params,
                cache_salt=cache_salt,
                priority=own_priority,
                prompt_free=prompt_free[id(prompt_params)],
            )
            for request in requests:
                detokenizer = Detokenizer(self._tokenizer, prompt_params, prompt_token_ids=token_ids)
                choices.append(Choice(index=len(choices), request=request, detokenizer=detokenizer))
        return choices

    def _open(
        self, choices: Sequence[Choice], stream: SyncOutputStream | AsyncOutputStream, reader: OutputReader
    ) -> None:
        if not choices:
            return
        reader.enter(stream)
        self._add_reader(reader)
        self._routes |= dict.fromkeys(stream.open, reader)
        try:
            self._service.submit(*(choice.request for choice in choices))
        except (ValueError, EngineDeadError):
            for request_id in stream.open:
                self._routes.pop(request_id)
            reader.leave(stream)
            raise

    def _loop_reader(self) -> EventLoopReader:
        """The reader of the running event loop, the one that is in use if any is."""
        event_loop = asyncio.get_running_loop()
        for reader in self._readers:
            if isinstance(reader, EventLoopReader) and reader.event_loop is event_loop:
                return reader
        return EventLoopReader(self._service, self.metrics, on_empty=self._remove_reader)

    def _add_reader(self, reader: OutputReader) -> None:
        with self._lock:
            if reader not in self._readers:
                self._readers = (*self._readers, reader)

    def _remove_reader(self, reader: OutputReader) -> None:
        with self._lock:
            self._readers = tuple(other for other in self._readers if other is not reader)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Post a step's outputs to the readers of their requests; on the engine thread."""
        delivered_s = self._clock()
        by_reader = defaultdict[OutputReader, list[RequestOutput]](list)
        routes = self._routes
        for output in outputs:
            ended = output.finish_reason is not None
            reader = routes.pop(output.request_id, None) if ended else routes.get(output.request_id)
            if reader is not None:
                by_reader[reader].append(output)
        for reader, own in by_reader.items():
            try:
                reader.post(own, delivered_s)
            except Exception:  # the other readers' outputs must not be lost with this one's
                _logger.exception("outputs of %d requests cannot be passed on", len(own))
                self._service.abort(*(output.request_id for output in own))


def _is_chat(
    prompt: Sequence[int] | Sequence[ConversationMessage],
) -> TypeGuard[Sequence[ConversationMessage]]:
    return bool(prompt) and isinstance(prompt[0], Mapping)
