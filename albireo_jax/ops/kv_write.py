"""Write the keys and values of a step into the pages of the cache, in place under donation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from albireo_jax.core.plan import NULL_PAGE
from albireo_jax.ops.kv_cache import KvCache, encode


class TokenPages(NamedTuple):
    """Page and offset in it of each token of a step."""

    page_T: Int32[Array, " T"]
    offset_T: Int32[Array, " T"]


def token_pages(
    page_table_RM: Int32[Array, "R M"],
    row_T: Int32[Array, " T"],
    position_T: Int32[Array, " T"],
    *,
    page_size: int,
) -> TokenPages:
    """Places of tokens' keys and values: the page that a row's table lists for each position.

    A padding token has a row outside 0 … R-1 and goes to the null page.
    """
    num_rows = page_table_RM.shape[0]
    column_T = position_T // page_size
    page_T = page_table_RM.at[row_T, column_T].get(mode="clip")
    is_real_T = (row_T >= 0) & (row_T < num_rows)
    return TokenPages(jnp.where(is_real_T, page_T, NULL_PAGE), position_T % page_size)


def write_kv(
    cache: KvCache,
    *,
    k_TNK: Float[Array, "T N K"],
    v_TNK: Float[Array, "T N K"],
    layer: int | Int32[Array, ""],
    pages: TokenPages,
) -> KvCache:
    """The cache with the step's tokens in one layer's pages, rounded as its dtype and scales want it.

    Under `jax.jit` with the cache donated, or in the carry of a loop, only the written entries move.
    """
    k, v = encode(k_TNK, cache.k_LPSNK.dtype), encode(v_TNK, cache.v_LPSNK.dtype)
    new = KvCache(k.x_TNK, v.x_TNK, k.scale_TN, v.scale_TN)

    def write(held: Array, written: Array) -> Array:
        return held.at[layer, pages.page_T, pages.offset_T].set(written)

    return jax.tree.map(write, cache, new)
