"""Calls from routes to the engine: long work runs in threads, so that the event loop stays free."""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from albireo_jax.core.types import SamplingParams
from albireo_jax.engine.frontend import Frontend, Prompt
from albireo_jax.engine.output_streams import AsyncOutputStream
from albireo_jax.engine.thread_pools import BoundedPool

_LONG_PROMPT_CHARACTERS = 4096
"""A longer text is tokenized by another thread, so that streams go on meanwhile."""

TOKENIZING = BoundedPool("tokenization", threads=max(2, min(4, os.cpu_count() or 1)), max_queued=256)
"""Where long texts are tokenized, and many requests are written."""

RENDERING = BoundedPool("chat templates", threads=2, max_queued=256)
"""Where long conversations are rendered."""

_CHOICE_CHARACTERS = 64
"""Characters whose tokenization takes as long as a request takes to be written."""

_Result = TypeVar("_Result")


async def encode(frontend: Frontend, prompt: Prompt, *, add_special_tokens: bool = True) -> tuple[int, ...]:
    """Token ids of a prompt of any length, which does not hold up the event loop. Raises ValueError."""
    return await run_in_thread_if_long(
        _size(prompt), lambda: frontend.encode(prompt, add_special_tokens=add_special_tokens)
    )


async def encode_all(
    frontend: Frontend, prompts: Sequence[Prompt], *, add_special_tokens: bool = True, must_fit: bool = True
) -> list[tuple[int, ...]]:
    """Token ids of prompts to generate from. Raises ValueError, also for a long one if it `must_fit`.

    Many short ones count as the long text that they are.
    """

    def work() -> list[tuple[int, ...]]:
        encode = partial(frontend.encode, add_special_tokens=add_special_tokens, must_fit=must_fit)
        return [encode(prompt) for prompt in prompts]

    return await run_in_thread_if_long(sum(map(_size, prompts)), work)


async def prepare(frontend: Frontend, params: SamplingParams) -> None:
    """Have the engine compile the grammar that `params` ask for, if they do.

    Raises ValueError for a wrong one, OverloadedError if too many wait.
    """
    if params.structured is not None:
        await asyncio.wrap_future(frontend.prepare(params.structured))


async def open_stream(
    frontend: Frontend,
    prompt_ids: Sequence[tuple[int, ...]],
    params: SamplingParams,
    *,
    cache_salt: str,
    priority: int,
) -> AsyncOutputStream:
    """An open stream; a thread writes its requests if they are many or long. Raises as `stream_async`."""
    size = sum(map(len, prompt_ids)) + _CHOICE_CHARACTERS * len(prompt_ids) * params.n
    size += len(params.allowed_token_ids or ()) + sum(map(len, params.bad_words))
    choices = await run_in_thread_if_long(
        size, lambda: frontend.write(prompt_ids, params, cache_salt=cache_salt, priority=priority)
    )
    return frontend.open_async(choices)


async def run_in_thread_if_long(
    num_characters: int, work: Callable[[], _Result], *, pool: BoundedPool = TOKENIZING
) -> _Result:
    """The result of `work`, done in `pool` if it has many characters to do. Raises OverloadedError."""
    return work() if num_characters <= _LONG_PROMPT_CHARACTERS else await pool.run(work)


def _size(prompt: Prompt) -> int:
    """Characters of a text, those of a chat, or token ids."""
    if isinstance(prompt, str) or not prompt or not isinstance(prompt[0], Mapping):
        return len(prompt)
    return sum(len(str(part["content"])) for part in prompt if isinstance(part, Mapping))
