"""Paged attention against its oracle, and the size of what it compiles to."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr
from jax.sharding import AxisType, PartitionSpec

from albireo_jax.ops.attention_loop import loop_attention
from albireo_jax.ops.attention_ref import reference_attention
from albireo_jax.ops.kv_cache import KvCache, dequantise, new_cache
from albireo_jax.ops.kv_write import TokenPages, write_kv
from tests.labs.attention_lab import Shape, random_batch, random_counts

SCALE = 0.3
_PAGES, _SCALES = PartitionSpec(None, None, None, "tp", None), PartitionSpec(None, None, None, "tp")
CACHE_SPECS = KvCache(_PAGES, _PAGES, _SCALES, _SCALES)


@partial(jax.jit, static_argnames=("sliding_window",))
def attend(arrays, layer, rows, *, sliding_window):
    return loop_attention(*arrays, layer=layer, scale=SCALE, sliding_window=sliding_window, **rows)


@partial(jax.jit, static_argnames=("sliding_window",))
def expect(arrays, layer, rows, *, sliding_window):
    return reference_attention(*arrays, layer=layer, scale=SCALE, sliding_window=sliding_window, **rows)


def check(arrays, rows, *, sliding_window=None, tolerance=2e-6):
    got = attend(arrays, 1, rows, sliding_window=sliding_window)
    want = expect(arrays, 1, rows, sliding_window=sliding_window)
    assert np.isfinite(np.asarray(want, np.float32)).all()
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(want, np.float32), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("sliding_window", [None, 1, 7, 70, 1000])
def test_equals_reference_on_ragged_steps(sliding_window):
    shape = Shape(tokens=75, rows=6)
    for seed in range(12):
        arrays, rows = random_batch(seed, shape, counts=random_counts(seed, shape))
        check(arrays, rows, sliding_window=sliding_window)


@pytest.mark.parametrize("sliding_window", [None, 7])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_equals_reference_on_dequantised_pages(dtype, sliding_window):
    shape = Shape(tokens=75, rows=6, dtype=dtype)
    for seed in range(6):
        (q_TNGK, cache), rows = random_batch(seed, shape, counts=random_counts(seed, shape))
        got = attend((q_TNGK, cache), 1, rows, sliding_window=sliding_window)
        want = expect((q_TNGK, dequantise(cache)), 1, rows, sliding_window=sliding_window)
        np.testing.assert_allclose(got, want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("sliding_window", [None, 70])
def test_equals_reference_on_decode_steps(sliding_window):
    shape = Shape(tokens=9, rows=9)
    for seed in range(4):
        arrays, rows = random_batch(seed, shape, counts=[1, 1, 0, 1, 1, 1, 1][: 7 - seed])
        check(arrays, rows, sliding_window=sliding_window)


@pytest.mark.parametrize(
    ("dtype", "group", "tolerance"),
    [
        ("float32", 1, 1e-5),
        ("float32", 3, 1e-5),
        ("bfloat16", 3, 2e-2),
        ("int8", 2, 1e-5),
        ("uint8", 1, 1e-5),
    ],
)
def test_equals_reference_over_many_trips(dtype, group, tolerance):
    shape = Shape(
        tokens=96, rows=40, columns=9, page_size=16, heads=4, head_dim=128, group=group, dtype=dtype
    )
    arrays, rows = random_batch(0, shape, counts=[1] * 18 + [2] * 19 + [37])
    check(arrays, rows, tolerance=tolerance)


def test_one_long_context_among_short_ones():
    shape = Shape(tokens=12, rows=12, columns=300)
    arrays, rows = random_batch(0, shape, counts=[1] * 12)
    contexts = jnp.asarray([3, 1, 2, 1200, *range(60, 68)], jnp.int32)
    rows["context_R"] = jnp.minimum(rows["context_R"], contexts)
    check(arrays, rows)


def test_pages_larger_than_a_block():
    shape = Shape(tokens=20, rows=3, page_size=128, columns=3)
    arrays, rows = random_batch(0, shape, counts=[15, 1])
    check(arrays, rows, sliding_window=9)


def test_padding_tokens_get_zeros():
    shape = Shape(tokens=20, rows=4)
    arrays, rows = random_batch(0, shape, counts=[3, 0, 4])
    out = np.asarray(attend(arrays, 0, rows, sliding_window=None))
    assert (out[7:] == 0).all()
    assert (out[:7] != 0).all()


def test_a_step_of_padding_only_gives_zeros():
    arrays, rows = random_batch(0, Shape(tokens=20, rows=4), counts=[])
    assert not np.asarray(attend(arrays, 0, rows, sliding_window=None)).any()


def test_a_prompt_in_chunks_equals_the_prompt_at_once():
    shape = Shape(tokens=64, rows=1)
    (q_TNGK, cache), rows = random_batch(3, shape, counts=[50])
    rows = {**rows, "context_R": jnp.asarray([50])}
    whole = attend([q_TNGK, cache], 0, rows, sliding_window=None)
    first, last = 0, 0
    for count in (13, 1, 33, 3):
        first, last = last, last + count
        chunk = {**rows, "row_start_R1": jnp.asarray([0, count]), "context_R": jnp.asarray([last])}
        q_chunk = jnp.zeros_like(q_TNGK).at[:count].set(q_TNGK[first:last])
        got = attend([q_chunk, cache], 0, chunk, sliding_window=None)
        np.testing.assert_allclose(got[:count], whole[first:last], atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("counts", [[1, 1, 1], [11, 1, 5]])
def test_equal_inside_shard_map(counts, dtype):
    shape = Shape(tokens=3 if max(counts) == 1 else 20, rows=3, dtype=dtype)
    arrays, rows = random_batch(0, shape, counts=counts)
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Auto,))
    heads = PartitionSpec(None, "tp")

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=((heads, CACHE_SPECS), PartitionSpec(), PartitionSpec()),
        out_specs=heads,
    )
    def sharded(arrays, layer, rows):
        return attend(arrays, layer, rows, sliding_window=7)

    got = sharded(arrays, jnp.int32(1), rows)
    want = attend(arrays, 1, rows, sliding_window=7)
    np.testing.assert_allclose(got, want, atol=1e-6)


def intermediate_sizes(jaxpr):
    """Elements of every value that a program computes, inside its loops too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: isinstance(leaf, ClosedJaxpr)
        ):
            if isinstance(parameter, ClosedJaxpr):
                yield from intermediate_sizes(parameter.jaxpr)


