"""Plans of several steps bring what single steps bring, delay nobody, and compute nothing behind a stop.

The laws of `sched_laws` look at such a plan as at so many plans, each with the pages that it is the first to
need. Faults are planted in what passes between scheduler and device, as in `test_planted_faults`.
"""

from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo_jax.core.plan import StepPlan
from albireo_jax.core.types import FinishReason, Request, RequestOutput
from albireo_jax.sched.ordered_queue import OrderedQueue
from albireo_jax.sched.scheduler import Scheduler
from tests.labs.sched_draws import draw_request
from tests.labs.sched_faults import with_calls, with_plans
from tests.labs.sched_lab import MAX_LEN, Case, House, Journal, run
from tests.labs.sched_laws import (
    LAWS,
    budgets_hold,
    pages_are_exact,
    scores_are_those_alone,
    tokens_are_those_alone,
)


def draw_plain(request_id: str, random: np.random.Generator) -> Request:
    """A request that can take several steps by itself."""
    return replace(draw_request(request_id, random), logprobs=None, prompt_logprobs=None)


@st.composite
def cases(draw) -> Case:
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    count = draw(st.integers(1, 6))
    requests = tuple(draw_plain(f"r{index}", random) for index in range(count))
    arrivals = tuple(sorted(random.integers(0, 6, size=count).tolist()))
    aborts = draw(st.lists(st.tuples(st.integers(6, 12), st.integers(0, count - 1)), max_size=2))
    return Case(requests=requests, arrivals=arrivals, aborts=tuple(aborts))


@st.composite
def houses(draw) -> House:
    page_size = draw(st.sampled_from((1, 2, 4, 8)))
    return House(
        depth=draw(st.integers(1, 3)),
        page_size=page_size,
        num_pages=MAX_LEN // page_size + draw(st.sampled_from((0, 4, 40))),
        max_rows=draw(st.integers(1, 6)),
        max_step_tokens=24,
        num_host_pages=draw(st.sampled_from((0, 9))),
        decode_steps=draw(st.sampled_from((2, 3, 8))),
    )


def bursts_delay_nobody(journal: Journal) -> None:
    """In a plan of several steps is every request that has not ended or had its last step planned."""
    limits = {r.request_id: len(r.prompt_token_ids) + r.max_tokens for r in journal.case.requests}
    live: list[str] = []
    for event, following in pairwise([*journal.events, None]):
        if isinstance(event, Request):
            live.append(event.request_id)
        elif isinstance(event, RequestOutput) and event.finish_reason and event.request_id in live:
            live.remove(event.request_id)
        elif isinstance(event, StepPlan):
            if isinstance(following, StepPlan) and following.step == event.step:
                assert list(event.request_ids) == live
            ends = dict(zip(event.request_ids, (event.starts + event.counts).tolist(), strict=True))
            live = [name for name in live if ends.get(name) != limits[name] - 1]


def stops_cost_little(journal: Journal) -> None:
    """Behind a stop only single steps compute a token, those that were queued before it was seen."""
    assert journal.stats is not None
    if not journal.case.aborts and not journal.stats.preemptions:
        stopped = [journal.outputs(r)[-1].finish_reason is FinishReason.STOP for r in journal.case.requests]
        assert journal.stats.dropped <= sum(stopped) * (journal.house.depth - 1)


ALL_LAWS = (*LAWS, bursts_delay_nobody, stops_cost_little)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(case=cases(), house=houses())
def test_outputs_are_those_of_single_steps(case: Case, house: House) -> None:
    journal = run(case, house)
    single = run(case, replace(house, decode_steps=1))
    for law in ALL_LAWS:
        law(journal)
    aborted = {case.requests[index] for _, index in case.aborts}
    for request in case.requests:
        if request not in aborted:
            outputs = [output[:3] for output in journal.outputs(request)]
            assert outputs == [output[:3] for output in single.outputs(request)]


@cache
def lively_cases(*, scored: bool = False) -> tuple[Case, ...]:
    def case(random: np.random.Generator) -> Case:
        draw = draw_request if scored else draw_plain
        requests = tuple(draw(f"r{index}", random) for index in range(6))
        return Case(requests=requests, arrivals=(0, 0, 0, 1, 4, 9))

    return tuple(case(np.random.default_rng(seed)) for seed in range(12))


