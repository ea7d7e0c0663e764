"""Machine code of kernels: its instructions, and the loop of matrix products in it."""

import shutil
import struct

import pytest

from benchmarks.gpu_programs.kernel_assembly import assemble
from benchmarks.gpu_programs.machine_code import Loop, code_instructions, product_loop

PRODUCT, BRANCH, OTHER, NOTHING = 0x23C, 0x947, 0x221, 0x918


def branch(instructions: int, architecture: str) -> int:
    """A branch over so many instructions, counted from the next one."""
    offset = instructions * 4
    if architecture == "sm_80":
        return BRANCH | (offset & (1 << 48) - 1) << 34
    return BRANCH | (offset & 0xFF) << 16 | (offset >> 8 & (1 << 48) - 1) << 34


def cubin(words: list[int], *, name: bytes = b".text.kernel") -> bytes:
    """An ELF file with the code of one kernel and the names of its two sections."""
    code = b"".join(word.to_bytes(16, "little") for word in words)
    names = b"\0" + name + b"\0.shstrtab\0"
    header = bytearray(64)
    header[:4] = b"\x7fELF"
    struct.pack_into("<Q", header, 0x28, 64 + len(code) + len(names))
    struct.pack_into("<HHH", header, 0x3A, 64, 2, 1)
    tables = [
        struct.pack("<IIQQQQ", 1, 1, 0, 0, 64, len(code)).ljust(64, b"\0"),
        struct.pack("<IIQQQQ", len(name) + 2, 3, 0, 0, 64 + len(code), len(names)).ljust(64, b"\0"),
    ]
    return bytes(header) + code + names + b"".join(tables)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_innermost_loop_with_all_products_is_found(architecture: str) -> None:
    inner = [OTHER] * 300 + [PRODUCT, OTHER, branch(-2, architecture), PRODUCT, branch(-305, architecture)]
    words = [OTHER, branch(4, architecture), *inner, OTHER, branch(-308, architecture)]
    assert product_loop(cubin(words), architecture) == Loop(instructions=305, products=2)


def test_products_before_the_loop_are_not_counted() -> None:
    words = [PRODUCT, branch(-2, "sm_80"), PRODUCT, OTHER, PRODUCT, PRODUCT, branch(-4, "sm_80")]
    assert product_loop(cubin(words), "sm_80") == Loop(instructions=4, products=2)


def test_no_loop_is_found_where_products_are_outside_of_it() -> None:
    assert product_loop(cubin([PRODUCT, OTHER, branch(-2, "sm_80")]), "sm_80") is None
    assert product_loop(cubin([OTHER, branch(-2, "sm_80")]), "sm_80") is None


def test_instructions_are_counted_up_to_the_last_branch() -> None:
    end = branch(-1, "sm_90")
    assert code_instructions(cubin([OTHER, PRODUCT, NOTHING, OTHER, end, NOTHING, NOTHING])) == 3


def test_bytes_without_a_kernel_are_refused() -> None:
    with pytest.raises(ValueError, match="is an ELF file"):
        product_loop(b"#!/bin/sh", "sm_80")
    with pytest.raises(ValueError, match="no code of a kernel"):
        product_loop(cubin([OTHER], name=b".data"), "sm_80")


PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry kernel(.param .u64 count) {
  .reg .u64 %n; .reg .pred %p; .reg .b32 %a; .reg .f32 %c<4>;
  ld.param.u64 %n, [count];
  mov.b32 %a, 1065369472;
  mov.f32 %c0, 0f00000000; mov.f32 %c1, %c0; mov.f32 %c2, %c0; mov.f32 %c3, %c0;
LOOP:
  mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%c0, %c1, %c2, %c3}, {%a, %a, %a, %a}, {%a, %a},
    {%c0, %c1, %c2, %c3};
  add.u64 %n, %n, -1;
  setp.ne.u64 %p, %n, 0;
  @%p bra LOOP;
  st.global.f32 [%n], %c0;
  ret;
}
"""


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="no assembler of CUDA")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_a_loop_is_found_in_what_the_assembler_makes(architecture: str) -> None:
    found = assemble(PTX, architecture)
    loop = found.loop
    assert loop is not None
    assert loop.instructions < found.instructions < 60
    assert loop.instructions < 20 * loop.products
