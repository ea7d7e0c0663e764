"""Packing loses nothing: what the device unpacks is the plan, and padding touches nobody."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo_jax.core.plan import SlotParams, StepPlan
from albireo_jax.core.token_sampling import GREEDY, TokenSampling
from albireo_jax.runtime.batch import (
    ADMISSIONS,
    Bucket,
    SampleInputs,
    bucket_grid,
    choose_bucket,
    layout,
    pack,
    pack_params,
    pack_rows,
    unpack,
    unpack_bans,
    unpack_params,
    unpack_rows,
)

MAX_ROWS = 12
MAX_TOKENS = 100
PAGE_SIZE = 4
GRID = bucket_grid(MAX_ROWS, MAX_TOKENS)

seeds = st.integers(0, 2**63 - 1)


@st.composite
def slot_params(draw: st.DrawFn, slot: int) -> SlotParams:
    floats = st.floats(0, 1, width=32)
    return SlotParams(
        slot=slot,
        sampling=TokenSampling(
            temperature=draw(floats),
            top_k=draw(st.integers(0, 1000)),
            top_p=draw(floats),
            min_p=draw(floats),
            seed=draw(seeds),
        ),
        banned_until=draw(st.integers(0, 1000)),
        stop_ids=tuple(draw(st.lists(st.integers(0, 1000), max_size=32))),
    )


def _params_of(slots: list[int]) -> st.SearchStrategy[list[SlotParams]]:
    return st.tuples(*(slot_params(slot) for slot in slots)).map(list)


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    rows = draw(st.integers(1, MAX_ROWS))
    counts = draw(st.lists(st.integers(1, MAX_TOKENS // MAX_ROWS), min_size=rows, max_size=rows))
    slots = draw(st.permutations(range(MAX_ROWS)))[:rows]
    num_updates = draw(st.integers(0, rows))
    new = draw(st.integers(0, rows))
    ints = st.integers(0, 1000)
    return StepPlan(
        step=0,
        request_ids=tuple(f"r{slot}" for slot in slots),
        epochs=np.zeros(rows, np.int32),
        slots=np.asarray(slots, np.int32),
        starts=np.asarray(draw(st.lists(ints, min_size=rows, max_size=rows)), np.int32),
        counts=np.asarray(counts, np.int32),
        samples=np.asarray(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), np.bool_),
        token_ids=np.asarray(
            draw(st.lists(st.integers(-1, 1000), min_size=sum(counts), max_size=sum(counts))), np.int32
        ),
        update_slots=np.asarray(slots[:num_updates], np.int32),
        update_columns=np.arange(num_updates, dtype=np.int32),
        update_pages=np.arange(1, num_updates + 1, dtype=np.int32),
        new_slots=tuple(draw(slot_params(slot)) for slot in slots[:new]),
    )


@settings(max_examples=60, deadline=None)
@given(plans())
def test_unpacking_gives_back_the_plan(plan: StepPlan) -> None:
    bucket = choose_bucket(plan, GRID)
    shape = layout(bucket, PAGE_SIZE)
    inputs = unpack(jax.device_put(pack(plan, shape, padding_slot=MAX_ROWS)), shape)
    rows, tokens, updates = plan.num_rows, plan.num_tokens, len(plan.update_slots)
    np.testing.assert_array_equal(inputs.token_T[:tokens], plan.token_ids)
    np.testing.assert_array_equal(inputs.slot_R[:rows], plan.slots)
    np.testing.assert_array_equal(inputs.start_R[:rows], plan.starts)
    np.testing.assert_array_equal(inputs.count_R[:rows], plan.counts)
    np.testing.assert_array_equal(inputs.update_slot_U[:updates], plan.update_slots)
    np.testing.assert_array_equal(inputs.update_column_U[:updates], plan.update_columns)
    np.testing.assert_array_equal(inputs.update_page_U[:updates], plan.update_pages)
    np.testing.assert_array_equal(inputs.slot_R[rows:], MAX_ROWS)
    assert not np.asarray(inputs.count_R[rows:]).any()
    np.testing.assert_array_equal(inputs.update_slot_U[updates:], MAX_ROWS)
    np.testing.assert_array_equal(inputs.update_page_U[updates:], 0)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_sampling_learns_whose_tokens_stand_where(plan: StepPlan) -> None:
    inputs = unpack_rows(jax.device_put(pack_rows(plan, MAX_ROWS, padding_slot=MAX_ROWS)))
    rows = plan.num_rows
    np.testing.assert_array_equal(inputs.slot_R[:rows], plan.slots)
    np.testing.assert_array_equal(inputs.position_R[:rows], plan.starts + plan.counts)
    np.testing.assert_array_equal(inputs.samples_R[:rows], plan.samples)
    np.testing.assert_array_equal(inputs.slot_R[rows:], MAX_ROWS)
    assert not np.asarray(inputs.samples_R[rows:]).any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, MAX_ROWS - 1), unique=True, max_size=ADMISSIONS).flatmap(_params_of))
def test_sampling_parameters_survive_to_the_bit(new_slots: list[SlotParams]) -> None:
    words = pack_params(new_slots, padding_slot=MAX_ROWS)
    np.testing.assert_array_equal(words[len(new_slots) :, 0], MAX_ROWS)
    rows = np.arange(ADMISSIONS, dtype=np.int32)
    inputs = SampleInputs(*jax.device_put((rows, rows + 5, rows >= 0)))
    params_ZF = jax.device_put(words[:, 1:])
    sampling, bans = unpack_params(params_ZF, inputs), unpack_bans(params_ZF, inputs)
    for row, params in enumerate(new_slots):
        assert words[row, 0] == params.slot
        assert float(sampling.temperature_R[row]) == params.sampling.temperature
        assert int(sampling.top_k_R[row]) == params.sampling.top_k
        assert float(sampling.top_p_R[row]) == params.sampling.top_p
        assert float(sampling.min_p_R[row]) == params.sampling.min_p
        high, low = (int(word) for word in sampling.seed_R2[row])
        assert (high << 32) | low == params.sampling.seed
        assert int(bans.until_R[row]) == params.banned_until
        stop_ids = [int(token) for token in bans.stop_id_RB[row] if token >= 0]
        assert stop_ids == list(params.stop_ids)
    np.testing.assert_array_equal(sampling.position_R, inputs.position_R)
    np.testing.assert_array_equal(bans.position_R, inputs.position_R)


def test_each_buffer_is_fresh() -> None:
    plan = _decode_plan(3)
    shape = layout(choose_bucket(plan, GRID), PAGE_SIZE)
    assert not np.shares_memory(
        pack(plan, shape, padding_slot=MAX_ROWS), pack(plan, shape, padding_slot=MAX_ROWS)
    )


@pytest.mark.parametrize(("max_rows", "max_tokens"), [(1, 1), (1, 16), (12, 100), (64, 64), (128, 512)])
def test_the_grid_has_a_bucket_for_every_step(max_rows: int, max_tokens: int) -> None:
    grid = bucket_grid(max_rows, max_tokens)
    for rows in range(1, max_rows + 1):
        assert choose_bucket(_decode_plan(rows), grid).is_decode
    mixed = [bucket for bucket in grid if not bucket.is_decode]
    assert all(bucket.tokens >= 2 * bucket.rows for bucket in mixed)
    assert any(bucket.tokens >= max_tokens and bucket.rows >= max_rows for bucket in mixed)


def test_an_oversized_step_is_refused() -> None:
    with pytest.raises(ValueError, match="a step of 17 tokens and 17 rows fits none"):
        choose_bucket(_decode_plan(17), GRID)


def test_the_smallest_bucket_is_taken() -> None:
    assert choose_bucket(_decode_plan(5), GRID) == Bucket(8, 8)
    assert choose_bucket(_decode_plan(1), GRID) == Bucket(1, 1)


@pytest.mark.parametrize("rows", [2, 8, 9, 16, 17, 33, 100, 256])
def test_short_prompts_beside_decoding_rows_are_not_padded_to_all_rows(rows: int) -> None:
    started = replace(_decode_plan(rows), new_slots=(_params(rows - 1),))
    bucket = choose_bucket(started, bucket_grid(256, 2048))
    assert not bucket.is_decode
    assert bucket.rows < 2 * max(rows, 8)
    assert bucket.tokens < 4 * max(rows, 8)


def _params(slot: int) -> SlotParams:
    return SlotParams(slot=slot, sampling=GREEDY, banned_until=0, stop_ids=())


def _decode_plan(rows: int) -> StepPlan:
    zeros = np.zeros(rows, np.int32)
    return StepPlan(
        step=0,
        request_ids=("r",) * rows,
        epochs=zeros,
        slots=np.arange(rows, dtype=np.int32),
        starts=zeros,
        counts=zeros + 1,
        samples=zeros == 0,
        token_ids=zeros,
        update_slots=zeros[:0],
        update_columns=zeros[:0],
        update_pages=zeros[:0],
    )
