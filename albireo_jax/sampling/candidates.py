"""Rows that filter: only each rank's best tokens travel, if nothing else can be drawn.

::

    R rows × V/t ──best K of each row──▶ R × K ──all-to-all──▶ R/t rows × t K ──sieve, noise──▶ R/t ids
                                                                                     │
           all rows from whole vocabularies (all-to-all of the logits) ◀── a row that is not sure

A rank's other tokens have no larger logit than the least that it sent, so the largest of these bounds what is
outside, and the sieve knows whether the candidates hold all that may be drawn. The mass of a nucleus counts
all tokens: each rank adds up its own, exactly, and the sums are added. Rows that filter nothing are drawn as
in `best`, in the same step.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from albireo_jax.sampling.argmax import best, largest, own_view
from albireo_jax.sampling.blocks import BLOCK_TOKENS, View, logit_peaks
from albireo_jax.sampling.draw import Rows, draw_through, resolve, scores
from albireo_jax.sampling.filters import Mass, SamplerParams, is_filtered, mass, mass_value, needs_mass, sieve
from albireo_jax.sampling.sharded import own_rows, pad_rows, sample_all_to_all

MAX_CANDIDATES = 128
"""K: tokens of a row that each rank sends; 32 or more, and a multiple of 16."""

_NOT_SURE = np.int32(-2)
_NO_ID = np.int32(-1)
_INF = np.float32(np.inf)


class _Candidates(NamedTuple):
    """Each rank's best logits of a row with their ids, and the largest logit that may be outside."""

    logit_RK: Float[Array, "R K"]
    id_RK: Int32[Array, "R K"]
    outside_R: Float[Array, " R"]


class _Asked(NamedTuple):
    """The facts of each row besides its logits, all of them the same on every rank."""

    params: SamplerParams
    max_R: Float[Array, " R"]
    mass_R: Float[Array, " R"]


def sample_candidates(
    logits_Rv: Float[Array, "R v"], params: SamplerParams, *, axis: str
) -> Int32[Array, " R"]:
    """Ids of all rows on every rank, from candidates where they suffice for every row that filters."""
    vocab = logits_Rv.shape[1] * lax.axis_size(axis)
    view = own_view(logits_Rv, axis=axis)
    peak_RJ = logit_peaks(view.logit_RJW)
    max_R = largest(peak_RJ, axis=axis)
    rows = resolve(params, max_R=max_R, vocab=vocab)
    asked = _Asked(params, max_R, _mass(view, rows, axis=axis))
    drawn_R = _draw(_candidates(view, peak_RJ, num_tokens=logits_Rv.shape[1]), asked, vocab=vocab, axis=axis)
    filtered_R = is_filtered(rows.filters)
    others = rows._replace(draws_R=rows.draws_R & ~filtered_R)
    id_R = jnp.where(filtered_R, drawn_R, best(view, others, peak_RJ, max_R=max_R, axis=axis))
    return lax.cond(
        (id_R == _NOT_SURE).any(), lambda: sample_all_to_all(logits_Rv, params, axis=axis), lambda: id_R
    )


def _mass(view: View, rows: Rows, *, axis: str) -> Float[Array, " R"]:
    """The mass of the whole vocabulary, for rows that need it."""

    def total() -> Float[Array, " R"]:
        own = mass(view.logit_RJW, rows.filters)
        return mass_value(Mass(*(lax.psum(word_R, axis) for word_R in own)))

    return lax.cond(needs_mass(rows.filters).any(), total, lambda: rows.filters.mass_R)


def _candidates(view: View, peak_RJ: Float[Array, "R J"], *, num_tokens: int) -> _Candidates:
    """The K largest logits of each row: they are in the K blocks with the largest maxima.

    What only fills the last block has no id, since those behind the last token are another rank's.
    """
    num_rows, blocks = peak_RJ.shape
    _, block_RM = lax.top_k(peak_RJ, min(MAX_CANDIDATES, blocks))
    row_R1 = jnp.arange(num_rows)[:, None]
    logit_RX = view.logit_RJW[row_R1, block_RM].reshape(num_rows, -1)
    lane_W = jnp.arange(BLOCK_TOKENS, dtype=jnp.int32)
    index_RMW = (block_RM * BLOCK_TOKENS)[:, :, None] + lane_W[None, None, :]
    id_RMW = view.first_RJ[row_R1, block_RM][:, :, None] + lane_W[None, None, :]
    id_RX = jnp.where(index_RMW < num_tokens, id_RMW, _NO_ID).reshape(num_rows, -1)
    count = min(MAX_CANDIDATES, logit_RX.shape[1])
    logit_RK, index_RK = lax.top_k(logit_RX, count)
    least_R = logit_RK.min(axis=1)  # the last one: but a slice makes XLA sort everything on a CPU
    holds_all = count == blocks * BLOCK_TOKENS
    outside_R = jnp.full_like(least_R, -_INF) if holds_all else least_R
    return _Candidates(logit_RK, jnp.take_along_axis(id_RX, index_RK, axis=1), outside_R)


def _draw(candidates: _Candidates, asked: _Asked, *, vocab: int, axis: str) -> Int32[Array, " R"]:
    """Ids drawn from the candidates of all ranks, each row on one; _NOT_SURE where they may not suffice."""
    everyones = _exchange(candidates, axis=axis)
    own = jax.tree.map(partial(own_rows, axis=axis), asked)
    rows = resolve(own.params, max_R=own.max_R, vocab=vocab)
    rows = rows._replace(filters=rows.filters._replace(mass_R=own.mass_R))
    view = View(everyones.logit_RK[:, :, None], everyones.id_RK)  # each candidate is a block of one token
    sieved = sieve(view.logit_RJW, rows.filters, outside_R=everyones.outside_R)
    id_R = draw_through(sieved, view.first_RJ, scores(view, rows))
    sure_id_R = jnp.where(sieved.is_sure_R, id_R, _NOT_SURE)
    return lax.all_gather(sure_id_R, axis, tiled=True)[: asked.max_R.shape[0]]


def _exchange(candidates: _Candidates, *, axis: str) -> _Candidates:
    """All ranks' candidates of this rank's own rows, as one message."""
    bits_RK = lax.bitcast_convert_type(candidates.logit_RK, jnp.int32)
    outside_R1 = lax.bitcast_convert_type(candidates.outside_R, jnp.int32)[:, None]
    sent_RX = pad_rows(jnp.concatenate([bits_RK, candidates.id_RK, outside_R1], axis=1), axis=axis)
    taken_RX = lax.all_to_all(sent_RX, axis, split_axis=0, concat_axis=1, tiled=True)
    rows, count = taken_RX.shape[0], bits_RK.shape[1]
    by_rank = taken_RX.reshape(rows, -1, sent_RX.shape[1])
    logit_RK = lax.bitcast_convert_type(by_rank[:, :, :count], jnp.float32)
    outside_RX = lax.bitcast_convert_type(by_rank[:, :, -1], jnp.float32)
    id_RK = by_rank[:, :, count : 2 * count].reshape(rows, -1)
    return _Candidates(logit_RK.reshape(rows, -1), id_RK, outside_RX.max(axis=1))
