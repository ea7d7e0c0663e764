import dataclasses

import numpy as np
import pytest

from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import TOKEN_ON_DEVICE, PageCopies, SlotParams, StepPlan
from albireo_jax.core.token_sampling import GREEDY, TokenSampling
from albireo_jax.sim.lanes import Clock
from albireo_jax.sim.simulated_executor import NullExecutor, SimExecutor

LIMITS = EngineLimits(max_model_len=32, vocab_size=50, num_pages=8, page_size=4, num_host_pages=3)
DRAWN = TokenSampling(temperature=1.0, seed=0)
PARAMS = SlotParams(slot=0, sampling=GREEDY, banned_until=0, stop_ids=())


def executor(clock: Clock | None = None) -> SimExecutor:
    return SimExecutor(LIMITS, max_rows=3, cost=lambda plan: 1.0 + plan.num_tokens, clock=clock or Clock())


def plan(
    tokens: list[int],
    *,
    start: int = 0,
    slot: int = 0,
    pages: tuple[int, ...] = (),
    first_column: int = 0,
    new: SlotParams | None = None,
) -> StepPlan:
    """A step of one row that samples."""
    columns = range(first_column, first_column + len(pages))
    return StepPlan(
        step=0,
        request_ids=("a",),
        epochs=np.array([1], np.int32),
        slots=np.array([slot], np.int32),
        starts=np.array([start], np.int32),
        counts=np.array([len(tokens)], np.int32),
        samples=np.array([True]),
        token_ids=np.array(tokens, np.int32),
        update_slots=np.full(len(pages), slot, np.int32),
        update_columns=np.array(columns, np.int32),
        update_pages=np.array(pages, np.int32),
        new_slots=() if new is None else (dataclasses.replace(new, slot=slot),),
    )


def sample(sim: SimExecutor, step: StepPlan) -> int:
    return int(sim.dispatch(step).wait().ids[0])


def test_chunks_pages_and_slots_do_not_change_the_token() -> None:
    whole = sample(executor(), plan([5, 6, 7, 8, 9], pages=(1, 2), new=PARAMS))
    sim = executor()
    sim.dispatch(plan([5, 6, 7], slot=2, pages=(7,), new=PARAMS))
    assert sample(sim, plan([8, 9], start=3, slot=2, pages=(4,), first_column=1)) == whole


def test_a_token_on_the_device_is_the_one_that_was_sampled() -> None:
    sim, other = executor(), executor()
    token = sample(sim, plan([5, 6], pages=(1,), new=PARAMS))
    after = sample(sim, plan([TOKEN_ON_DEVICE], start=2))
    assert sample(other, plan([5, 6, token], pages=(1,), new=PARAMS)) == after


@pytest.mark.parametrize(
    "changed",
    [
        plan([6, 5, 7, 8, 9], pages=(1, 2), new=PARAMS),
        plan([5, 6, 7, 8, 9], pages=(1, 1), new=PARAMS),
        plan([5, 6, 7, 8, 9], start=1, pages=(1, 2), new=PARAMS),
        plan([5, 6, 7, 8, 9], pages=(1, 2), new=dataclasses.replace(PARAMS, sampling=DRAWN)),
    ],
    ids=["order", "page", "position", "parameters"],
)
def test_order_pages_positions_and_parameters_matter(changed: StepPlan) -> None:
    right = [sample(executor(), plan([5, 6, 7, 8, n], pages=(1, 2), new=PARAMS)) for n in range(10)]
    wrong = [
        sample(executor(), dataclasses.replace(changed, token_ids=np.append(changed.token_ids[:-1], [n])))
        for n in range(10)
    ]
    assert right[9] != wrong[9] or right != wrong
    assert sum(one == other for one, other in zip(right, wrong, strict=True)) < 5


def test_a_page_that_another_request_wrote_over_changes_the_token() -> None:
    def run(page_of_other: int) -> int:
        sim = executor()
        sim.dispatch(plan([5, 6, 7, 8], pages=(1,), new=PARAMS))
        sim.dispatch(plan([9, 9, 9], slot=1, pages=(page_of_other,), new=PARAMS))
        return sample(sim, plan([5], start=4, pages=(3,), first_column=1))

    assert run(2) == run(4)
    assert run(2) != run(1)


