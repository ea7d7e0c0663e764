"""Every query meets every block of its context exactly once, however a step is cut."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo_jax.ops.attention_pieces import FINISHED, PADDING, Cut, Rows, cut, find

NUM_TOKENS, NUM_ROWS, LONGEST = 40, 5, 900
cut_jitted = jax.jit(cut, static_argnames=("how", "num_tokens"))


def sizes(*, queries, num_pieces, window):
    return Cut(
        queries=queries,
        group=3,
        block_tokens=8,
        num_tiles=NUM_TOKENS // queries + NUM_ROWS,
        num_pieces=num_pieces,
        first_slot=11,
        window=window,
    )


CUTS = [
    sizes(queries=1, num_pieces=4, window=None),
    sizes(queries=7, num_pieces=1, window=None),
    sizes(queries=7, num_pieces=50, window=20),
    sizes(queries=16, num_pieces=300, window=None),
]


@st.composite
def steps(draw):
    """Queries and contexts of rows, and which rows are to be cut."""
    counts, room = [], NUM_TOKENS
    for _ in range(NUM_ROWS):
        counts.append(draw(st.integers(0, room)))
        room -= counts[-1]
    contexts = [draw(st.integers(count, LONGEST)) if count else 0 for count in counts]
    return counts, contexts, [draw(st.booleans()) and count > 0 for count in counts]


def check(step, how, *, spoil=lambda piece_XF: piece_XF):
    counts, contexts, is_cut = step
    starts = np.cumsum([0, *counts])
    rows = Rows(jnp.asarray(starts, jnp.int32), jnp.asarray(contexts, jnp.int32), jnp.asarray(is_cut))
    pieces = cut_jitted(rows, how, num_tokens=NUM_TOKENS)
    piece_XF, merge_TF = spoil(np.array(pieces.piece_XF)), np.array(pieces.merge_TF)
    seen = {}  # by token: the ranges of the context that its pieces cover, and their slots
    taken = set()
    for row, token, queries, position, begin, end, slot, _ in piece_XF:
        if begin >= end:
            continue
        assert is_cut[row]
        assert starts[row] <= token
        assert token + queries <= starts[row + 1]
        assert position == contexts[row] - (starts[row + 1] - token)
        assert begin % how.block_tokens == 0
        assert queries <= how.queries
        if slot >= 0:
            own = set(range(slot, slot + how.queries * how.group))
            assert not own & taken, "two pieces write one slot"
            taken |= own
        for nth in range(queries):
            seen.setdefault(token + nth, []).append((begin, end, slot + nth * how.group if slot >= 0 else -1))
    assert all(how.first_slot <= slot < how.first_slot + how.num_slots for slot in taken)
    for token in range(NUM_TOKENS):
        first, stride, count, _ = merge_TF[token]
        row = int(np.searchsorted(starts, token, side="right")) - 1
        if row >= NUM_ROWS or not is_cut[row]:
            assert count == PADDING
            assert token not in seen
            continue
        ranges = sorted(seen[token])
        position = contexts[row] - (starts[row + 1] - token)
        visible = max(0, position - how.window + 1) if how.window else 0
        assert ranges[0][0] <= visible
        assert ranges[-1][1] > position
        assert all(left[1] == right[0] for left, right in itertools.pairwise(ranges))
        slots = [slot for _, _, slot in ranges]
        assert slots == ([first + nth * stride for nth in range(count)] if count != FINISHED else [-1])


@pytest.mark.parametrize("how", CUTS, ids=str)
@given(step=steps())
@settings(max_examples=60, deadline=None)
def test_pieces_cover_what_each_query_sees_once(how, step):
    check(step, how)


LONG = ([1, 30, 0, 9, 0], [900, 700, 0, 9, 0], [True, True, False, True, False])


@pytest.mark.parametrize("field", [0, 1, 3, 4, 5, 6])
def test_a_piece_with_a_wrong_field_is_seen(field):
    def spoil(piece_XF):
        piece_XF[1, field] += 8
        return piece_XF

    check(LONG, CUTS[2])
    with pytest.raises((AssertionError, IndexError)):
        check(LONG, CUTS[2], spoil=spoil)


def test_work_is_shared_out_evenly():
    """No piece is longer than the step's blocks shared among the pieces, rounded up; at most 64 per tile."""
    counts, contexts = np.array([1, 1, 1, 1, 1]), np.array([5, 700, 8, 130, 900])
    rows = Rows(
        jnp.asarray(np.cumsum([0, *counts]), jnp.int32),
        jnp.asarray(contexts, jnp.int32),
        jnp.ones(NUM_ROWS, bool),
    )
    for num_pieces in (4, 40, 4000):
        how = sizes(queries=1, num_pieces=num_pieces, window=None)
        piece_XF = np.asarray(cut(rows, how, num_tokens=NUM_TOKENS).piece_XF)
        blocks = -(-(piece_XF[:, 5] - piece_XF[:, 4]) // how.block_tokens)
        total = int(np.sum(-(-contexts // how.block_tokens)))
        assert blocks.sum() == total
        assert blocks.max() == max(-(-total // num_pieces), -(-113 // 64))


def test_find_names_the_range_of_each_index():
    ends = jnp.asarray([0, 3, 3, 7], jnp.int32)
    got = find(ends, jnp.arange(9, dtype=jnp.int32))
    assert got.tolist() == [1, 1, 1, 3, 3, 3, 3, 3, 3]
