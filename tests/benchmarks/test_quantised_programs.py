"""The gates on programs whose weights are codes: copies of codes, launches, and peaks of rows."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from albireo_jax.core.config import Dtype, Quantization
from albireo_jax.core.memory import page_bytes, weight_bytes
from benchmarks.gpu_programs.compiled_programs import DECODE, NUM_PAGES, PAGE_SIZE, ProgramCase
from benchmarks.gpu_programs.gates import breaches
from benchmarks.gpu_programs.program_figures import figures
from tests.labs.program_lab import CASE, compiled_text, good_decode

FP8_MATRICES = {
    "wqkv": (4096, 8, 6, 128),
    "wo": (4096, 4096),
    "gate_up": (4096, 2, 14336),
    "down": (14336, 4096),
}


@pytest.mark.parametrize("name", FP8_MATRICES)
def test_fp8_codes_that_a_step_transposes_or_widens_are_copies(name):
    """XLA does so where the codes do not lie as cuBLASLt wants them, and where it widens them ahead."""
    case = ProgramCase(model="llama-3.1-8b", tp=1, layers=2, quantization=Quantization.FP8)
    inputs, *outputs = FP8_MATRICES[name]
    codes_DF = jax.ShapeDtypeStruct((inputs, *outputs), jnp.float8_e4m3fn)
    x_TD = jax.ShapeDtypeStruct((64, inputs), jnp.bfloat16)

    def transposed(w, x):
        return jax.lax.optimization_barrier(w.reshape(inputs, -1).T), x

    def widened(w, x):
        return x @ jax.lax.optimization_barrier(w.astype(x.dtype)).reshape(inputs, -1)

    for fault in (transposed, widened):
        found = figures(case, compiled_text(fault, codes_DF, x_TD))
        assert found.weight_copies >= 1
        assert f"{found.weight_copies} copies of a layer's weights" in breaches(case, DECODE, found)


def good_codes(kind, case, launches):
    """Figures of a decode step on one device that breaks no gate, with weights of codes."""
    weights = weight_bytes(case.config, tp=1, dtype=Dtype.BFLOAT16)
    pool = (NUM_PAGES + 1) * page_bytes(case.config, tp=1, page_size=PAGE_SIZE, dtype=Dtype.BFLOAT16)
    products = 4 * case.layers if kind is Quantization.FP8 else 0
    return replace(
        good_decode(),
        argument_bytes=weights + pool,
        alias_bytes=pool + 65 * 512 * 4,
        output_bytes=pool + 65 * 512 * 4,
        collectives=Counter(),
        kernels=5,
        launches=launches,
        fp8_products=products,
        peaks=products,
        command_buffers=1,
        lone_launches=Counter(),
        longest_run=0,
    )


@pytest.mark.parametrize(
    ("kind", "a_layer"), [(Quantization.INT8, 12), (Quantization.FP8_W8A16, 12), (Quantization.FP8, 17)]
)
def test_steps_with_codes_have_gates_of_their_own(kind, a_layer):
    case = replace(CASE, tp=1, quantization=kind)
    good = good_codes(kind, case, 2 * a_layer + 12)
    assert breaches(case, DECODE, good) == []
    more = {"launches": good.launches, "fp8_products": good.fp8_products, "peaks": good.peaks}
    for name, number in more.items():
        assert len(breaches(case, DECODE, replace(good, **{name: number + 1}))) == 1


def test_the_peak_of_a_row_is_counted_as_often_as_it_is_calculated():
    x_TD = jax.ShapeDtypeStruct((64, 512), jnp.float32)
    assert figures(CASE, compiled_text(lambda x: x.max(axis=1), x_TD)).peaks == 1
    assert figures(CASE, compiled_text(lambda x: x.sum(axis=1), x_TD)).peaks == 0
