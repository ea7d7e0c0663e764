"""The CUDA kernels as operations of a JAX program.

XLA takes a kernel as PTX text and launches it itself, inside its command buffers too. A kernel gets the
addresses of its operands and then of its results, as 64-bit numbers; all else is fixed when it is compiled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, partial
from importlib import resources
from typing import Any, TypeAlias

import jax
import numpy as np

from albireo_jax.ops.cuda.nvrtc import compile_ptx


class Architecture(StrEnum):
    """The GPUs that a kernel's text is for: those of this compute capability and later."""

    AMPERE = "80"
    HOPPER = "90"


def architecture_of(device: Any) -> Architecture:
    """The latest architecture that a device of JAX belongs to; it must be an NVIDIA GPU."""
    major = int(device.compute_capability.split(".")[0])
    return Architecture.HOPPER if major >= 9 else Architecture.AMPERE


class Entry(StrEnum):
    """A kernel, by its name in its source."""

    ATTEND = "attend_pieces"
    PREPARE = "prepare_step"
    ROTATE = "rotate_and_write"
    ADD = "add_and_normalise"
    PEAKS = "row_peaks"
    DRAW = "draw_rows"

    @property
    def source(self) -> str:
        """The file that holds it."""
        return _SOURCES[self]


_SOURCES = {
    Entry.ATTEND: "paged_attention.cu",
    Entry.PREPARE: "prepare_step.cu",
    Entry.ROTATE: "rotate_and_write.cu",
    Entry.ADD: "add_and_normalise.cu",
    Entry.PEAKS: "sample_rows.cu",
    Entry.DRAW: "sample_rows.cu",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel for one model and cache: the macros of its source, as that describes them."""

    entry: Entry
    macros: tuple[tuple[str, str], ...]
    warps: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps


_MOST_BLOCKS = 2**31 - 1, 65535
"""Blocks of a grid along x and y at most, on every GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A launch of (x, y) blocks, with the shapes of what it gives.

    The last operands are where the first of `in_place` results lie already, in their order. Raises ValueError
    for more blocks than GPUs launch.
    """

    kernel: Kernel
    grid: tuple[int, int]
    results: tuple[jax.ShapeDtypeStruct, ...]
    in_place: int = 0

    def __post_init__(self) -> None:
        for axis, blocks, most in zip("xy", self.grid, _MOST_BLOCKS, strict=True):
            if blocks > most:
                raise ValueError(
                    f"{self.kernel.entry} with {blocks} blocks along {axis}: GPUs launch up to {most}"
                )


LaunchFn: TypeAlias = Callable[[Launch, Sequence[jax.Array]], Sequence[jax.Array]]
"""Runs a launch on operands: `launch_on` gives one for GPUs; tests run the same kernels on the CPU."""


@cache
def launch_on(architecture: Architecture) -> LaunchFn:
    """The function that launches kernels on GPUs of an architecture; the same one each time."""
    return partial(_launch, architecture)


def _launch(architecture: Architecture, what: Launch, operands: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """An operation of the traced program that launches a kernel; can only be compiled for NVIDIA GPUs.

    Raises NvrtcError where the kernel cannot be compiled.
    """
    first = len(operands) - what.in_place
    call = jax.ffi.ffi_call(
        "__gpu$xla.gpu.ptx",
        what.results,
        input_output_aliases={first + nth: nth for nth in range(what.in_place)},
    )
    x, y = what.grid
    return call(
        *operands,
        name=str(what.kernel.entry),
        kernel_type="ptx",
        kernel_data=ptx(what.kernel, architecture),
        grid_x=np.int32(x),
        grid_y=np.int32(y),
        grid_z=np.int32(1),
        block_x=np.int32(what.kernel.threads),
        block_y=np.int32(1),
        block_z=np.int32(1),
        shared_mem_bytes=np.int32(0),
        output_indices=tuple(np.int32(len(operands) + nth) for nth in range(len(what.results))),
    )


def ptx(kernel: Kernel, architecture: Architecture) -> str:
    """A kernel's PTX; NVRTC takes a second or so for it, once per source, macros and architecture.

    It is the same text in every layer and bucket. XLA copies it for each launch of a program and loads every
    copy as a module of its own when the program first runs; the driver compiles equal texts once, as long as
    it can keep what it compiled (CUDA_CACHE_PATH, by default ~/.nv/ComputeCache).
    """
    return _ptx(kernel.entry.source, kernel.macros, architecture)


@cache
def _ptx(source: str, macros: tuple[tuple[str, str], ...], architecture: Architecture) -> str:
    folder = resources.files("albireo_jax.ops.cuda")
    headers = {file.name: file.read_text() for file in folder.iterdir() if file.name.endswith(".h")}
    return compile_ptx(
        (folder / source).read_text(), headers=headers, macros=macros, architecture=f"compute_{architecture}"
    )
