"""The int32 buffers of a step, and the sizes that a plan is padded to in them.

A compiled step has fixed shapes: a *bucket* of T tokens and R rows. By convention T == R means
that every row computes exactly one known slot's token (a decode step: no admissions, no prompt
chunks), and every other bucket has T >= 2R; so the shapes alone tell the two kinds apart.

One buffer is the input of the forward pass (offsets by `layout`), another that of sampling::

    | token ids T | slots R | starts R | counts R | page updates 3U |
    | slots R | positions R | samples R |

A step that admits requests has a third, with the parameters of up to ADMISSIONS new slots. If some of these
begin with pages that are computed already, a fourth has those slots' rows of the page table.
Padding rows have no tokens, never sample, and use the slot `max_rows`, which no request owns; padding
tokens belong to no row; padding updates write the null page into that slot's table. Everything that
is a float travels as its bits. Buffers are fresh for every step: the runtime may still read them
after a call has returned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int32
from numpy.typing import NDArray

from albireo_jax.core.plan import NULL_PAGE, SlotParams, StepPlan
from albireo_jax.core.token_sampling import NUM_WORDS
from albireo_jax.core.types import MAX_STOP_IDS
from albireo_jax.sampling.filters import SamplerParams, sampler_params
from albireo_jax.sampling.logits import Bans

_MIN_MIXED_TOKENS = 32
_FEW_ROWS = 8
_STOP_IDS_AT = NUM_WORDS + 1
SLOT_FIELDS = _STOP_IDS_AT + MAX_STOP_IDS
"""int32 words that hold the sampling parameters of one slot."""

ADMISSIONS = 8
"""New slots that one program writes at once."""


class Bucket(NamedTuple):
    """Padded size of a step: T tokens and R rows."""

    tokens: int
    rows: int

    @property
    def is_decode(self) -> bool:
        """Whether every row computes one token, and no row is new."""
        return self.tokens == self.rows


class StepInputs(NamedTuple):
    """The inputs of a forward pass, taken apart on the device; U page updates."""

    token_T: Int32[Array, " T"]
    slot_R: Int32[Array, " R"]
    start_R: Int32[Array, " R"]
    count_R: Int32[Array, " R"]
    update_slot_U: Int32[Array, " U"]
    update_column_U: Int32[Array, " U"]
    update_page_U: Int32[Array, " U"]


class SampleInputs(NamedTuple):
    """The inputs of sampling besides the logits: slots, positions of the next tokens, which rows sample."""

    slot_R: Int32[Array, " R"]
    position_R: Int32[Array, " R"]
    samples_R: Bool[Array, " R"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferLayout:
    """The offset of each part of a bucket's buffer, in int32 words, and its number of entries."""

    bucket: Bucket
    num_updates: int

    @property
    def rows_at(self) -> int:
        """Offset of the row fields."""
        return self.bucket.tokens

    @property
    def updates_at(self) -> int:
        """Offset of the page updates."""
        return self.rows_at + 3 * self.bucket.rows

    @property
    def num_words(self) -> int:
        """Length of the buffer."""
        return self.updates_at + 3 * self.num_updates


def bucket_grid(max_rows: int, max_step_tokens: int, *, min_rows: int = 1) -> tuple[Bucket, ...]:
    """All buckets of an engine: decode steps by rows, mixed steps by tokens and by few or all rows.

    Sizes are powers of two, so that padding at most doubles a step's tokens. Mixed steps of short prompts
    have a bucket for each number of rows: a short prompt beside more than few rows would otherwise be
    padded to twice the tokens of all rows. `min_rows` is the smallest decode step to compile.
    """
    top_rows = max(_power_of_two(max_rows), min_rows)
    few_rows = min(_FEW_ROWS, top_rows)
    decode = tuple(Bucket(rows, rows) for rows in _powers(min_rows, top_rows))
    top_tokens = max(_power_of_two(max_step_tokens), 2 * top_rows, _MIN_MIXED_TOKENS)
    short = {Bucket(2 * rows, rows) for rows in _powers(few_rows, top_rows)}
    mixed = {
        Bucket(tokens, rows)
        for tokens in _powers(_MIN_MIXED_TOKENS, top_tokens)
        for rows in (few_rows, top_rows)
        if tokens >= 2 * rows
    }
    return decode + tuple(sorted(short | mixed))


def choose_bucket(plan: StepPlan, buckets: tuple[Bucket, ...]) -> Bucket:
    """The smallest bucket that holds the plan; `buckets` come from `bucket_grid`."""
    num_tokens, num_rows = plan.num_tokens, plan.num_rows
    decode = num_tokens == num_rows and not plan.new_slots
    fitting = [
        (tokens, rows)
        for tokens, rows in buckets
        if rows >= num_rows and tokens >= num_tokens and (tokens == rows) == decode
    ]
    if not fitting:
        raise ValueError(f"a step of {num_tokens} tokens and {num_rows} rows fits none of {buckets}")
    return Bucket(*min(fitting))


