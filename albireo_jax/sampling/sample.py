"""From logits to one token per row: exact, reproducible, and never a sort over the vocabulary.

A row is V logits in J blocks of W, and the maximum of each block serves every stage::

    logits ──▶ block maxima ──▶ largest logit: the token of greedy rows
                    │               (if no row draws, this is all)
                    ▼
          rows that filter: the blocks with the highest maxima ──▶ sieve, noise ──▶ token, if
                    │                                          nothing outside of them can be drawn
                    ▼
          all other rows: whole ──▶ sieve, noise ──▶ token

The second stage looks at a few thousand tokens, which is enough for most rows with top-k, top-p or
min-p. The third sees whole rows, because nothing is filtered or because the nucleus is wide. Both draw
through the same sieve from a view of the row, so a row's token does not depend on which of them found
it. Either works through the rows that need it, so few at a time that they stay in a CPU's cache.

So it is on a CPU. A GPU would keep its host waiting for every such choice, and draws all rows whole, by
kernels of its own (`sample_cuda`) or by operations of XLA (`at_once`): the same tokens. Nothing here
communicates between devices.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from albireo_jax.core.plan import NOT_FINITE
from albireo_jax.ops.cuda.kernels import LaunchFn
from albireo_jax.sampling.blocks import BLOCK_TOKENS, View, first_largest, logit_peaks, peaks, whole_rows
from albireo_jax.sampling.branch_free import draw_branch_free
from albireo_jax.sampling.draw import (
    Rows,
    draw_through,
    resolve,
    scores,
)
from albireo_jax.sampling.filters import (
    MAX_VOCAB,
    SamplerParams,
    is_filtered,
    mass,
    mass_value,
    needs_mass,
    sieve,
)
from albireo_jax.sampling.sample_cuda import sample_cuda

_SHORT_LIST_BLOCKS = 64
_TILE_TOKENS = 2**17
_INF = np.float32(np.inf)


class _Tokens(NamedTuple):
    """One id per row, and whether it is final."""

    id_R: Int32[Array, " R"]
    is_final_R: Bool[Array, " R"]


_DrawFn: TypeAlias = Callable[[Int32[Array, " Q"]], _Tokens]
"""Draws the rows of these numbers."""

_Tree = TypeVar("_Tree")


def sample(
    logits_RV: Float[Array, "R V"], params: SamplerParams, *, launch: LaunchFn | None = None
) -> Int32[Array, " R"]:
    """The id of each row's token.

    A greedy row takes its largest logit, the lowest id on ties. Any other row, in this order:

    1. logits are divided by the temperature;
    2. top-k keeps the k largest, and whatever ties with the k-th;
    3. top-p keeps, of these, the smallest set of most probable tokens whose mass reaches p, ties included;
    4. min-p keeps what has at least min_p times the largest probability;
    5. the largest sum of scaled logit and Gumbel noise wins, the lowest id on ties.

    The noise is a function of seed, position and token id only, and so is the token of the row's logits
    and parameters only. Tokens below 2^-29 of the largest probability add nothing to the mass in 3.
    Minus infinity is never drawn. A row whose largest logit is not finite gets NOT_FINITE. With `launch` the
    CUDA kernels select the tokens.
    """
    vocab = logits_RV.shape[1]
    if vocab > MAX_VOCAB:
        raise ValueError(
            f"a vocabulary of {vocab} tokens is too large to sample from, the limit is {MAX_VOCAB}"
        )
    if launch is not None:
        return sample_cuda(logits_RV, params, launch=launch)
    view = whole_rows(logits_RV)
    peak_RJ = logit_peaks(view.logit_RJW)
    greedy_R = first_largest(view.logit_RJW, view.first_RJ, peak_RJ=peak_RJ).id_R
    resolved = resolve(params, max_R=peak_RJ.max(axis=1), vocab=vocab)

    id_R = lax.platform_dependent(
        view, resolved, peak_RJ, greedy_R, cpu=_draw_where_needed, default=_draw_all_at_once
    )
    return jnp.where(jnp.isfinite(peak_RJ.max(axis=1)), id_R, NOT_FINITE)


def _draw_all_at_once(
    view: View, rows: Rows, peak_RJ: Float[Array, "R J"], greedy_R: Int32[Array, " R"]
) -> Int32[Array, " R"]:
    del peak_RJ
    return jnp.where(rows.draws_R, draw_branch_free(view, rows), greedy_R)


def _draw_where_needed(
    view: View, rows: Rows, peak_RJ: Float[Array, "R J"], greedy_R: Int32[Array, " R"]
) -> Int32[Array, " R"]:
    def draw() -> Int32[Array, " R"]:
        return _draw_by_stages(view, rows, peak_RJ, greedy_R)

    return lax.cond(rows.draws_R.any(), draw, lambda: greedy_R)


def _draw_by_stages(
    view: View, rows: Rows, peak_RJ: Float[Array, "R J"], greedy_R: Int32[Array, " R"]
) -> Int32[Array, " R"]:
    filters = rows.filters
    mass_R = lax.cond(
        needs_mass(filters).any(), lambda: mass_value(mass(view.logit_RJW, filters)), lambda: filters.mass_R
    )
    rows = rows._replace(filters=filters._replace(mass_R=mass_R))
    tokens = _Tokens(greedy_R, ~rows.draws_R)
    num_rows, blocks = view.first_RJ.shape

    def tile_rows(blocks: int) -> int:
        return min(num_rows, _TILE_TOKENS // (blocks * BLOCK_TOKENS) or 1)

    if blocks > 4 * _SHORT_LIST_BLOCKS:
        draw = partial(_draw_short_lists, view, rows, peak_RJ)
        tokens = _in_tiles(draw, is_filtered(filters), tokens, tile_rows=tile_rows(_SHORT_LIST_BLOCKS))
    draw = partial(_draw_whole_rows, view, rows)
    return _in_tiles(draw, ~tokens.is_final_R, tokens, tile_rows=tile_rows(blocks)).id_R


def _in_tiles(draw: _DrawFn, is_open_R: Bool[Array, " R"], tokens: _Tokens, *, tile_rows: int) -> _Tokens:
    """Tokens of the open rows drawn anew, `tile_rows` of them at a time."""
    rows = is_open_R.shape[0]
    open_row_R = jnp.nonzero(is_open_R, size=rows, fill_value=rows)[0].astype(jnp.int32)

    def draw_tile(tile: Int32[Array, ""], tokens: _Tokens) -> _Tokens:
        # A slice that would pass the end starts earlier, and draws some rows a second time.
        row_Q = lax.dynamic_slice(open_row_R, (tile * tile_rows,), (tile_rows,))
        drawn = draw(row_Q)
        return _Tokens(
            tokens.id_R.at[row_Q].set(drawn.id_R, mode="drop"),
            tokens.is_final_R.at[row_Q].set(drawn.is_final_R, mode="drop"),
        )

    tiles = (is_open_R.sum(dtype=jnp.int32) + (tile_rows - 1)) // tile_rows
    return lax.fori_loop(0, tiles, draw_tile, tokens)


def _draw_short_lists(
    view: View, rows: Rows, peak_RJ: Float[Array, "R J"], row_Q: Int32[Array, " Q"]
) -> _Tokens:
    """Draw from the blocks with the highest maxima; final where no token outside of them can be drawn."""
    own = _take(rows, row_Q)
    peak_QM, block_QM = lax.top_k(_take(peak_RJ, row_Q), _SHORT_LIST_BLOCKS)
    logit_QMW = view.logit_RJW.at[row_Q[:, None], block_QM].get(mode="clip")
    sieved = sieve(logit_QMW, own.filters, outside_R=peak_QM.min(axis=1))
    first_QM = block_QM * BLOCK_TOKENS
    id_Q = draw_through(sieved, first_QM, scores(View(logit_QMW, first_QM), own))
    return _Tokens(id_Q, sieved.is_sure_R)


def _draw_whole_rows(view: View, rows: Rows, row_Q: Int32[Array, " Q"]) -> _Tokens:
    """Draw from all blocks."""
    own_view, own = _take(view, row_Q), _take(rows, row_Q)
    score_QJW = scores(own_view, own)

    def through_filters() -> Int32[Array, " Q"]:
        sieved = sieve(own_view.logit_RJW, own.filters, outside_R=jnp.full(row_Q.shape, -_INF))
        return draw_through(sieved, own_view.first_RJ, score_QJW)

    def unfiltered() -> Int32[Array, " Q"]:
        return first_largest(score_QJW, own_view.first_RJ, peak_RJ=peaks(score_QJW)).id_R

    id_Q = lax.cond(is_filtered(own.filters).any(), through_filters, unfiltered)
    return _Tokens(id_Q, jnp.ones(row_Q.shape, jnp.bool_))


def _take(tree: _Tree, row_Q: Int32[Array, " Q"]) -> _Tree:
    """Some rows of every array."""

    def take(array_R: Array) -> Array:
        return array_R.at[row_Q].get(mode="clip")

    return jax.tree.map(take, tree)
