"""Log probabilities of given tokens and of the likeliest ones, over a vocabulary that is split over ranks.

Only a few numbers per row travel: its largest logit, the sum of exponentials, the given token's logit and
how many are larger, and each rank's B likeliest tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from albireo_jax.sampling.blocks import largest_logits


class RowScores(NamedTuple):
    """Log probability and rank (1: likeliest) of the given token of R rows, and the B likeliest, in order.

    Among equals the lowest id comes first, and all have the rank of the first.
    """

    logprob_R: Float[Array, " R"]
    rank_R: Int32[Array, " R"]
    top_id_RB: Int32[Array, "R B"]
    top_logprob_RB: Float[Array, "R B"]


def score_rows(
    logits_Rv: Float[Array, "R v"], id_R: Int32[Array, " R"], *, num_top: int, axis: str | None
) -> RowScores:
    """Scores of the tokens `id_R`, equal on all ranks; `axis` None means that rows are whole.

    A row that holds a NaN, or whose id is none of the vocabulary, has scores that mean nothing.
    """
    share = logits_Rv.shape[1]
    first = 0 if axis is None else lax.axis_index(axis) * share
    max_R = _over_ranks(lax.pmax, logits_Rv.max(axis=1), axis)
    total_R = _over_ranks(lax.psum, jnp.exp(logits_Rv - max_R[:, None]).sum(axis=1), axis)
    log_total_R = max_R + jnp.log(total_R)

    at_R = id_R - first
    is_own_R = (at_R >= 0) & (at_R < share)
    own_R = jnp.take_along_axis(logits_Rv, jnp.clip(at_R, 0, share - 1)[:, None], axis=1)[:, 0]
    given_R = _over_ranks(lax.pmax, jnp.where(is_own_R, own_R, -jnp.inf), axis)
    larger_R = (logits_Rv > given_R[:, None]).sum(axis=1, dtype=jnp.int32)

    top_RB, column_RB = largest_logits(logits_Rv, min(num_top, share))
    id_RB = column_RB + first
    if axis is not None:
        top_RB = lax.all_gather(top_RB, axis, axis=1, tiled=True)
        id_RB = lax.all_gather(id_RB, axis, axis=1, tiled=True)
        top_RB, at_RB = lax.top_k(top_RB, num_top)  # ranks are in the order of their ids
        id_RB = jnp.take_along_axis(id_RB, at_RB, axis=1)
    return RowScores(
        logprob_R=given_R - log_total_R,
        rank_R=1 + _over_ranks(lax.psum, larger_R, axis),
        top_id_RB=id_RB,
        top_logprob_RB=top_RB - log_total_R[:, None],
    )


def _over_ranks(reduce: Callable[[Array, str], Array], per_row_R: Array, axis: str | None) -> Array:
    return per_row_R if axis is None else reduce(per_row_R, axis)
