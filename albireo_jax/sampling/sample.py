"""From logits to one token per row: exact, reproducible, and never a sort over the vocabulary.

A row is V logits in J blocks of W, and the maximum of each block serves every stage::

    logits ──ban──▶ block maxima ──▶ largest logit: the token of greedy rows
                        │               (if no row draws, this is all)
                        ▼
              the blocks with the highest maxima ──▶ floor, noise ──▶ token of the rows whose floor
                        │                                             is above all other blocks
                        ▼
              the other rows, a tile at a time: all blocks ──▶ floor, noise ──▶ token

The second stage looks at a few thousand tokens, which is enough for most rows with top-k, top-p or
min-p. The third sees whole rows, because nothing is filtered or because the nucleus is wide. Both run the
same floor and the same draw on a view of the row, so a row's token does not depend on which of them
found it. Stages that no row needs are skipped at run time. Nothing here communicates between devices.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from albireo_jax.sampling.filters import MAX_VOCAB, RowFilters, floor, is_filtered, mass, needs_mass
from albireo_jax.sampling.noise import Words, gumbel

_BLOCK_TOKENS = 64
_SHORT_LIST_BLOCKS = 64
_CPU_TILE_TOKENS = 2**17  # logits and weights of a tile stay in a core's cache
_INF = np.float32(np.inf)
_SMALLEST = np.finfo(np.float32).tiny


class SamplerParams(NamedTuple):
    """How each row's token is chosen, and at which position it will stand.

    temperature 0 is greedy; top_k 0 keeps all; top_p 1 and min_p 0 filter nothing. `seed_R2` holds the high
    and the low word of a 63-bit seed. At a position below `banned_until_R` the ids in `stop_id_RB`
    (padded with -1) are never drawn.
    """

    temperature_R: Float[Array, " R"]
    top_k_R: Int32[Array, " R"]
    top_p_R: Float[Array, " R"]
    min_p_R: Float[Array, " R"]
    seed_R2: UInt32[Array, "R 2"]
    position_R: Int32[Array, " R"]
    banned_until_R: Int32[Array, " R"]
    stop_id_RB: Int32[Array, "R B"]


class _View(NamedTuple):
    """J blocks of W neighbouring logits of each row, and the id of each block's first."""

    logit_RJW: Float[Array, "R J W"]
    first_RJ: Int32[Array, "R J"]


class _Rows(NamedTuple):
    """The parameters of rows, neutral where a row is greedy."""

    draws_R: Bool[Array, " R"]
    filters: RowFilters
    seed: Words
    position_R: UInt32[Array, " R"]


class _Tokens(NamedTuple):
    """One id per row, and whether it is final."""

    id_R: Int32[Array, " R"]
    is_final_R: Bool[Array, " R"]


def sample(logits_RV: Float[Array, "R V"], params: SamplerParams) -> Int32[Array, " R"]:
    """The id of each row's token.

    A greedy row takes its largest logit, the lowest id on ties. Any other row, in this order:

    1. banned stop ids lose their logit;
    2. logits are divided by the temperature;
    3. top-k keeps the k largest, and whatever ties with the k-th;
    4. top-p keeps, of these, the smallest set of most probable tokens whose mass reaches p, ties included;
    5. min-p keeps what has at least min_p times the largest probability;
    6. the largest sum of scaled logit and Gumbel noise wins, the lowest id on ties.

    The noise is a function of seed, position and token id only, and so is the token of the row's logits
    and parameters only. Tokens below 2^-29 of the largest probability add nothing to the mass in 4.
    Minus infinity is never drawn. A row whose largest logit is not finite is treated as greedy; its id means
    nothing, but is one of the vocabulary.
    """
    vocab = logits_RV.shape[1]
    if vocab > MAX_VOCAB:
        raise ValueError(
            f"a vocabulary of {vocab} tokens is too large to sample from, the limit is {MAX_VOCAB}"
        )
    view = _whole_rows(_ban(logits_RV, params))
    # Without the barrier, XLA reads all logits once more for the maximum of a row.
    peak_RJ = lax.optimization_barrier(view.logit_RJW.max(axis=2))
    greedy_R = _first_largest(view.logit_RJW, view.first_RJ, peak_RJ)
    resolved = _resolve(params, max_R=peak_RJ.max(axis=1), vocab=vocab)
    id_R = lax.cond(
        resolved.draws_R.any(), lambda: _draw_rows(view, resolved, peak_RJ, greedy_R), lambda: greedy_R
    )
    return jnp.clip(id_R, 0, vocab - 1)


