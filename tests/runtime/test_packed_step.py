"""A plan is packed whole: the arrays are those of its rows, and slots keep what they were admitted with."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from albireo_jax.core.logit_rules import LogitRules
from albireo_jax.core.plan import LogprobTargets, PageCopies, SlotParams, SlotRules, StepPlan
from albireo_jax.core.token_sampling import GREEDY, TokenSampling
from albireo_jax.runtime.batch import ADMISSIONS, Bucket, bucket_grid, layout, pack, pack_rows
from albireo_jax.runtime.decode_loop import DecodeLoop
from albireo_jax.runtime.logit_rule_programs import MASKS, RULED_ADMISSIONS, LogitRulesShape
from albireo_jax.runtime.packed_step import PackedCopies, PackedLoop, PackedStep, StepPacker
from albireo_jax.sampling.routes import Route

MAX_ROWS, PAGE_SIZE, PAGES_PER_SLOT, STEPS = 80, 4, 6, 4
ROUTES = (Route.GREEDY, Route.UNFILTERED, Route.ALL_TO_ALL)
RULES = LogitRules(repetition_penalty=2.0)
GREEDY_SLOT = SlotParams(slot=0, sampling=GREEDY, banned_until=0, stop_ids=())
DRAWN, FILTERED = TokenSampling(temperature=1.0, seed=0), TokenSampling(temperature=1.0, top_k=3, seed=0)


def packer() -> StepPacker:
    return StepPacker(
        bucket_grid(MAX_ROWS, 4 * MAX_ROWS),
        LogitRulesShape(num_slots=MAX_ROWS + 1, padded_vocab=40, max_len=16),
        routes=ROUTES,
        page_size=PAGE_SIZE,
        pages_per_slot=PAGES_PER_SLOT,
        decode_steps=STEPS,
    )


def plan(slots: list[int], **fields: Any) -> StepPlan:
    """A decode step of these slots, each at position 5; all rows sample."""
    ones = np.ones(len(slots), np.int32)
    none = ones[:0]
    how = {
        "starts": 5 * ones,
        "counts": ones,
        "samples": ones > 0,
        "token_ids": ones,
        "update_slots": none,
        "update_columns": none,
        "update_pages": none,
    }
    return StepPlan(
        step=0,
        request_ids=tuple(f"r{slot}" for slot in slots),
        epochs=ones,
        slots=np.array(slots, np.int32),
        **(how | fields),
    )


def packed(of: StepPacker, slots: list[int], **fields: Any) -> PackedStep:
    step = of.pack(plan(slots, **fields))
    assert isinstance(step, PackedStep)
    return step


def rules_of(slot: int) -> SlotRules:
    return SlotRules(rules=RULES, token_ids=np.array([slot, 1], np.int32), prompt_len=2)


def test_a_plan_without_rows_is_its_copies_alone() -> None:
    copies = PageCopies(to_host=((1, 2),), to_device=((3, 4),))
    assert packer().pack(plan([], copies=copies)) == PackedCopies(copies=copies)


def test_buffers_are_those_of_the_plan_in_the_smallest_bucket_and_fresh() -> None:
    of, given = packer(), plan([7, 2, 9], copies=PageCopies(to_host=((1, 2),)))
    step, again = of.pack(given), of.pack(given)
    assert isinstance(step, PackedStep)
    assert isinstance(again, PackedStep)
    assert (step.bucket, step.num_rows, step.copies) == (Bucket(4, 4), 3, given.copies)
    how = layout(step.bucket, PAGE_SIZE)
    np.testing.assert_array_equal(step.inputs, pack(given, how, padding_slot=MAX_ROWS))
    np.testing.assert_array_equal(step.rows, pack_rows(given, 4, padding_slot=MAX_ROWS))
    assert not np.shares_memory(step.inputs, again.inputs)
    assert not np.shares_memory(step.rows, again.rows)
    assert (list(step.first_pages), list(step.admissions), step.rules.rows) == ([], [], None)
    assert not step.has_banned_rows
    assert (list(step.targets.rows), list(step.targets.tokens)) == ([], [])


def test_new_slots_are_written_by_as_many_calls_as_hold_them() -> None:
    slots = list(range(2 * ADMISSIONS + 3))
    new = tuple(replace(GREEDY_SLOT, slot=slot, pages=(slot + 1,) if slot % 2 else ()) for slot in slots)
    step = packed(packer(), slots, new_slots=new)
    assert not step.bucket.is_decode
    written = [row[0] for array in step.admissions for row in array.tolist()]
    assert written == [*slots, *[MAX_ROWS] * (3 * ADMISSIONS - len(slots))]
    begun = [(row[0], row[1]) for array in step.first_pages for row in array.tolist() if row[0] < MAX_ROWS]
    assert begun == [(slot, slot + 1) for slot in slots if slot % 2]
    assert len(step.first_pages) == 2


def test_the_route_is_that_of_the_rows_that_sample_as_their_slots_were_admitted() -> None:
    of = packer()
    drawn, filtered = (
        replace(GREEDY_SLOT, slot=1, sampling=DRAWN),
        replace(GREEDY_SLOT, slot=2, sampling=FILTERED),
    )
    first = packed(of, [0, 1, 2], new_slots=(GREEDY_SLOT, drawn, filtered))
    assert first.route is Route.ALL_TO_ALL
    assert packed(of, [0]).route is Route.GREEDY
    assert packed(of, [0, 1]).route is Route.UNFILTERED
    assert packed(of, [0, 2], samples=np.array([True, False])).route is Route.GREEDY
    packed(of, [2], new_slots=(replace(GREEDY_SLOT, slot=2),))
    assert packed(of, [0, 2]).route is Route.GREEDY


def test_rows_below_their_min_tokens_are_banned_until_their_position_is_reached() -> None:
    of = packer()
    held = replace(GREEDY_SLOT, slot=3, banned_until=8, stop_ids=(2,))
    assert packed(of, [3], new_slots=(held,)).has_banned_rows
    for start, banned in ((6, True), (7, False)):
        assert packed(of, [0, 3], starts=np.array([0, start], np.int32)).has_banned_rows == banned
    assert not packed(of, [3], samples=np.array([False])).has_banned_rows
    assert not packed(of, [3], new_slots=(replace(held, stop_ids=()),)).has_banned_rows


def test_rows_with_rules_read_their_slots_and_count_in_them_where_they_sample() -> None:
    of = packer()
    slots = list(range(RULED_ADMISSIONS + 1))
    new = tuple(replace(GREEDY_SLOT, slot=slot, rules=rules_of(slot)) for slot in slots)
    first = packed(of, slots, new_slots=new)
    assert [len(array) for array in first.rules.admissions] == [RULED_ADMISSIONS] * 2
    step = packed(of, [40, 2, 5], samples=np.array([True, True, False]))
    assert step.rules.rows is not None
    assert list(step.rules.admissions) == []
    assert step.rules.rows.read_slot_R.tolist() == [MAX_ROWS, 2, 5, MAX_ROWS]
    assert step.rules.rows.count_slot_R.tolist() == [MAX_ROWS + 1, 2, MAX_ROWS + 1, MAX_ROWS + 1]
    assert packed(of, [40, 5], samples=np.array([True, False])).rules.rows is None
    packed(of, [2], new_slots=(replace(GREEDY_SLOT, slot=2),))
    assert packed(of, [2]).rules.rows is None


def test_masks_are_written_by_as_many_calls_as_hold_them() -> None:
    slots = np.arange(MASKS + 2, dtype=np.int32)
    step = packed(packer(), slots.tolist(), mask_slots=slots, masks=slots[:, None] * np.ones(2, np.int32))
    written = np.concatenate(step.rules.masks)
    assert written[: len(slots), :3].tolist() == [[slot, slot, slot] for slot in slots]
    assert set(written[len(slots) :, 0].tolist()) == {MAX_ROWS + 1}


@pytest.mark.parametrize(("num_rows", "wanted", "sizes"), [(3, 3, [8]), (80, 8, [8]), (80, 70, [64, 64])])
def test_targets_are_cut_into_pieces_of_the_sizes_that_are_compiled(
    num_rows: int, wanted: int, sizes: list[int]
) -> None:
    rows, tokens = np.arange(wanted, dtype=np.int32), np.arange(65, dtype=np.int32) % num_rows
    targets = LogprobTargets(rows=rows, tokens=tokens, next_ids=tokens + 1)
    step = packed(packer(), list(range(num_rows)), scored=targets)
    assert [len(piece.row_C) for piece in step.targets.rows] == sizes
    kept = [piece.row_C[: piece.wanted] for piece in step.targets.rows]
    np.testing.assert_array_equal(np.concatenate(kept), rows)
    pairs = [
        (piece.token_C[: piece.wanted], piece.next_id_C[: piece.wanted]) for piece in step.targets.tokens
    ]
    np.testing.assert_array_equal(np.concatenate([token for token, _ in pairs]), tokens)
    np.testing.assert_array_equal(np.concatenate([following for _, following in pairs]), tokens + 1)


@pytest.mark.parametrize(
    ("sampling", "route"),
    [(GREEDY, Route.GREEDY), (DRAWN, Route.ALL_TO_ALL), (FILTERED, Route.ALL_TO_ALL)],
)
def test_several_steps_take_one_of_two_loops(sampling: TokenSampling, route: Route) -> None:
    of = packer()
    packed(of, [4], new_slots=(replace(GREEDY_SLOT, slot=4, sampling=sampling),))
    step = of.pack(plan([4, 0, 1], steps=np.array([4, 2, 3], np.int32)))
    assert isinstance(step, PackedLoop)
    assert step.loop == DecodeLoop(rows=4, route=route, steps=STEPS)
    assert step.num_rows == 3
    assert step.inputs[-4:].tolist() == [4, 2, 3, 0]
