"""Paged attention as a loop of XLA operations, for every device and dtype; made for CPUs.

Queries are cut into tiles of one row each, so that a row's context is gathered once per tile and not
once per token: rows with one query (decode) into tiles of one, the others (prompt chunks) into tiles
of up to Q queries. With Q = 4, rows of 6, 1 and 3 queries and two padding tokens::

    token    0 1 2 3 4 5 6 7 8 9 - -
    row      0 0 0 0 0 0 1 2 2 2
    chunks  [---0---|-1-] [--2--]        at most T/Q + R tiles; 3 are used
    decode              [0]              at most R tiles; 1 is used

The two kinds take turns. The context that a tile sees is a number of blocks of B cached tokens; all
blocks of all tiles in one line are the work, and a loop takes W blocks of it per trip::

    tile     0               1       2 3
    block    0   1   2   3   0   1   0 0   1   2
            |===|===|===|===|===|==|===|===|===|=|
             trip 0      trip 1      trip 2      trip 3        W = 3

So the time depends on the contexts there are, not on the longest one, nor on the width of the page
table. A trip gathers its blocks of keys and values into small float32 buffers that stay in the cores'
caches, multiplies, and adds to each tile's running maximum, sum and output (online softmax).

Axes besides the usual: I tiles, Q queries of a tile, U = Q * G query vectors of a tile for one
key/value head, W blocks of a trip, B tokens of a block, Y pages of a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Real

from albireo_jax.core.plan import NULL_PAGE
from albireo_jax.ops.kv_cache import KvCache, decode


class _Sizes(NamedTuple):
    """The cut of the work on tiles of one kind: B at most, and elements of the keys of a trip at most."""

    block_tokens: int
    trip_elements: int


_DECODE = _Sizes(block_tokens=64, trip_elements=2**19)
"""Blocks so small that the last one of a context wastes little."""

_CHUNK = _Sizes(block_tokens=128, trip_elements=2**18)
"""Blocks so large that matrix products run at full speed."""

_CHUNK_VECTORS = 64
"""U: query vectors per key/value head that share one walk over the context of a prompt chunk."""

_SEQUENTIAL_TILES = 2
"""So few tiles are taken block by block: XLA runs so small a loop without waking other threads."""

_MASKED = -1e30
"""Score of what a query does not see: finite, so that a query that sees nothing yields no NaN."""

_HALF = 0.5
"""Factor on the values, exact. XLA's CPU compiler vectorises a gather only if it also calculates."""


class _Layer(NamedTuple):
    """One layer of the cache, inside the arrays of all layers."""

    cache: KvCache
    nth: int | Int32[Array, ""]


class _Rows(NamedTuple):
    """Place of each row's queries, length of its context, and its pages."""

    row_start_R1: Int32[Array, " R1"]
    context_R: Int32[Array, " R"]
    page_table_RM: Int32[Array, "R M"]


class _Mask(NamedTuple):
    """The scale and cap of scores, and the distance that a query sees back."""

    scale: float
    window: int | None
    cap: float | None


class _Tiles(NamedTuple):
    """Tiles of Q queries of one row, row after row, those in use first.

    A place without a query has token T, which no array has, and position -1, which sees nothing.
    """

    row_I: Int32[Array, " I"]
    token_IQ: Int32[Array, "I Q"]
    position_IQ: Int32[Array, "I Q"]
    tile_T: Int32[Array, " T"]
    place_T: Int32[Array, " T"]
    is_tiled_T: Bool[Array, " T"]


class _Line(NamedTuple):
    """All blocks of all tiles in one line: `ends_I` are running totals of the tiles' blocks.

    Place w of the line, if it falls to tile i, is that tile's block `w + offset_I[i]`.
    """

    ends_I: Int32[Array, " I"]
    offset_I: Int32[Array, " I"]
    context_I: Int32[Array, " I"]


class _Blocks(NamedTuple):
    """The W blocks of a trip: their tiles, the cached entries in them, and the queries that see these."""

    tile_W: Int32[Array, " W"]
    page_WY: Int32[Array, "W Y"]
    entry_WB: Int32[Array, "W B"]
    is_cached_WB: Bool[Array, "W B"]
    position_WQ: Int32[Array, "W Q"]


class _Softmax(NamedTuple):
    """Online softmax over the blocks so far: maximum, sum, and sum of weighted values."""

    max_INU: Float[Array, "I N U"]
    sum_INU: Float[Array, "I N U"]
    out_INUK: Float[Array, "I N U K"]


