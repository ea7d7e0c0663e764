"""A pool does a bounded amount of work of one kind, refuses more, and forgets what was cancelled."""

import asyncio
import gc
import threading
import weakref
from concurrent.futures import CancelledError

import pytest

from albireo_jax.core.errors import OverloadedError
from albireo_jax.engine.thread_pools import BoundedPool


class _Text:
    """Something that a weak reference can follow."""


def test_work_beyond_the_limit_is_refused_until_some_is_done() -> None:
    pool, go = BoundedPool("tests", threads=2, max_queued=3), threading.Event()
    futures = [pool.submit(lambda: go.wait(60)) for _ in range(5)]
    with pytest.raises(OverloadedError, match=r"3 requests wait for tests"):
        pool.submit(lambda: True)
    go.set()
    assert all(future.result(60) for future in futures)
    assert pool.submit(lambda: 7).result(60) == 7
    pool.close()


def test_an_error_is_the_callers_and_the_pool_goes_on() -> None:
    pool = BoundedPool("tests", threads=1, max_queued=1)

    async def use() -> int:
        with pytest.raises(ZeroDivisionError):
            await pool.run(lambda: 1 // 0)
        return await pool.run(lambda: 3)

    assert asyncio.run(use()) == 3
    pool.close()


def test_cancelled_work_is_not_done_and_keeps_nothing() -> None:
    pool, go = BoundedPool("tests", threads=1, max_queued=2), threading.Event()
    first = pool.submit(lambda: go.wait(60))
    text = _Text()
    seen = weakref.ref(text)

    async def leave() -> None:
        task = asyncio.create_task(pool.run(lambda kept=text: kept))
        await asyncio.sleep(0)
        assert pool.num_open == 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    del text
    gc.collect()
    assert seen() is None
    assert pool.num_open == 1
    go.set()
    assert first.result(60)
    pool.close()


def test_a_closed_pool_drops_what_has_not_begun() -> None:
    pool, go = BoundedPool("tests", threads=1, max_queued=2), threading.Event()
    begun, waiting = pool.submit(lambda: go.wait(60)), pool.submit(lambda: True)
    pool.close()
    with pytest.raises(CancelledError):
        waiting.result(60)
    go.set()
    assert begun.result(60)
    with pytest.raises(RuntimeError):
        pool.submit(lambda: True)
    assert pool.num_open == 0
