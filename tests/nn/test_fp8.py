"""Products of codes with codes: against NumPy's, and codes that depend on nothing but their row."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import Array
from numpy.typing import NDArray

from albireo_jax.core.config import Quantization
from albireo_jax.nn.fp8 import ProductRows, coded_rows, fp8_product
from albireo_jax.nn.layers import gated_mlp, linear
from albireo_jax.nn.quantise import CodedWeight, encode

DTYPES = (jnp.float32, jnp.bfloat16)
Product = Callable[..., Array]


def rows(dtype: jnp.dtype, *, spread: float = 3.0) -> jax.Array:
    """Rows of numbers of very different sizes, one of them of zeros, one of a single number."""
    rng = np.random.default_rng(1)
    x_TD = (
        rng.normal(size=(9, 256))
        * np.exp(rng.normal(size=(9, 256)) * spread)
        * 10.0 ** rng.integers(-9, 9, (9, 1))
    )
    x_TD[3] = 0.0
    x_TD[4] = np.eye(256)[7] * -0.3
    return jnp.asarray(x_TD, jnp.float32).astype(dtype)


def numpy_codes(x_TD: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Codes of rows as float64, and their scales, by logarithms and powers."""
    peak_T = np.maximum(np.abs(x_TD).max(axis=1), 2.0**-100)
    scale_T = 2.0 ** np.ceil(np.log2(peak_T / 448.2))
    code_TD = np.clip(x_TD / scale_T[:, None], -448, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return code_TD.astype(np.float64), scale_T


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_those_of_the_definition(dtype: jnp.dtype) -> None:
    x_TD = rows(dtype)
    found = jax.jit(coded_rows)(x_TD)
    code_TD, scale_T = numpy_codes(np.asarray(x_TD, np.float64))
    assert found.code_TD.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(np.asarray(found.scale_T, np.float64), scale_T)
    np.testing.assert_array_equal(np.asarray(found.code_TD, np.float64), code_TD)
    assert np.all(np.abs(code_TD).max(axis=1)[[0, 1, 2, 4]] >= 224)
    assert not code_TD[3].any()


def test_peaks_at_the_edge_of_the_range_take_the_smallest_scale() -> None:
    """A peak a little above 448 is that code; one clearly above it takes the next power."""
    peaks = np.array([224.0, 225.0, 447.0, 448.0, 448.1, 450.0, 2.0**-99, 2.0**-130, 3e38], np.float32)
    found = coded_rows(jnp.asarray(peaks)[:, None])
    scales = np.array([0.5, 1, 1, 1, 1, 2, 2.0**-107, 2.0**-108, 2.0**120])
    np.testing.assert_array_equal(np.asarray(found.scale_T), scales)
    assert np.isfinite(np.asarray(found.code_TD, np.float32)).all()


def assert_product(
    product: Product, dtype: jnp.dtype, form: ProductRows, shape: tuple[int, int] = (256, 48)
) -> None:
    """In float32 but for the order of sums; in bfloat16 the sum and its multiple are rounded."""
    x_TD = rows(dtype)
    w = encode(jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32), Quantization.FP8)
    y_TF = jax.jit(product, static_argnames="rows")(x_TD, w.code, scale_F=w.scale, rows=form)
    code_TD, scale_T = numpy_codes(np.asarray(x_TD, np.float64))
    sum_TF = code_TD @ np.asarray(w.code, np.float64)
    wanted_TF = sum_TF * scale_T[:, None] * np.asarray(w.scale, np.float64)
    assert y_TF.dtype == dtype
    rounding = 2.01 * 2.0**-8 if dtype == jnp.bfloat16 else 0
    noise_TF = 1e-6 * (np.abs(code_TD) @ np.abs(np.asarray(w.code, np.float64)))
    bound_TF = noise_TF * scale_T[:, None] * np.asarray(w.scale, np.float64) + rounding * np.abs(wanted_TF)
    assert np.all(np.abs(np.asarray(y_TF, np.float64) - wanted_TF) <= bound_TF)


