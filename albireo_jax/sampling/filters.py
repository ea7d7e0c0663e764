"""Top-k, top-p and min-p as one number per row: the lowest logit that may still be drawn.

Nothing is sorted. The k-th largest logit is found by bisection over the bits of a float32, which order like
integers; the nucleus by bisection over *weights*, which are integers: round((2^28 - 16) * p / p_max) for a
token of probability p. Integers add up to the same sum in any order, so a nucleus depends on nothing but its
row: not on how many rows are reduced together, on padding of the vocabulary, or on the device's shape.

A filter runs on a *view* of a row: all of it, or just the blocks with its highest logits. In the second case
it also says whether the view was enough to be sure.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

MAX_VOCAB = 2**20
"""Tokens whose weights can be added up without overflow."""

_MAX_WEIGHT = np.int32(2**28 - 2**4)  # the largest float32 below 2^28
_WEIGHT_BITS = 28
_GROUP = 16  # weights that fit a uint32 together
_INF = np.float32(np.inf)


class RowFilters(NamedTuple):
    """What a row filters by, neutral where it does not: top_k 0, top_p 1, min_p 0; temperature > 0.

    `max_R` is the row's largest logit, finite. `mass_R` is the `mass` of all its tokens, only read
    for rows with top-p and without top-k.
    """

    temperature_R: Float[Array, " R"]
    top_k_R: Int32[Array, " R"]
    top_p_R: Float[Array, " R"]
    min_p_R: Float[Array, " R"]
    max_R: Float[Array, " R"]
    mass_R: Float[Array, " R"]


class Floor(NamedTuple):
    """The lowest logit that may be drawn, and whether no token outside of the view could be."""

    logit_R: Float[Array, " R"]
    is_sure_R: Bool[Array, " R"]


def is_filtered(filters: RowFilters) -> Bool[Array, " R"]:
    """Rows that filter at all."""
    return (filters.top_k_R > 0) | (filters.top_p_R < 1) | (filters.min_p_R > 0)


def needs_mass(filters: RowFilters) -> Bool[Array, " R"]:
    """Rows whose nucleus is a share of their whole vocabulary."""
    return (filters.top_p_R < 1) & (filters.top_k_R == 0)


def mass(logit_RJW: Float[Array, "R J W"], filters: RowFilters) -> Float[Array, " R"]:
    """Sum of the weights of all tokens in view."""
    return _sum(_weights(logit_RJW, filters))


def floor(logit_RJW: Float[Array, "R J W"], filters: RowFilters, *, outside_R: Float[Array, " R"]) -> Floor:
    """The floor under top-k, then top-p of what that leaves, then min-p, given a view of each row.

    `outside_R` is the largest logit outside of the view (minus infinity: there is none). A floor that is
    not sure means nothing.
    """
    no_floor_R = jnp.full_like(outside_R, -_INF)
    kth_R = lax.cond((filters.top_k_R > 0).any(), lambda: _kth_logit(logit_RJW, filters), lambda: no_floor_R)
    weight_RJW = jnp.where(logit_RJW >= _wide(kth_R), _weights(logit_RJW, filters), 0)
    nucleus_R = lax.cond(
        (filters.top_p_R < 1).any(),
        lambda: _nucleus_weight(weight_RJW, filters),
        lambda: jnp.zeros_like(filters.top_k_R),
    )
    least_R = jnp.maximum(nucleus_R, jnp.ceil(filters.min_p_R * np.float32(_MAX_WEIGHT)).astype(jnp.int32))
    lightest_R = jnp.where(weight_RJW >= _wide(least_R), logit_RJW, _INF).min(axis=(1, 2))
    # With top-k, a nucleus is only right if the view holds the k logits.
    by_weight_R = (filters.top_k_R == 0) & (_weights(_wide(outside_R), filters)[:, 0, 0] < least_R)
    return Floor(
        logit_R=jnp.where(least_R > 0, lightest_R, kth_R),
        is_sure_R=(outside_R < kth_R) | by_weight_R | (outside_R == -_INF),
    )


def _weights(logit_RJW: Float[Array, "R J W"], filters: RowFilters) -> Int32[Array, "R J W"]:
    scaled_RJW = (logit_RJW - _wide(filters.max_R)) / _wide(filters.temperature_R)
    return jnp.round(jnp.exp(scaled_RJW) * np.float32(_MAX_WEIGHT)).astype(jnp.int32)


def _sum(weight_RJW: Int32[Array, "R J W"]) -> Float[Array, " R"]:
    """The exact integer sum, rounded to float32: monotone in every weight, whatever the order."""
    rows = weight_RJW.shape[0]
    group_RG = weight_RJW.reshape(rows, -1, _GROUP).sum(axis=2).astype(jnp.uint32)
    high_R = (group_RG >> 16).sum(axis=1)
    low_R = (group_RG & np.uint32(0xFFFF)).sum(axis=1)
    carried_R = high_R + (low_R >> 16)
    return carried_R.astype(jnp.float32) * np.float32(2**16) + (low_R & np.uint32(0xFFFF)).astype(jnp.float32)


def _kth_logit(logit_RJW: Float[Array, "R J W"], filters: RowFilters) -> Float[Array, " R"]:
    """The k-th largest logit in view; minus infinity for rows without top-k."""
    low_R = jnp.full_like(filters.top_k_R, _ordered(-_INF))
    high_R = jnp.where(filters.top_k_R > 0, _ordered(filters.max_R), low_R)

    def has_k(bits_R: Int32[Array, " R"]) -> Bool[Array, " R"]:
        is_in_RJW = logit_RJW >= _wide(_float(bits_R))
        return is_in_RJW.astype(jnp.int32).sum(axis=(1, 2)) >= filters.top_k_R

    return _float(_largest(has_k, low_R, high_R, bits=32))


def _nucleus_weight(weight_RJW: Int32[Array, "R J W"], filters: RowFilters) -> Int32[Array, " R"]:
    """The weight of the lightest token in the nucleus; 0 for rows without top-p."""
    whole_R = jnp.where(filters.top_k_R > 0, _sum(weight_RJW), filters.mass_R)
    share_R = filters.top_p_R * whole_R

    def reaches(least_R: Int32[Array, " R"]) -> Bool[Array, " R"]:
        return _sum(jnp.where(weight_RJW >= _wide(least_R), weight_RJW, 0)) >= share_R

    high_R = jnp.where(filters.top_p_R < 1, _MAX_WEIGHT, 0)
    return _largest(reaches, jnp.zeros_like(high_R), high_R, bits=_WEIGHT_BITS)


def _largest(
    holds: Callable[[Int32[Array, " R"]], Bool[Array, " R"]],
    low_R: Int32[Array, " R"],
    high_R: Int32[Array, " R"],
    *,
    bits: int,
) -> Int32[Array, " R"]:
    """The largest number in [low, high] for which a falling predicate holds; low if there is none."""

    def halve(_: Int32[Array, ""], bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low_R, high_R = bracket
        middle_R = (low_R | high_R) - ((low_R ^ high_R) >> 1)  # their mean, rounded up, without overflow
        holds_R = holds(middle_R)
        return jnp.where(holds_R, middle_R, low_R), jnp.where(holds_R, high_R, middle_R - 1)

    return lax.fori_loop(0, bits, halve, (low_R, high_R))[0]


def _ordered(logit: Float[Array, "..."] | np.float32) -> Int32[Array, "..."]:
    """The integer that orders like the float; both zeros differ, NaN is outside the infinities."""
    bits = lax.bitcast_convert_type(logit, jnp.int32)
    return jnp.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def _float(ordered: Int32[Array, "..."]) -> Float[Array, "..."]:
    bits = jnp.where(ordered < 0, ordered ^ np.int32(0x7FFFFFFF), ordered)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _wide(per_row_R: Array) -> Array:
    """One number per row, shaped to broadcast over its blocks."""
    return per_row_R[:, None, None]