def _whole_rows(logits_RV: Float[Array, "R V"]) -> _View:
    rows, vocab = logits_RV.shape
    if vocab % _BLOCK_TOKENS:
        logits_RV = jnp.pad(logits_RV, ((0, 0), (0, -vocab % _BLOCK_TOKENS)), constant_values=-_INF)
    logit_RJW = logits_RV.reshape(rows, -1, _BLOCK_TOKENS)
    blocks = logit_RJW.shape[1]
    first_J = jnp.arange(blocks, dtype=jnp.int32) * _BLOCK_TOKENS
    return _View(logit_RJW, jnp.broadcast_to(first_J, (rows, blocks)))


def _ban(logits_RV: Float[Array, "R V"], params: SamplerParams) -> Float[Array, "R V"]:
    is_banned_RB = (params.position_R < params.banned_until_R)[:, None] & (params.stop_id_RB >= 0)
    id_RB = jnp.where(is_banned_RB, params.stop_id_RB, logits_RV.shape[1])
    row_R1 = jnp.arange(logits_RV.shape[0])[:, None]

    def ban(_: Int32[Array, ""], logits_RV: Float[Array, "R V"]) -> Float[Array, "R V"]:
        return logits_RV.at[row_R1, id_RB].set(-_INF, mode="drop")

    # A loop of one turn or none: unlike a conditional, it leaves the logits where they are.
    return lax.fori_loop(0, is_banned_RB.any().astype(jnp.int32), ban, logits_RV)


def _resolve(params: SamplerParams, *, max_R: Float[Array, " R"], vocab: int) -> _Rows:
    draws_R = (params.temperature_R > 0) & jnp.isfinite(max_R)
    filters_top_k_R = draws_R & (params.top_k_R > 0) & (params.top_k_R < vocab)
    return _Rows(
        draws_R=draws_R,
        filters=RowFilters(
            temperature_R=jnp.where(draws_R, jnp.maximum(params.temperature_R, _SMALLEST), 1),
            top_k_R=jnp.where(filters_top_k_R, params.top_k_R, 0),
            top_p_R=jnp.where(draws_R, params.top_p_R, 1),
            min_p_R=jnp.where(draws_R, params.min_p_R, 0),
            max_R=jnp.where(draws_R, max_R, 0),
            mass_R=jnp.zeros_like(max_R),
        ),
        seed=Words(params.seed_R2[:, 0], params.seed_R2[:, 1]),
        position_R=params.position_R.astype(jnp.uint32),
    )


