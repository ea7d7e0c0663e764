"""The cost of KV copies in the engine's steps, for conversations with all their pages and a third of them.

The conversations and the kinds of memory are those of `benchmarks.swap`; the engine has random weights.
"""

from dataclasses import replace
from functools import partial

from albireo_jax.core.config import Dtype
from albireo_jax.core.memory import page_bytes
from albireo_jax.core.token_ids import token_array
from albireo_jax.core.types import Request
from albireo_jax.launch import Prepared, prepare_random
from albireo_jax.runtime.batch import Bucket
from benchmarks.gpu_check.check import SMALL_QWEN, Check, Sizes
from benchmarks.gpu_check.check_engines import free
from benchmarks.gpu_check.loops import answers_of
from benchmarks.swap import (
    PAGE_SIZE,
    Memory,
    Pages,
    SwapRun,
    Talks,
    Tokens,
    run_talks,
    swap_series,
)

_REAL = Talks(count=32, turns=3, said=480, answered=32, vocab_size=400)
_SMALL = Talks(count=4, turns=2, said=24, answered=8, vocab_size=400)
_BUCKETS = (Bucket(32, 32), Bucket(2048, 32))
_SMALL_BUCKETS = (Bucket(4, 4), Bucket(64, 4))


def run_swap(check: Check) -> None:
    """Every kind of memory, each with an engine of its own, as their pools differ."""
    talks = _SMALL if check.small else _REAL
    for memory in (Memory.SWAP, Memory.ENDLESS, Memory.RECOMPUTE):
        if check.figures.has_time(f"swap: {memory}"):
            ready = _prepared(check, Pages.of(memory, demand=talks.demand))
            runs = [_run(ready, talks, seed=seed) for seed in range(2)]
            check.figures.extend(swap_series(SMALL_QWEN, memory, runs[1:]))  # the first one warms up
            del ready


def _prepared(check: Check, pages: Pages) -> Prepared:
    shape = check.shape(SMALL_QWEN)
    dtype = Dtype.FLOAT32 if check.on_cpu else Dtype.BFLOAT16
    host_bytes = pages.host * page_bytes(shape, tp=1, page_size=PAGE_SIZE, dtype=dtype)
    config = Sizes.of(small=check.small).config(host_memory_bytes=host_bytes, num_pages=pages.device)
    free()
    return prepare_random(config, shape, buckets=_SMALL_BUCKETS if check.small else _BUCKETS)


def _run(ready: Prepared, talks: Talks, *, seed: int) -> SwapRun:
    return run_talks(
        partial(_answer, ready, seed),
        replace(talks, seed=seed),
        stats=ready.loop.scheduler.stats,
        timeline=ready.timeline,
    )


def _answer(ready: Prepared, seed: int, texts: list[Tokens], max_tokens: int) -> list[Tokens]:
    requests = [
        Request(
            request_id=f"{seed} {len(text)} {index}",
            prompt_token_ids=token_array("a text", text),
            max_tokens=max_tokens,
        )
        for index, text in enumerate(texts)
    ]
    return answers_of(ready.loop, requests)
