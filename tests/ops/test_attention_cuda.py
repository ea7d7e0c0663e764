"""The CUDA attention kernels, run on the CPU thread by thread, against the oracle of attention."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_lab import Shape, random_batch, random_counts
from cuda_lab import Order, launch_on_cpu, needs_compiler

from albireo_jax.core.errors import ModelError
from albireo_jax.ops import attention_cuda
from albireo_jax.ops.attention import paged_attention
from albireo_jax.ops.attention_cuda import check_shape
from albireo_jax.ops.attention_ref import reference_attention
from albireo_jax.ops.kv_cache import FP8_BITS, KvCache, decode, dequantise

SCALE = 0.3
LATE, EARLY = Order(0, is_eager=False), Order(1, is_eager=True)


def attend(shape, *, seed=0, counts=None, window=None, cap=None, launch):
    (q_TNGK, cache), rows = random_batch(seed, shape, counts=counts or random_counts(seed, shape))
    q_TNGK = q_TNGK.astype(jnp.bfloat16)
    options = {"layer": 1, "scale": SCALE, "sliding_window": window, "soft_cap": cap, **rows}
    got = paged_attention(q_TNGK, cache, **options, launch=launch)
    want = reference_attention(q_TNGK.astype(jnp.float32), dequantise(cache), **options)
    return np.asarray(got, np.float32), np.asarray(want)


def check(shape, *, order=LATE, edits=(), **how):
    got, want = attend(shape, launch=launch_on_cpu(order, edits=edits), **how)
    assert np.isfinite(want).all()
    np.testing.assert_allclose(got, want, atol=2e-2, rtol=2e-2)
    # Weights and results are rounded to 8 bits, and nothing else: far less on average.
    assert np.abs(got - want).mean() < 2e-3 * max(1.0, np.abs(want).mean())


@pytest.fixture
def long_pieces(monkeypatch):
    """One piece a tile, so that the ring goes round many times."""
    monkeypatch.setattr(attention_cuda, "_DECODE_BLOCKS", 1)
    monkeypatch.setattr(attention_cuda, "_CHUNK_BLOCKS", 1)


SMALL = Shape(tokens=75, rows=6, columns=13, page_size=16, group=4, head_dim=64, dtype="bfloat16")


@needs_compiler
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [None, 70])
def test_equals_reference_on_ragged_steps(seed, window):
    check(SMALL, seed=seed, window=window)


@needs_compiler
@pytest.mark.parametrize(
    ("fields", "how"),
    [
        ({"head_dim": 128, "dtype": "int8", "group": 1, "page_size": 4, "columns": 60}, {}),
        ({"head_dim": 80, "dtype": "uint8", "group": 5, "page_size": 32, "columns": 6}, {"cap": 2.0}),
        ({"head_dim": 8, "dtype": "bfloat16", "group": 3, "page_size": 1, "columns": 150}, {"window": 9}),
        ({"head_dim": 256, "dtype": "bfloat16", "group": 2, "page_size": 8, "heads": 1}, {}),
        ({"head_dim": 32, "dtype": "int8", "group": 20, "page_size": 16, "columns": 9}, {"window": 33}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if value else "plain",
)
def test_equals_reference_in_other_shapes(fields, how):
    check(Shape(tokens=39, rows=4, **fields), counts=[1, 30, 0, 7], **how)


@needs_compiler
@pytest.mark.usefixtures("long_pieces")
def test_equals_reference_where_a_context_is_one_piece():
    check(SMALL, counts=[1, 60, 1, 5])


@needs_compiler
def test_equals_reference_on_decode_steps():
    shape = Shape(tokens=7, rows=7, columns=20, page_size=16, group=4, head_dim=64, dtype="bfloat16")
    for seed in range(2):
        check(shape, seed=seed, counts=[1, 1, 0, 1, 1])


@needs_compiler
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_every_code_is_widened_exactly(dtype):
    """A query that sees one token has its value: with a scale of 1, what the 256 codes stand for."""
    codes = np.arange(256, dtype=np.uint8).reshape(1, 1, 1, 1, 256)
    codes[codes & 0x7F == 0x7F] = 0  # of an fp8: not a number
    shape = (1, 2, 1, 1, 256)
    pages = jnp.zeros(shape, dtype).at[:, 1].set(jnp.asarray(codes[:, 0].view(dtype)))
    ones = jnp.ones(shape[:-1], jnp.bfloat16)
    cache = KvCache(pages, pages, ones, ones)
    got = paged_attention(
        jnp.zeros((1, 1, 1, 256), jnp.bfloat16),
        cache,
        layer=0,
        scale=SCALE,
        sliding_window=None,
        soft_cap=None,
        row_start_R1=jnp.array([0, 1], jnp.int32),
        context_R=jnp.array([1], jnp.int32),
        page_table_RM=jnp.array([[1]], jnp.int32),
        launch=launch_on_cpu(LATE),
    )
    np.testing.assert_array_equal(np.asarray(got, np.float32).ravel(), decode(pages[0, 1].ravel()))


@needs_compiler
@pytest.mark.usefixtures("long_pieces")
def test_the_order_of_threads_and_copies_changes_nothing():
    counts = [1, 60, 1, 5]
    late, early = (attend(SMALL, counts=counts, launch=launch_on_cpu(order))[0] for order in (LATE, EARLY))
    np.testing.assert_array_equal(late, early)


@needs_compiler
@pytest.mark.usefixtures("long_pieces")
@pytest.mark.parametrize(
    ("right", "wrong", "order"),
    [
        ("cp_async_wait<RING - 2>();", "cp_async_wait<RING - 1>();", LATE),
        ("    sync_group();\n    keep_item", "    keep_item", EARLY),
        ("at <= query &&", "at < query &&", LATE),
        ("is_cached ? 16 : 0", "16", LATE),
        ("PAGE_SIZE < TOKENS ? PAGE_SIZE : TOKENS", "TOKENS", LATE),
        (
            "first + begin < end ? cached_vector(cache, first + begin) : cache.head",
            "cached_vector(cache, first)",
            LATE,
        ),
    ],
    ids=[
        "copies that are read too soon",
        "no barrier",
        "masked diagonal",
        "no zeros past the end",
        "a page that is longer than it is",
        "one page for a whole stage",
    ],
)
def test_a_fault_in_the_kernel_is_seen(right, wrong, order):
    with pytest.raises(AssertionError):
        check(SMALL, counts=[1, 60, 1, 5], order=order, edits=((right, wrong),))


def test_what_the_kernels_cannot_do_is_refused_by_name():
    bfloat16 = jnp.dtype(jnp.bfloat16)
    good = {"head_dim": 128, "group": 8, "q_dtype": bfloat16, "kv_dtype": bfloat16}
    check_shape(**good)
    check_shape(**(good | {"kv_dtype": FP8_BITS}))
    for wrong, said in (
        ({"q_dtype": jnp.dtype(jnp.float32)}, "not float32 with bfloat16"),
        ({"kv_dtype": jnp.dtype(jnp.float32)}, "not bfloat16 with float32"),
        ({"head_dim": 100}, "head_dim 100 must be a multiple of 8"),
        ({"head_dim": 72, "kv_dtype": FP8_BITS}, "head_dim 72 must be a multiple of 16"),
        ({"head_dim": 512}, "up to 256"),
        ({"group": 65}, "65 query heads per key/value head, more than the kernels' 64"),
        ({"group": 33, "head_dim": 256}, "more than the kernels' 32"),
    ):
        with pytest.raises(ModelError, match=said):
            check_shape(**(good | wrong))
