"""Top-k, top-p and min-p without a sort: which tokens of a row may be drawn at all.

A token passes top-k if fewer than k tokens have a larger logit, and top-p if the tokens with a larger logit
have less than p of the mass. Both are one sum over the row, so a sampler can draw first and test what it
drew (`passes`): a draw that fails also rules out everything below it. Only the two filters together need
to know the k-th largest logit beforehand; it is found by bisection over the bits of a float32, which order
like integers.

Mass is counted in *weights*, which are integers: round((2^28 - 16) * p / p_max) for a token of probability p.
Integers add up to the same sum in any order, so what passes depends on nothing but the row: not on how many
rows are reduced together, on padding of the vocabulary, or on the device.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from albireo_jax.core.token_sampling import PARAMETERS, WordKind
from albireo_jax.sampling.blocks import wide
from albireo_jax.sampling.order import LEAST, ordered, ordered_float

MAX_VOCAB = 2**20
"""Tokens whose weights can be added up without overflow."""

_MAX_WEIGHT = np.int32(2**28 - 2**4)  # the largest float32 below 2^28
_GROUP = 16  # weights that fit a uint32 together
_INF = np.float32(np.inf)
_SMALLEST = np.finfo(np.float32).tiny


class SamplerParams(NamedTuple):
    """The choice of each row's token, a `TokenSampling` for each row, and the token's position.

    temperature 0 is greedy; top_k 0 keeps all; top_p 1 and min_p 0 filter nothing. `seed_R2` holds the high
    and the low word of a 63-bit seed.
    """

    temperature_R: Float[Array, " R"]
    top_k_R: Int32[Array, " R"]
    top_p_R: Float[Array, " R"]
    min_p_R: Float[Array, " R"]
    seed_R2: UInt32[Array, "R 2"]
    position_R: Int32[Array, " R"]


class RowFilters(NamedTuple):
    """The filters of rows, neutral where a row has none: top_k 0, top_p 1, min_p 0; temperature > 0.

    `max_R` is the row's largest logit, finite. `mass_R` is the `mass` of all its tokens, only read
    for rows with top-p and without top-k.
    """

    temperature_R: Float[Array, " R"]
    top_k_R: Int32[Array, " R"]
    top_p_R: Float[Array, " R"]
    min_p_R: Float[Array, " R"]
    max_R: Float[Array, " R"]
    mass_R: Float[Array, " R"]


class Sieve(NamedTuple):
    """A view of rows (some of their blocks), ready for `passes`.

    `logit_RJW` is minus infinity where a token is out whatever is drawn. A token passes if those with larger
    logits weigh less than `share_R` together. Rows that are not sure may have tokens outside of the
    view that could be drawn as well.
    """

    logit_RJW: Float[Array, "R J W"]
    weight_RJW: Int32[Array, "R J W"]
    share_R: Float[Array, " R"]
    is_sure_R: Bool[Array, " R"]


class _Top(NamedTuple):
    """The smallest of some largest logits, and their mass, which ties with the smallest are part of."""

    kth_R: Float[Array, " R"]
    mass_R: Float[Array, " R"]


def sampler_params(word_RF: Int32[Array, "R F"], *, position_R: Int32[Array, " R"]) -> SamplerParams:
    """The parameters of rows from the words of each, which `TokenSampling.words` wrote."""
    array_of: dict[str, Array] = {}
    first = 0
    for name, parameter in PARAMETERS.items():
        own_RX = word_RF[:, first : first + parameter.kind.num_words]
        match parameter.kind:
            case WordKind.FLOAT:
                array_of[f"{name}_R"] = lax.bitcast_convert_type(own_RX[:, 0], jnp.float32)
            case WordKind.INT:
                array_of[f"{name}_R"] = own_RX[:, 0]
            case WordKind.INT64:
                array_of[f"{name}_R2"] = lax.bitcast_convert_type(own_RX, jnp.uint32)
        first += parameter.kind.num_words
    return SamplerParams(**array_of, position_R=position_R)


def is_drawn(params: SamplerParams) -> Bool[Array, " R"]:
    """Rows that draw their token; the others take their largest logit."""
    return params.temperature_R > 0


def selection_words(params: SamplerParams) -> Int32[Array, "R 3"]:
    """The bits of temperature, top-k and top-p of each row, which the kernels select tokens by."""
    temperature_R = lax.bitcast_convert_type(params.temperature_R, jnp.int32)
    top_p_R = lax.bitcast_convert_type(params.top_p_R, jnp.int32)
    return jnp.stack([temperature_R, params.top_k_R, top_p_R], axis=1)


def row_filters(
    params: SamplerParams, draws_R: Bool[Array, " R"], *, max_R: Float[Array, " R"], vocab: int
) -> RowFilters:
    """The filters of rows, given which of them draw, and their largest logits."""
    has_top_k_R = draws_R & (params.top_k_R > 0) & (params.top_k_R < vocab)
    return RowFilters(
        temperature_R=jnp.where(draws_R, jnp.maximum(params.temperature_R, _SMALLEST), 1),
        top_k_R=jnp.where(has_top_k_R, params.top_k_R, 0),
        top_p_R=jnp.where(draws_R, params.top_p_R, 1),
        min_p_R=jnp.where(draws_R, params.min_p_R, 0),
        max_R=jnp.where(draws_R, max_R, 0),
        mass_R=jnp.zeros_like(max_R),
    )


def is_filtered(filters: RowFilters) -> Bool[Array, " R"]:
    """Whether each row filters at all."""
    return (filters.top_k_R > 0) | (filters.top_p_R < 1) | (filters.min_p_R > 0)


def needs_mass(filters: RowFilters) -> Bool[Array, " R"]:
    """Whether each row's nucleus is a share of its whole vocabulary."""
    return (filters.top_p_R < 1) & (filters.top_k_R == 0)


