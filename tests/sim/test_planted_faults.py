"""Each law catches the faults that are planted against it.

A fault is a thin wrapper around the scheduler or the executor: what passes between them and the loop is
changed as a bug would change it. In all cases more requests arrive than there are rows, and in the small
house there are too few pages for the rows. Faults that have to do with constraints and broken logits are
planted in cases that have them.
"""

from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
from sched_lab import MAX_LEN, VOCAB_SIZE, Bond, Case, House, Journal, Rule, draw_bond, draw_request, run
from sched_laws import (
    LAWS,
    answers_follow_rules,
    budgets_hold,
    errors_are_counted,
    masks_follow_tokens,
    no_row_is_delayed,
    nothing_is_wasted,
    nothing_leaks,
    order_is_fair,
    pages_are_exact,
    requests_finish,
    scores_are_those_alone,
    tokens_are_those_alone,
)

from albireo_jax.core.plan import NOT_FINITE, ScoredTokens, StepPlan
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


@cache
def bound_cases() -> tuple[Case, ...]:
    def bound(case: Case, random: np.random.Generator) -> Case:
        failing = Bond(modulus=5, fails_after=int(random.integers(4)))
        return replace(case, bonds=(failing, *(draw_bond(random) for _ in case.requests[1:])))

    return tuple(bound(case, np.random.default_rng(seed)) for seed, case in enumerate(crowded_cases()))


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


def row_left_out(real: Scheduler) -> StepPlan | None:
    """The oldest row is forgotten in some steps."""
    if real._steps % 5 != 4 or len(real._running) < 2:
        return real.plan()
    oldest, real._running = real._running[:1], real._running[1:]
    plan = real.plan()
    real._running = np.concatenate((oldest, real._running))
    return plan


def constraint_dropped(real: Scheduler, request: Request) -> RequestOutput | None:
    return real.add(replace(request, constraint=None))


def rule_changed(real: Scheduler, request: Request) -> RequestOutput | None:
    if not isinstance(request.constraint, Rule):
        return real.add(request)
    bond = request.constraint.bond
    return real.add(replace(request, constraint=Rule(replace(bond, modulus=bond.modulus + 1))))


def failure_passed_over(real: Scheduler, request: Request) -> RequestOutput | None:
    if not isinstance(request.constraint, Rule):
        return real.add(request)
    return real.add(replace(request, constraint=Rule(replace(request.constraint.bond, fails_after=None))))


def end_passed_over(real: Scheduler, request: Request) -> RequestOutput | None:
    if not isinstance(request.constraint, Rule):
        return real.add(request)
    return real.add(replace(request, constraint=Rule(replace(request.constraint.bond, max_length=None))))


def masks_of_rows_that_have_none(plan: StepPlan) -> StepPlan:
    free = np.setdiff1d(plan.slots, plan.mask_slots)
    masks = np.full((len(free), 1), 2**VOCAB_SIZE - 1, np.int32)
    return replace(
        plan,
        mask_slots=np.concatenate((plan.mask_slots, free)),
        masks=np.concatenate((plan.masks.reshape(-1, 1), masks)),
    )


def scores_of_neighbours(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    if sampled.scores is not None:
        sampled = replace(
            sampled, scores=replace(sampled.scores, logprobs=np.roll(sampled.scores.logprobs, 1))
        )
    return real.commit(plan, sampled)


def prompt_scored_again(real: Scheduler) -> StepPlan | None:
    for sequence in real._waiting:
        sequence.num_scored = 0
    return real.plan()


def broken_logits_taken_for_a_token(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    free = ~np.isin(plan.slots, plan.mask_slots)
    return real.commit(plan, replace(sampled, ids=np.where(free, np.maximum(sampled.ids, 0), sampled.ids)))


def error_not_counted(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    outputs = real.commit(plan, sampled)
    real._nonfinite = 0
    return outputs


def all_rows_broken_by_one(real: Scheduler, plan: StepPlan, sampled) -> list[RequestOutput]:
    if (sampled.ids == NOT_FINITE).any():
        sampled = replace(sampled, ids=np.full_like(sampled.ids, NOT_FINITE))
    return real.commit(plan, sampled)


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
    "scores_forgotten": (
        with_plans(lambda plan: replace(plan, scored=ScoredTokens())),
        (scores_are_those_alone,),
    ),
    "scores_of_neighbours": (with_calls(commit=scores_of_neighbours), (scores_are_those_alone,)),
    "prompt_scored_again": (with_calls(plan=prompt_scored_again), (scores_are_those_alone,)),
    "one_token_more": (with_calls(add=one_token_more), (requests_finish, budgets_hold, nothing_is_wasted)),
}
BOUND_FAULTS = {
    "row_left_out": (with_calls(plan=row_left_out), (no_row_is_delayed, order_is_fair)),
    "constraint_dropped": (
        with_calls(add=constraint_dropped),
        (masks_follow_tokens, answers_follow_rules, tokens_are_those_alone),
    ),
    "rule_changed": (
        with_calls(add=rule_changed),
        (masks_follow_tokens, answers_follow_rules, tokens_are_those_alone),
    ),
    "failure_passed_over": (with_calls(add=failure_passed_over), (tokens_are_those_alone,)),
    "end_passed_over": (with_calls(add=end_passed_over), (answers_follow_rules, tokens_are_those_alone)),
    "masks_of_rows_that_have_none": (with_plans(masks_of_rows_that_have_none), (masks_follow_tokens,)),
    "broken_logits_taken_for_a_token": (
        with_calls(commit=broken_logits_taken_for_a_token),
        (tokens_are_those_alone,),
    ),
    "error_not_counted": (with_calls(commit=error_not_counted), (errors_are_counted,)),
    "all_rows_broken_by_one": (
        with_calls(commit=all_rows_broken_by_one),
        (tokens_are_those_alone, requests_finish, errors_are_counted),
    ),
}
PAIRS = [(fault, law) for fault, (_, laws) in (FAULTS | BOUND_FAULTS).items() for law in laws]


def breaks(law, journal: Journal) -> bool:
    try:
        law(journal)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("house", [SMALL, ROOMY])
@pytest.mark.parametrize("cases", [crowded_cases, bound_cases])
def test_without_a_fault_all_laws_hold(cases, house: House) -> None:
    journals = [run(case, house) for case in cases()]
    assert not [law for law in LAWS for journal in journals if breaks(law, journal)]
    preempted = [journal.stats.preemptions > 0 for journal in journals]
    assert any(preempted) == (house is SMALL)


@pytest.mark.parametrize(("fault", "law"), PAIRS, ids=[f"{fault}-{law.__name__}" for fault, law in PAIRS])
def test_fault_is_caught(fault: str, law) -> None:
    run_with_fault, _ = (FAULTS | BOUND_FAULTS)[fault]
    cases = bound_cases() if fault in BOUND_FAULTS else crowded_cases()
    assert any(breaks(law, run_with_fault(case, house)) for case in cases for house in (SMALL, ROOMY))


def test_every_law_has_a_fault() -> None:
    assert {law for _, law in PAIRS} == set(LAWS)