@pytest.mark.parametrize("form", [ProductRows.ROUNDED, ProductRows.CODES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_the_sum_of_products_of_codes(dtype: jnp.dtype, form: ProductRows) -> None:
    assert_product(fp8_product, dtype, form)


def weights_transposed(x_TD: Array, w_DF: Array, *, scale_F: Array, rows: ProductRows) -> Array:
    return fp8_product(x_TD, w_DF.T, scale_F=scale_F, rows=rows)


def another_columns_scale(x_TD: Array, w_DF: Array, *, scale_F: Array, rows: ProductRows) -> Array:
    return fp8_product(x_TD, w_DF, scale_F=jnp.roll(scale_F, 1), rows=rows)


def another_rows_scale(x_TD: Array, w_DF: Array, *, scale_F: Array, rows: ProductRows) -> Array:
    y_TF = fp8_product(x_TD, w_DF, scale_F=scale_F, rows=rows)
    scale_T = coded_rows(x_TD).scale_T
    return (y_TF * (jnp.roll(scale_T, 1) / scale_T)[:, None]).astype(y_TF.dtype)


def rows_as_they_are(x_TD: Array, w_DF: Array, *, scale_F: Array, rows: ProductRows) -> Array:
    return linear(x_TD, w_DF, scale_F=scale_F, rows=ProductRows.FLOATS)


@pytest.mark.parametrize("form", [ProductRows.ROUNDED, ProductRows.CODES])
@pytest.mark.parametrize(
    "fault", [weights_transposed, another_columns_scale, another_rows_scale, rows_as_they_are]
)
def test_a_fault_in_a_product_is_seen(fault: Product, form: ProductRows) -> None:
    """The matrix is square: transposed, it has the same shape."""
    for dtype in DTYPES:
        assert_product(fp8_product, dtype, form, (256, 256))
        with pytest.raises(AssertionError):
            assert_product(fault, dtype, form, (256, 256))


def test_rows_enter_products_with_codes_as_they_are_told() -> None:
    """Weights alone are rounded with FLOATS; both other forms round rows, and give the same numbers."""
    x_TD = jnp.asarray(np.random.default_rng(3).normal(size=(6, 128)), jnp.float32)
    w = encode(jnp.asarray(np.random.default_rng(4).normal(size=(128, 40)), jnp.float32), Quantization.FP8)
    products = {form: np.asarray(linear(x_TD, w.code, scale_F=w.scale, rows=form)) for form in ProductRows}
    exact = np.asarray(x_TD) @ (np.asarray(w.code, np.float32) * np.asarray(w.scale))
    np.testing.assert_allclose(products[ProductRows.FLOATS], exact, atol=1e-4)
    np.testing.assert_allclose(products[ProductRows.ROUNDED], products[ProductRows.CODES], atol=1e-4)
    changed = np.abs(products[ProductRows.CODES] - exact).max()
    assert 1e-2 < changed < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("form", [ProductRows.ROUNDED, ProductRows.CODES])
def test_both_products_of_a_feed_forward_round_their_rows(form: ProductRows) -> None:
    rng = np.random.default_rng(5)
    x_TD = rng.normal(size=(7, 64))
    up, down = rng.normal(size=(64, 2 * 96)), rng.normal(size=(96, 64))
    w_up, w_down = (encode(jnp.asarray(w, jnp.float32), Quantization.FP8) for w in (up, down))

    def product(x_TD: NDArray[np.float64], w: CodedWeight) -> NDArray[np.float64]:
        code_TD, scale_T = numpy_codes(x_TD)
        return code_TD @ np.asarray(w.code, np.float64) * scale_T[:, None] * np.asarray(w.scale, np.float64)

    gate_TF, up_TF = np.split(product(x_TD, w_up), 2, axis=1)
    wanted_TD = product(
        (gate_TF / (1 + np.exp(-gate_TF)) * up_TF).astype(np.float32).astype(np.float64), w_down
    )
    found_TD = gated_mlp(
        jnp.asarray(x_TD, jnp.float32),
        w_up.code.reshape(64, 2, 96),
        w_down.code,
        gate_up_scale_2F=w_up.scale.reshape(2, 96),
        down_scale_D=w_down.scale,
        rows=form,
    )
    np.testing.assert_allclose(found_TD, wanted_TD, rtol=0, atol=1e-5 * np.abs(wanted_TD).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_row_have_its_codes_but_for_its_smallest_numbers(dtype: jnp.dtype) -> None:
    """Ranks that share a row scale their own parts: codes depend on their number only so far."""
    x_TD = rows(dtype, spread=6.0)

    def rounded(ranks: int) -> NDArray[np.float64]:
        coded = [coded_rows(part) for part in jnp.split(x_TD, ranks, axis=1)]
        parts = [
            np.asarray(c.code_TD, np.float64) * np.asarray(c.scale_T, np.float64)[:, None] for c in coded
        ]
        return np.concatenate(parts, axis=1)

    whole_TD, size_TD = rounded(1), np.abs(np.asarray(x_TD, np.float64))
    peak_T = size_TD.max(axis=1, keepdims=True)
    for ranks in (2, 4, 8):
        difference_TD = np.abs(rounded(ranks) - whole_TD)
        assert not difference_TD[size_TD >= 2.0**-13 * peak_T].any()
        assert np.all(difference_TD <= 2.0**-17 * peak_T)
        assert difference_TD.any()


def test_a_row_depends_on_no_other_row() -> None:
    x_TD = rows(jnp.bfloat16)
    whole = coded_rows(x_TD)
    for row in range(len(x_TD)):
        alone = coded_rows(x_TD[row : row + 1])
        np.testing.assert_array_equal(np.asarray(alone.code_TD[0]), np.asarray(whole.code_TD[row]))
        np.testing.assert_array_equal(alone.scale_T[0], whole.scale_T[row])


@pytest.mark.parametrize("form", [ProductRows.ROUNDED, ProductRows.CODES])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_stays_so_and_harms_no_other_row(form: ProductRows, bad: float) -> None:
    x_TD = jnp.ones((3, 32)).at[1, 5].set(bad)
    w = encode(jnp.ones((32, 4)), Quantization.FP8)
    y_TF = np.asarray(jax.jit(fp8_product, static_argnames="rows")(x_TD, w.code, scale_F=w.scale, rows=form))
    assert not np.isfinite(y_TF[1]).any()
    np.testing.assert_allclose(y_TF[[0, 2]], 32, rtol=1e-6)
