"""The paged cache as arrays: keys and values in a float dtype, or as codes of one byte and scales.

A quantised vector of K numbers, the key or value of one token and head, is kept as its quotients by one
scale of its own, so that neither other heads nor other tokens change what is read back::

    codes of x / scale    scale = max |x| / largest code, rounded up to bfloat16: no quotient saturates

A code of int8 is held with its sign bit turned, which makes it the integer plus 128 without a sign: kernels
make a number of 16 bits of it by placing it beside a constant.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

FP8_BITS = jnp.dtype(jnp.uint8)
"""Dtype of pages of float8_e4m3fn, held as bits: XLA's CPU compiler writes bytes in place, not float8."""

_INT8 = jnp.dtype(jnp.int8)
_LARGEST = {_INT8: 127.0, FP8_BITS: 448.0}
"""The largest code of each quantised dtype."""

KV_KINDS = {jnp.dtype(jnp.bfloat16): 0, _INT8: 1, FP8_BITS: 2}
"""The number by which CUDA kernels know each dtype of pages that they take."""

_SIGN = np.int8(-128)
"""The bit of an int8 that pages hold turned."""

_SMALLEST_PEAK = 2.0**-100
"""Stands for the peak of vectors closer to zero, which are zero then: the scale is a normal number."""

_LARGEST_BFLOAT16_BITS = 0x7FFF0000
"""The largest bits of a float32 that is a bfloat16 too, but for its sign; a NaN."""


class KvCache(NamedTuple):
    """Keys and values of all layers in P pages of S tokens; page 0 is the null page.

    Pages are float32, bfloat16, int8 or `FP8_BITS`; the last two have scales, the others None.
    """

    k_LPSNK: Real[Array, "L P S N K"]
    v_LPSNK: Real[Array, "L P S N K"]
    k_scale_LPSN: Float[Array, "L P S N"] | None = None
    v_scale_LPSN: Float[Array, "L P S N"] | None = None


class CodedKv(NamedTuple):
    """Vectors as pages of one dtype hold them; scales where these are quantised."""

    x_TNK: Real[Array, "T N K"]
    scale_TN: Float[Array, "T N"] | None


def new_cache(shape: tuple[int, int, int, int, int], dtype: jnp.dtype) -> KvCache:
    """A zeroed cache of shape (L, P, S, N, K); every array has a buffer of its own, to be donated."""
    cache = KvCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    if dtype not in _LARGEST:
        return cache
    scales = (jnp.zeros(shape[:-1], jnp.bfloat16) for _ in range(2))
    return KvCache(cache.k_LPSNK, cache.v_LPSNK, *scales)


def encode(x_TNK: Float[Array, "T N K"], dtype: jnp.dtype) -> CodedKv:
    """Vectors in the dtype of a cache's pages, each rounded to it by the scale that is stored.

    A number x of a quantised vector becomes x' with |x - x'| <= scale / 2 in int8, and <= |x| / 16 in fp8
    unless |x| < scale / 64. A vector that is not finite is read back as not finite.
    """
    largest = _LARGEST.get(dtype)
    if largest is None:
        return CodedKv(x_TNK.astype(dtype), None)
    x_TNK = x_TNK.astype(jnp.float32)
    peak_TN = jnp.maximum(jnp.max(jnp.abs(x_TNK), axis=-1), _SMALLEST_PEAK)
    scale_TN = _up_to_bfloat16(peak_TN / largest)
    quotient_TNK = x_TNK / scale_TN[..., None]
    if dtype == FP8_BITS:
        code_TNK = jax.lax.bitcast_convert_type(quotient_TNK.astype(jnp.float8_e4m3fn), FP8_BITS)
    else:
        code_TNK = jnp.round(quotient_TNK).astype(dtype) ^ _SIGN
    return CodedKv(code_TNK, scale_TN.astype(jnp.bfloat16))


def decode(code: Real[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The float32 numbers of entries of pages, still to be multiplied by their scales if they have any."""
    if code.dtype == FP8_BITS:
        code = jax.lax.bitcast_convert_type(code, jnp.float8_e4m3fn)
    elif code.dtype == _INT8:
        code = code ^ _SIGN
    return code.astype(jnp.float32)


def dequantise(cache: KvCache) -> KvCache:
    """The whole cache in float32, without scales: for tests and tools, as it is a copy."""
    k_LPSNK, v_LPSNK = decode(cache.k_LPSNK), decode(cache.v_LPSNK)
    if cache.k_scale_LPSN is not None and cache.v_scale_LPSN is not None:
        k_LPSNK *= cache.k_scale_LPSN.astype(jnp.float32)[..., None]
        v_LPSNK *= cache.v_scale_LPSN.astype(jnp.float32)[..., None]
    return KvCache(k_LPSNK, v_LPSNK)


def _up_to_bfloat16(x_TN: Float[Array, "T N"]) -> Float[Array, "T N"]:
    """The least bfloat16 numbers not below positive ones, still in float32; a NaN stays one.

    On bits, because compilers take a conversion to bfloat16 and back for excess that may be left out. Bits of
    NaNs are bounded first: rounded up, those of a GPU's NaN, which are all ones, would be those of -0.
    """
    bits_TN = jnp.minimum(jax.lax.bitcast_convert_type(x_TN, jnp.int32), _LARGEST_BFLOAT16_BITS)
    return jax.lax.bitcast_convert_type((bits_TN + 0xFFFF) & ~0xFFFF, jnp.float32)
