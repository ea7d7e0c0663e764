"""Causal grouped-query attention over a paged cache, for packed decode rows and prompt chunks.

Queries are cut into tiles of one row each, so that a row's context is gathered once per tile and not
once per token: rows with one query (decode) into tiles of one, the others (prompt chunks) into tiles
of up to Q queries. With Q = 4, rows of 6, 1 and 3 queries and two padding tokens::

    token    0 1 2 3 4 5 6 7 8 9 - -
    row      0 0 0 0 0 0 1 2 2 2
    chunks  [---0---|-1-] [--2--]        at most T/Q + R tiles, of which 3 are used
    decode              [0]              at most R tiles, of which 1 is used

The two kinds take turns. Tiles are worked off in groups of W; a group walks over its contexts in blocks
of B cached tokens, each tile from the first block that its first query sees. A running maximum and sum
make the softmax exact (online softmax), and both loops end as early as the step's rows allow, however
long the buffers are::

    context of tile 0   |==block 0==|==block 1==|==block 2==|
    context of tile 1   |==block 0==|==blo
    context of tile 2   |==block 0==|==block 1==|=
                           trip 0      trip 1      trip 2       the group's longest context ends it

Per trip, [W, B] tokens of keys and of values are gathered from their pages into small float32 buffers
that stay in a core's cache, where two batched matrix products read them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

_CHUNK_QUERIES = 32
"""Q: queries of a prompt chunk that share one walk over the context."""

_BLOCK_TOKENS = 64
"""B: cached tokens per tile and trip."""

_BLOCK_ELEMENTS = 2**19
"""Keys of all tiles of a group in one trip: 2 MB in float32."""

_MASKED = -1e30
"""Score of what a query does not see: finite, so that a tile that sees nothing yields no NaN."""


class _Layer(NamedTuple):
    """One layer of the cache, inside the arrays of all layers."""

    k_LPSNK: Float[Array, "L P S N K"]
    v_LPSNK: Float[Array, "L P S N K"]
    layer: int | Int32[Array, ""]


class _Rows(NamedTuple):
    """Where each row's queries are, how long its context is, and in which pages."""

    row_start_R1: Int32[Array, " R1"]
    context_R: Int32[Array, " R"]
    page_table_RM: Int32[Array, "R M"]


class _Tiles(NamedTuple):
    """Tiles (axis I) of Q queries of one row: the used ones first.

    An unused query has token T, which no array has, and position -1, which sees nothing.
    """

    token_IQ: Int32[Array, "I Q"]
    position_IQ: Int32[Array, "I Q"]
    page_table_IM: Int32[Array, "I M"]
    num_used: Int32[Array, ""]


