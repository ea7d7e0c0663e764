"""The kernel that prepares a step, run on the CPU: every query meets each block of its context once."""

import itertools
import random

import jax.numpy as jnp
import numpy as np
import pytest

from albireo_jax.ops.prepare_cuda import Cut, PackedRows, prepare_step
from tests.labs.cuda_lab import Order, launch_on_cpu, needs_compiler

NUM_TOKENS, NUM_ROWS, LONGEST, PAGE_SIZE, HEADS, SLOTS = 40, 5, 900, 4, 3, 7
TABLE_ZM = np.random.default_rng(1).permutation(SLOTS * 225).reshape(SLOTS, 225).astype(np.int32)
LAST_TOKEN_Z = np.arange(100, 100 + SLOTS, dtype=np.int32)
GROUP, BLOCK_TOKENS = 3, 8
ANY_ORDER = Order(0, is_eager=False)


def cuts(*, queries, num_pieces, window=None, both=True):
    """Rows of one query and chunks, or all rows as chunks."""
    shared = {"group": GROUP, "block_tokens": BLOCK_TOKENS, "num_pieces": num_pieces, "window": window}
    decode = Cut(queries=1, num_tiles=NUM_ROWS, first_slot=0, most=1, **shared)
    chunk = Cut(
        queries=queries,
        num_tiles=NUM_TOKENS // queries + NUM_ROWS,
        first_slot=decode.num_slots if both else 0,
        fewest=2 if both else 1,
        **shared,
    )
    return [decode, chunk] if both else [chunk]


CUTS = [
    cuts(queries=1, num_pieces=4, both=False),
    cuts(queries=7, num_pieces=1),
    cuts(queries=7, num_pieces=50, window=20),
    cuts(queries=16, num_pieces=300),
]


def prepare(counts, contexts, how, *, order=ANY_ORDER, edits=()):
    rng = np.random.default_rng(sum(contexts))
    slots = rng.permutation(SLOTS)[:NUM_ROWS]
    ids = np.where(rng.random(NUM_TOKENS) < 0.5, -1, rng.integers(0, 99, NUM_TOKENS))
    words_W = np.concatenate([ids, slots, np.subtract(contexts, counts), counts]).astype(np.int32)
    rows = PackedRows(
        *map(jnp.asarray, (words_W, TABLE_ZM, LAST_TOKEN_Z)), num_tokens=NUM_TOKENS, num_rows=NUM_ROWS
    )
    made = prepare_step(rows, how, page_size=PAGE_SIZE, heads=HEADS, launch=launch_on_cpu(order, edits=edits))
    return ids, slots, made


