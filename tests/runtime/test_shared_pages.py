"""Requests that begin with pages which another one computed sample what they would have sampled alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from albireo_jax.core.plan import TOKEN_ON_DEVICE, PageCopies, SlotParams, StepPlan
from albireo_jax.core.token_sampling import GREEDY, TokenSampling
from albireo_jax.nn.sharding import make_mesh
from albireo_jax.runtime.batch import ADMISSIONS, pack_pages
from albireo_jax.runtime.executor import JaxExecutor
from albireo_jax.runtime.step import begin_with_pages

Build = Callable[..., Any]
PAGE_SIZE = 4
MAX_ROWS = ADMISSIONS + 4
SHAPE = {"max_rows": MAX_ROWS, "max_step_tokens": 60, "page_size": PAGE_SIZE, "num_host_pages": 4}
PREFIX = tuple(11 * i % 97 for i in range(6 * PAGE_SIZE))
PREFIX_PAGES = (3, 9, 1, 40, 7, 22)
SLOT = SlotParams(slot=0, sampling=GREEDY, banned_until=0, stop_ids=())
DEGREES = [1, 4]


class Row(NamedTuple):
    """A row of a step that samples: its tokens, the pages that it gains, and its parameters if it is new."""

    slot: int
    start: int
    tokens: tuple[int, ...]
    gained: tuple[int, ...] = ()
    params: SlotParams | None = None


def _params(slot: int, *, sampled: bool, pages: tuple[int, ...] = ()) -> SlotParams:
    drawn = TokenSampling(temperature=1.5, top_p=0.98, seed=100 + slot)
    return replace(SLOT, slot=slot, pages=pages, sampling=drawn if sampled else GREEDY)


def _plan(rows: Sequence[Row]) -> StepPlan:
    updates = [
        (row.slot, column, page)
        for row in rows
        for column, page in enumerate(row.gained, start=-(-row.start // PAGE_SIZE))
    ]
    slots, columns, pages = np.array(updates, np.int32).reshape(-1, 3).T
    return StepPlan(
        step=0,
        request_ids=tuple(f"r{row.slot}" for row in rows),
        epochs=np.zeros(len(rows), np.int32),
        slots=np.array([row.slot for row in rows], np.int32),
        starts=np.array([row.start for row in rows], np.int32),
        counts=np.array([len(row.tokens) for row in rows], np.int32),
        samples=np.ones(len(rows), np.bool_),
        token_ids=np.array([token for row in rows for token in row.tokens], np.int32),
        update_slots=slots,
        update_columns=columns,
        update_pages=pages,
        new_slots=tuple(row.params for row in rows if row.params is not None),
    )


def _run(executor: JaxExecutor, *steps: Sequence[Row], copies: PageCopies | None = None) -> list[list[int]]:
    """Sampled ids of each step; all are dispatched before the first is read."""
    plans = [_plan(rows) for rows in steps]
    if copies is not None:
        plans[0] = replace(plans[0], copies=copies)
    handles = [executor.dispatch(plan) for plan in plans]
    return [handle.wait().ids.tolist() for handle in handles]


def _compute_prefix(executor: JaxExecutor) -> None:
    """Fill the prefix's pages, in slot 0, in two steps.

    The other slots are given pages of other tokens first, so that nothing is right by what was left in them.
    """
    for slot in range(1, MAX_ROWS):
        _run(
            executor,
            [Row(slot, 0, tuple(range(50, 78)), tuple(range(300, 307)), _params(slot, sampled=False))],
        )
    half, pages = len(PREFIX) // 2, len(PREFIX_PAGES) // 2
    _run(
        executor,
        [Row(0, 0, PREFIX[:half], PREFIX_PAGES[:pages], SLOT)],
        [Row(0, half, PREFIX[half:], PREFIX_PAGES[pages:])],
    )


def _alone(executor: JaxExecutor, prompt: tuple[int, ...], params: SlotParams, count: int) -> list[int]:
    """The answer of a request that computes all of its prompt, in pages that nothing else uses, in slot 0."""
    pages = tuple(range(100, 100 + -(-(len(prompt) + count) // PAGE_SIZE)))
    first = Row(0, 0, prompt, pages, replace(params, slot=0, pages=()))
    later = [[Row(0, len(prompt) + i, (TOKEN_ON_DEVICE,))] for i in range(count - 1)]
    return [ids[0] for ids in _run(executor, [first], *later)]


@pytest.mark.parametrize("tp", DEGREES)
@pytest.mark.parametrize("sampled", [False, True])
def test_a_request_behind_shared_pages_answers_as_if_it_had_computed_them(
    engine: Build, tp: int, sampled: bool, compilations: list[str]
) -> None:
    executor = engine(tp=tp, **SHAPE).executor
    compilations.clear()
    tail, count = (60, 61, 62), 6
    start, pages = 5 * PAGE_SIZE, PREFIX_PAGES[:5]
    params = _params(2, sampled=sampled, pages=pages)
    other = _params(1, sampled=True)
    other_prompt = (70, 71, 72, 73, 74)
    want = _alone(executor, PREFIX[:start] + tail, params, count)
    want_other = _alone(executor, other_prompt, other, count)
    _compute_prefix(executor)

    def later(i: int) -> list[Row]:
        return [
            Row(0, len(PREFIX) + 1 + i, (TOKEN_ON_DEVICE,)),
            Row(1, len(other_prompt) + i, (TOKEN_ON_DEVICE,)),
            Row(2, start + len(tail) + i, (TOKEN_ON_DEVICE,)),
        ]

    first = [
        Row(0, len(PREFIX), (TOKEN_ON_DEVICE,), (50, 51)),
        Row(1, 0, other_prompt, (52, 53, 54), other),
        Row(2, start, tail, (55, 56), params),
    ]
    got = _run(executor, first, *(later(i) for i in range(count - 1)))
    assert [ids[2] for ids in got] == want
    assert [ids[1] for ids in got] == want_other
    assert len(compilations) == 0


@pytest.mark.parametrize("tp", DEGREES)
def test_more_slots_than_one_program_writes_begin_in_one_step(
    engine: Build, tp: int, compilations: list[str]
) -> None:
    """Slots that compute all themselves are among those with pages, as are rows that decode."""
    executor = engine(tp=tp, **SHAPE).executor
    compilations.clear()
    rows = [Row(0, len(PREFIX), (TOKEN_ON_DEVICE,), (50,))]
    want: list[int] = []
    for slot in range(1, MAX_ROWS):
        num_pages = 0 if slot == 5 else 1 + slot % len(PREFIX_PAGES)
        start, tail = num_pages * PAGE_SIZE, (80 + slot, 20 + slot)[: 1 + slot % 2]
        params = _params(slot, sampled=slot % 3 == 0, pages=PREFIX_PAGES[:num_pages])
        want += _alone(executor, PREFIX[:start] + tail, params, 1)
        rows.append(Row(slot, start, tail, (60 + slot,), params))
    assert sum(row.params is not None and row.params.pages != () for row in rows) > ADMISSIONS
    _compute_prefix(executor)
    (got,) = _run(executor, rows)
    assert got[1:] == want
    assert len(compilations) == 0


@pytest.mark.parametrize("tp", DEGREES)
def test_the_pages_are_what_the_answer_depends_on(engine: Build, tp: int) -> None:
    """One other page gives other answers; another order would not, as keys know their positions."""
    executor = engine(tp=tp, **SHAPE).executor
    start = 5 * PAGE_SIZE

    def answers(pages: tuple[int, ...]) -> list[int]:
        steps = [
            [Row(1, start, (token,), (50,), _params(1, sampled=False, pages=pages))] for token in range(8)
        ]
        return [ids[0] for ids in _run(executor, *steps)]

    want = [_alone(executor, (*PREFIX[:start], token), _params(1, sampled=False), 1)[0] for token in range(8)]
    _compute_prefix(executor)
    assert answers(PREFIX_PAGES[:5]) == want
    assert answers((*PREFIX_PAGES[:4], PREFIX_PAGES[5])) != want


@pytest.mark.parametrize("tp", DEGREES)
def test_pages_that_come_back_from_the_host_can_be_begun_with_in_the_next_step(
    engine: Build, tp: int
) -> None:
    executor = engine(tp=tp, **SHAPE).executor
    start, host = 2 * PAGE_SIZE, PREFIX_PAGES[:2]
    params = _params(1, sampled=False, pages=(30, 31))
    want = _alone(executor, (*PREFIX[:start], 60, 61), params, 1)
    _compute_prefix(executor)
    _run(
        executor,
        [Row(2, 0, tuple(range(8)), host, _params(2, sampled=False))],  # writes over them
        copies=PageCopies(to_host=((host[0], 4), (host[1], 2))),
    )
    _run(
        executor,
        [Row(2, 8, (TOKEN_ON_DEVICE,), (50,))],
        copies=PageCopies(to_device=((4, 30), (2, 31))),
    )
    assert _run(executor, [Row(1, start, (60, 61), (51,), params)]) == [want]


@pytest.mark.parametrize("tp", DEGREES)
def test_whole_rows_of_the_table_are_written_in_place(tp: int) -> None:
    num_slots, pages_per_slot = 40, 300
    padding_slot = num_slots - 1
    draw = np.random.default_rng(tp)
    table = draw.integers(1, 1000, (num_slots, pages_per_slot)).astype(np.int32)
    slots = draw.permutation(padding_slot)[: ADMISSIONS - 2]
    new_slots = [
        replace(SLOT, slot=int(slot), pages=tuple(draw.integers(1, 1000, length).tolist()))
        for slot, length in zip(slots, (1, 2, 7, 40, pages_per_slot, 5), strict=True)
    ]
    table_rows = pack_pages(new_slots, pages_per_slot, padding_slot=padding_slot)
    everywhere = NamedSharding(make_mesh(tp), PartitionSpec())
    program = begin_with_pages.lower(
        *(jax.ShapeDtypeStruct(array.shape, np.int32, sharding=everywhere) for array in (table, table_rows))
    ).compile()
    assert program.memory_analysis().alias_size_in_bytes == table.nbytes
    got = program(jax.device_put(table, everywhere), table_rows)

    for params in new_slots:
        table[params.slot] = 0
        table[params.slot, : len(params.pages)] = params.pages
    table[padding_slot] = 0
    np.testing.assert_array_equal(np.asarray(got), table)
    assert got.sharding.is_equivalent_to(everywhere, 2)


def test_a_slot_takes_no_more_pages_than_its_row_holds() -> None:
    with pytest.raises(ValueError, match="slot 3 begins with 5 of 4 pages"):
        pack_pages([replace(SLOT, slot=3, pages=(1, 2, 3, 4, 5))], 4, padding_slot=9)
