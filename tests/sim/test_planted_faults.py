"""Each law catches the faults that are planted against it.

A fault is a thin wrapper around the scheduler or the executor: what passes between them and the loop is
changed as a bug would change it. In all cases more requests arrive than there are rows, and in the small
house there are too few pages for the rows.
"""

from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
from sched_lab import MAX_LEN, Case, House, Journal, draw_request, run
from sched_laws import (
    LAWS,
    budgets_hold,
    nothing_is_wasted,
    nothing_leaks,
    order_is_fair,
    pages_are_exact,
    requests_finish,
    tokens_are_those_alone,
)

from albireo_jax.core.plan import StepPlan
from albireo_jax.core.types import FinishReason, Request, RequestOutput
from albireo_jax.sched.scheduler import Scheduler

SMALL = House(depth=2, page_size=4, num_pages=MAX_LEN // 4, max_rows=4, max_step_tokens=12)
ROOMY = replace(SMALL, num_pages=200)


@cache
def crowded_cases() -> tuple[Case, ...]:
    def case(random: np.random.Generator) -> Case:
        requests = tuple(draw_request(f"r{index}", random) for index in range(8))
        return Case(requests=requests, arrivals=tuple(range(8)), aborts=((4, 1), (9, 3), (12, 7)))

    return tuple(case(np.random.default_rng(seed)) for seed in range(6))


class Faulty:
    """A scheduler of which some calls are replaced by functions of it."""

    def __init__(
        self,
        real: Scheduler,
        *,
        add=Scheduler.add,
        abort=Scheduler.abort,
        plan=Scheduler.plan,
        commit=Scheduler.commit,
    ) -> None:
        self.real = real
        self.add = partial(add, real)
        self.abort = partial(abort, real)
        self.plan = partial(plan, real)
        self.commit = partial(commit, real)

    @property
    def has_work(self) -> bool:
        return self.real.has_work

    @property
    def times_emptied(self) -> int:
        return self.real.times_emptied


def with_calls(**functions):
    """Run with some of the scheduler's calls replaced."""
    return partial(run, break_scheduler=partial(Faulty, **functions))


def with_plans(change):
    """Run with every third plan changed."""

    def plan(real: Scheduler) -> StepPlan | None:
        made = real.plan()
        return change(made) if made is not None and made.step % 3 == 2 else made

    return with_calls(plan=plan)


# The faults: each runs a case with the fault in it.


def page_update_lost(plan: StepPlan) -> StepPlan:
    return replace(
        plan,
        update_slots=plan.update_slots[:-1],
        update_columns=plan.update_columns[:-1],
        update_pages=plan.update_pages[:-1],
    )


def page_given_early(plan: StepPlan) -> StepPlan:
    column, page = MAX_LEN // SMALL.page_size - 1, SMALL.num_pages
    return replace(
        plan,
        update_slots=np.append(plan.update_slots, plan.slots[:1]),
        update_columns=np.append(plan.update_columns, np.int32(column)),
        update_pages=np.append(plan.update_pages, np.int32(page)),
    )


def page_in_use_given(plan: StepPlan) -> StepPlan:
    return replace(plan, update_pages=np.ones_like(plan.update_pages))


def slots_exchanged(plan: StepPlan) -> StepPlan:
    return replace(plan, slots=plan.slots[::-1])


def position_too_low(plan: StepPlan) -> StepPlan:
    return replace(plan, starts=np.maximum(plan.starts - 1, 0))


def seeds_of_others(plan: StepPlan) -> StepPlan:
    return replace(plan, new_slots=tuple(replace(params, seed=params.seed + 1) for params in plan.new_slots))


def ban_forgotten(plan: StepPlan) -> StepPlan:
    return replace(plan, new_slots=tuple(replace(params, banned_until=0) for params in plan.new_slots))


def newest_first(case: Case, house: House) -> Journal:
    held: list[Request] = []

    def add(real: Scheduler, request: Request) -> None:
        held.append(request)
        if len(held) == 2:
            real.add(held.pop())
            real.add(held.pop())

    return with_calls(add=add)(case, house)


def plan_arrays_reused(case: Case, house: House) -> Journal:
    def broken(executor):
        plans: list[StepPlan] = []

        def dispatch(plan: StepPlan):
            for earlier in plans[-1:]:
                earlier.starts[:] = plan.starts[0]
            plans.append(plan)
            return executor.dispatch(plan)

        return SimpleNamespace(dispatch=dispatch)

    return run(case, house, break_executor=broken)


def budget_exceeded(case: Case, house: House) -> Journal:
    larger = replace(house, max_step_tokens=house.max_step_tokens + 1)
    return run(case, house, break_scheduler=lambda _: Scheduler(larger.config, larger.limits))


def epochs_ignored(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    current = [real._live[r].epoch if r in real._live else -1 for r in plan.request_ids]
    return real.commit(replace(plan, epochs=np.array(current, np.int32)), sampled)


def results_of_neighbours(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    return real.commit(plan, replace(sampled, ids=np.roll(sampled.ids, 1)))


def result_lost(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    return [] if plan.step % 5 == 4 else real.commit(plan, sampled)


def result_taken_twice(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    return real.commit(plan, sampled) + (real.commit(plan, sampled) if plan.step == 4 else [])


def abort_not_passed_on(_: Scheduler, request_id: str) -> RequestOutput:
    return RequestOutput(request_id, None, FinishReason.ABORT)


def abort_of_another(real: Scheduler, _: str) -> RequestOutput | None:
    return real.abort("r2")


def stop_ids_forgotten(real: Scheduler, request: Request) -> None:
    real.add(replace(request, stop_ids=()))


def one_token_more(real: Scheduler, request: Request) -> None:
    real.add(replace(request, max_tokens=request.max_tokens + 1))


FAULTS = {
    "page_update_lost": (with_plans(page_update_lost), (tokens_are_those_alone, pages_are_exact)),
    "page_given_early": (with_plans(page_given_early), (pages_are_exact,)),
    "page_in_use_given": (with_plans(page_in_use_given), (tokens_are_those_alone, pages_are_exact)),
    "slots_exchanged": (with_plans(slots_exchanged), (tokens_are_those_alone,)),
    "position_too_low": (with_plans(position_too_low), (tokens_are_those_alone, nothing_is_wasted)),
    "seeds_of_others": (with_plans(seeds_of_others), (tokens_are_those_alone,)),
    "ban_forgotten": (with_plans(ban_forgotten), (tokens_are_those_alone, requests_finish)),
    "epochs_ignored": (with_calls(commit=epochs_ignored), (tokens_are_those_alone,)),
    "newest_first": (newest_first, (order_is_fair,)),
    "plan_arrays_reused": (plan_arrays_reused, (tokens_are_those_alone,)),
    "budget_exceeded": (budget_exceeded, (budgets_hold,)),
    "results_of_neighbours": (with_calls(commit=results_of_neighbours), (tokens_are_those_alone,)),
    "result_lost": (with_calls(commit=result_lost), (requests_finish, nothing_leaks)),
    "result_taken_twice": (with_calls(commit=result_taken_twice), (tokens_are_those_alone,)),
    "abort_not_passed_on": (with_calls(abort=abort_not_passed_on), (nothing_leaks, requests_finish)),
    "abort_of_another": (with_calls(abort=abort_of_another), (requests_finish,)),
    "stop_ids_forgotten": (with_calls(add=stop_ids_forgotten), (requests_finish, tokens_are_those_alone)),
    "one_token_more": (with_calls(add=one_token_more), (requests_finish, budgets_hold, nothing_is_wasted)),
}
PAIRS = [(fault, law) for fault, (_, laws) in FAULTS.items() for law in laws]


def breaks(law, journal: Journal) -> bool:
    try:
        law(journal)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("house", [SMALL, ROOMY])
def test_without_a_fault_all_laws_hold(house: House) -> None:
    journals = [run(case, house) for case in crowded_cases()]
    assert not [law for law in LAWS for journal in journals if breaks(law, journal)]
    preempted = [journal.stats.preemptions > 0 for journal in journals]
    assert any(preempted) == (house is SMALL)


@pytest.mark.parametrize(("fault", "law"), PAIRS, ids=[f"{fault}-{law.__name__}" for fault, law in PAIRS])
def test_fault_is_caught(fault: str, law) -> None:
    run_with_fault, _ = FAULTS[fault]
    assert any(
        breaks(law, run_with_fault(case, house)) for case in crowded_cases() for house in (SMALL, ROOMY)
    )


def test_every_law_has_a_fault() -> None:
    assert {law for _, law in PAIRS} == set(LAWS)
