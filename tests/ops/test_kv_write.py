"""Writing keys and values into pages: the right entries, and nothing else, without a copy of the pool."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from albireo_jax.core.plan import NULL_PAGE
from albireo_jax.ops.kv_cache import KvCache, encode, new_cache
from albireo_jax.ops.kv_write import token_pages, write_kv

LAYERS, PAGES, PAGE_SIZE, HEADS, HEAD_DIM = 3, 12, 4, 2, 8
DTYPES = ["float32", "bfloat16", "int8", "uint8"]


def test_token_pages_follow_the_page_table():
    table_RM = jnp.asarray([[5, 2, 9], [7, 1, 0]], jnp.int32)
    row_T = jnp.asarray([0, 0, 0, 1, 1, 2, -1], jnp.int32)
    position_T = jnp.asarray([3, 4, 11, 0, 7, 0, 1], jnp.int32)
    pages = token_pages(table_RM, row_T, position_T, page_size=4)
    assert pages.page_T.tolist() == [5, 2, 9, 7, 1, NULL_PAGE, NULL_PAGE]
    assert pages.offset_T.tolist() == [3, 0, 3, 0, 3, 0, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_one_layer_at_the_tokens_places_only(dtype):
    rng = np.random.default_rng(0)
    shape = (LAYERS, PAGES, PAGE_SIZE, HEADS, HEAD_DIM)
    before = jax.tree.map(
        lambda zeros: jnp.asarray(rng.integers(1, 99, zeros.shape), zeros.dtype),
        new_cache(shape, jnp.dtype(dtype)),
    )
    new = [jnp.asarray(rng.standard_normal((6, HEADS, HEAD_DIM)), "float32") for _ in range(2)]
    table_RM = jnp.asarray(1 + rng.permutation(PAGES - 1)[:8].reshape(2, 4), jnp.int32)
    row_T = jnp.asarray([0, 0, 0, 1, 2, 2], jnp.int32)  # the last two are padding
    position_T = jnp.asarray([2, 3, 4, 13, 0, 1], jnp.int32)
    pages = token_pages(table_RM, row_T, position_T, page_size=PAGE_SIZE)
    after = write_kv(before, k_TNK=new[0], v_TNK=new[1], layer=1, pages=pages)
    coded = [encode(x_TNK, jnp.dtype(dtype)) for x_TNK in new]
    written = KvCache(*(x.x_TNK for x in coded), *(x.scale_TN for x in coded))
    for old, tokens, cache in zip(*map(jax.tree.leaves, (before, written, after)), strict=True):
        want = np.array(old)
        for token in range(4):
            page = table_RM[row_T[token], position_T[token] // PAGE_SIZE]
            want[1, page, position_T[token] % PAGE_SIZE] = np.asarray(tokens[token])
        np.testing.assert_array_equal(np.asarray(cache)[:, 1:], want[:, 1:])
        np.testing.assert_array_equal(np.asarray(cache)[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_in_the_carry_of_a_layer_loop(dtype, bfloat16_is_in_place):
    if dtype != "float32" and not bfloat16_is_in_place:
        pytest.skip("this jax converts whole bfloat16 arrays on the CPU, the scales of one-byte pages too")

    @partial(jax.jit, donate_argnums=0)
    def write_all(cache, k_TNK, v_TNK, pages):
        def layer(cache, layer):
            return write_kv(cache, k_TNK=k_TNK, v_TNK=v_TNK, layer=layer, pages=pages), None

        return jax.lax.scan(layer, cache, jnp.arange(LAYERS))[0]

    shape = LAYERS, 4000, PAGE_SIZE, HEADS, HEAD_DIM
    cache = jax.eval_shape(lambda: new_cache(shape, jnp.dtype(dtype)))
    new = jax.ShapeDtypeStruct((6, HEADS, HEAD_DIM), "float32")
    place = jax.ShapeDtypeStruct((6,), jnp.int32)
    pages = token_pages(
        jnp.ones((2, 4), jnp.int32), jnp.zeros(6, jnp.int32), jnp.zeros(6, jnp.int32), page_size=4
    )
    pages = jax.tree.map(lambda _: place, pages)
    memory = write_all.lower(cache, new, new, pages).compile().memory_analysis()
    pool_bytes = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes // 100
