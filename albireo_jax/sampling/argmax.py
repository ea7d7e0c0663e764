"""Rows that filter nothing: each rank finds the best of its own tokens, and the ranks compare winners.

Only a few numbers per row travel, whatever the vocabulary: its largest logit, which the scores are measured
from, the best score, and the lowest id that has it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from albireo_jax.core.plan import NOT_FINITE
from albireo_jax.sampling.blocks import View, first_largest, logit_peaks, peaks, whole_rows, wide
from albireo_jax.sampling.draw import Rows, resolve, scores
from albireo_jax.sampling.filters import SamplerParams

_NO_ID = np.iinfo(np.int32).max


class _Best(NamedTuple):
    """The largest value among a rank's own tokens of each row, and the lowest id that has it."""

    value_R: Float[Array, " R"]
    id_R: Int32[Array, " R"]


def sample_greedy(logits_Rv: Float[Array, "R v"], params: SamplerParams, *, axis: str) -> Int32[Array, " R"]:
    """The token of each row as if its temperature were 0: the largest logit, the lowest id on ties."""
    del params
    view = own_view(logits_Rv, axis=axis)
    peak_RJ = logit_peaks(view.logit_RJW)
    return _compare(_own_best(view.logit_RJW, view, peak_RJ), max_R=largest(peak_RJ, axis=axis), axis=axis)


def sample_unfiltered(
    logits_Rv: Float[Array, "R v"], params: SamplerParams, *, axis: str
) -> Int32[Array, " R"]:
    """The token of each row as if it had no top-k, top-p or min-p; greedy where the temperature is 0."""
    view = own_view(logits_Rv, axis=axis)
    peak_RJ = logit_peaks(view.logit_RJW)
    max_R = largest(peak_RJ, axis=axis)
    rows = resolve(params, max_R=max_R, vocab=logits_Rv.shape[1] * lax.axis_size(axis))
    return best(view, rows, peak_RJ, max_R=max_R, axis=axis)


def own_view(logits_Rv: Float[Array, "R v"], *, axis: str) -> View:
    """A rank's share of the rows; its ids are those of the whole vocabulary."""
    view = whole_rows(logits_Rv)
    return view._replace(first_RJ=view.first_RJ + lax.axis_index(axis) * logits_Rv.shape[1])


def largest(peak_RJ: Float[Array, "R J"], *, axis: str) -> Float[Array, " R"]:
    """The largest logit of each row over all ranks; infinite if one of them is not a number."""
    return _over_ranks(lax.pmax, peak_RJ.max(axis=1), axis)


def best(
    view: View, rows: Rows, peak_RJ: Float[Array, "R J"], *, max_R: Float[Array, " R"], axis: str
) -> Int32[Array, " R"]:
    """The id of each row with the largest score over all ranks; a row that does not draw has no noise."""
    own = lax.platform_dependent(view, rows, peak_RJ, cpu=_scored_where_needed, default=_scored)
    return _compare(own, max_R=max_R, axis=axis)


def _scored(view: View, rows: Rows, peak_RJ: Float[Array, "R J"]) -> _Best:
    del peak_RJ
    score_RJW = jnp.where(wide(rows.draws_R), scores(view, rows), view.logit_RJW)
    return _own_best(score_RJW, view, peaks(score_RJW))


def _scored_where_needed(view: View, rows: Rows, peak_RJ: Float[Array, "R J"]) -> _Best:
    """The same, without scores if no row draws. On a GPU the host would wait for that to be known."""
    return lax.cond(
        rows.draws_R.any(),
        lambda: _scored(view, rows, peak_RJ),
        lambda: _own_best(view.logit_RJW, view, peak_RJ),
    )


def _own_best(value_RJW: Float[Array, "R J W"], view: View, peak_RJ: Float[Array, "R J"]) -> _Best:
    return _Best(peak_RJ.max(axis=1), first_largest(value_RJW, view.first_RJ, peak_RJ=peak_RJ).id_R)


def _compare(own: _Best, *, max_R: Float[Array, " R"], axis: str) -> Int32[Array, " R"]:
    """The lowest id with the largest value over all ranks."""
    is_best_R = own.value_R == _over_ranks(lax.pmax, own.value_R, axis)
    id_R = _over_ranks(lax.pmin, jnp.where(is_best_R, own.id_R, _NO_ID), axis)
    return jnp.where(jnp.isfinite(max_R), id_R, NOT_FINITE)


def _over_ranks(reduce: Callable[[Array, str], Array], per_row_R: Array, axis: str) -> Array:
    """A reduction over all ranks; one rank alone would still copy its numbers to itself."""
    return per_row_R if lax.axis_size(axis) == 1 else reduce(per_row_R, axis)
