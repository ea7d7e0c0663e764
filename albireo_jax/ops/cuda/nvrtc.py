"""CUDA C++ to PTX with NVRTC, the compiler library that comes with JAX's CUDA wheels: no toolkit, no GPU.

The driver translates the PTX for the GPU that is there. Its `.version` is lowered to that of CUDA 12.0, so
that a compiler newer than the driver does no harm; assemblers refuse what needs more.
"""

import ctypes
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

_NvrtcFn = Callable[..., int]

_PTX_VERSION = "8.0"
_IN_WHEELS = ("cu13/lib/libnvrtc.so.13", "cu12/lib/libnvrtc.so.12", "cuda_nvrtc/lib/libnvrtc.so.12")
_ON_THE_PATH = ("libnvrtc.so.13", "libnvrtc.so.12")


class NvrtcError(RuntimeError):
    """NVRTC is missing, or refused a program; the message holds its log."""


def compile_ptx(
    source: str, *, headers: Mapping[str, str], macros: Iterable[tuple[str, str]], architecture: str
) -> str:
    """PTX of a program in CUDA C++17 for GPUs from `architecture` on, such as "compute_80".

    `headers` are texts by the names that it includes them by; nothing else can be included. Raises NvrtcError
    with the compiler's log if the program is wrong, and without one where there is no NVRTC.
    """
    nvrtc = _library()
    program = ctypes.c_void_p()
    names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
    texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"albireo.cu", len(headers), texts, names
    )
    _check(nvrtc, created, "create a program")
    try:
        flags = [f"--gpu-architecture={architecture}", "--std=c++17"]
        flags += [f"--define-macro={name}={value}" for name, value in macros]
        options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        if nvrtc.nvrtcCompileProgram(program, len(flags), options) != 0:
            log = _text(nvrtc, program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
            raise NvrtcError(f"NVRTC refused the kernels with {flags}:\n{log}")
        ptx = _text(nvrtc, program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return re.sub(r"^\.version \d+\.\d+", f".version {_PTX_VERSION}", ptx, count=1, flags=re.MULTILINE)


@cache
def _library() -> ctypes.CDLL:
    """NVRTC of the wheels that JAX's CUDA extras install, or of the system."""
    wheels = importlib.util.find_spec("nvidia")
    folders = [] if wheels is None else wheels.submodule_search_locations or []
    found = [Path(folder) / name for folder in folders for name in _IN_WHEELS]
    for path in found:
        # NVRTC opens its builtins by name alone, which finds them only if they are loaded already.
        for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins))
    for name in [*(str(path) for path in found if path.exists()), *_ON_THE_PATH]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue  # The next place; if none has it, the error below names all of them.
    raise NvrtcError(
        f"no NVRTC among {', '.join([*map(str, found), *_ON_THE_PATH])}; "
        "it comes with albireo-jax[cuda12] and albireo-jax[cuda13] (package nvidia-cuda-nvrtc)"
    )


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, size_of: _NvrtcFn, read: _NvrtcFn) -> str:
    """A text of NVRTC's, whose size is asked for first."""
    size = ctypes.c_size_t()
    _check(nvrtc, size_of(program, ctypes.byref(size)), "tell a text's size")
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, read(program, buffer), "give a text")
    return buffer.value.decode()


def _check(nvrtc: ctypes.CDLL, result: int, what: str) -> None:
    if result != 0:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise NvrtcError(f"NVRTC cannot {what}: {nvrtc.nvrtcGetErrorString(result).decode()}")
