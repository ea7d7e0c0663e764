"""The machine code of an assembled kernel: how long it is, and the loop that does its matrix products.

Instructions of sm_70 and later are 16 bytes, the opcode in the lowest 12 bits. A cubin is an ELF file whose
section `.text.NAME` is the code of the kernel NAME.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_INSTRUCTION_BYTES = 16
_MATRIX_PRODUCT, _BRANCH, _NOTHING = 0x23C, 0x947, 0x918
_OFFSET_BITS, _LOW_BITS = 48, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """Instructions of a loop's body, and the matrix products among them."""

    instructions: int
    products: int


def product_loop(cubin: bytes, architecture: str) -> Loop | None:
    """The innermost loop of a cubin's one kernel that holds the most matrix products; None if none holds any.

    Some may stand before it. `architecture` is "sm_80" or "sm_90". Raises ValueError for bytes that hold no
    kernel.
    """
    words = _words(cubin)
    products = [at for at, word in enumerate(words) if word & 0xFFF == _MATRIX_PRODUCT]
    loops = [
        Loop(instructions=end + 1 - begin, products=sum(begin <= at <= end for at in products))
        for begin, end in _backward_branches(words, architecture)
    ]
    best = max(loops, key=lambda loop: (loop.products, -loop.instructions), default=None)
    return best if best is not None and best.products else None


def code_instructions(cubin: bytes) -> int:
    """The instructions of a cubin's one kernel; raises ValueError for bytes that hold none.

    The code ends with a branch to itself, and is filled up with instructions that do nothing.
    """
    return sum(word & 0xFFF != _NOTHING for word in _words(cubin)) - 1


def _words(cubin: bytes) -> list[int]:
    code = _code(cubin)
    return [
        int.from_bytes(code[at : at + _INSTRUCTION_BYTES], "little")
        for at in range(0, len(code), _INSTRUCTION_BYTES)
    ]


def _backward_branches(words: list[int], architecture: str) -> Iterator[tuple[int, int]]:
    """Where each branch to an earlier instruction leads, and where it stands."""
    for at, word in enumerate(words):
        if word & 0xFFF == _BRANCH:
            target = at + 1 + _branch_offset(word, architecture) * 4 // _INSTRUCTION_BYTES
            if target <= at:
                yield target, at


def _branch_offset(word: int, architecture: str) -> int:
    """How far a branch leads from the next instruction on, in units of 4 bytes."""
    offset = word >> 34 & (1 << _OFFSET_BITS) - 1
    offset -= (offset >> _OFFSET_BITS - 1) << _OFFSET_BITS
    if architecture == "sm_80":
        return offset
    return offset << _LOW_BITS | word >> 16 & (1 << _LOW_BITS) - 1


def _code(cubin: bytes) -> bytes:
    """The section of the kernel's code."""
    if cubin[:4] != b"\x7fELF":
        raise ValueError(f"a cubin is an ELF file, got {cubin[:4]!r}")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_bytes, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + nth * entry_bytes) for nth in range(count)]
    names = sections[names_at][4]
    for name, _, _, _, at, size in sections:
        if cubin.startswith(b".text.", names + name):
            return cubin[at : at + size]
    raise ValueError("the cubin has no code of a kernel")
