"""What the host does: the time of a call by its number of arrays, and of a cold and a warm start.

A start is a process of its own that prepares the engine and says what it took. Both have the same empty home
at first, where the engine keeps its compiled programs, so that the first is cold and the second is warm.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from albireo_jax.experiments.gpu_check.check import SMALL_QWEN, Check, prepared
from albireo_jax.experiments.restoring import restore
from albireo_jax.runtime.batch import Bucket

_SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "gpu_check.py"
_ARRAYS = (16, 300)
_CALLS = 200
_HITS, _WRITTEN = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"
_BUCKETS = (Bucket(16, 16), Bucket(64, 16))
_SMALL_BUCKETS = (Bucket(4, 4), Bucket(32, 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A start of the engine: seconds until it is ready, without Python's own, and what it compiled.

    `found` programs came from the persistent cache, `compiled` ones did not.
    """

    seconds: float
    found: int
    compiled: int


def measure_start(check: Check) -> Start:
    """Prepare an engine in this process and tell what it took."""
    events = Counter[str]()

    def count(event: str, **_: str | int) -> None:
        events[event] += 1

    jax.monitoring.register_event_listener(count)
    began_s = time.perf_counter()
    prepared(check, SMALL_QWEN, _SMALL_BUCKETS if check.small else _BUCKETS)
    seconds = time.perf_counter() - began_s
    return Start(seconds=seconds, found=events[_HITS], compiled=events[_WRITTEN])


def run_host(check: Check) -> None:
    """Starts first, while this process holds nothing of the device's memory; then calls."""
    with tempfile.TemporaryDirectory() as home:
        for case in ("cold start", "warm start"):
            if check.notebook.has_time(case):
                _note_start(check, case, _started(check, home))
    for count in _ARRAYS:
        samples = [1e6 * seconds for seconds in call_seconds(count)]
        check.notebook.add("jit", f"{count} arrays", metric="call", unit="us", samples=samples)


def call_seconds(count: int) -> list[float]:
    """Seconds of calls of a compiled program with so many arrays and one fresh buffer of the host."""
    arrays = tuple(jnp.zeros(8, jnp.float32) for _ in range(count - 1))

    def step(arrays: tuple[Array, ...], buffer: Array) -> Array:
        return sum(arrays, jnp.zeros(8, jnp.float32)) + buffer

    call = jax.jit(step).lower(arrays, jax.ShapeDtypeStruct((8,), jnp.float32)).compile()
    times_s: list[float] = []
    for _ in range(_CALLS):
        buffer = np.zeros(8, np.float32)
        began_s = time.perf_counter()
        result = call(arrays, buffer)
        times_s.append(time.perf_counter() - began_s)
        result.block_until_ready()
    return times_s[_CALLS // 10 :]


def _started(check: Check, home: str) -> Start:
    arguments = ["--device", "cpu" if check.on_cpu else "gpu", *(["--small"] if check.small else [])]
    command = ["env", f"HOME={home}", sys.executable, str(_SCRIPT), "start", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a start ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return restore(Start, json.loads(done.stdout.splitlines()[-1]))


def _note_start(check: Check, case: str, start: Start) -> None:
    notebook = check.notebook
    notebook.add(SMALL_QWEN, case, metric="start", unit="s", samples=[start.seconds])
    notebook.add(SMALL_QWEN, case, metric="programs found", unit="1", samples=[start.found])
    notebook.add(SMALL_QWEN, case, metric="programs compiled", unit="1", samples=[start.compiled])


def start_line(start: Start) -> str:
    """A start as the process prints it."""
    return json.dumps(asdict(start))