class _Softmax(NamedTuple):
    """Online softmax over the blocks seen so far: maximum, sum, and the sum of weighted values.

    H = Q * G query vectors per tile and key/value head.
    """

    max_INH: Float[Array, "I N H"]
    sum_INH: Float[Array, "I N H"]
    out_INHK: Float[Array, "I N H K"]


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
    c > p - sliding_window where that is set. Scores and softmax are float32. Tokens after the last
    row's are padding and get zeros. T == R promises that no row has more than one query.
    """
    rows = _Rows(row_start_R1, context_R, page_table_RM)
    cache = _Layer(k_LPSNK, v_LPSNK, layer)
    num_tokens, num_rows = q_TNGK.shape[0], context_R.shape[0]
    count_R = row_start_R1[1:] - row_start_R1[:-1]
    is_decode_R = count_R == 1
    tiles = _cut(rows, is_decode_R.astype(jnp.int32), num_tiles=num_rows, queries=1, num_tokens=num_tokens)
    out_TNGK = jnp.zeros_like(q_TNGK)
    out_TNGK = _attend(q_TNGK, out_TNGK, tiles, cache=cache, scale=scale, window=sliding_window)
    if num_tokens == num_rows:
        return out_TNGK
    queries = min(_CHUNK_QUERIES, num_tokens)
    tiles_R = jnp.where(is_decode_R, 0, (count_R + queries - 1) // queries)
    num_tiles = num_tokens // queries + min(num_rows, num_tokens // 2)
    tiles = _cut(rows, tiles_R, num_tiles=num_tiles, queries=queries, num_tokens=num_tokens)
    return _attend(q_TNGK, out_TNGK, tiles, cache=cache, scale=scale, window=sliding_window)


def _cut(
    rows: _Rows, tiles_R: Int32[Array, " R"], *, num_tiles: int, queries: int, num_tokens: int
) -> _Tiles:
    """The first `tiles_R` tiles of `queries` queries of each row, row after row."""
    ends_R = jnp.cumsum(tiles_R, dtype=jnp.int32)
    tile_I = jnp.arange(num_tiles, dtype=jnp.int32)
    # Comparing with all rows is one small fused loop; an unused tile falls on the last row.
    row_I = jnp.sum(tile_I[:, None] >= ends_R[None, :-1], axis=1, dtype=jnp.int32)
    first_I = rows.row_start_R1[row_I] + (tile_I - (ends_R - tiles_R)[row_I]) * queries
    token_IQ = first_I[:, None] + jnp.arange(queries, dtype=jnp.int32)[None, :]
    end_I = rows.row_start_R1[row_I + 1]
    is_used_IQ = (token_IQ < end_I[:, None]) & (tile_I < ends_R[-1])[:, None]
    position_IQ = rows.context_R[row_I][:, None] - (end_I[:, None] - token_IQ)
    return _Tiles(
        token_IQ=jnp.where(is_used_IQ, token_IQ, num_tokens),
        position_IQ=jnp.where(is_used_IQ, position_IQ, -1),
        page_table_IM=rows.page_table_RM[row_I],
        num_used=ends_R[-1],
    )


def _attend(
    q_TNGK: Float[Array, "T N G K"],
    out_TNGK: Float[Array, "T N G K"],
    tiles: _Tiles,
    *,
    cache: _Layer,
    scale: float,
    window: int | None,
) -> Float[Array, "T N G K"]:
    """`out_TNGK` with the attention of the tiles' queries in their places."""
    num_tiles, queries = tiles.token_IQ.shape
    _, num_heads, group, head_dim = q_TNGK.shape
    width = min(num_tiles, max(1, _BLOCK_ELEMENTS // (_BLOCK_TOKENS * num_heads * head_dim)))
    padding = -num_tiles % width
    token_IQ = jnp.pad(tiles.token_IQ, ((0, padding), (0, 0)), constant_values=q_TNGK.shape[0])
    position_IQ = jnp.pad(tiles.position_IQ, ((0, padding), (0, 0)), constant_values=-1)
    page_table_IM = jnp.pad(tiles.page_table_IM, ((0, padding), (0, 0)))

    def attend_group(index: Int32[Array, ""], out_TNGK: Float[Array, "T N G K"]) -> Array:
        token_WQ, position_WQ, table_WM = (
            jax.lax.dynamic_slice_in_dim(array, index * width, width)
            for array in (token_IQ, position_IQ, page_table_IM)
        )
        q_WQNGK = q_TNGK.at[token_WQ].get(mode="fill", fill_value=0)
        q_WNHK = q_WQNGK.transpose(0, 2, 1, 3, 4).reshape(width, num_heads, queries * group, head_dim)
        o_WNHK = _attend_group(
            q_WNHK.astype(jnp.float32), position_WQ, table_WM, cache=cache, scale=scale, window=window
        )
        o_WNQGK = o_WNHK.reshape(width, num_heads, queries, group, head_dim)
        o_WQNGK = o_WNQGK.transpose(0, 2, 1, 3, 4).astype(out_TNGK.dtype)
        return out_TNGK.at[token_WQ].set(o_WQNGK, mode="drop")

    num_groups = (tiles.num_used + width - 1) // width
    return jax.lax.fori_loop(0, num_groups, attend_group, out_TNGK)


def _attend_group(
    q_INHK: Float[Array, "I N H K"],
    position_IQ: Int32[Array, "I Q"],
    page_table_IM: Int32[Array, "I M"],
    *,
    cache: _Layer,
    scale: float,
    window: int | None,
) -> Float[Array, "I N H K"]:
    """Attention of a few tiles at once, block by block over their contexts."""
    page_size, num_columns = cache.k_LPSNK.shape[2], page_table_IM.shape[1]
    block_pages = min(max(1, _BLOCK_TOKENS // page_size), num_columns)
    block_tokens = block_pages * page_size
    repeats = q_INHK.shape[2] // position_IQ.shape[1]
    position_IH = jnp.repeat(position_IQ, repeats, axis=1)
    low_IH = jnp.zeros_like(position_IH) if window is None else position_IH - window + 1
    end_I = jnp.max(position_IQ, axis=1) + 1
    first_I = jnp.maximum(low_IH[:, 0], 0) // block_tokens
    num_trips = jnp.max((end_I + block_tokens - 1) // block_tokens - first_I)

    def attend_block(trip: Int32[Array, ""], state: _Softmax) -> _Softmax:
        block_I = first_I + trip
        column_IJ = block_I[:, None] * block_pages + jnp.arange(block_pages, dtype=jnp.int32)[None, :]
        page_IJ = jnp.take_along_axis(page_table_IM, jnp.minimum(column_IJ, num_columns - 1), axis=1)
        cached_IB = block_I[:, None] * block_tokens + jnp.arange(block_tokens, dtype=jnp.int32)[None, :]
        k_INBK, v_INBK = _gather(cache, page_IJ, is_cached_IB=cached_IB < end_I[:, None], scale=scale)
        seen_IHB = cached_IB[:, None, :] <= position_IH[:, :, None]
        if window is not None:
            seen_IHB &= cached_IB[:, None, :] >= low_IH[:, :, None]
        return _accumulate(state, q_INHK, k_INBK, v_INBK=v_INBK, seen_IHB=seen_IHB)

    # Made like the queries: inside shard_map they vary over the mesh as the queries do.
    start = _Softmax(
        max_INH=jnp.full_like(q_INHK[..., 0], _MASKED),
        sum_INH=jnp.zeros_like(q_INHK[..., 0]),
        out_INHK=jnp.zeros_like(q_INHK),
    )
    state = jax.lax.fori_loop(0, num_trips, attend_block, start)
    return state.out_INHK / jnp.maximum(state.sum_INH, jnp.finfo(jnp.float32).tiny)[..., None]


class _Block(NamedTuple):
    """Keys, scaled, and values of a block of cached tokens per tile, in float32."""

    k_INBK: Float[Array, "I N B K"]
    v_INBK: Float[Array, "I N B K"]


def _gather(
    cache: _Layer, page_IJ: Int32[Array, "I J"], *, is_cached_IB: Bool[Array, "I B"], scale: float
) -> _Block:
    """The block's keys and values; those of entries that no context has are zero or never used."""
    page_size, num_heads, head_dim = cache.k_LPSNK.shape[2:]
    num_tiles, num_pages = page_IJ.shape
    shape = (num_tiles, num_heads, num_pages * page_size, head_dim)
    k_IJSNK = cache.k_LPSNK[cache.layer, page_IJ].astype(jnp.float32) * scale
    v_IJSNK = cache.v_LPSNK[cache.layer, page_IJ].astype(jnp.float32)
    k_INBK = k_IJSNK.transpose(0, 3, 1, 2, 4).reshape(shape)
    v_INBK = v_IJSNK.transpose(0, 3, 1, 2, 4).reshape(shape)
    # What was left in a page by its last owner must not reach the sum, not even as 0 * NaN.
    return _Block(k_INBK, jnp.where(is_cached_IB[:, None, :, None], v_INBK, 0.0))


def _accumulate(
    state: _Softmax,
    q_INHK: Float[Array, "I N H K"],
    k_INBK: Float[Array, "I N B K"],
    *,
    v_INBK: Float[Array, "I N B K"],
    seen_IHB: Bool[Array, "I H B"],
) -> _Softmax:
    """The online softmax with one more block of keys and values per tile."""
    score_INHB = jnp.einsum("INBK,INHK->INHB", k_INBK, q_INHK)
    score_INHB = jnp.where(seen_IHB[:, None], score_INHB, _MASKED)
    max_INH = jnp.maximum(state.max_INH, score_INHB.max(axis=-1))
    weight_INHB = jnp.where(seen_IHB[:, None], jnp.exp(score_INHB - max_INH[..., None]), 0.0)
    fade_INH = jnp.exp(state.max_INH - max_INH)
    out_INHK = jnp.einsum("INHB,INBK->INHK", weight_INHB, v_INBK)
    return _Softmax(
        max_INH=max_INH,
        sum_INH=state.sum_INH * fade_INH + weight_INHB.sum(axis=-1),
        out_INHK=state.out_INHK * fade_INH[..., None] + out_INHK,
    )
