"""Parts of every sampler: what a row asks for, its scores, and the draw through a sieve.

A token's score is its logit over the temperature plus Gumbel noise, and the largest score wins. Both
terms are functions of the row alone, so every way of finding the winner finds the same token.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from albireo_jax.sampling.blocks import View, first_largest, peaks, value_at, wide
from albireo_jax.sampling.filters import (
    RowFilters,
    SamplerParams,
    Sieve,
    is_drawn,
    passes,
    row_filters,
    scaled,
)
from albireo_jax.sampling.noise import Words, gumbel

_INF = np.float32(np.inf)


class Rows(NamedTuple):
    """The parameters of rows, neutral where a row is greedy or has no token."""

    draws_R: Bool[Array, " R"]
    filters: RowFilters
    seed: Words
    position_R: UInt32[Array, " R"]


class _Round(NamedTuple):
    """Only logits above the floor are still in the draw; the last winner, and whether it passed."""

    floor_R: Float[Array, " R"]
    id_R: Int32[Array, " R"]
    is_done_R: Bool[Array, " R"]


def resolve(params: SamplerParams, *, max_R: Float[Array, " R"], vocab: int) -> Rows:
    """The parameters of rows in the terms of the samplers, given the rows' largest logits."""
    draws_R = is_drawn(params) & jnp.isfinite(max_R)
    return Rows(
        draws_R=draws_R,
        filters=row_filters(params, draws_R, max_R=max_R, vocab=vocab),
        seed=Words(params.seed_R2[:, 0], params.seed_R2[:, 1]),
        position_R=params.position_R.astype(jnp.uint32),
    )


def scores(view: View, rows: Rows) -> Float[Array, "R J W"]:
    """Scaled logits and noise."""
    lane_W = jnp.arange(view.logit_RJW.shape[2], dtype=jnp.uint32)
    id_RJW = view.first_RJ.astype(jnp.uint32)[:, :, None] + lane_W[None, None, :]
    key = Words(wide(rows.seed.first), wide(rows.seed.second))
    return scaled(view.logit_RJW, rows.filters) + gumbel(key, Words(wide(rows.position_R), id_RJW))


def draw_through(
    sieved: Sieve, first_RJ: Int32[Array, "R J"], score_RJW: Float[Array, "R J W"]
) -> Int32[Array, " R"]:
    """The id of the largest score among the tokens that pass; means nothing where the sieve is not sure.

    A winner that does not pass rules out all that is not above it, and the next round draws from the rest.
    Top-p takes 1 + ln(1/p) rounds on average, whatever the vocabulary.
    """

    def draw(state: _Round) -> _Round:
        is_above_RJW = sieved.logit_RJW > wide(state.floor_R)
        above_RJW = jnp.where(is_above_RJW, score_RJW, -_INF)
        best = first_largest(above_RJW, first_RJ, peak_RJ=peaks(above_RJW))
        logit_R = value_at(sieved.logit_RJW, best)
        # Nothing left above the floor would be our bug, or NaN; without this it would also be a hang.
        is_done_R = state.is_done_R | passes(sieved, logit_R) | ~(logit_R > state.floor_R)
        return _Round(
            jnp.where(is_done_R, state.floor_R, logit_R),
            best.id_R,  # of a row that is done, the same again
            is_done_R,
        )

    rows = first_RJ.shape[0]
    start = _Round(jnp.full(rows, -_INF), jnp.zeros(rows, jnp.int32), ~sieved.is_sure_R)
    return lax.while_loop(lambda state: ~state.is_done_R.all(), draw, start).id_R
