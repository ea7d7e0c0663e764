"""Compile every program ahead of time, so that no request ever waits for a compiler."""

import os
import sys
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import jax

Progress = Callable[[int, int], None]
"""Called with (programs done, programs in all) before the first and after each."""

Name = TypeVar("Name", bound=Hashable)

_MIN_THREADS, _MAX_THREADS = 2, 8


def compile_all(
    lower: Mapping[Name, Callable[[], jax.stages.Lowered]], *, progress: Progress | None = None
) -> dict[Name, jax.stages.Compiled]:
    """Executables of all programs.

    Tracing holds the interpreter, so it is done here one by one; XLA's compiler does not and gets the cores.
    """
    report = progress or _silent
    report(0, len(lower))
    compiled: dict[Name, jax.stages.Compiled] = {}
    with ThreadPoolExecutor(num_threads(_cores())) as pool:
        futures = {name: pool.submit(trace().compile) for name, trace in lower.items()}
        for name, future in futures.items():
            compiled[name] = future.result()
            report(len(compiled), len(lower))
    return compiled


def num_threads(cores: int) -> int:
    """How many programs to compile at once on so many cores.

    At most eight: each takes memory of the host, half a GB for a model of 32 unrolled layers, and tracing,
    which goes one by one, feeds few of them.
    """
    return max(_MIN_THREADS, min(cores, _MAX_THREADS))


def use_persistent_cache(folder: Path) -> None:
    """Keep compiled programs in `folder`, so that the next start takes seconds instead of minutes.

    The quickly compiled ones too: all of them together take a second, and the next start should compile none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _cores() -> int:
    """Cores that this process may run on."""
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _silent(done: int, total: int) -> None:
    """The progress of a compilation that nobody watches."""
    del done, total
