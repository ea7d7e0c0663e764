"""The gates of assembled kernels, without an assembler."""

from dataclasses import replace

import pytest

from albireo_jax.core.config import KvDtype
from albireo_jax.ops.cuda.kernels import Entry
from benchmarks.gpu_programs.compiled_programs import DECODE, MIXED
from benchmarks.gpu_programs.kernel_assembly import (
    ARCHITECTURES,
    KERNEL_MODELS,
    KV_DTYPES,
    LOOP_INSTRUCTIONS,
    Assembled,
    kernel_breaches,
    kernels,
    launches,
    loop_instructions,
    read_assembler,
    residual_kernels,
    scratch_bytes,
)
from benchmarks.gpu_programs.machine_code import Loop

ASSEMBLER = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attend_pieces' for 'sm_80'
ptxas info    : Function properties for attend_pieces
    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 49152 bytes smem, 424 bytes cmem[0]
"""


def test_what_the_assembler_tells_is_read():
    found = read_assembler(ASSEMBLER)
    assert found == Assembled(registers=168, stack_bytes=8, spill_bytes=16, shared_bytes=49152)
    assert (found.blocks(128), replace(found, registers=169).blocks(128)) == (3, 2)
    with pytest.raises(RuntimeError, match="does not tell"):
        read_assembler("ptxas info    : 0 bytes gmem")


def test_spills_a_stack_too_many_registers_and_a_long_loop_break_the_gates_of_kernels():
    kernel = kernels(KERNEL_MODELS["smollm2"], tp=1, kv_dtype=KvDtype.INT8)["decode rows"]
    loop = Loop(instructions=725, products=48)
    good = Assembled(registers=168, stack_bytes=0, spill_bytes=0, shared_bytes=49152, loop=loop)
    assert kernel_breaches("decode rows", kernel, good, architecture="sm_90") == []
    assert loop_instructions("decode rows", kernel, loop) == 725  # 64 tokens a turn
    for fault in (
        {"spill_bytes": 4},
        {"stack_bytes": 8},
        {"registers": 176},
        {"loop": None},
        {"loop": replace(loop, instructions=726)},
        {"loop": replace(loop, products=49)},
        {"loop": Loop(instructions=364, products=24)},
    ):
        assert len(kernel_breaches("decode rows", kernel, replace(good, **fault), architecture="sm_90")) == 1


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("role", "most"), [("decode rows", 1.3), ("chunks", 1.5)])
def test_pages_of_codes_take_little_more_instructions_than_bfloat16(role, most, head_dim):
    """GPUs before those of sm_89 have no instruction that widens fp8."""
    floats, int8, fp8 = (LOOP_INSTRUCTIONS[role, kv_dtype, head_dim] for kv_dtype in KV_DTYPES)
    assert all(code <= most * number for code, number in zip(int8, floats, strict=True))
    assert fp8[ARCHITECTURES.index("sm_90")] <= most * floats[ARCHITECTURES.index("sm_90")]


def test_spills_registers_and_instructions_of_the_kernel_of_residuals_break_its_gates():
    kernel = residual_kernels(KERNEL_MODELS["llama-3.1-70b"])["add"]
    assert (kernel.entry, kernel.threads) == (Entry.ADD, 512)  # so that each takes 8 channels twice
    good = Assembled(registers=32, stack_bytes=0, spill_bytes=0, shared_bytes=64, instructions=260)
    assert kernel_breaches("add", kernel, good, architecture="sm_90") == []
    for fault in ({"spill_bytes": 24}, {"stack_bytes": 16}, {"registers": 33}, {"instructions": 261}):
        assert len(kernel_breaches("add", kernel, replace(good, **fault), architecture="sm_90")) == 1


@pytest.mark.parametrize("model", KERNEL_MODELS)
def test_every_model_has_four_kernels_for_each_kind_of_pages(model):
    seen = [kernels(KERNEL_MODELS[model], tp=1, kv_dtype=kv_dtype) for kv_dtype in KV_DTYPES]
    for each in seen:
        entries = [kernel.entry for kernel in each.values()]
        assert entries == [Entry.PREPARE, Entry.ROTATE, Entry.ATTEND, Entry.ATTEND]
    decode = launches(KERNEL_MODELS[model], DECODE, tp=1, kv_dtype=KV_DTYPES[0])
    assert [launch.kernel for launch in decode] == [
        seen[0][role] for role in ("prepare", "rotate", "decode rows")
    ]
    assert len({kernel for each in seen for kernel in each.values()}) == 10
    assert (
        0
        < scratch_bytes(KERNEL_MODELS[model], DECODE, tp=1)
        < scratch_bytes(KERNEL_MODELS[model], MIXED, tp=1)
    )
