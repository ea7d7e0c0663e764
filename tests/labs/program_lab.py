"""A case of the programs for GPUs, traced for the CPU, and figures that break no gate."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp

from albireo_jax.core.config import Dtype
from albireo_jax.core.memory import page_bytes, weight_bytes
from albireo_jax.runtime.batch import SLOT_FIELDS
from benchmarks.gpu_programs.compiled_programs import (
    NUM_PAGES,
    PAGE_SIZE,
    CompiledProgram,
    ProgramCase,
)
from benchmarks.gpu_programs.program_figures import figures

CASE = ProgramCase(model="llama-3.1-8b", tp=8, layers=2)


def compiled_text(function, *shapes):
    text = jax.jit(function).lower(*shapes).compile().as_text()
    return CompiledProgram(
        text=text, argument_bytes=0, alias_bytes=0, temp_bytes=0, output_bytes=0, launches=LAUNCHES
    )


def good_decode():
    """Figures of a decode step that breaks no gate."""
    weights = weight_bytes(CASE.config, tp=8, dtype=Dtype.BFLOAT16)
    pool = (NUM_PAGES + 1) * page_bytes(CASE.config, tp=8, page_size=PAGE_SIZE, dtype=Dtype.BFLOAT16)
    plain = figures(CASE, compiled_text(lambda x: x + 1, jax.ShapeDtypeStruct((3,), jnp.float32)))
    return replace(
        plain,
        argument_bytes=weights + pool,
        alias_bytes=pool + 65 * 512 * 4,
        output_bytes=pool + 65 * 512 * 4 + 2**22,
        temp_bytes=2**22,
        collectives=Counter({("all-reduce", 64 * 4096 * 2): 5}),
        kernels=8,
        host_waits=0,
        command_buffers=5,
        lone_launches=Counter(kAllReduce=5),
        longest_run=4,
        launches=33,
    )


def good_sampling():
    """Figures of a sampling program that breaks no gate."""
    state = 4 * 65 * (1 + SLOT_FIELDS)
    return replace(good_decode(), collectives=Counter(), alias_bytes=state, output_bytes=state + 256)


LAUNCHES = """\
001: kCustomKernel [source] one
000: kCommandBuffer [source]
    002: kCustomKernel [source] two
    003: kCopy [source] three
004: kWhile [prev=000]
condition:
    005: kCustomKernel [source] four
  body:
    000: kCommandBuffer [source]
        006: kCustomKernel [source] five
        007: kConditional [prev=006] six
    008: kCustomKernel [prev=007] seven
    009: kCopy [prev=008] eight
    010: kConditional [prev=009] nine
011: kAllReduce [prev=004] ten
"""
