"""Compile every bucket ahead of time, so that no request ever waits for a compiler."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from albireo_jax.runtime.batch import Bucket

Progress = Callable[[int, int], None]
"""Called with (buckets done, buckets in all) before the first and after each."""

_COMPILE_THREADS = 2


def compile_buckets(
    lower: Callable[[Bucket], jax.stages.Lowered],
    buckets: Iterable[Bucket],
    *,
    progress: Progress | None = None,
) -> dict[Bucket, jax.stages.Compiled]:
    """Executables of all buckets.

    Tracing holds the interpreter, so it is done here one by one; XLA's compiler does not and gets threads.
    """
    pending = tuple(buckets)
    report = progress or _silent
    report(0, len(pending))
    compiled: dict[Bucket, jax.stages.Compiled] = {}
    with ThreadPoolExecutor(_COMPILE_THREADS) as pool:
        futures = {bucket: pool.submit(lower(bucket).compile) for bucket in pending}
        for bucket, future in futures.items():
            compiled[bucket] = future.result()
            report(len(compiled), len(pending))
    return compiled


def use_persistent_cache(folder: Path) -> None:
    """Keep compiled programs in `folder`, so that the next start takes seconds instead of minutes."""
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _silent(done: int, total: int) -> None:
    """The progress of a compilation that nobody watches."""
    del done, total