TIGHT = House(page_size=2, num_pages=MAX_LEN // 2, max_rows=3, max_step_tokens=12, decode_steps=4)
ROOMY = replace(TIGHT, page_size=4, num_pages=200, max_rows=6)


@pytest.mark.parametrize("house", [TIGHT, ROOMY])
def test_the_cases_have_bursts_that_end_early_and_some_that_find_no_pages(house: House) -> None:
    journals = [run(case, house) for case in lively_cases()]
    assert not [law for law in ALL_LAWS for journal in journals if breaks(law, journal)]
    assert sum(journal.repeats for journal in journals) > 20
    stopped = [
        journal.outputs(request)[-1].finish_reason is FinishReason.STOP
        for journal in journals
        for request in journal.case.requests
    ]
    assert sum(stopped) > 10
    assert any(journal.stats.preemptions for journal in journals if journal.stats) == (house is TIGHT)


def steps_past_the_limit(plan: StepPlan) -> StepPlan:
    return replace(plan, steps=plan.steps + np.int32(1))


def pages_of_later_steps_lost(plan: StepPlan) -> StepPlan:
    starts = {int(slot): int(start) for slot, start in zip(plan.slots, plan.starts, strict=True)}
    first = np.array([starts.get(int(slot), 0) for slot in plan.update_slots], np.int32)
    kept = plan.update_columns * ROOMY.page_size <= first if len(plan.steps) else plan.update_slots >= 0
    return replace(
        plan,
        update_slots=plan.update_slots[kept],
        update_columns=plan.update_columns[kept],
        update_pages=plan.update_pages[kept],
    )


def tokens_in_the_wrong_order(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    last_first = replace(sampled, ids=np.ascontiguousarray(sampled.ids[::-1]))
    return real.commit(plan, last_first if len(plan.steps) else sampled)


def last_token_lost(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    return real.commit(plan, replace(sampled, counts=np.maximum(sampled.counts - 1, 0)))


def tokens_behind_the_end_taken(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    return real.commit(plan, replace(sampled, counts=np.full_like(sampled.counts, plan.num_steps)))


def scored_rows_in_bursts(real: Scheduler) -> StepPlan | None:
    real._table.repeats[:] = True
    return real.plan()


def those_that_wait_passed_over(real: Scheduler) -> StepPlan | None:
    if not len(real._running):
        return real.plan()
    waiting, real._waiting._queue = real._waiting._queue, OrderedQueue(1)
    plan = real.plan()
    real._waiting._queue = waiting
    return plan


def stops_unknown_to_the_device(case: Case, house: House) -> Journal:
    def broken(executor):
        def forget(plan: StepPlan) -> StepPlan:
            return replace(
                plan, new_slots=tuple(replace(new, banned_until=0, stop_ids=()) for new in plan.new_slots)
            )

        dispatch = executor.dispatch
        executor.dispatch = lambda plan: dispatch(forget(plan))
        return executor

    held = replace(case, requests=tuple(replace(request, min_tokens=0) for request in case.requests))
    return run(held, house, break_executor=broken)


FAULTS = {
    "steps_past_the_limit": (with_plans(steps_past_the_limit, every=1), budgets_hold),
    "pages_of_later_steps_lost": (with_plans(pages_of_later_steps_lost, every=1), pages_are_exact),
    "pages_lost_and_read": (with_plans(pages_of_later_steps_lost, every=1), tokens_are_those_alone),
    "tokens_in_the_wrong_order": (with_calls(commit=tokens_in_the_wrong_order), tokens_are_those_alone),
    "last_token_lost": (with_calls(commit=last_token_lost), tokens_are_those_alone),
    "tokens_behind_the_end_taken": (with_calls(commit=tokens_behind_the_end_taken), stops_cost_little),
    "scored_rows_in_bursts": (with_calls(plan=scored_rows_in_bursts), scores_are_those_alone),
    "those_that_wait_passed_over": (with_calls(plan=those_that_wait_passed_over), bursts_delay_nobody),
    "stops_unknown_to_the_device": (stops_unknown_to_the_device, stops_cost_little),
}


def breaks(law, journal: Journal) -> bool:
    try:
        law(journal)
    except AssertionError:
        return True
    return False


def is_caught(law, run_with_fault, case: Case) -> bool:
    """By the law, or by an assertion of the scheduler before there is a journal."""
    try:
        return breaks(law, run_with_fault(case, ROOMY))
    except AssertionError:
        return True


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault: str) -> None:
    run_with_fault, law = FAULTS[fault]
    caught = partial(is_caught, law, run_with_fault)
    assert any(map(caught, lively_cases(scored=fault == "scored_rows_in_bursts")))