def scaled(logit_RJW: Float[Array, "R J W"], filters: RowFilters) -> Float[Array, "R J W"]:
    """Logits over temperature, shifted so that the largest is 0: no temperature is too small."""
    return (logit_RJW - wide(filters.max_R)) / wide(filters.temperature_R)


def is_likely(logit_RJW: Float[Array, "R J W"], filters: RowFilters) -> Bool[Array, "R J W"]:
    """Logits that pass min-p: those with at least min_p times the largest probability."""
    return scaled(logit_RJW, filters) >= wide(jnp.log(filters.min_p_R))


def weights(logit_RJW: Float[Array, "R J W"], filters: RowFilters) -> Int32[Array, "R J W"]:
    """The integers that mass is counted in, up to 2^28."""
    return jnp.round(jnp.exp(scaled(logit_RJW, filters)) * np.float32(_MAX_WEIGHT)).astype(jnp.int32)


class Mass(NamedTuple):
    """A sum of weights as two words, so that the sums of several views can still be added exactly."""

    high_R: UInt32[Array, " R"]
    low_R: UInt32[Array, " R"]


def mass(logit_RJW: Float[Array, "R J W"], filters: RowFilters) -> Mass:
    """Sum of the weights of all tokens in view."""
    return _words(weights(logit_RJW, filters))


def mass_value(total: Mass) -> Float[Array, " R"]:
    """The exact sum, rounded to float32."""
    carried_R = total.high_R + (total.low_R >> 16)
    low_R = total.low_R & np.uint32(0xFFFF)
    return carried_R.astype(jnp.float32) * np.float32(2**16) + low_R.astype(jnp.float32)


def sieve(logit_RJW: Float[Array, "R J W"], filters: RowFilters, *, outside_R: Float[Array, " R"]) -> Sieve:
    """The sieve of a view; `outside_R` is the largest logit outside of it, minus infinity for none.

    A row is sure if the view holds the k largest logits, or all of the share above the largest logit
    outside; or if that one, and so all others outside, fails min-p.
    """
    weight_RJW = weights(logit_RJW, filters)
    has_both_R = (filters.top_k_R > 0) & (filters.top_p_R < 1)
    top = lax.cond(
        has_both_R.any(),
        lambda: _top(logit_RJW, weight_RJW, filters, k_R=jnp.where(has_both_R, filters.top_k_R, 0)),
        lambda: _Top(jnp.full_like(outside_R, -_INF), filters.mass_R),
    )
    share_R = _share(filters, jnp.where(has_both_R, top.mass_R, filters.mass_R))
    counts_R = (filters.top_k_R > 0) & ~has_both_R  # each token counts as one
    weight_RJW = jnp.where(wide(counts_R), 1, weight_RJW)

    above_R = _sum(jnp.where(logit_RJW > wide(outside_R), weight_RJW, 0))
    holds_share_R = ~has_both_R & (above_R >= share_R)
    floor_R = jnp.where(holds_share_R, outside_R, -_INF)
    outside_fails_R = ~has_both_R & ~is_likely(wide(outside_R), filters)[:, 0, 0]
    can_pass_RJW = (logit_RJW > wide(floor_R)) & (logit_RJW >= wide(top.kth_R))
    can_pass_RJW &= is_likely(logit_RJW, filters)
    return Sieve(
        logit_RJW=jnp.where(can_pass_RJW, logit_RJW, -_INF),
        weight_RJW=weight_RJW,
        share_R=share_R,
        is_sure_R=holds_share_R | outside_fails_R | (outside_R < top.kth_R) | (outside_R == -_INF),
    )


