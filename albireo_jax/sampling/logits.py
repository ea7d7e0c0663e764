"""The changes to logits before a token is chosen from them: masks, refused words, biases, penalties, bans.

All of it is element by element over the vocabulary, so each rank does its own share, and no logits or counts
travel. The state of Z slots lives on the device; rows without rules read a slot that changes nothing.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

MASK_BITS = 32
"""Tokens per word of a mask."""

_INF = np.float32(np.inf)


class Rules(NamedTuple):
    """Rules of Z slots, v tokens of the vocabulary each on its rank (`core.logit_rules` says what they do).

    `seen_Zv` counts a token's occurrences in the answer from bit 1 on; bit 0 says that the prompt has it.
    `mask_ZX` has bit i % 32 of word i // 32 set if token i is allowed. There are B biased tokens and H bad
    words of up to Y tokens, which end in the last place; -1 is in the places of none. `recent_ZY` are the
    last tokens of the answer, the latest in the last place. `penalty_Z3`: repetition, presence, frequency.
    """

    seen_Zv: Int32[Array, "Z v"]
    mask_ZX: Int32[Array, "Z X"]
    biased_ZB: Int32[Array, "Z B"]
    bias_ZB: Float[Array, "Z B"]
    bad_word_ZHY: Int32[Array, "Z H Y"]
    recent_ZY: Int32[Array, "Z Y"]
    penalty_Z3: Float[Array, "Z 3"]


class Bans(NamedTuple):
    """Ids that rows may not sample at positions below `until_R`: those in `stop_id_RB`, padded with -1."""

    position_R: Int32[Array, " R"]
    until_R: Int32[Array, " R"]
    stop_id_RB: Int32[Array, "R B"]


def ban(
    logits_Rv: Float[Array, "R v"], bans: Bans, *, first: Int32[Array, ""] | int = 0
) -> Float[Array, "R v"]:
    """The logits without those of banned ids; `first` is the id of the first column.

    In place where the logits have no other use. Elsewhere all of them are copied, which on a CPU takes three
    times as long as finding the largest: it is for steps in which some row has a ban.
    """
    is_banned_R = bans.position_R < bans.until_R
    banned_RB = jnp.where(is_banned_R[:, None], bans.stop_id_RB, -1)
    row_R1 = jnp.arange(logits_Rv.shape[0])[:, None]
    column_RB = _columns(banned_RB, first=first, count=logits_Rv.shape[1])
    return logits_Rv.at[row_R1, column_RB].set(-_INF, mode="drop")


def apply_rules(
    logits_Rv: Float[Array, "R v"], rules: Rules, slot_R: Int32[Array, " R"], *, first: Int32[Array, ""] | int
) -> Float[Array, "R v"]:
    """Logits of rows in these slots, changed by their rules; `first` is the id of the first column."""
    allowed_Rv = unpack_mask(rules.mask_ZX[slot_R], first=first, count=logits_Rv.shape[1])
    logits_Rv = jnp.where(allowed_Rv, logits_Rv, -_INF)
    refused_RH = _refused(rules.bad_word_ZHY[slot_R], rules.recent_ZY[slot_R])
    row_R1 = jnp.arange(logits_Rv.shape[0])[:, None]
    column_RH = _columns(refused_RH, first=first, count=logits_Rv.shape[1])
    logits_Rv = logits_Rv.at[row_R1, column_RH].set(-_INF, mode="drop")
    column_RB = _columns(rules.biased_ZB[slot_R], first=first, count=logits_Rv.shape[1])
    logits_Rv = logits_Rv.at[row_R1, column_RB].add(rules.bias_ZB[slot_R], mode="drop")
    repetition_R1, presence_R1, frequency_R1 = jnp.split(rules.penalty_Z3[slot_R], 3, axis=1)
    seen_Rv = rules.seen_Zv[slot_R]
    count_Rv = seen_Rv >> 1
    repeated_Rv = jnp.where(logits_Rv > 0, logits_Rv / repetition_R1, logits_Rv * repetition_R1)
    logits_Rv = jnp.where(seen_Rv > 0, repeated_Rv, logits_Rv)
    logits_Rv = logits_Rv - frequency_R1 * count_Rv.astype(jnp.float32)
    return logits_Rv - jnp.where(count_Rv > 0, presence_R1, 0)


def note_tokens(
    rules: Rules, slot_R: Int32[Array, " R"], id_R: Int32[Array, " R"], *, first: Int32[Array, ""] | int
) -> Rules:
    """The rules once rows in these slots have sampled these tokens; a slot of Z or more is no row's."""
    column_R = _columns(id_R, first=first, count=rules.seen_Zv.shape[1])
    recent_RY = rules.recent_ZY.at[slot_R].get(mode="clip")
    recent_RY = jnp.concatenate([recent_RY[:, 1:], id_R[:, None]], axis=1)
    return rules._replace(
        seen_Zv=rules.seen_Zv.at[slot_R, column_R].add(2, mode="drop"),
        recent_ZY=rules.recent_ZY.at[slot_R].set(recent_RY, mode="drop"),
    )


def unpack_mask(
    word_RX: Int32[Array, "R X"], *, first: Int32[Array, ""] | int, count: int
) -> Bool[Array, "R v"]:
    """The bits of `count` tokens from `first` on; tokens behind the last word are not allowed."""
    num_words = count // MASK_BITS + 2
    padded_RX = jnp.pad(word_RX, ((0, 0), (0, num_words)))
    # A slice that starts late would be moved to the front: no token there is one of the model's.
    begin = jnp.minimum(jnp.asarray(first) // MASK_BITS, word_RX.shape[1])
    own_RX = lax.dynamic_slice_in_dim(padded_RX, begin, num_words, axis=1)
    bit_RXW = (own_RX[:, :, None] >> jnp.arange(MASK_BITS, dtype=jnp.int32)[None, None, :]) & 1
    bit_RV = bit_RXW.reshape(word_RX.shape[0], -1)
    return lax.dynamic_slice_in_dim(bit_RV, jnp.asarray(first) % MASK_BITS, count, axis=1) != 0


def _refused(bad_word_RHY: Int32[Array, "R H Y"], recent_RY: Int32[Array, "R Y"]) -> Int32[Array, "R H"]:
    """The last tokens of the bad words whose other tokens were just generated, -1 for the others."""
    before_RHY = bad_word_RHY[:, :, :-1]
    agrees_RHY = (before_RHY < 0) | (before_RHY == recent_RY[:, None, 1:])
    return jnp.where(agrees_RHY.all(axis=2), bad_word_RHY[:, :, -1], -1)


def _columns(
    id_RX: Int32[Array, "R *X"], *, first: Int32[Array, ""] | int, count: int
) -> Int32[Array, "R *X"]:
    """Columns of these ids in this rank's share, `count` for an id outside of it."""
    column_RX = id_RX - first
    return jnp.where((id_RX >= 0) & (column_RX >= 0) & (column_RX < count), column_RX, count)