@cache
def layout(bucket: Bucket, page_size: int) -> BufferLayout:
    """Offsets of a bucket's buffer. A row of c tokens gains at most ceil(c / page_size) pages."""
    num_updates = bucket.rows if bucket.is_decode else bucket.rows + -(-bucket.tokens // page_size)
    return BufferLayout(bucket=bucket, num_updates=num_updates)


def pack(plan: StepPlan, layout: BufferLayout, *, padding_slot: int) -> NDArray[np.int32]:
    """A fresh buffer of a plan's forward pass."""
    tokens, rows = plan.num_tokens, plan.num_rows
    buffer = pack_padding(layout, padding_slot=padding_slot)
    buffer[:tokens] = plan.token_ids
    row_fields = buffer[layout.rows_at : layout.updates_at].reshape(3, layout.bucket.rows)
    row_fields[0, :rows] = plan.slots
    row_fields[1, :rows] = plan.starts
    row_fields[2, :rows] = plan.counts
    updates = buffer[layout.updates_at :].reshape(3, layout.num_updates)
    count = len(plan.update_slots)
    updates[0, :count] = plan.update_slots
    updates[1, :count] = plan.update_columns
    updates[2, :count] = plan.update_pages
    return buffer


def pack_padding(layout: BufferLayout, *, padding_slot: int) -> NDArray[np.int32]:
    """A fresh buffer of a forward pass that computes nothing: all rows are padding."""
    return _padding(layout, padding_slot).copy()


@cache
def _padding(layout: BufferLayout, padding_slot: int) -> NDArray[np.int32]:
    buffer = np.zeros(layout.num_words, np.int32)
    buffer[layout.rows_at : layout.rows_at + layout.bucket.rows] = padding_slot
    updates = buffer[layout.updates_at :].reshape(3, layout.num_updates)
    updates[0] = padding_slot
    updates[2] = NULL_PAGE
    return buffer


def unpack(buffer: Int32[Array, " W"], layout: BufferLayout) -> StepInputs:
    """The parts of a packed buffer, on the device."""
    rows = buffer[layout.rows_at : layout.updates_at].reshape(3, layout.bucket.rows)
    updates = buffer[layout.updates_at :].reshape(3, layout.num_updates)
    return StepInputs(buffer[: layout.bucket.tokens], *rows, *updates)


def pack_rows(plan: StepPlan, rows: int, *, padding_slot: int) -> NDArray[np.int32]:
    """A fresh buffer of the sampling of a plan's rows, padded to `rows`."""
    buffer = pack_padding_rows(rows, padding_slot=padding_slot)
    fields = buffer.reshape(3, rows)
    fields[0, : plan.num_rows] = plan.slots
    fields[1, : plan.num_rows] = plan.starts + plan.counts
    fields[2, : plan.num_rows] = plan.samples
    return buffer


def pack_padding_rows(rows: int, *, padding_slot: int) -> NDArray[np.int32]:
    """A fresh buffer of a sampling of rows that are all padding."""
    buffer = np.zeros(3 * rows, np.int32)
    buffer[:rows] = padding_slot
    return buffer


def unpack_rows(buffer: Int32[Array, " W"]) -> SampleInputs:
    """The parts of a buffer of `pack_rows`, on the device."""
    slot_R, position_R, samples_R = buffer.reshape(3, -1)
    return SampleInputs(slot_R, position_R, samples_R != 0)


def pack_params(new_slots: Sequence[SlotParams], *, padding_slot: int) -> NDArray[np.int32]:
    """A fresh array [ADMISSIONS, 1 + F]: slots and their parameters' words."""
    admissions = np.zeros((ADMISSIONS, 1 + SLOT_FIELDS), np.int32)
    admissions[len(new_slots) :, 0] = padding_slot
    for row, params in enumerate(new_slots):
        admissions[row, 0] = params.slot
        _write_params(admissions[row, 1:], params)
    return admissions


def pack_pages(
    new_slots: Sequence[SlotParams], pages_per_slot: int, *, padding_slot: int
) -> NDArray[np.int32]:
    """A fresh array [ADMISSIONS, 1 + M]: slots and their rows of the page table, filled up with null pages.

    Raises ValueError for a slot with more than M = `pages_per_slot` pages.
    """
    table_rows = np.full((ADMISSIONS, 1 + pages_per_slot), NULL_PAGE, np.int32)
    table_rows[len(new_slots) :, 0] = padding_slot
    for row, params in enumerate(new_slots):
        if len(params.pages) > pages_per_slot:
            raise ValueError(f"slot {params.slot} begins with {len(params.pages)} of {pages_per_slot} pages")
        table_rows[row, 0] = params.slot
        table_rows[row, 1 : 1 + len(params.pages)] = params.pages
    return table_rows


def unpack_params(params_ZF: Int32[Array, "Z F"], inputs: SampleInputs) -> SamplerParams:
    """Sampling of a step's rows, from their slots' words."""
    word_RF = params_ZF[inputs.slot_R]
    return sampler_params(word_RF[:, :NUM_WORDS], position_R=inputs.position_R)


def unpack_bans(params_ZF: Int32[Array, "Z F"], inputs: SampleInputs) -> Bans:
    """The ids by which a step's rows may not end yet, from their slots' words."""
    word_RF = params_ZF[inputs.slot_R]
    return Bans(inputs.position_R, word_RF[:, NUM_WORDS], unpack_stop_ids(word_RF))


def unpack_stop_ids(word_RF: Int32[Array, "R F"]) -> Int32[Array, "R B"]:
    """The stop ids of rows, padded with -1, from the words of their slots."""
    return word_RF[:, _STOP_IDS_AT:]


def _write_params(words: NDArray[np.int32], params: SlotParams) -> None:
    words[:NUM_WORDS] = params.sampling.words()
    words[NUM_WORDS] = params.banned_until
    words[_STOP_IDS_AT:] = -1
    words[_STOP_IDS_AT : _STOP_IDS_AT + len(params.stop_ids)] = params.stop_ids


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _powers(low: int, high: int) -> tuple[int, ...]:
    return tuple(1 << exponent for exponent in range(low.bit_length() - 1, high.bit_length()))
