"""The device that the check runs on: found without starting JAX, and the part that first uses it.

Names, sizes and clocks are those that the driver tells, and ceilings are measured.
"""

import subprocess
import time
from collections.abc import Callable

import jax

from benchmarks.gpu_check.attention_cases import FirstAttention
from benchmarks.gpu_check.carried import TARGET
from benchmarks.gpu_check.ceilings import note_ceilings
from benchmarks.gpu_check.check import Check


def used_bytes() -> int:
    """Bytes of the first GPU's memory that are taken, as its driver counts them, of all processes."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[0]) * 2**20


def note_memory(check: Check, subject: str) -> None:
    """Bytes in use beside JAX's pool: context, modules, graphs, libraries."""
    if check.on_cpu:
        check.figures.leave_out("memory beside the pool", "a CPU has no pool")
        return
    pool_bytes: int = jax.devices()[0].memory_stats()["bytes_limit"]
    figures = {"pool": pool_bytes, "memory beside the pool": used_bytes() - pool_bytes}
    for metric, size in figures.items():
        check.figures.add(subject, "in use", metric=metric, unit="GB", samples=[size / 1e9])


def run_device(check: Check) -> None:
    """The first launch of all, the compiler's description of the device, then what the device reaches."""
    with check.figures.attempt("first launch"):
        _note_first_launch(check)
    with check.figures.attempt("description of the device"):
        _keep_target(check)
    note_ceilings(check)
    note_memory(check, "device")


def _note_first_launch(check: Check) -> None:
    """Seconds of the first step with a kernel of ours: of each stage, and of the kernel once it is loaded."""
    times_s: dict[str, float] = {}

    def timed(metric: str, call: Callable[[], object]) -> None:
        began_s = time.perf_counter()
        call()
        times_s[metric] = time.perf_counter() - began_s

    timed("start of JAX", jax.devices)
    attention = FirstAttention(check)
    timed("trace and NVRTC", attention.trace)
    timed("compile", attention.compile)
    timed("first call", attention.call)
    timed("second call", attention.call)
    for metric, seconds in times_s.items():
        check.figures.add("attention", "first launch", metric=metric, unit="s", samples=[seconds])


def _keep_target(check: Check) -> None:
    """Keep what XLA's compiler must know of this device, as tests/data has it of another."""
    if check.on_cpu:
        check.figures.leave_out("description of the device", "a CPU has none")
        return
    from jaxlib import xla_client

    described = xla_client.get_topology_for_devices(jax.devices())
    (check.carried / TARGET).write_text(str(described.target_config))