def check(counts, contexts, how, **options):
    ids, slots, made = prepare(counts, contexts, how, **options)
    starts = np.cumsum([0, *counts])
    np.testing.assert_array_equal(made.last_R, np.maximum(starts[1:] - 1, 0))
    for token in range(NUM_TOKENS):
        row = int(np.searchsorted(starts, token, side="right")) - 1
        id_, position, place = ids[token], 0, 0
        if row < NUM_ROWS:
            id_ = LAST_TOKEN_Z[slots[row]] if id_ < 0 else id_
            position = contexts[row] - (starts[row + 1] - token)
            place = TABLE_ZM[slots[row], position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
        assert (made.token_T[token], made.position_T[token], made.place_T[token]) == (id_, position, place)
    seen, cleared, taken = {}, [], set()
    for work, cut in zip(made.works, how, strict=True):
        assert not np.asarray(work.arrived_XN).any()
        check_work(np.asarray(work.piece_XF), cut, starts, contexts, slots, seen, cleared, taken)
    assert sorted(cleared) == list(range(starts[-1], NUM_TOKENS))
    for token in range(starts[-1]):
        row = int(np.searchsorted(starts, token, side="right")) - 1
        ranges, position = sorted(seen[token]), contexts[row] - (starts[row + 1] - token)
        window = how[0].window
        assert ranges[0][0] <= (max(0, position - window + 1) if window else 0)
        assert ranges[-1][1] > position
        assert all(left[1] == right[0] for left, right in itertools.pairwise(ranges))


def check_work(piece_XF, cut, starts, contexts, slots, seen, cleared, taken):
    """Notes by token which ranges of its context are seen, and the tokens that are cleared."""
    tiles = {}
    for at, (row, token, queries, position, begin, end, slot, turn) in enumerate(piece_XF.tolist()):
        if begin >= end:
            cleared += range(token, token + queries)
            continue
        owner = int(np.searchsorted(starts, token, side="right")) - 1
        assert cut.fewest <= starts[owner + 1] - starts[owner] <= cut.most
        assert slots[owner] == row
        assert 0 < queries <= min(cut.queries, starts[owner + 1] - token)
        assert position == contexts[owner] - (starts[owner + 1] - token)
        assert begin % cut.block_tokens == 0
        nth, count = divmod(turn, 65536)
        assert 0 <= nth < count <= 64
        assert (slot >= 0) == (count > 1)
        if slot >= 0:
            stride = cut.queries * cut.group
            own = set(range(slot, slot + stride))
            assert not own & taken, "two pieces write one slot"
            assert cut.first_slot <= slot
            assert slot + stride <= cut.first_slot + cut.num_slots
            taken |= own
            # A tile's pieces know the same first slot and the same count of those that are done.
            tiles.setdefault(token, set()).add((slot - nth * stride, at - nth, count, queries))
        for each in range(queries):
            seen.setdefault(token + each, []).append((begin, end))
    assert all(len(tile) == 1 for tile in tiles.values())


def random_step(seed):
    """Queries and contexts of rows; some rows have none, some tokens are of no row."""
    draw = random.Random(seed)
    counts, room = [], NUM_TOKENS
    for _ in range(NUM_ROWS):
        counts.append(draw.choice([0, 1, 1, draw.randint(0, room)]) if room else 0)
        room -= counts[-1]
    return counts, [draw.randint(count, LONGEST) if count else 0 for count in counts]


LONG = ([1, 30, 0, 9, 0], [900, 700, 0, 9, 0])


@needs_compiler
@pytest.mark.parametrize("how", CUTS, ids=str)
def test_pieces_cover_what_each_query_sees_once(how):
    for step in (*map(random_step, range(15)), LONG, ([0] * NUM_ROWS, [0] * NUM_ROWS), ([8] * 5, [8] * 5)):
        check(*step, how)


@needs_compiler
def test_decode_steps_have_decode_rows_only():
    decode = cuts(queries=1, num_pieces=40)[0]._replace(most=NUM_TOKENS)
    check([1, 1, 1, 0, 0], [900, 1, 33, 0, 0], [decode])


@needs_compiler
def test_the_order_of_threads_changes_nothing():
    one, other = (prepare(*LONG, CUTS[2], order=Order(seed, is_eager=False))[2] for seed in (1, 2))
    for left, right in zip(one.works, other.works, strict=True):
        np.testing.assert_array_equal(left.piece_XF, right.piece_XF)


FAULTS = [
    ("if (threadIdx.x >= far) sum.x +=", "if (threadIdx.x > far) sum.x +="),
    ("end(middle) > index", "end(middle) >= index"),
    ("tile.position - cut.window + 1", "tile.position"),
    ("nth << 16 | count", "nth << 16 | (count + 1)"),
    ("tile.slot + nth * stride", "tile.slot"),
    ("up(longest, MOST_PIECES)", "1"),
    ("min(end - tile.token, cut.queries)", "cut.queries"),
    ("rows.start[row] + nth * cut.queries", "rows.start[row]"),
    ("written + (at - total.x) * cleared", "written"),
    ("if (id == TOKEN_ON_DEVICE)", "if (id == 0)"),
    ("where % size.page_size;", "where;"),
    ("arrived[at] = 0", "arrived[at] = 1"),
]


@needs_compiler
@pytest.mark.parametrize(("right", "wrong"), FAULTS, ids=[right for right, _ in FAULTS])
def test_a_fault_in_the_kernel_is_seen(right, wrong):
    steps = [LONG, ([1, 12, 1, 9, 0], [900, 700, 820, 9, 0]), ([1, 0, 0, 0, 0], [900, 0, 0, 0, 0])]

    def check_all():
        for (counts, contexts), how in itertools.product(steps, CUTS):
            check(counts, contexts, how, edits=((right, wrong),))

    with pytest.raises(AssertionError):
        check_all()


@needs_compiler
def test_work_is_shared_out_evenly():
    """No piece is longer than the step's blocks shared among the pieces, rounded up; at most 64 per tile."""
    counts, contexts = [1, 1, 1, 1, 1], np.array([5, 700, 8, 130, 900])
    for num_pieces in (4, 40, 4000):
        how = cuts(queries=1, num_pieces=num_pieces, both=False)
        piece_XF = np.asarray(prepare(counts, contexts, how)[2].works[0].piece_XF)
        blocks = -(-(piece_XF[:, 5] - piece_XF[:, 4]) // BLOCK_TOKENS)
        total = int(np.sum(-(-contexts // BLOCK_TOKENS)))
        assert blocks.sum() == total
        assert blocks.max() == max(-(-total // num_pieces), -(-113 // 64))