def copies_only(**copies: tuple[tuple[int, int], ...]) -> StepPlan:
    """A step without rows."""
    none = np.zeros(0, np.int32)
    return dataclasses.replace(
        plan([]),
        request_ids=(),
        epochs=none,
        slots=none,
        starts=none,
        counts=none,
        samples=np.zeros(0, np.bool_),
        copies=PageCopies(**copies),
    )


OUT = dataclasses.replace(
    plan([9, 9, 9, 9], slot=1, pages=(1,), new=PARAMS), copies=PageCopies(to_host=((1, 2),))
)
"""Copies page 1 to host page 2 and then writes over it."""


def tokens_after(*between: StepPlan, page: int, copies: PageCopies | None = None) -> list[int]:
    """The tokens after ten prompts in page 1, read from `page` once these steps have run."""

    def token(last: int) -> int:
        sim = executor()
        for step in (plan([5, 6, 7, last], pages=(1,), new=PARAMS), *between):
            sim.dispatch(step)
        after = plan([5], start=4, pages=(page, 3))
        return sample(sim, dataclasses.replace(after, copies=copies or PageCopies()))

    return [token(last) for last in range(10)]


def are_unrelated(tokens: list[int], others: list[int]) -> bool:
    return sum(one == other for one, other in zip(tokens, others, strict=True)) < 5


@pytest.mark.parametrize("page", [1, 6])
def test_a_page_comes_back_from_the_host_as_it_left(page: int) -> None:
    stayed = tokens_after(page=1)
    back = copies_only(to_device=((2, page),))
    assert tokens_after(OUT, back, page=page) == stayed
    assert tokens_after(OUT, back, copies_only(), page=page) == stayed
    assert are_unrelated(tokens_after(OUT, page=page), stayed)


def test_a_page_that_is_read_by_the_step_that_sends_for_it_gives_other_tokens() -> None:
    early = tokens_after(OUT, page=6, copies=PageCopies(to_device=((2, 6),)))
    assert are_unrelated(early, tokens_after(page=1))


def test_a_host_page_may_be_copied_to_as_soon_as_its_copy_in_has_started() -> None:
    again, back = copies_only(to_host=((1, 2),)), copies_only(to_device=((2, 6),))
    assert tokens_after(OUT, back, again, page=6) == tokens_after(page=1)
    assert are_unrelated(tokens_after(OUT, again, back, page=6), tokens_after(page=1))


def test_a_step_of_copies_only_returns_no_ids() -> None:
    ids = executor().dispatch(copies_only(to_host=((1, 1),), to_device=((1, 2),))).wait().ids
    assert (ids.tolist(), ids.dtype) == ([], np.int32)


def test_the_seed_matters_at_a_temperature_only() -> None:
    def token(temperature: float, seed: int) -> int:
        params = dataclasses.replace(PARAMS, sampling=TokenSampling(temperature=temperature, seed=seed))
        return sample(executor(), plan([5, 6], pages=(1,), new=params))

    assert len({token(0.0, seed) for seed in range(8)}) == 1
    assert len({token(0.7, seed) for seed in range(8)}) > 3
    assert token(0.7, 2**63 - 1) == token(0.7, 2**63 - 1)


def test_stop_ids_are_not_sampled_below_banned_until() -> None:
    free = sample(executor(), plan([5, 6], pages=(1,), new=PARAMS))
    for banned_until, expected in ((2, free), (3, (free + 1) % 50)):
        params = dataclasses.replace(PARAMS, banned_until=banned_until, stop_ids=(free,))
        assert sample(executor(), plan([5, 6], pages=(1,), new=params)) == expected


