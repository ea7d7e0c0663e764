"""The CUDA attention kernels, run on the CPU thread by thread, against the oracle of attention."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_lab import Shape, random_batch, random_counts
from cuda_lab import Order, launch_on_cpu, needs_compiler

from albireo_jax.ops.attention import paged_attention
from albireo_jax.ops.attention_ref import reference_attention
from albireo_jax.ops.kv_cache import dequantise

SCALE = 0.3
IN_TURN = Order(0, False)


def check(shape, *, seed=0, counts=None, window=None, cap=None, order=IN_TURN):
    (q_TNGK, cache), rows = random_batch(seed, shape, counts=counts or random_counts(seed, shape))
    q_TNGK = q_TNGK.astype(jnp.bfloat16)
    options = {"layer": 1, "scale": SCALE, "sliding_window": window, "soft_cap": cap, **rows}
    got = paged_attention(q_TNGK, cache, **options, launch=launch_on_cpu(order))
    q32_TNGK = q_TNGK.astype(jnp.float32)
    want = reference_attention(q32_TNGK, dequantise(cache), **options)
    got, want = np.asarray(got, np.float32), np.asarray(want)
    assert np.isfinite(want).all()
    np.testing.assert_allclose(got, want, atol=2e-2, rtol=2e-2)
    # Rounding of weights and results alone: half a unit in the last place of 8 bits, a few times over.
    assert np.abs(got - want).mean() < 2e-3 * max(1.0, np.abs(want).mean())
    return got


SMALL = Shape(tokens=75, rows=6, columns=13, page_size=16, group=4, head_dim=64, dtype="bfloat16")


@needs_compiler
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", [None, 7, 70])
def test_equals_reference_on_ragged_steps(seed, window):
    check(SMALL, seed=seed, window=window)
