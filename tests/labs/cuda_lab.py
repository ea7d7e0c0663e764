"""Runs the CUDA kernels on the CPU: the same source, compiled as C++ (see cuda/cuda_on_cpu.h)."""

import ctypes
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from albireo_jax.ops.cuda.kernels import Entry, Kernel, Launch

HERE = Path(__file__).parent / "cuda"
COMPILER = shutil.which("g++") or shutil.which("c++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to run the kernels with")
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Order:
    """In which order threads take turns, and whether copies happen as early or as late as they may."""

    seed: int
    is_eager: bool


Edits = tuple[tuple[str, str], ...]
"""Texts of the source and what stands for them: planted faults."""


def _library(entry: Entry, macros: tuple[tuple[str, str], ...], edits: Edits) -> ctypes.CDLL:
    named = ("SOURCE", f'"{entry.source}"'), ("ENTRY", str(entry))
    return compiled("run_kernels.cpp", (*named, *macros), edits)


@cache
def compiled(program: str, macros: tuple[tuple[str, str], ...], edits: Edits = ()) -> ctypes.CDLL:
    """A library of a C++ program beside this file, which may include the kernels' sources."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernels.so"
        for file in resources.files("albireo_jax.ops.cuda").iterdir():
            if file.name.endswith((".cu", ".h")):
                text = file.read_text()
                for right, wrong in edits:
                    text = text.replace(right, wrong)
                (Path(folder) / file.name).write_text(text)
        subprocess.run(
            [
                *(str(COMPILER), "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-U_FORTIFY_SOURCE"),
                *("-ffp-contract=off", *(f"-D{name}={value}" for name, value in macros)),
                *(f"-I{folder}", str(HERE / program), "-o", str(library)),
            ],
            check=True,
        )
        return ctypes.CDLL(str(library))


def run(
    kernel: Kernel, grid: tuple[int, int], arrays: Sequence[np.ndarray], order: Order, edits: Edits
) -> None:
    """Runs every block of a grid; the kernel reads and writes the arrays where they are."""
    addresses = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
    with _one_at_a_time:  # devices call side by side, and a library has one shared memory
        library = _library(kernel.entry, kernel.macros, edits)
        library.run(*grid, ctypes.c_uint64(order.seed), int(order.is_eager), addresses)


def take_bytes_read(kernel: Kernel, edits: Edits = ()) -> int:
    """Bytes that a kernel's loads have read from its operands since the last call."""
    counter = _library(kernel.entry, kernel.macros, edits).take_bytes_read
    counter.restype = ctypes.c_uint64
    return counter()


def _unwritten(like: jax.ShapeDtypeStruct) -> np.ndarray:
    """An array in which what no kernel writes is found to be that: NaNs, or the least of integers."""
    is_float = jnp.issubdtype(like.dtype, jnp.floating)
    return np.full(like.shape, np.nan if is_float else np.iinfo(like.dtype).min, like.dtype)


def launch_on_cpu(order: Order, *, edits: Edits = ()):
    """A `LaunchFn` for programs that run on the CPU."""

    def launch(what: Launch, operands: Sequence[jax.Array]) -> Sequence[jax.Array]:
        def callback(*given: np.ndarray) -> list[np.ndarray]:
            inputs = [np.asarray(array) for array in given]
            in_place = inputs[len(inputs) - what.in_place :]
            results = [array.copy() for array in in_place]
            results += [_unwritten(like) for like in what.results[len(results) :]]
            run(what.kernel, what.grid, [*inputs, *results], order, edits)
            return results

        return jax.pure_callback(callback, list(what.results), *operands)

    return launch
