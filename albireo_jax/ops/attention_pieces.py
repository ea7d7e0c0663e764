"""How the attention of a step is cut into pieces of about the same length, to be computed side by side.

Queries are cut into tiles of up to Q queries of one row, and what a tile sees of its row's context into
pieces of whole blocks of B tokens, so long that about `num_pieces` come out of all tiles together. A tile of
one piece writes its results; the pieces of a cut tile write theirs into slots of their own, and each of its
queries is told which of these to merge::

    tile     0               1       2 3
    block    0   1   2   3   0   1   0 0   1   2          10 blocks
    piece    |---0---|---1---|---2---|3|---4---|-5-|       num_pieces = 5: pieces of 2 blocks
    slots     0       1                 2       3          tiles 0 and 3 are cut

All of it is calculated on the device from the rows' lengths, once per step: layers share it.

Axes besides the usual: I tiles, X pieces, F fields.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

_MOST_PIECES = 64
"""Pieces of one tile at most: a single block of threads merges those of a query."""

FINISHED, PADDING = 0, -1
"""Counts of pieces to merge for tokens whose results are written already, and for those that have none."""


class Rows(NamedTuple):
    """Where each row's queries are, how long its context is, and which rows are to be cut now."""

    row_start_R1: Int32[Array, " R1"]
    context_R: Int32[Array, " R"]
    is_cut_R: Bool[Array, " R"]


class Cut(NamedTuple):
    """Sizes by which a step is cut; all but `window` are positive.

    At most `num_tiles` tiles of `queries` queries come out, and `num_tiles` + `num_pieces` pieces, which
    take at most 2 * `num_pieces` * `queries` * `group` slots, one per query and head of its group.
    """

    queries: int
    group: int
    block_tokens: int
    num_tiles: int
    num_pieces: int
    first_slot: int
    window: int | None


class Pieces(NamedTuple):
    """What the kernels read.

    `piece_XF`: row, first token, number of queries, position of the first one, first and last (exclusive)
    cached token, first slot or -1, and a filler; unused pieces see no tokens. `merge_TF`: first slot, slots
    from one piece to the next, number of pieces (`FINISHED`, `PADDING`), and a filler.
    """

    piece_XF: Int32[Array, "X F"]
    merge_TF: Int32[Array, "T F"]


def cut(rows: Rows, how: Cut, *, num_tokens: int) -> Pieces:
    """Pieces of the rows that are to be cut; tokens of other rows count as padding."""
    count_R = rows.row_start_R1[1:] - rows.row_start_R1[:-1]
    tiles_R = jnp.where(rows.is_cut_R, (count_R + how.queries - 1) // how.queries, 0)
    tile_ends_R = jnp.cumsum(tiles_R, dtype=jnp.int32)
    tile_begins_R = tile_ends_R - tiles_R

    tile_I = jnp.arange(how.num_tiles, dtype=jnp.int32)
    row_I = find(tile_ends_R, tile_I)
    token_I = rows.row_start_R1[row_I] + (tile_I - tile_begins_R[row_I]) * how.queries
    end_I = rows.row_start_R1[row_I + 1]
    queries_I = jnp.where(tile_I < tile_ends_R[-1], jnp.minimum(end_I - token_I, how.queries), 0)
    position_I = rows.context_R[row_I] - (end_I - token_I)
    context_I = position_I + queries_I
    first_I = jnp.zeros_like(position_I)
    if how.window is not None:
        first_I = jnp.maximum(position_I - how.window + 1, 0) // how.block_tokens * how.block_tokens
    blocks_I = jnp.where(queries_I > 0, (context_I - first_I + how.block_tokens - 1) // how.block_tokens, 0)

    length = jnp.maximum(_up(jnp.sum(blocks_I), how.num_pieces), _up(jnp.max(blocks_I), _MOST_PIECES))
    length = jnp.maximum(length, 1)  # in blocks
    pieces_I = (blocks_I + length - 1) // length
    slots = how.queries * how.group
    slots_I = jnp.where(pieces_I > 1, pieces_I * slots, 0)
    slot_I = how.first_slot + jnp.cumsum(slots_I, dtype=jnp.int32) - slots_I

    piece_ends_I = jnp.cumsum(pieces_I, dtype=jnp.int32)
    piece_X = jnp.arange(how.num_tiles + how.num_pieces, dtype=jnp.int32)
    tile_X = find(piece_ends_I, piece_X)
    nth_X = piece_X - (piece_ends_I - pieces_I)[tile_X]
    begin_X = first_I[tile_X] + nth_X * length * how.block_tokens
    end_X = jnp.minimum(begin_X + length * how.block_tokens, context_I[tile_X])
    is_used_X = piece_X < piece_ends_I[-1]
    fields = (
        row_I[tile_X],
        token_I[tile_X],
        queries_I[tile_X],
        position_I[tile_X],
        jnp.where(is_used_X, begin_X, 0),
        jnp.where(is_used_X, end_X, 0),
        jnp.where(pieces_I[tile_X] > 1, slot_I[tile_X] + nth_X * slots, -1),
        jnp.zeros_like(piece_X),
    )

    token_T = jnp.arange(num_tokens, dtype=jnp.int32)
    row_T = find(rows.row_start_R1[1:], token_T)
    nth_T = token_T - rows.row_start_R1[row_T]
    tile_T = jnp.minimum(tile_begins_R[row_T] + nth_T // how.queries, how.num_tiles - 1)
    is_mine_T = (token_T < rows.row_start_R1[-1]) & (tiles_R[row_T] > 0)
    count_T = jnp.where(pieces_I[tile_T] > 1, pieces_I[tile_T], FINISHED)
    merges = (
        slot_I[tile_T] + nth_T % how.queries * how.group,
        jnp.full_like(token_T, slots),
        jnp.where(is_mine_T, count_T, PADDING),
        jnp.zeros_like(token_T),
    )
    return Pieces(jnp.stack(fields, axis=1), jnp.stack(merges, axis=1))


def find(ends_X: Int32[Array, " X"], index_Z: Int32[Array, " Z"]) -> Int32[Array, " Z"]:
    """Which of consecutive ranges holds each index; the last one, if none does.

    Comparing with every end is one small fused loop, where a search would be many operations.
    """
    return jnp.sum(index_Z[:, None] >= ends_X[None, :-1], axis=1, dtype=jnp.int32)


def _up(total: Int32[Array, ""], parts: int) -> Int32[Array, ""]:
    return (total + parts - 1) // parts