def loop_attention(
    q_TNGK: Float[Array, "T N G K"],
    cache: KvCache,
    *,
    layer: int | Int32[Array, ""],
    row_start_R1: Int32[Array, " R1"],
    context_R: Int32[Array, " R"],
    page_table_RM: Int32[Array, "R M"],
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None = None,
) -> Float[Array, "T N G K"]:
    """A `PagedAttentionFn` of operations of XLA."""
    num_tokens, _, group, _ = q_TNGK.shape
    num_rows = context_R.shape[0]
    rows = _Rows(row_start_R1, context_R, page_table_RM)
    held = _Layer(cache, layer)
    mask = _Mask(scale, sliding_window, soft_cap)
    count_R = row_start_R1[1:] - row_start_R1[:-1]
    is_decode_R = count_R == 1
    tiles = _cut(rows, is_decode_R.astype(jnp.int32), shape=(num_rows, 1), num_tokens=num_tokens)
    out_TNGK = _attend(q_TNGK, tiles, rows=rows, layer=held, mask=mask)
    if num_tokens == num_rows:
        return out_TNGK
    queries = min(max(1, _CHUNK_VECTORS // group), num_tokens)
    tiles_R = jnp.where(is_decode_R, 0, (count_R + queries - 1) // queries)
    num_tiles = num_tokens // queries + min(num_rows, num_tokens // 2)
    tiles = _cut(rows, tiles_R, shape=(num_tiles, queries), num_tokens=num_tokens)
    return out_TNGK + _attend(q_TNGK, tiles, rows=rows, layer=held, mask=mask)


def _cut(rows: _Rows, tiles_R: Int32[Array, " R"], *, shape: tuple[int, int], num_tokens: int) -> _Tiles:
    """The first `tiles_R` tiles of each row, in arrays of `shape` (I, Q)."""
    num_tiles, queries = shape
    ends_R = jnp.cumsum(tiles_R, dtype=jnp.int32)
    begins_R = ends_R - tiles_R
    tile_I = jnp.arange(num_tiles, dtype=jnp.int32)
    row_I = _find(ends_R, tile_I)
    token_IQ = (rows.row_start_R1[row_I] + (tile_I - begins_R[row_I]) * queries)[:, None] + jnp.arange(
        queries, dtype=jnp.int32
    )[None, :]
    end_I = jnp.where(tile_I < ends_R[-1], rows.row_start_R1[row_I + 1], 0)
    is_query_IQ = token_IQ < end_I[:, None]
    position_IQ = rows.context_R[row_I][:, None] - (end_I[:, None] - token_IQ)

    token_T = jnp.arange(num_tokens, dtype=jnp.int32)
    row_T = _find(rows.row_start_R1[1:], token_T)
    nth_T = token_T - rows.row_start_R1[row_T]
    return _Tiles(
        row_I=row_I,
        token_IQ=jnp.where(is_query_IQ, token_IQ, num_tokens),
        position_IQ=jnp.where(is_query_IQ, position_IQ, -1),
        tile_T=jnp.minimum(begins_R[row_T] + nth_T // queries, num_tiles - 1),
        place_T=nth_T % queries,
        is_tiled_T=(token_T < rows.row_start_R1[-1]) & (tiles_R[row_T] > 0),
    )


def _attend(
    q_TNGK: Float[Array, "T N G K"], tiles: _Tiles, *, rows: _Rows, layer: _Layer, mask: _Mask
) -> Float[Array, "T N G K"]:
    """Attention of the tiles' queries, zeros for all other tokens."""
    num_tiles, queries = tiles.token_IQ.shape
    _, heads, group, head_dim = q_TNGK.shape
    vectors = queries * group
    page_size = layer.cache.k_LPSNK.shape[2]
    sizes = _DECODE if queries == 1 else _CHUNK
    block_pages = max(1, sizes.block_tokens // page_size)
    block_elements = block_pages * page_size * heads * head_dim
    width = min(num_tiles, max(1, sizes.trip_elements // block_elements))
    width = 1 if num_tiles <= _SEQUENTIAL_TILES else width
    line = _line_up(tiles, block_tokens=block_pages * page_size, window=mask.window)

    def trip(index: Int32[Array, ""], state: _Softmax) -> _Softmax:
        work_W = index * width + jnp.arange(width, dtype=jnp.int32)
        blocks = _take(line, work_W, tiles=tiles, rows=rows, pages=(block_pages, page_size))
        q_WQNGK = q_TNGK.at[tiles.token_IQ[blocks.tile_W]].get(mode="fill", fill_value=0)
        q_WNUK = q_WQNGK.transpose(0, 2, 1, 3, 4).reshape(width, heads, vectors, head_dim)
        return _add_blocks(state, q_WNUK.astype(jnp.float32), blocks, layer=layer, mask=mask)

    # Made like the queries: inside a shard_map these vary over the mesh, and so must the loop's state.
    zeros_INUK = jnp.zeros_like(q_TNGK, jnp.float32, shape=(num_tiles + width - 1, heads, vectors, head_dim))
    zeros_INU = zeros_INUK[..., 0]
    start = _Softmax(max_INU=zeros_INU + _MASKED / 2, sum_INU=zeros_INU, out_INUK=zeros_INUK)
    state = jax.lax.fori_loop(0, (line.ends_I[-1] + width - 1) // width, trip, start)

    shape = (-1, heads, queries, group)
    sum_TNG = state.sum_INU.reshape(shape)[tiles.tile_T, :, tiles.place_T]
    out_TNGK = state.out_INUK.reshape(*shape, head_dim)[tiles.tile_T, :, tiles.place_T]
    sum_TNG = jnp.where(tiles.is_tiled_T[:, None, None], sum_TNG * _HALF, 1.0)
    return jnp.where(tiles.is_tiled_T[:, None, None, None], out_TNGK / sum_TNG[..., None], 0.0).astype(
        q_TNGK.dtype
    )


def _line_up(tiles: _Tiles, *, block_tokens: int, window: int | None) -> _Line:
    """The blocks that each tile sees: from that of its first query's first entry to its own last one."""
    context_I = jnp.max(tiles.position_IQ, axis=1) + 1
    first_I = jnp.zeros_like(context_I)
    if window is not None:
        first_I = jnp.maximum(tiles.position_IQ[:, 0] - window + 1, 0) // block_tokens
    blocks_I = (context_I + block_tokens - 1) // block_tokens - first_I
    ends_I = jnp.cumsum(blocks_I, dtype=jnp.int32)
    return _Line(ends_I=ends_I, offset_I=first_I - (ends_I - blocks_I), context_I=context_I)


def _take(
    line: _Line, work_W: Int32[Array, " W"], *, tiles: _Tiles, rows: _Rows, pages: tuple[int, int]
) -> _Blocks:
    """The blocks at some places of the line; `pages` gives the pages of a block and the page size."""
    block_pages, page_size = pages
    tile_W = _find(line.ends_I, work_W)
    is_work_W = work_W < line.ends_I[-1]
    block_W = work_W + line.offset_I[tile_W]
    context_W = jnp.where(is_work_W, line.context_I[tile_W], 0)
    column_WY = block_W[:, None] * block_pages + jnp.arange(block_pages, dtype=jnp.int32)[None, :]
    page_WY = rows.page_table_RM.at[tiles.row_I[tile_W][:, None], column_WY].get(mode="clip")
    entry_WB = (block_W * block_pages * page_size)[:, None] + jnp.arange(
        block_pages * page_size, dtype=jnp.int32
    )[None, :]
    return _Blocks(
        tile_W=tile_W,
        # One page, hot in the cache, stands for all those past the end of a context.
        page_WY=jnp.where(column_WY * page_size < context_W[:, None], page_WY, NULL_PAGE),
        entry_WB=entry_WB,
        is_cached_WB=entry_WB < context_W[:, None],
        position_WQ=jnp.where(is_work_W[:, None], tiles.position_IQ[tile_W], -1),
    )


def _add_blocks(
    state: _Softmax, q_WNUK: Float[Array, "W N U K"], blocks: _Blocks, *, layer: _Layer, mask: _Mask
) -> _Softmax:
    """The online softmax with a trip's blocks of keys and values.

    Every tile in use has a block, so the trip's tiles are neighbours: V <= W of them from the first on.
    """
    k_LPSNK, v_LPSNK, k_scale_LPSN, v_scale_LPSN = layer.cache
    k_WNBK = _gather(k_LPSNK, layer.nth, blocks.page_WY) * mask.scale
    v_WNBK = _gather(v_LPSNK, layer.nth, blocks.page_WY) * _HALF
    # What a page's last owner left must not reach the sum, not even as 0 * NaN.
    v_WNBK = jnp.where(blocks.is_cached_WB[:, None, :, None], v_WNBK, 0.0)
    score_WNUB = jnp.einsum("WNBK,WNUK->WNUB", k_WNBK, q_WNUK)
    score_WNUB = _times_scales(score_WNUB, k_scale_LPSN, layer.nth, blocks=blocks)
    if mask.cap is not None:
        score_WNUB = mask.cap * jnp.tanh(score_WNUB / mask.cap)
    score_WNUB = jnp.where(_seen(blocks, q_WNUK.shape[2], window=mask.window), score_WNUB, _MASKED)

    width = blocks.tile_W.shape[0]
    first = blocks.tile_W[0]
    nth_W = jnp.minimum(blocks.tile_W - first, width - 1)
    is_tile_VW = jnp.arange(width, dtype=jnp.int32)[:, None] == nth_W[None, :]
    before = _Softmax(*(jax.lax.dynamic_slice_in_dim(array, first, width) for array in state))
    max_VWNU = jnp.where(is_tile_VW[:, :, None, None], jnp.max(score_WNUB, axis=-1)[None], _MASKED)
    max_VNU = jnp.maximum(before.max_INU, jnp.max(max_VWNU, axis=1))
    fade_VNU = jnp.exp(before.max_INU - max_VNU)
    # The running maximum starts far above the score of what is masked: exp gives exactly 0 for it.
    weight_WNUB = jnp.exp(score_WNUB - max_VNU[nth_W][..., None])
    sum_WNU = jnp.sum(weight_WNUB, axis=-1)
    weight_WNUB = _times_scales(weight_WNUB, v_scale_LPSN, layer.nth, blocks=blocks)
    out_WNUK = jnp.einsum("WNUB,WNBK->WNUK", weight_WNUB, v_WNBK)
    share_VW = is_tile_VW.astype(jnp.float32)
    after = _Softmax(
        max_INU=max_VNU,
        sum_INU=before.sum_INU * fade_VNU + jnp.einsum("VW,WNU->VNU", share_VW, sum_WNU),
        out_INUK=before.out_INUK * fade_VNU[..., None] + jnp.einsum("VW,WNUK->VNUK", share_VW, out_WNUK),
    )
    return _Softmax(
        *(
            jax.lax.dynamic_update_slice_in_dim(old, new, first, axis=0)
            for old, new in zip(state, after, strict=True)
        )
    )


def _seen(blocks: _Blocks, vectors: int, *, window: int | None) -> Bool[Array, "W 1 U B"]:
    """The entries that each query vector of a tile sees, for all heads."""
    position_WU = jnp.repeat(blocks.position_WQ, vectors // blocks.position_WQ.shape[1], axis=1)
    seen_WUB = blocks.entry_WB[:, None, :] <= position_WU[:, :, None]
    if window is not None:
        seen_WUB &= blocks.entry_WB[:, None, :] > position_WU[:, :, None] - window
    return seen_WUB[:, None]


def _gather(
    x_LPSNK: Real[Array, "L P S N K"], layer: int | Int32[Array, ""], page_WY: Int32[Array, "W Y"]
) -> Float[Array, "W N B K"]:
    """Blocks of pages in float32, without their scales, heads first as batched matrix products want them."""
    _, _, page_size, heads, head_dim = x_LPSNK.shape
    width, block_pages = page_WY.shape
    x_WYSNK = decode(x_LPSNK[layer, page_WY])
    return x_WYSNK.transpose(0, 3, 1, 2, 4).reshape(width, heads, block_pages * page_size, head_dim)


def _times_scales(
    x_WNUB: Float[Array, "W N U B"],
    scale_LPSN: Float[Array, "L P S N"] | None,
    layer: int | Int32[Array, ""],
    *,
    blocks: _Blocks,
) -> Float[Array, "W N U B"]:
    """Scores or weights, one per cached vector, times the vectors' scales if the cache has any.

    So K numbers are spared a multiplication each; what is not cached gets 0.
    """
    if scale_LPSN is None:
        return x_WNUB
    width, heads, _, block_tokens = x_WNUB.shape
    scale_WYSN = scale_LPSN[layer, blocks.page_WY].astype(jnp.float32)
    scale_WNB = scale_WYSN.transpose(0, 3, 1, 2).reshape(width, heads, block_tokens)
    return x_WNUB * jnp.where(blocks.is_cached_WB[:, None], scale_WNB, 0.0)[:, :, None]


def _find(ends_X: Int32[Array, " X"], index_Z: Int32[Array, " Z"]) -> Int32[Array, " Z"]:
    """The one of consecutive ranges that holds each index; the last one, if none does.

    Comparing with every end is one small fused loop, where a search would be many operations.
    """
    return jnp.sum(index_Z[:, None] >= ends_X[None, :-1], axis=1, dtype=jnp.int32)