def passes(sieved: Sieve, logit_R: Float[Array, " R"]) -> Bool[Array, " R"]:
    """Rows whose token of this logit may be drawn."""
    heavier_RJW = jnp.where(sieved.logit_RJW > wide(logit_R), sieved.weight_RJW, 0)
    return _sum(heavier_RJW) < sieved.share_R


def count_share(filters: RowFilters) -> Float[Array, " R"]:
    """The number of tokens that top-k keeps; infinity for all."""
    return jnp.where(filters.top_k_R > 0, filters.top_k_R.astype(jnp.float32), _INF)


def mass_share(filters: RowFilters, mass_R: Float[Array, " R"]) -> Float[Array, " R"]:
    """The part that top-p keeps of the mass of the tokens that it chooses from; infinity for all."""
    nucleus_R = jnp.maximum(filters.top_p_R * mass_R, 1)  # the most probable token always passes
    return jnp.where(filters.top_p_R < 1, nucleus_R, _INF)


def _share(filters: RowFilters, mass_R: Float[Array, " R"]) -> Float[Array, " R"]:
    return jnp.where(filters.top_p_R < 1, mass_share(filters, mass_R), count_share(filters))


def _sum(weight_RJW: Int32[Array, "R J W"]) -> Float[Array, " R"]:
    """The exact integer sum, rounded to float32: monotone in every weight, whatever the order."""
    return mass_value(_words(weight_RJW))


def _words(weight_RJW: Int32[Array, "R J W"]) -> Mass:
    rows = weight_RJW.shape[0]
    group_RG = weight_RJW.reshape(rows, -1, _GROUP).sum(axis=2).astype(jnp.uint32)
    return Mass((group_RG >> 16).sum(axis=1), (group_RG & np.uint32(0xFFFF)).sum(axis=1))


def _top(
    logit_RJW: Float[Array, "R J W"],
    weight_RJW: Int32[Array, "R J W"],
    filters: RowFilters,
    *,
    k_R: Int32[Array, " R"],
) -> _Top:
    """The k largest logits in view, all where k is 0."""
    kth_R = _kth_logit(logit_RJW, k_R, filters.max_R)
    return _Top(kth_R, _sum(jnp.where(logit_RJW >= wide(kth_R), weight_RJW, 0)))


def _kth_logit(
    logit_RJW: Float[Array, "R J W"], k_R: Int32[Array, " R"], max_R: Float[Array, " R"]
) -> Float[Array, " R"]:
    """The k-th largest logit in view; minus infinity where k is 0."""
    low_R = jnp.full_like(k_R, LEAST)
    high_R = jnp.where(k_R > 0, ordered(max_R), low_R)

    def halve(_: Int32[Array, ""], bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low_R, high_R = bracket
        middle_R = (low_R | high_R) - ((low_R ^ high_R) >> 1)  # their mean, rounded up, without overflow
        is_in_RJW = logit_RJW >= wide(ordered_float(middle_R))
        has_k_R = is_in_RJW.astype(jnp.int32).sum(axis=(1, 2)) >= k_R
        return jnp.where(has_k_R, middle_R, low_R), jnp.where(has_k_R, high_R, middle_R - 1)

    return ordered_float(lax.fori_loop(0, 32, halve, (low_R, high_R))[0])
