"""From a body to an open turn: the model's name, the caller's faults, the prompts' token ids; its usage."""

import os
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

from albireo_jax.core.errors import ContextLengthError
from albireo_jax.core.types import SamplingParams
from albireo_jax.engine.frontend import Frontend, Prompt
from albireo_jax.engine.output_streams import AsyncTurn, ChoiceDelta, Completion
from albireo_jax.engine.thread_pools import BoundedPool
from albireo_jax.serving.errors import ApiError, bad_request
from albireo_jax.serving.wire import Wire

_LONG_PROMPT_CHARACTERS = 4096
"""A longer text is tokenized by another thread, so that streams go on meanwhile."""

_SHOWN_CHARACTERS = 500
"""Of a text that an error quotes."""

TOKENIZING = BoundedPool("tokenization", threads=max(2, min(4, os.cpu_count() or 1)), max_queued=256)
"""Where long texts are tokenized, and many requests are written."""

RENDERING = BoundedPool("chat templates", threads=2, max_queued=256)
"""Where long conversations are rendered."""

GRAMMARS = BoundedPool("grammars", threads=32, max_queued=64)
"""Threads that compile grammars; most of them wait for processes that try these."""

_CHOICE_CHARACTERS = 64
"""Characters whose tokenization takes as long as a request takes to be written."""

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """The fields that every object of one answer repeats."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, model: str, *, request_id: str | None = None) -> "Heading":
        """The heading of an answer made now, under the id of its request, or else one of its own."""
        return cls(id=f"{prefix}-{request_id or uuid.uuid4().hex}", created=int(time.time()), model=model)

    def object(self, kind: str, **fields: Any) -> dict[str, Any]:
        """An OpenAI object of `kind`."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **fields}


class Usage:
    """Counts the tokens of a turn with `n` samples of each prompt, to be told as OpenAI's usage object.

    A prompt counts once, and as cached what its first sample found. Answers do not count unless they are
    `shown`.
    """

    def __init__(self, num_prompt_tokens: int, *, n: int, shown: bool = True) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._n = n
        self._shown = shown
        self._num_generated = self._num_cached = 0

    def count(self, outcomes: Iterable[ChoiceDelta | Completion]) -> None:
        """Add what choices brought."""
        for outcome in outcomes:
            if self._shown:
                self._num_generated += len(outcome.token_ids)
            if outcome.cached_tokens and outcome.choice % self._n == 0:
                self._num_cached += outcome.cached_tokens

    def object(self) -> dict[str, Any]:
        """OpenAI's object of what was counted so far."""
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_generated,
            "total_tokens": self._num_prompt_tokens + self._num_generated,
            "prompt_tokens_details": {"cached_tokens": self._num_cached},
        }


def check_model(asked: str | None, served_name: str) -> None:
    """Raise ApiError 404 if a client asks for another model; who names none gets ours."""
    if asked is not None and asked != served_name:
        raise ApiError(
            HTTPStatus.NOT_FOUND,
            f"the model {asked[:_SHOWN_CHARACTERS]!r} does not exist; this server serves {served_name!r}",
            param="model",
            code="model_not_found",
        )


@contextmanager
def callers_fault(schema: type[Wire]) -> Generator[None, None, None]:
    """Turn a ValueError into an ApiError 400; its `param` is the field that begins the message."""
    try:
        yield
    except ContextLengthError as error:
        raise bad_request(str(error), code="context_length_exceeded") from error
    except ValueError as error:
        raise bad_request(str(error), param=schema.field_in(str(error))) from error


async def encode(frontend: Frontend, prompt: Prompt, *, add_special_tokens: bool = True) -> tuple[int, ...]:
    """Token ids of a prompt of any length, which does not hold up the event loop. Raises ValueError."""
    return await aside(_size(prompt), lambda: frontend.encode(prompt, add_special_tokens=add_special_tokens))


async def encode_all(
    frontend: Frontend, prompts: Sequence[Prompt], *, add_special_tokens: bool = True, must_fit: bool = True
) -> list[tuple[int, ...]]:
    """Token ids of prompts to generate from. Raises ValueError, also for a long one if it `must_fit`.

    Many short ones count as the long text that they are.
    """

    def work() -> list[tuple[int, ...]]:
        encode = partial(frontend.encode, add_special_tokens=add_special_tokens, must_fit=must_fit)
        return [encode(prompt) for prompt in prompts]

    return await aside(sum(map(_size, prompts)), work)


async def prepare(frontend: Frontend, params: SamplingParams) -> None:
    """Have another thread compile the grammar that `params` ask for, if they do.

    Raises ValueError for a wrong one, OverloadedError if too many wait.
    """
    if params.structured is not None:
        await GRAMMARS.run(lambda: frontend.prepare(params))


async def open_turn(
    frontend: Frontend, prompt_ids: Sequence[tuple[int, ...]], params: SamplingParams, *, cache_salt: str
) -> AsyncTurn:
    """An open turn; another thread writes its requests if they are many or long. Raises as `stream_async`."""
    size = sum(map(len, prompt_ids)) + _CHOICE_CHARACTERS * len(prompt_ids) * params.n
    size += len(params.allowed_token_ids or ()) + sum(map(len, params.bad_words))
    choices = await aside(size, lambda: frontend.write(prompt_ids, params, cache_salt=cache_salt))
    return frontend.open_async(choices)


async def aside(
    num_characters: int, work: Callable[[], _Result], *, pool: BoundedPool = TOKENIZING
) -> _Result:
    """The result of `work`, done in `pool` if it has many characters to do. Raises OverloadedError."""
    return work() if num_characters <= _LONG_PROMPT_CHARACTERS else await pool.run(work)


def _size(prompt: Prompt) -> int:
    """Characters of a text, those of a chat, or token ids."""
    if isinstance(prompt, str) or not prompt or not isinstance(prompt[0], Mapping):
        return len(prompt)
    return sum(len(str(part["content"])) for part in prompt if isinstance(part, Mapping))
