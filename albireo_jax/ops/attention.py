"""Causal grouped-query attention over a paged cache, for packed decode rows and prompt chunks.

Queries are cut into tiles of at most Q queries of one row, so that a row's context is gathered once
per tile and not once per token. With Q = 4, rows of 6, 1 and 3 queries and two padding tokens::

    token   0 1 2 3 4 5 6 7 8 9 - -
    row     0 0 0 0 0 0 1 2 2 2
    tile    [--0--] [1] 2 [-3-]          then padding tiles up to T/Q + R

All tiles walk over their contexts in blocks of B cached tokens at once, each from the first block
that its first query sees; a running maximum and sum make the softmax exact (online softmax)::

    context of tile 0   |=block 0=|=block 1=|=block 2=|
    context of tile 1   |=block 0=|=block 1=|=block 2=|
    context of tile 2   |=block 0=|
    context of tile 3   |=block 0=|=bl
                         trip 0    trip 1    trip 2       the longest context ends the loop

A decode step (T = R by convention: at most one token per row) has tiles of one query.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

_QUERIES_PER_TILE = 16
_BLOCK_TOKENS = 64
_MASKED = -1e30
"""Score of what a query does not see: finite, so that a tile that sees nothing yields no NaN."""


class _Tiles(NamedTuple):
    """Queries of a step, in tiles (axis I) of at most Q queries (axis Q) of one row."""

    token_IQ: Int32[Array, "I Q"]
    position_IQ: Int32[Array, "I Q"]
    is_real_IQ: Bool[Array, "I Q"]
    row_I: Int32[Array, " I"]
    tile_T: Int32[Array, " T"]
    query_T: Int32[Array, " T"]


class _Softmax(NamedTuple):
    """Online softmax of the blocks seen so far: maximum, sum, and unnormalised output."""

    max_ING: Float[Array, "I N GQ"]
    sum_ING: Float[Array, "I N GQ"]
    out_INGK: Float[Array, "I N GQ K"]


def paged_attention(
    q_TNGK: Float[Array, "T N G K"],
    k_LPSNK: Float[Array, "L P S N K"],
    v_LPSNK: Float[Array, "L P S N K"],
    *,
    layer: int | Int32[Array, ""],
    row_start_R1: Int32[Array, " R1"],
    context_R: Int32[Array, " R"],
    page_table_RM: Int32[Array, "R M"],
    scale: float,
    sliding_window: int | None,
) -> Float[Array, "T N G K"]:
    """Attention of T packed queries over one layer of the paged cache, which holds their own keys too.

    Row r owns queries row_start[r] … row_start[r+1]-1, the last ones of its context[r] tokens, whose
    pages are page_table[r]. The query at position p sees the cache entries c with c <= p, and
    c > p - sliding_window where that is set. Scores are float32. Padding tokens, after the last row,
    get zeros. T == R promises that no row has more than one query.
    """
    page_size = k_LPSNK.shape[2]
    num_tokens, num_heads, group, head_dim = q_TNGK.shape
    num_queries = 1 if num_tokens == context_R.shape[0] else _QUERIES_PER_TILE
    tiles = _tile(row_start_R1, context_R, num_tokens=num_tokens, num_queries=num_queries)
    num_tiles = tiles.row_I.shape[0]
    block_pages = max(1, _BLOCK_TOKENS // page_size)
    block_tokens = block_pages * page_size

    q_IQNGK = q_TNGK.at[tiles.token_IQ].get(mode="clip").astype(jnp.float32) * scale
    q_INgK = q_IQNGK.transpose(0, 2, 1, 3, 4).reshape(num_tiles, num_heads, num_queries * group, head_dim)
    table_IM = page_table_RM[tiles.row_I]
    low_IQ = jnp.zeros_like(tiles.position_IQ)
    if sliding_window is not None:
        low_IQ = jnp.maximum(tiles.position_IQ - sliding_window + 1, 0)
    first_block_I = low_IQ[:, 0] // block_tokens
    end_I = jnp.max(jnp.where(tiles.is_real_IQ, tiles.position_IQ + 1, 0), axis=1)
    num_blocks = jnp.max(-(-end_I // block_tokens) - first_block_I)

    def attend_block(trip: Int32[Array, ""], state: _Softmax) -> _Softmax:
        block_I = first_block_I + trip
        column_IJ = block_I[:, None] * block_pages + jnp.arange(block_pages)[None, :]
        page_IJ = jnp.take_along_axis(table_IM, column_IJ, axis=1, mode="clip")
        shape_IBNK = (num_tiles, block_tokens, num_heads, head_dim)
        k_IBNK = k_LPSNK[layer, page_IJ].reshape(shape_IBNK).astype(jnp.float32)
        v_IBNK = v_LPSNK[layer, page_IJ].reshape(shape_IBNK).astype(jnp.float32)
        cached_IB = block_I[:, None] * block_tokens + jnp.arange(block_tokens)[None, :]
        v_IBNK = jnp.where((cached_IB < end_I[:, None])[:, :, None, None], v_IBNK, 0.0)
        seen_IQB = (cached_IB[:, None, :] <= tiles.position_IQ[:, :, None]) & (
            cached_IB[:, None, :] >= low_IQ[:, :, None]
        )
        seen_I1gB = jnp.repeat(seen_IQB, group, axis=1)[:, None]
        return _accumulate(state, q_INgK, k_IBNK, v_IBNK, seen_I1gB)

    start = _Softmax(
        jnp.full((num_tiles, num_heads, num_queries * group), _MASKED, jnp.float32),
        jnp.zeros((num_tiles, num_heads, num_queries * group), jnp.float32),
        jnp.zeros(q_INgK.shape, jnp.float32),
    )
    state = jax.lax.fori_loop(0, num_blocks, attend_block, start)
    o_INgK = state.out_INGK / jnp.maximum(state.sum_ING, jnp.finfo(jnp.float32).tiny)[..., None]
    o_INQGK = o_INgK.reshape(num_tiles, num_heads, num_queries, group, head_dim)
    o_TNGK = o_INQGK[tiles.tile_T, :, tiles.query_T]
    is_real_T = jnp.arange(num_tokens) < row_start_R1[-1]
    return jnp.where(is_real_T[:, None, None, None], o_TNGK, 0.0).astype(q_TNGK.dtype)


def _tile(
    row_start_R1: Int32[Array, " R1"], context_R: Int32[Array, " R"], *, num_tokens: int, num_queries: int
) -> _Tiles:
    """Cut the rows into tiles; with one query per tile, tile r is row r."""
    num_rows = context_R.shape[0]
    num_tiles = num_rows if num_queries == 1 else num_tokens // num_queries + num_rows
    count_R = row_start_R1[1:] - row_start_R1[:-1]
    tiles_R = (count_R + num_queries - 1) // num_queries
    end_R = jnp.arange(1, num_rows + 1) if num_queries == 1 else jnp.cumsum(tiles_R)
    first_R = jnp.arange(num_rows) if num_queries == 1 else end_R - tiles_R
    row_I = jnp.searchsorted(end_R, jnp.arange(num_tiles), side="right").astype(jnp.int32)
    row_I = jnp.minimum(row_I, num_rows - 1)
    index_IQ = (jnp.arange(num_tiles) - first_R[row_I])[:, None] * num_queries + jnp.arange(num_queries)[
        None, :
    ]
    is_real_IQ = index_IQ < count_R[row_I][:, None]
    token_T = jnp.arange(num_tokens)
    row_T = jnp.minimum(jnp.searchsorted(row_start_R1[1:], token_T, side="right"), num_rows - 1)
    index_T = token_T - row_start_R1[row_T]
    return _Tiles(
        token_IQ=row_start_R1[row_I][:, None] + index_IQ,
        position_IQ=(context_R - count_R)[row_I][:, None] + index_IQ,
        is_real_IQ=is_real_IQ,
        row_I=row_I,
        tile_T=first_R[row_T] + index_T // num_queries,
        query_T=index_T % num_queries,
    )


def _accumulate(
    state: _Softmax,
    q_INgK: Float[Array, "I N GQ K"],
    k_IBNK: Float[Array, "I B N K"],
    v_IBNK: Float[Array, "I B N K"],
    seen_I1gB: Bool[Array, "I 1 GQ B"],
) -> _Softmax:
    """The online softmax with one more block of keys and values per tile."""
    score_INgB = jnp.einsum("INgK,IBNK->INgB", q_INgK, k_IBNK)
    seen_INgB = jnp.broadcast_to(seen_I1gB, score_INgB.shape)
    score_INgB = jnp.where(seen_INgB, score_INgB, _MASKED)
    max_INg = jnp.maximum(state.max_ING, score_INgB.max(axis=-1))
    weight_INgB = jnp.where(seen_INgB, jnp.exp(score_INgB - max_INg[..., None]), 0.0)
    fade_INg = jnp.exp(state.max_ING - max_INg)
    out_INgK = jnp.einsum("INgB,IBNK->INgK", weight_INgB, v_IBNK)
    return _Softmax(
        max_INg,
        state.sum_ING * fade_INg + weight_INgB.sum(axis=-1),
        state.out_INGK * fade_INg[..., None] + out_INgK,
    )
