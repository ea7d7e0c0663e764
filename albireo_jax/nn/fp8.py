"""Products of fp8 codes with fp8 codes: the rows are rounded to e4m3 too, each scaled by a power of two.

::

    x[t, i] ~ row code[t, i] * 2^a[t]           2^a[t]: the smallest power with all |x[t, i]| <= 448 * 2^a[t]
    y[t, o] = (sum over i of row code[t, i] * code[i, o]) * 2^a[t] * scale[o]

A code has a sign, four bits of exponent and three of mantissa: a scale only has to bring a row into range. A
power of two does that and rounds nothing:

- Codes are the same bits however a compiler divides, and depend on their row alone. All steps make them, with
  prompts and without, on all devices.
- A number has the same mantissa at any scale, unless it is below 2^-13 of the largest of its row. Where ranks
  share the inputs of a product, each scales its own part of a row, and they need not communicate. The numbers
  that its codes stand for differ from those of the whole row by less than 2^-17 of its largest number.

Rounding widens differences: where two programs sum in different orders, a number near the middle between two
codes may take the other one.
"""

from enum import StrEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

_LARGEST = 448.0  # of e4m3
_SCALE_OF_PEAK = (
    1.499 / _LARGEST
)  # below 3/2, where the nearest power of two changes: the peak becomes a code
_SMALLEST_PEAK = 2.0**-100  # of rows closer to zero, which are zero then


class ProductRows(StrEnum):
    """Form in which rows enter a product with codes.

    FLOATS are left as they are: only weights are rounded. ROUNDED are numbers that codes stand for, in the
    dtype of the rows, which any device multiplies. CODES are fp8 themselves, which GPUs of sm_89 and later
    multiply with codes twice as fast as bfloat16. ROUNDED and CODES give the same sums, but for their order.
    """

    FLOATS = "floats"
    ROUNDED = "rounded"
    CODES = "codes"


class CodedRows(NamedTuple):
    """Rows as e4m3 codes, and the power of two by which each row is multiplied."""

    code_TD: Float[Array, "T D"]
    scale_T: Float[Array, " T"]


def row_peaks(x_TD: Float[Array, "T D"]) -> Float[Array, " T"]:
    """The largest absolute number of each row."""
    return jnp.max(jnp.abs(x_TD.astype(jnp.float32)), axis=1)


def coded_rows(x_TD: Float[Array, "T D"], peak_T: Float[Array, " T"] | None = None) -> CodedRows:
    """The e4m3 codes nearest to each row, ties to even, scaled by its largest number.

    A row that is not finite has a code that is NaN. `peak_T` is `row_peaks` where that is known.
    """
    x32_TD = x_TD.astype(jnp.float32)
    peak_T = jnp.maximum(row_peaks(x_TD) if peak_T is None else peak_T, _SMALLEST_PEAK)
    scale_T = _power_of_two(peak_T * _SCALE_OF_PEAK)
    inverse_T = _power_of_two(1 / scale_T)  # a GPU's division is not exact
    return CodedRows((x32_TD * inverse_T[:, None]).astype(jnp.float8_e4m3fn), scale_T)


def fp8_product(
    x_TD: Float[Array, "T D"], w_DF: Real[Array, "D F"], *, scale_F: Float[Array, " F"], rows: ProductRows
) -> Float[Array, "T F"]:
    """Product of rows, rounded to codes, with a matrix of e4m3 codes, each of whose columns has a scale.

    Summed in float32, rounded to the dtype of the rows, scaled in float32 and rounded again: cuBLASLt writes
    half the bytes so. HIGHEST keeps it from its fast sums of about 14 bits. `rows` is not FLOATS.
    """
    precision = None
    if rows is ProductRows.CODES:
        # Without the barrier, XLA calculates a norm and its peak once more where it scales the product, and
        # sums in another order: near a power of two, codes and product would be scaled by different ones.
        code_TD, scale_T = coded_rows(x_TD, jax.lax.optimization_barrier(row_peaks(x_TD)))
        precision = jax.lax.Precision.HIGHEST
    else:
        code_TD, scale_T = coded_rows(x_TD)
        code_TD, w_DF = code_TD.astype(x_TD.dtype), w_DF.astype(x_TD.dtype)
    y_TF = jnp.dot(code_TD, w_DF, precision=precision, preferred_element_type=x_TD.dtype)
    return (y_TF.astype(jnp.float32) * scale_T[:, None] * scale_F[None]).astype(x_TD.dtype)


def _power_of_two(x: Float[Array, " T"]) -> Float[Array, " T"]:
    """The nearest power of two: without bits of mantissa."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=0)
