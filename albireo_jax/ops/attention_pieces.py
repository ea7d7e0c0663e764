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
    """Sizes by which a step is cut; all but `window` and `first_slot` are positive.

    At most `num_tiles` tiles of `queries` queries come out, and `num_tiles` + `num_pieces` pieces, which
    take at most `num_slots` slots from `first_slot` on, one per query and head of its group.
    """

    queries: int
    group: int
    block_tokens: int
    num_tiles: int
    num_pieces: int
    first_slot: int
    window: int | None

    @property
    def num_slots(self) -> int:
        """Slots at most: a tile of x > 1 lengths is cut into fewer than 2 x pieces."""
        return 2 * self.num_pieces * self.queries * self.group


class Pieces(NamedTuple):
    """What the kernels read.

    `piece_XF`: row, first token, number of queries, position of the first one, first and last (exclusive)
    cached token, first slot or -1, and a filler; unused pieces see no tokens. `merge_TF`: first slot, slots
    from one piece to the next, number of pieces (`FINISHED`, `PADDING`), and a filler.
    """

    piece_XF: Int32[Array, "X F"]
    merge_TF: Int32[Array, "T F"]


class _Tiles(NamedTuple):
    """Queries by tiles, and where each row's tiles begin; unused tiles have no queries and no blocks.

    A tile sees cached tokens from first on, in blocks, up to position + queries.
    """

    begins_R: Int32[Array, " R"]
    count_R: Int32[Array, " R"]
    row_I: Int32[Array, " I"]
    token_I: Int32[Array, " I"]
    queries_I: Int32[Array, " I"]
    position_I: Int32[Array, " I"]
    first_I: Int32[Array, " I"]
    blocks_I: Int32[Array, " I"]


class _Split(NamedTuple):
    """How many pieces of how many blocks tiles are cut into, and where the slots of each begin."""

    length: Int32[Array, ""]
    pieces_I: Int32[Array, " I"]
    slot_I: Int32[Array, " I"]


def cut(rows: Rows, how: Cut, *, num_tokens: int) -> Pieces:
    """Pieces of the rows that are to be cut; tokens of other rows count as padding."""
    tiles = _tiles(rows, how)
    split = _split(tiles, how)
    return Pieces(_pieces(tiles, split, how), _merges(rows, tiles, split, how=how, num_tokens=num_tokens))


def _tiles(rows: Rows, how: Cut) -> _Tiles:
    count_R = rows.row_start_R1[1:] - rows.row_start_R1[:-1]
    tiles_R = jnp.where(rows.is_cut_R, _up(count_R, how.queries), 0)
    ends_R = jnp.cumsum(tiles_R, dtype=jnp.int32)
    begins_R = ends_R - tiles_R
    tile_I = jnp.arange(how.num_tiles, dtype=jnp.int32)
    row_I = find(ends_R, tile_I)
    token_I = rows.row_start_R1[row_I] + (tile_I - begins_R[row_I]) * how.queries
    end_I = rows.row_start_R1[row_I + 1]
    queries_I = jnp.where(tile_I < ends_R[-1], jnp.minimum(end_I - token_I, how.queries), 0)
    position_I = rows.context_R[row_I] - (end_I - token_I)
    first_I = jnp.zeros_like(position_I)
    if how.window is not None:
        first_I = jnp.maximum(position_I - how.window + 1, 0) // how.block_tokens * how.block_tokens
    blocks_I = jnp.where(queries_I > 0, _up(position_I + queries_I - first_I, how.block_tokens), 0)
    return _Tiles(begins_R, tiles_R, row_I, token_I, queries_I, position_I, first_I, blocks_I)


def _split(tiles: _Tiles, how: Cut) -> _Split:
    length = jnp.maximum(_up(jnp.sum(tiles.blocks_I), how.num_pieces), 1)
    length = jnp.maximum(length, _up(jnp.max(tiles.blocks_I), _MOST_PIECES))
    pieces_I = _up(tiles.blocks_I, length)
    slots_I = jnp.where(pieces_I > 1, pieces_I * how.queries * how.group, 0)
    return _Split(length, pieces_I, how.first_slot + jnp.cumsum(slots_I, dtype=jnp.int32) - slots_I)


def _pieces(tiles: _Tiles, split: _Split, how: Cut) -> Int32[Array, "X F"]:
    ends_I = jnp.cumsum(split.pieces_I, dtype=jnp.int32)
    piece_X = jnp.arange(how.num_tiles + how.num_pieces, dtype=jnp.int32)
    tile_X = find(ends_I, piece_X)
    nth_X = piece_X - (ends_I - split.pieces_I)[tile_X]
    tokens = split.length * how.block_tokens
    begin_X = tiles.first_I[tile_X] + nth_X * tokens
    end_X = jnp.minimum(begin_X + tokens, (tiles.position_I + tiles.queries_I)[tile_X])
    is_used_X = piece_X < ends_I[-1]
    slot_X = split.slot_I[tile_X] + nth_X * how.queries * how.group
    fields = (
        tiles.row_I[tile_X],
        tiles.token_I[tile_X],
        tiles.queries_I[tile_X],
        tiles.position_I[tile_X],
        jnp.where(is_used_X, begin_X, 0),
        jnp.where(is_used_X, end_X, 0),
        jnp.where(split.pieces_I[tile_X] > 1, slot_X, -1),
        jnp.zeros_like(piece_X),
    )
    return jnp.stack(fields, axis=1)


def _merges(rows: Rows, tiles: _Tiles, split: _Split, *, how: Cut, num_tokens: int) -> Int32[Array, "T F"]:
    token_T = jnp.arange(num_tokens, dtype=jnp.int32)
    row_T = find(rows.row_start_R1[1:], token_T)
    nth_T = token_T - rows.row_start_R1[row_T]
    tile_T = jnp.minimum(tiles.begins_R[row_T] + nth_T // how.queries, how.num_tiles - 1)
    is_mine_T = (token_T < rows.row_start_R1[-1]) & (tiles.count_R[row_T] > 0)
    count_T = jnp.where(split.pieces_I[tile_T] > 1, split.pieces_I[tile_T], FINISHED)
    fields = (
        split.slot_I[tile_T] + nth_T % how.queries * how.group,
        jnp.full_like(token_T, how.queries * how.group),
        jnp.where(is_mine_T, count_T, PADDING),
        jnp.zeros_like(token_T),
    )
    return jnp.stack(fields, axis=1)


def find(ends_X: Int32[Array, " X"], index_Z: Int32[Array, " Z"]) -> Int32[Array, " Z"]:
    """Which of consecutive ranges holds each index; the last one, if none does.

    Comparing with every end is one small fused loop, where a search would be many operations.
    """
    return jnp.sum(index_Z[:, None] >= ends_X[None, :-1], axis=1, dtype=jnp.int32)


def _up(total: Int32[Array, "*shape"], parts: int | Int32[Array, ""]) -> Int32[Array, "*shape"]:
    return (total + parts - 1) // parts
