"""Quantised keys and values: what is read back, how far it is from what was written, and the scales."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from albireo_jax.ops.kv_cache import FP8_BITS, KvCache, decode, dequantise, encode, new_cache

INT8 = jnp.dtype(jnp.int8)
LARGEST = {INT8: 127, FP8_BITS: 448}
TOKENS, HEADS, HEAD_DIM = 40, 3, 16


def vectors(seed: int) -> np.ndarray:
    """Vectors of magnitudes from 1e-20 to 1e20, some numbers of each far below the others."""
    rng = np.random.default_rng(seed)
    x_TNK = rng.standard_normal((TOKENS, HEADS, HEAD_DIM)) * 10.0 ** rng.uniform(-4, 0, HEAD_DIM)
    return (x_TNK * 10.0 ** rng.uniform(-20, 20, (TOKENS, HEADS, 1))).astype(np.float32)


def read_back(x_TNK, dtype):
    """(numbers, scales, quotients) that a cache of `dtype` gives for what was written."""
    coded = jax.jit(encode, static_argnums=1)(jnp.asarray(x_TNK), dtype)
    scale_TN1 = np.asarray(coded.scale_TN).astype(np.float32)[..., None]
    code_TNK = np.asarray(coded.x_TNK)
    numbers_TNK = meanings(code_TNK)
    return numbers_TNK.astype(np.float64) * scale_TN1, scale_TN1, numbers_TNK


def meanings(codes):
    """The numbers that entries of pages stand for: an int8 is held plus 128, without a sign."""
    if codes.dtype == FP8_BITS:
        return codes.view(ml_dtypes.float8_e4m3fn)
    return (codes.view(np.uint8).astype(int) - 128).astype(np.int8)


@pytest.mark.parametrize("dtype", [INT8, FP8_BITS])
@pytest.mark.parametrize("seed", range(4))
def test_scales_are_the_least_that_let_nothing_saturate(seed, dtype):
    x_TNK = vectors(seed)
    _, scale_TN1, _ = read_back(x_TNK, dtype)
    peak_TN1 = np.abs(x_TNK).max(axis=-1, keepdims=True)
    exact_TN1 = peak_TN1.astype(np.float64) / LARGEST[dtype]
    assert (scale_TN1 >= exact_TN1 * (1 - 2**-23)).all()
    assert (scale_TN1 <= exact_TN1 * (1 + 2**-7)).all()


@pytest.mark.parametrize("seed", range(4))
def test_int8_is_off_by_half_a_scale_at_most(seed):
    x_TNK = vectors(seed)
    got_TNK, scale_TN1, code_TNK = read_back(x_TNK, INT8)
    assert (np.abs(got_TNK - x_TNK) <= scale_TN1 / 2 * (1 + 2**-15)).all()
    assert np.abs(code_TNK.astype(int)).max() == 127


@pytest.mark.parametrize("seed", range(4))
def test_fp8_is_off_by_a_sixteenth_at_most_and_by_less_than_its_step_near_zero(seed):
    x_TNK = vectors(seed)
    got_TNK, scale_TN1, _ = read_back(x_TNK, FP8_BITS)
    is_normal_TNK = np.abs(x_TNK) >= scale_TN1 * 2**-6
    bound_TNK = np.where(is_normal_TNK, np.abs(x_TNK) * 2**-4, scale_TN1 * 2**-10)
    assert (np.abs(got_TNK - x_TNK) <= bound_TNK * (1 + 2**-15)).all()
    assert 0 < is_normal_TNK.mean() < 1


@pytest.mark.parametrize("dtype", [INT8, FP8_BITS])
def test_every_finite_code_is_read_as_what_it_stands_for(dtype):
    codes = np.arange(256, dtype=np.uint8)
    stored = codes.view(np.int8) if dtype == INT8 else codes
    want = meanings(stored).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(jax.jit(decode)(jnp.asarray(stored))), want)


@pytest.mark.parametrize("dtype", [INT8, FP8_BITS])
def test_a_head_and_a_token_do_not_touch_the_others(dtype):
    x_TNK = vectors(0)
    changed_TNK = x_TNK.copy()
    changed_TNK[3, 1] *= 1000
    one, other = (read_back(x, dtype)[0] for x in (x_TNK, changed_TNK))
    differs_TN = (one != other).any(axis=-1)
    assert differs_TN[3, 1]
    assert differs_TN.sum() == 1


@pytest.mark.parametrize("dtype", [INT8, FP8_BITS])
def test_zero_is_read_as_zero(dtype):
    got_TNK, scale_TN1, _ = read_back(np.zeros((2, 1, 4), np.float32), dtype)
    assert (got_TNK == 0).all()
    assert (scale_TN1 > 0).all()


@pytest.mark.parametrize("dtype", [INT8, FP8_BITS])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, HEAD_DIM - 1])
def test_a_vector_that_is_not_finite_is_never_read_as_finite(dtype, bad, place):
    x_TNK = vectors(1)
    x_TNK[5, 2, place] = bad
    check_not_finite(x_TNK, dtype)


@pytest.mark.parametrize("dtype", [INT8, FP8_BITS])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FFF0001, 0x7F800001])
def test_no_bits_of_a_nan_are_read_as_finite(dtype, bits):
    """All ones are the NaN that GPUs calculate; rounded up as bits, they would become those of -0."""
    x_TNK = vectors(1)
    x_TNK.view(np.uint32)[5, 2, 3] = bits
    check_not_finite(x_TNK, dtype)


def check_not_finite(x_TNK, dtype):
    """The vector of token 5 and head 2 is read as not finite, and the other tokens' as finite."""
    coded = encode(jnp.asarray(x_TNK), dtype)
    got_TNK = np.asarray(decode(coded.x_TNK) * coded.scale_TN.astype(jnp.float32)[..., None])
    assert not np.isfinite(got_TNK[5, 2]).all()
    assert np.isfinite(np.delete(got_TNK, 5, axis=0)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float_caches_have_no_scales_and_round_to_nearest(dtype):
    cache = new_cache((2, 3, 4, HEADS, HEAD_DIM), jnp.dtype(dtype))
    assert (cache.k_scale_LPSN, cache.v_scale_LPSN) == (None, None)
    coded = encode(jnp.asarray(vectors(0)), jnp.dtype(dtype))
    np.testing.assert_array_equal(np.asarray(coded.x_TNK), vectors(0).astype(coded.x_TNK.dtype))


def test_dequantise_multiplies_each_vector_by_its_own_scale():
    rng = np.random.default_rng(0)
    code_LPSNK = rng.integers(-127, 128, (2, 2, 3, 4, 5)).astype(np.int8)
    scale_LPSN = (2.0 ** rng.integers(-3, 4, (2, 2, 3, 4))).astype(np.float32)
    scales = jnp.asarray(scale_LPSN, jnp.bfloat16), jnp.asarray(2 * scale_LPSN, jnp.bfloat16)
    held = jnp.asarray(code_LPSNK ^ np.int8(-128))
    k, v, *no_scales = dequantise(KvCache(held, held, *scales))
    np.testing.assert_array_equal(k, code_LPSNK * scale_LPSN[..., None])
    np.testing.assert_array_equal(v, 2.0 * code_LPSNK * scale_LPSN[..., None])
    assert no_scales == [None, None]