def _draw_rows(
    view: _View, rows: _Rows, peak_RJ: Float[Array, "R J"], greedy_R: Int32[Array, " R"]
) -> Int32[Array, " R"]:
    filters = rows.filters
    mass_R = lax.cond(
        needs_mass(filters).any(), lambda: mass(view.logit_RJW, filters), lambda: filters.mass_R
    )
    rows = rows._replace(filters=filters._replace(mass_R=mass_R))
    greedy = _Tokens(greedy_R, ~rows.draws_R)
    tokens = greedy
    if peak_RJ.shape[1] > 4 * _SHORT_LIST_BLOCKS:
        tokens = lax.cond(
            is_filtered(filters).any(), lambda: _draw_short_lists(view, rows, peak_RJ, greedy), lambda: greedy
        )
    num_rows, blocks, _ = view.logit_RJW.shape
    cpu_tile = max(1, min(num_rows, _CPU_TILE_TOKENS // (blocks * _BLOCK_TOKENS)))
    return lax.platform_dependent(
        view,
        rows,
        tokens,
        cpu=partial(_draw_tiles, tile_rows=cpu_tile),
        default=partial(_draw_tiles, tile_rows=num_rows),
    )


def _draw_short_lists(view: _View, rows: _Rows, peak_RJ: Float[Array, "R J"], tokens: _Tokens) -> _Tokens:
    """Draw from the blocks with the highest maxima; final where no token outside of them can be drawn."""
    peak_RM, block_RM = lax.top_k(peak_RJ, _SHORT_LIST_BLOCKS)
    short = _View(
        jnp.take_along_axis(view.logit_RJW, block_RM[:, :, None], axis=1, mode="clip"),
        block_RM * _BLOCK_TOKENS,
    )
    floors = floor(short.logit_RJW, rows.filters, outside_R=peak_RM.min(axis=1))
    is_new_R = floors.is_sure_R & ~tokens.is_final_R
    id_R = jnp.where(is_new_R, _draw(short, rows, floors.logit_R), tokens.id_R)
    return _Tokens(id_R, floors.is_sure_R | tokens.is_final_R)


def _draw_tiles(view: _View, rows: _Rows, tokens: _Tokens, *, tile_rows: int) -> Int32[Array, " R"]:
    """Draw the rows that are not final from all of their blocks, `tile_rows` at a time."""
    num_rows = tokens.id_R.shape[0]
    open_row_R = jnp.nonzero(~tokens.is_final_R, size=num_rows, fill_value=num_rows)[0].astype(jnp.int32)

    def draw_tile(tile: Int32[Array, ""], id_R: Int32[Array, " R"]) -> Int32[Array, " R"]:
        # A slice that would pass the end starts earlier, and draws some rows a second time.
        row_Q = lax.dynamic_slice(open_row_R, (tile * tile_rows,), (tile_rows,))

        def take(array_R: Array) -> Array:
            return array_R.at[row_Q].get(mode="clip")

        own_view, own = jax.tree.map(take, view), jax.tree.map(take, rows)
        nothing_Q = jnp.full(tile_rows, -_INF)
        floor_Q = lax.cond(
            is_filtered(own.filters).any(),
            lambda: floor(own_view.logit_RJW, own.filters, outside_R=nothing_Q).logit_R,
            lambda: nothing_Q,
        )
        return id_R.at[row_Q].set(_draw(own_view, own, floor_Q), mode="drop")

    tiles = ((~tokens.is_final_R).sum(dtype=jnp.int32) + (tile_rows - 1)) // tile_rows
    return lax.fori_loop(0, tiles, draw_tile, tokens.id_R)


def _draw(view: _View, rows: _Rows, floor_R: Float[Array, " R"]) -> Int32[Array, " R"]:
    """The id of the largest sum of scaled logit and noise, among logits not below the floor."""
    seed, max_R, temperature_R = rows.seed, rows.filters.max_R, rows.filters.temperature_R
    lane_W = jnp.arange(_BLOCK_TOKENS, dtype=jnp.uint32)
    id_RJW = view.first_RJ.astype(jnp.uint32)[:, :, None] + lane_W[None, None, :]
    key = Words(_wide(seed.first), _wide(seed.second))
    noise_RJW = gumbel(key, Words(_wide(rows.position_R), id_RJW))
    score_RJW = (view.logit_RJW - _wide(max_R)) / _wide(temperature_R) + noise_RJW
    score_RJW = jnp.where(view.logit_RJW >= _wide(floor_R), score_RJW, -_INF)
    return _first_largest(score_RJW, view.first_RJ, lax.optimization_barrier(score_RJW.max(axis=2)))


def _first_largest(
    value_RJW: Float[Array, "R J W"], first_RJ: Int32[Array, "R J"], peak_RJ: Float[Array, "R J"]
) -> Int32[Array, " R"]:
    """The lowest id whose value is the largest of its row, given the maximum of each block.

    Two steps of masks, where `jnp.argmax` over the vocabulary takes 10 times as long on a CPU.
    """
    is_best_RJ = peak_RJ == peak_RJ.max(axis=1, keepdims=True)
    first_R1 = jnp.where(is_best_RJ, first_RJ, np.iinfo(np.int32).max).min(axis=1, keepdims=True)
    block_J = jnp.arange(first_RJ.shape[1], dtype=jnp.int32)
    block_R = jnp.where(first_RJ == first_R1, block_J[None, :], 0).sum(axis=1)
    value_RW = jnp.take_along_axis(value_RJW, _wide(block_R), axis=1, mode="clip")[:, 0]
    return first_R1[:, 0] + jnp.argmax(value_RW, axis=1).astype(jnp.int32)


def _wide(per_row_R: Array) -> Array:
    """One number per row, shaped to broadcast over its blocks."""
    return per_row_R[:, None, None]