@pytest.mark.parametrize(("tokens", "rows"), [(512, 32), (64, 64)])
def test_contexts_are_gathered_per_tile_and_block(tokens, rows):
    shape = Shape(tokens=tokens, rows=rows, columns=128, page_size=16, heads=8, head_dim=64, group=1)
    arrays, step = abstract_step(shape, num_pages=5000)
    jaxpr = jax.make_jaxpr(partial(attend, sliding_window=None))(arrays, jnp.int32(1), step)
    one_block_per_token = tokens * 64 * shape.heads * shape.head_dim
    assert max(intermediate_sizes(jaxpr.jaxpr)) <= one_block_per_token // 4


def abstract_step(shape, *, num_pages):
    """Shapes of a step, without arrays."""
    cache_shape = (shape.layers, num_pages, shape.page_size, shape.heads, shape.head_dim)
    q_dtype = jnp.float32 if shape.is_quantised else shape.dtype
    arrays = (
        jax.ShapeDtypeStruct((shape.tokens, shape.heads, shape.group, shape.head_dim), q_dtype),
        jax.eval_shape(lambda: new_cache(cache_shape, jnp.dtype(shape.dtype))),
    )
    rows = {
        "row_start_R1": jax.ShapeDtypeStruct((shape.rows + 1,), jnp.int32),
        "context_R": jax.ShapeDtypeStruct((shape.rows,), jnp.int32),
        "page_table_RM": jax.ShapeDtypeStruct((shape.rows, shape.columns), jnp.int32),
    }
    return arrays, rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint8"])
def test_a_layer_loop_leaves_the_pool_in_place(dtype, bfloat16_is_in_place):
    if dtype != "float32" and not bfloat16_is_in_place:
        pytest.skip("this jax converts whole bfloat16 arrays on the CPU, the scales of one-byte pages too")
    shape = Shape(tokens=32, rows=32, page_size=16, heads=8, head_dim=64, dtype=dtype)

    @partial(jax.jit, donate_argnums=0)
    def step(cache, q_TNGK, pages, rows):
        def layer(carry, layer):
            cache, q_TNGK = carry
            cache = write_kv(cache, k_TNK=q_TNGK[:, :, 0], v_TNK=q_TNGK[:, :, 1], layer=layer, pages=pages)
            return (cache, attend([q_TNGK, cache], layer, rows, sliding_window=None)), None

        return jax.lax.scan(layer, (cache, q_TNGK), jnp.arange(shape.layers))[0]

    def memory(num_pages):
        (q_TNGK, cache), rows = abstract_step(shape, num_pages=num_pages)
        place = jax.ShapeDtypeStruct((shape.tokens,), jnp.int32)
        return step.lower(cache, q_TNGK, TokenPages(place, place), rows).compile().memory_analysis()

    small, large = memory(100), memory(10_000)
    pool_elements = 2 * shape.layers * 10_000 * shape.page_size * shape.heads * shape.head_dim
    assert large.temp_size_in_bytes == small.temp_size_in_bytes
    assert large.temp_size_in_bytes < 16 * 2**20
    assert large.alias_size_in_bytes >= pool_elements * jnp.dtype(dtype).itemsize
