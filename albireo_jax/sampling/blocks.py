"""Rows cut into blocks of neighbouring tokens, whose maxima say where a row is worth looking at."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

BLOCK_TOKENS = 64


class View(NamedTuple):
    """J blocks of W neighbouring logits of each row, and the id of each block's first token."""

    logit_RJW: Float[Array, "R J W"]
    first_RJ: Int32[Array, "R J"]


class Place(NamedTuple):
    """One token of each row: its id, its block in a view, and its place in the block."""

    id_R: Int32[Array, " R"]
    block_R: Int32[Array, " R"]
    lane_R: Int32[Array, " R"]


class Largest(NamedTuple):
    """The B largest logits of each row, in falling order, and their columns, in rising order among equals."""

    logit_RB: Float[Array, "R B"]
    column_RB: Int32[Array, "R B"]


def whole_rows(logits_RV: Float[Array, "R V"]) -> View:
    """All blocks of each row, in order; minus infinity fills the last one."""
    rows, vocab = logits_RV.shape
    if vocab % BLOCK_TOKENS:
        logits_RV = jnp.pad(logits_RV, ((0, 0), (0, -vocab % BLOCK_TOKENS)), constant_values=-np.inf)
    logit_RJW = logits_RV.reshape(rows, -1, BLOCK_TOKENS)
    first_J = jnp.arange(logit_RJW.shape[1], dtype=jnp.int32) * BLOCK_TOKENS
    return View(logit_RJW, jnp.broadcast_to(first_J, (rows, len(first_J))))


def peaks(value_RJW: Float[Array, "R J W"]) -> Float[Array, "R J"]:
    """The maximum of each block of numbers."""
    # Without the barrier, XLA reads all values once more for the maximum of a row.
    return lax.optimization_barrier(value_RJW.max(axis=2))


def logit_peaks(logit_RJW: Float[Array, "R J W"]) -> Float[Array, "R J"]:
    """The maximum of each block, infinite if a logit in it is not a number.

    A maximum alone passes over what is not a number (XLA's on a CPU does). A sum does not, and takes a fourth
    of the time of testing each logit. Half of a mean is a sum that cannot overflow.
    """
    is_number_RJ = ~jnp.isnan((logit_RJW * np.float32(0.5 / BLOCK_TOKENS)).sum(axis=2))
    return jnp.where(is_number_RJ, peaks(logit_RJW), np.float32(np.inf))


def first_largest(
    value_RJW: Float[Array, "R J W"], first_RJ: Int32[Array, "R J"], *, peak_RJ: Float[Array, "R J"]
) -> Place:
    """The lowest id whose value is the largest of its row, given the `peaks` of the values.

    By blocks, then inside of one: `jnp.argmax` over a vocabulary takes 10 times as long on a CPU.
    """
    is_best_RJ = peak_RJ == peak_RJ.max(axis=1, keepdims=True)
    first_R1 = jnp.where(is_best_RJ, first_RJ, np.iinfo(np.int32).max).min(axis=1, keepdims=True)
    block_J = jnp.arange(first_RJ.shape[1], dtype=jnp.int32)
    block_R = jnp.where(first_RJ == first_R1, block_J[None, :], 0).sum(axis=1)
    value_RW = jnp.take_along_axis(value_RJW, wide(block_R), axis=1, mode="clip")[:, 0]
    lane_R = jnp.argmax(value_RW, axis=1).astype(jnp.int32)
    return Place(first_R1[:, 0] + lane_R, block_R, lane_R)


def largest_logits(logits_RV: Float[Array, "R V"], count: int) -> Largest:
    """The `count` largest logits of each row, at most V.

    They are in the `count` blocks with the largest maxima, the first blocks among equals: each of these holds
    a logit that comes before all that are in other blocks. So few thousand numbers are sorted, not V.
    """
    view = whole_rows(logits_RV)
    peak_RJ = peaks(view.logit_RJW)
    _, block_RM = lax.top_k(peak_RJ, min(count, peak_RJ.shape[1]))
    block_RM = jnp.sort(block_RM, axis=1)  # so that equals stay in the order of their columns
    logit_RMW = jnp.take_along_axis(view.logit_RJW, block_RM[:, :, None], axis=1, mode="clip")
    logit_RB, at_RB = lax.top_k(logit_RMW.reshape(len(block_RM), -1), count)
    first_RB = jnp.take_along_axis(block_RM, at_RB // BLOCK_TOKENS, axis=1, mode="clip") * BLOCK_TOKENS
    return Largest(logit_RB, first_RB + at_RB % BLOCK_TOKENS)


def value_at(value_RJW: Float[Array, "R J W"], place: Place) -> Float[Array, " R"]:
    """One value of each row."""
    value_RW = jnp.take_along_axis(value_RJW, wide(place.block_R), axis=1, mode="clip")[:, 0]
    return jnp.take_along_axis(value_RW, place.lane_R[:, None], axis=1, mode="clip")[:, 0]


def wide(per_row_R: Array) -> Array:
    """One number per row, shaped to broadcast over its blocks."""
    return per_row_R[:, None, None]
