"""Rows drawn without a branch or a loop whose end only the device knows.

A GPU's host waits for such a decision, and with it for all that was queued before, so that no step would
overlap the next. Here every row takes the same way. What top-k and top-p keep is found before the draw, as
the least logit that passes, digit by digit of its 32 bits, which order like the logits::

    bits     ??.. ...   3 sums over the row, of what is above x00111..., x01111..., x10111...: 2 bits known
             10?? ...   3 more: 4 bits known
             1001 ...   after 16 passes, all

Three sums share a pass: as many as the arithmetic of a GPU keeps up with while the row streams by. The
outcome is that of `draw.draw_through`, which draws first and tests afterwards, since the same sums decide.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from albireo_jax.sampling.blocks import View, first_largest, peaks, wide
from albireo_jax.sampling.draw import Rows, scores
from albireo_jax.sampling.filters import Mass, count_share, is_likely, mass_share, mass_value, weights
from albireo_jax.sampling.order import LEAST, ordered_float

_DIGIT = 2  # bits that a pass over the row finds
_WEIGHT_BITS = 28
_INF = np.float32(np.inf)

_WordsFn: TypeAlias = Callable[[Bool[Array, "R J W"]], list[UInt32[Array, "R J"]]]
_TotalFn: TypeAlias = Callable[[UInt32[Array, "R X"]], Float[Array, " R"]]


class _Amount(NamedTuple):
    """The amount of some tokens of each row: the total of X words, each of them a sum over the blocks."""

    words: _WordsFn
    total: _TotalFn


def draw_branch_free(view: View, rows: Rows) -> Int32[Array, " R"]:
    """The token of each row that draws, from all of its blocks; means nothing for the others."""
    filters = rows.filters
    logit_RJW = view.logit_RJW
    weight = _weight(weights(logit_RJW, filters))
    kth_R = _least_passing(logit_RJW, count_share(filters), _count())
    is_top_RJW = logit_RJW >= wide(kth_R)
    mass_R = weight.total(_sums(weight.words(is_top_RJW)))
    last_R = _least_passing(logit_RJW, mass_share(filters, mass_R), weight)
    keeps_RJW = is_top_RJW & (logit_RJW >= wide(last_R)) & (logit_RJW > -_INF)
    keeps_RJW &= is_likely(logit_RJW, filters)
    score_RJW = jnp.where(keeps_RJW, scores(view, rows), -_INF)
    return first_largest(score_RJW, view.first_RJ, peak_RJ=peaks(score_RJW)).id_R


def _least_passing(
    logit_RJW: Float[Array, "R J W"], share_R: Float[Array, " R"], amount: _Amount
) -> Float[Array, " R"]:
    """The least number such that what is above it amounts to less than a row's share, which is 1 or more.

    Numbers below minus infinity count as that.
    """
    key_R = jnp.zeros(share_R.shape, jnp.uint32)
    for shift in reversed(range(0, 32, _DIGIT)):
        # The largest number with each digit but the last, and what is above it.
        last = [key_R | np.uint32((digit + 1 << shift) - 1) for digit in range(2**_DIGIT - 1)]
        words = [amount.words(logit_RJW > wide(_number(last_R))) for last_R in last]
        sum_RX = _sums([word_RJ for each in words for word_RJ in each])
        digit_R = jnp.zeros_like(key_R)
        for above_RX in jnp.split(sum_RX, len(last), axis=1):
            digit_R += (amount.total(above_RX) >= share_R).astype(jnp.uint32)
        key_R |= digit_R << shift
    return _number(key_R)


def _sums(words: list[UInt32[Array, "R J"]]) -> UInt32[Array, "R X"]:
    """The sums of words over the blocks, as one operation."""
    return jnp.stack(words, axis=1).sum(axis=2)


def _number(key_R: UInt32[Array, " R"]) -> Float[Array, " R"]:
    """The float of an unsigned integer that orders like it."""
    ordered_R = lax.bitcast_convert_type(key_R ^ np.uint32(2**31), jnp.int32)
    return ordered_float(jnp.maximum(ordered_R, LEAST))


def _count() -> _Amount:
    """Each token counts as one."""

    def words(is_in_RJW: Bool[Array, "R J W"]) -> list[UInt32[Array, "R J"]]:
        return [is_in_RJW.sum(axis=2, dtype=jnp.uint32)]

    def total(sum_RX: UInt32[Array, "R X"]) -> Float[Array, " R"]:
        return sum_RX[:, 0].astype(jnp.float32)

    return _Amount(words, total)


def _weight(weight_RJW: Int32[Array, "R J W"]) -> _Amount:
    """Each token counts as its weight, added up exactly: in as few words as the size of a row allows."""
    _, blocks, lanes = weight_RJW.shape
    bits = 32 - (blocks * lanes - 1).bit_length()  # of a weight's word, so that no sum overflows
    shifts = range(0, _WEIGHT_BITS, bits)

    def words(is_in_RJW: Bool[Array, "R J W"]) -> list[UInt32[Array, "R J"]]:
        own_RJW = jnp.where(is_in_RJW, weight_RJW, 0)
        parts = [(own_RJW >> shift) & np.int32(2**bits - 1) for shift in shifts]
        return [part_RJW.sum(axis=2, dtype=jnp.uint32) for part_RJW in parts]

    def total(sum_RX: UInt32[Array, "R X"]) -> Float[Array, " R"]:
        high_R = low_R = jnp.zeros(sum_RX.shape[0], jnp.uint32)
        for nth, shift in enumerate(shifts):
            sum_R = sum_RX[:, nth]
            low_R += (sum_R << shift) & np.uint32(0xFFFF)
            high_R += sum_R >> (16 - shift) if shift <= 16 else sum_R << (shift - 16)
        return mass_value(Mass(high_R, low_R))

    return _Amount(words, total)
