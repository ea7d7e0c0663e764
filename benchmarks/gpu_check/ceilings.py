"""The most that this device reaches: bytes per second of a large copy, flops per second of matrix products.

Everything that is given as a share of a ceiling is divided by one of these, measured in the same process.
"""

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks.gpu_check.check import Check

_REPEATS = 5
_CALLS = 4
_COPIED_BYTES = (2**24, 2**31)
_MATRIX_SIZES = ((256,), (4096, 8192))


@jax.jit
def _copy(x_X: Array) -> Array:
    return x_X + jnp.ones((), x_X.dtype)


@jax.jit
def _read(x_X: Array) -> Array:
    return jnp.max(x_X)


@partial(jax.jit, compiler_options={"xla_gpu_enable_triton_gemm": "False"})  # nothing to tune for a ceiling
def _multiply(x_AB: Float[Array, "A B"], y_BC: Float[Array, "B C"]) -> Float[Array, "A C"]:
    return x_AB @ y_BC


def copy_bytes_per_s(*, small: bool) -> tuple[float, ...]:
    """Bytes read and written per second while a large array is copied, one number added on the way."""
    x_X = jnp.zeros(_COPIED_BYTES[not small] // 4, jnp.int32)
    return tuple(2 * x_X.nbytes / seconds for seconds in _seconds(partial(_copy, x_X)))


def read_bytes_per_s(*, small: bool) -> tuple[float, ...]:
    """Bytes per second while a large array is read for its largest number."""
    x_X = jnp.zeros(_COPIED_BYTES[not small] // 4, jnp.int32)
    return tuple(x_X.nbytes / seconds for seconds in _seconds(partial(_read, x_X)))


def matrix_flops_per_s(size: int) -> tuple[float, ...]:
    """Flops per second of products of two square bfloat16 matrices of random numbers."""
    keys = jax.random.split(jax.random.key(0))
    x_AB, y_BC = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    return tuple(2 * size**3 / seconds for seconds in _seconds(partial(_multiply, x_AB, y_BC)))


def best_matrix_flops_per_s(*, small: bool) -> float:
    """The rate that shares of the matrix rate are of: the best median over the sizes."""
    return max(_median(matrix_flops_per_s(size)) for size in _MATRIX_SIZES[not small])


def best_copy_bytes_per_s(*, small: bool) -> float:
    """The rate that shares of the byte roofline are of: the median."""
    return _median(copy_bytes_per_s(small=small))


def note_ceilings(check: Check) -> None:
    """Copies, reads, and products of several sizes."""
    figures = check.figures
    size = f"{_COPIED_BYTES[not check.small] / 2**20:.0f} MiB"
    for metric, measure in (("copy bandwidth", copy_bytes_per_s), ("read bandwidth", read_bytes_per_s)):
        samples = [sample / 1e9 for sample in measure(small=check.small)]
        figures.add("device", size, metric=metric, unit="GB/s", samples=samples)
    for size in _MATRIX_SIZES[not check.small][::-1]:
        if figures.has_time(f"matrix rate at {size}"):
            samples = [sample / 1e12 for sample in matrix_flops_per_s(size)]
            figures.add("device", f"{size} bfloat16", metric="matrix rate", unit="TFLOP/s", samples=samples)


def _median(samples: tuple[float, ...]) -> float:
    return sorted(samples)[len(samples) // 2]


def _seconds(call: Callable[[], Array]) -> list[float]:
    """Seconds of a call, several queued at once so that the host's part hides; the first are warm-up."""
    times_s: list[float] = []
    for _ in range(_REPEATS + 1):
        began_s = time.perf_counter()
        result = call()
        for _ in range(_CALLS - 1):
            result = call()  # in turn, so that no more than two results are held
        result.block_until_ready()
        times_s.append((time.perf_counter() - began_s) / _CALLS)
    return times_s[1:]