def test_a_masked_row_samples_what_its_mask_allows() -> None:
    allowed = [3, 31, 32, 49]
    bits = np.zeros(64, np.bool_)
    bits[allowed] = True
    masks = np.packbits(bits, bitorder="little").view(np.int32)[None]
    seen: set[int] = set()
    for last in range(20):
        step = plan([5, last], slot=2, pages=(1,), new=PARAMS)
        masked = dataclasses.replace(step, mask_slots=np.array([2], np.int32), masks=masks)
        seen.add(sample(executor(), masked))
        others = dataclasses.replace(step, mask_slots=np.array([1], np.int32), masks=masks)
        assert sample(executor(), others) == sample(executor(), step)
    assert seen == set(allowed)


def test_steps_follow_each_other_on_the_clock() -> None:
    clock = Clock()
    sim = executor(clock)
    first = sim.dispatch(plan([5, 6], pages=(1,), new=PARAMS))
    second = sim.dispatch(plan([TOKEN_ON_DEVICE], start=2))
    assert clock() == 0.0
    assert second.wait().finished_s == 3.0 + 2.0
    assert clock() == 5.0
    assert first.wait().finished_s == 3.0
    assert clock() == 5.0
    clock.advance_to(9.0)
    assert sim.dispatch(plan([TOKEN_ON_DEVICE], start=3)).wait().finished_s == 11.0


def test_a_plan_that_changes_before_its_step_is_waited_for_is_found_out() -> None:
    def run(change: int) -> int:
        sim = executor()
        step = plan([5, 6], pages=(1,), new=PARAMS)
        handle = sim.dispatch(step)
        step.token_ids[0] += change
        return int(handle.wait().ids[0])

    assert run(0) != run(1)


def test_the_null_executor_answers_at_once_with_one_id_per_row() -> None:
    clock = Clock()
    clock.advance_to(2.0)
    sampled = NullExecutor(token_id=7, clock=clock).dispatch(plan([5, 6])).wait()
    assert (sampled.ids.tolist(), sampled.finished_s) == ([7], 2.0)


def test_copies_have_lanes_of_their_own_and_a_step_waits_for_those_before_it() -> None:
    """A step takes 10 seconds and a page 4, beside the step."""
    sim = SimExecutor(LIMITS, max_rows=3, cost=lambda _: 10.0, clock=Clock(), page_copy_s=4.0)

    def end_s(to_host: tuple[int, ...] = (), to_device: tuple[int, ...] = ()) -> float:
        copies = PageCopies(
            to_host=tuple((host, host) for host in to_host),
            to_device=tuple((host, host) for host in to_device),
        )
        return sim.dispatch(dataclasses.replace(plan([5]), copies=copies)).step.finished_s

    assert end_s(to_host=(1, 2, 3)) == 10  # on the host at 4, 8 and 12
    assert end_s(to_device=(1, 2)) == 20  # page 2 is there at 8, so on the device at 12
    assert end_s(to_device=(3, 1, 2)) == 30  # at 24
    assert end_s(to_device=(1,) * 7) == 40  # at 52
    assert sim.copy_times == (60, 0)
    assert end_s() == 62
    assert sim.copy_times == (60, 12)


def test_a_step_that_only_copies_waits_for_its_copies() -> None:
    sim = SimExecutor(LIMITS, max_rows=3, cost=lambda _: 1.0, clock=Clock(), page_copy_s=4.0)
    out = PageCopies(to_host=((1, 1), (2, 2)))
    sim.dispatch(dataclasses.replace(plan([5], pages=(1,), new=PARAMS), copies=out))
    none = np.zeros(0, np.int32)
    only = dataclasses.replace(
        plan([]),
        request_ids=(),
        epochs=none,
        slots=none,
        starts=none,
        counts=none,
        samples=np.zeros(0, bool),
        copies=PageCopies(to_device=((2, 1),)),  # there at 12: it is on the host at 8
    )
    sampled = sim.dispatch(only).wait()
    assert (sampled.finished_s, sampled.copy_s, sampled.copy_wait_s) == (12, 4, 10)
    assert sim.dispatch(plan([6], start=1)).wait().copy_wait_s == 0
    assert sim.copy_times == (12, 10)
