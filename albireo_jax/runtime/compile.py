"""Compile every program ahead of time, so that no request ever waits for a compiler."""

import logging
import math
import os
import stat
import sys
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import TypeVar

import jax
from jax.experimental.compilation_cache import compilation_cache

Progress = Callable[[int, int], None]
"""Called with (programs done, programs in all) before the first and after each."""

Name = TypeVar("Name", bound=Hashable)

MAX_CACHE_BYTES = 8 * 2**30
"""Size of the persistent cache, some ten models' programs."""

_logger = logging.getLogger(__name__)

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
    """The number of programs to compile at once on so many cores.

    At most eight: each takes memory of the host, half a GB for a model of 32 unrolled layers, and tracing,
    which goes one by one, feeds few of them.
    """
    return max(_MIN_THREADS, min(cores, _MAX_THREADS))


def use_persistent_cache(folder: Path | None, *, max_bytes: int = MAX_CACHE_BYTES) -> None:
    """Keep compiled programs in `folder`, so that the next start takes seconds instead of minutes.

    The quickly compiled ones too: all of them together take a second, and the next start should compile none.
    Beyond `max_bytes` the least recently used are dropped, now. Entries do not depend on where the folder is.
    A folder that cannot be written to is only read; where there is none, programs are compiled each time. A
    warning says so, since the engine works all the same.
    """
    if folder is None:
        _logger.warning("compiled programs are not kept: there is no home folder")
        return
    changes: dict[str, object] = {
        "jax_compilation_cache_dir": str(folder),
        # JAX's own bound has all processes of the host wait for one lock, in which it reads a file of every
        # entry to write one.
        "jax_compilation_cache_max_size": -1,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.listdir(folder)
    except OSError as error:
        _logger.warning("compiled programs are not kept: %s", error)
        changes = {"jax_compilation_cache_dir": None}
    else:
        if _is_writable(folder):
            _drop_least_recently_used(folder, max_bytes)
        else:
            _logger.warning("compiled programs are read from %s, which cannot be written to", folder)
            changes |= {
                "jax_persistent_cache_min_compile_time_secs": math.inf,
                "jax_persistent_cache_enable_xla_caches": "none",
            }
    if jax.config.jax_compilation_cache_dir != changes["jax_compilation_cache_dir"]:
        compilation_cache.reset_cache()  # it would go on with the folder that it used first
    for name, value in changes.items():
        jax.config.update(name, value)


def _drop_least_recently_used(folder: Path, max_bytes: int) -> None:
    """Remove files of a cache until the others have at most `max_bytes`, by the times of their last reading.

    Where a file system does not keep these, by the times of writing. Another process may do the same.
    """
    files: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            found = path.stat()
            if stat.S_ISREG(found.st_mode):
                files.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    excess = sum(size for _, size, _ in files) - max_bytes
    for _, size, path in sorted(files):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= size


def _is_writable(folder: Path) -> bool:
    try:
        with TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _cores() -> int:
    """Cores that this process may run on."""
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _silent(done: int, total: int) -> None:
    """The progress of a compilation that nobody watches."""
    del done, total
