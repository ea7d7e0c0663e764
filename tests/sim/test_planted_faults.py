"""Each law catches the faults that are planted against it.

A fault is a thin wrapper around the scheduler or the executor: what passes between them and the loop is
changed as a bug would change it. In all cases more requests arrive than there are rows, and in the small
house there are too few pages for the rows. Faults that have to do with constraints and broken logits are
planted in cases that have them.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from albireo_jax.core.plan import LogprobTargets
from tests.labs.policy_faults import most_pages_preempted, preempted_behind_all, youngest_started
from tests.labs.sched_draws import draw_bond, draw_request
from tests.labs.sched_faults import (
    FINE,
    ROOMY,
    SMALL,
    abort_not_passed_on,
    abort_of_another,
    all_rows_broken_by_one,
    ban_forgotten,
    broken_logits_taken_for_a_token,
    budget_exceeded,
    comes_back_before_its_mask,
    constraint_dropped,
    copies_out_exchanged,
    copy_in_lost,
    end_passed_over,
    epochs_ignored,
    error_not_counted,
    failure_passed_over,
    hits_not_told,
    host_page_twice,
    late_ends_lost,
    late_masks_exchanged,
    late_masks_lost,
    looked_up_once,
    masks_of_rows_that_have_none,
    newest_first,
    nobody_waits_for_pages,
    one_token_more,
    page_given_early,
    page_in_use_given,
    page_update_lost,
    plan_arrays_reused,
    planned_before_its_mask,
    position_too_low,
    prefix_kept_that_is_not_finite,
    prefix_taken_for_finite,
    prefixes_found_late,
    prefixes_found_too_early,
    prefixes_of_all_salts,
    prompt_scored_again,
    result_lost,
    result_taken_twice,
    results_of_neighbours,
    row_left_out,
    rule_changed,
    scores_of_neighbours,
    seeds_of_others,
    slots_exchanged,
    stop_ids_forgotten,
    stop_ids_of_all_forgotten,
    waits_for_ever,
    waits_for_others,
    with_calls,
    with_late_masks,
    with_plans,
)
from tests.labs.sched_lab import FREE, Bond, Case, House, Journal, run
from tests.labs.sched_laws import (
    LAWS,
    answers_follow_rules,
    budgets_hold,
    copies_are_timely,
    errors_are_counted,
    hits_were_seen_before,
    masks_follow_tokens,
    no_page_is_computed_twice,
    no_row_is_delayed,
    nobody_waits_in_vain,
    nothing_is_wasted,
    nothing_leaks,
    order_is_fair,
    order_is_kept,
    pages_are_exact,
    requests_finish,
    scores_are_those_alone,
    tokens_are_those_alone,
)


@cache
def crowded_cases() -> tuple[Case, ...]:
    def case(random: np.random.Generator) -> Case:
        requests = tuple(draw_request(f"r{index}", random) for index in range(8))
        return Case(requests=requests, arrivals=tuple(range(8)), aborts=((4, 1), (9, 3), (12, 7)))

    return tuple(case(np.random.default_rng(seed)) for seed in range(12))


@cache
def bound_cases() -> tuple[Case, ...]:
    def bound(case: Case, random: np.random.Generator) -> Case:
        failing = Bond(modulus=5, fails_after=int(random.integers(4)))
        return replace(case, bonds=(failing, *(draw_bond(random) for _ in case.requests[1:])))

    return tuple(bound(case, np.random.default_rng(seed)) for seed, case in enumerate(crowded_cases()))


@cache
def equal_cases(*, broken: float = 0.0) -> tuple[Case, ...]:
    """Prompts that are one long one or its beginning; the logits behind some of them are not finite."""

    def case(random: np.random.Generator) -> Case:
        ends, apart = random.integers(12, 21, size=8).tolist(), int(random.integers(5))
        requests = tuple(
            replace(
                draw_request(f"r{index}", random),
                prompt_token_ids=tuple(range(end)),
                cache_salt="",
                logprobs=None,
                prompt_logprobs=None,
            )
            for index, end in enumerate(ends)
        )
        bonds = tuple(Bond(breaks_after=0) if random.random() < broken else FREE for _ in requests)
        return Case(requests=requests, arrivals=tuple(index * apart for index in range(8)), bonds=bonds)

    return tuple(case(np.random.default_rng(seed)) for seed in range(12))


def broken_cases() -> tuple[Case, ...]:
    return equal_cases(broken=0.4)


@cache
def preempted_cases() -> tuple[Case, ...]:
    """The youngest request is preempted, be it in the middle of its prompt."""
    return tuple(replace(case, preemptions=(2, 3, 5, 8, 13)) for case in crowded_cases())


@cache
def held_cases() -> tuple[Case, ...]:
    """Bound requests are preempted, some of them while their masks are made."""
    return tuple(replace(case, preemptions=tuple(range(2, 20))) for case in bound_cases())


FAULTS = {
    "page_update_lost": (with_plans(page_update_lost), (tokens_are_those_alone, pages_are_exact)),
    "page_given_early": (with_plans(page_given_early), (pages_are_exact,)),
    "page_in_use_given": (with_plans(page_in_use_given), (tokens_are_those_alone, pages_are_exact)),
    "slots_exchanged": (with_plans(slots_exchanged), (tokens_are_those_alone,)),
    "position_too_low": (with_plans(position_too_low), (tokens_are_those_alone, nothing_is_wasted)),
    "seeds_of_others": (with_plans(seeds_of_others), (tokens_are_those_alone,)),
    "ban_forgotten": (with_plans(ban_forgotten, every=1), (tokens_are_those_alone, requests_finish)),
    "epochs_ignored": (with_calls(commit=epochs_ignored), (tokens_are_those_alone,)),
    "newest_first": (newest_first, (order_is_fair, order_is_kept)),
    "plan_arrays_reused": (plan_arrays_reused, (tokens_are_those_alone,)),
    "budget_exceeded": (budget_exceeded, (budgets_hold,)),
    "results_of_neighbours": (with_calls(commit=results_of_neighbours), (tokens_are_those_alone,)),
    "result_lost": (with_calls(commit=result_lost), (requests_finish, nothing_leaks)),
    "result_taken_twice": (with_calls(commit=result_taken_twice), (tokens_are_those_alone,)),
    "abort_not_passed_on": (with_calls(abort=abort_not_passed_on), (nothing_leaks, requests_finish)),
    "abort_of_another": (with_calls(abort=abort_of_another), (requests_finish,)),
    "stop_ids_forgotten": (with_calls(add=stop_ids_forgotten), (requests_finish, tokens_are_those_alone)),
    "stop_ids_of_all_forgotten": (
        with_calls(commit=stop_ids_of_all_forgotten),
        (requests_finish, tokens_are_those_alone),
    ),
    "preempted_behind_all": (with_calls(plan=preempted_behind_all), (order_is_fair, order_is_kept)),
    "most_pages_preempted": (with_calls(plan=most_pages_preempted), (order_is_kept,)),
    "youngest_started": (with_calls(plan=youngest_started), (order_is_kept, order_is_fair)),
    "scores_forgotten": (
        with_plans(lambda plan: replace(plan, scored=LogprobTargets())),
        (scores_are_those_alone,),
    ),
    "scores_of_neighbours": (with_calls(commit=scores_of_neighbours), (scores_are_those_alone,)),
    "prefixes_of_all_salts": (with_calls(add=prefixes_of_all_salts), (hits_were_seen_before,)),
    "hits_not_told": (with_calls(commit=hits_not_told), (hits_were_seen_before,)),
    "copy_in_lost": (with_plans(copy_in_lost, every=1), (tokens_are_those_alone,)),
    "copies_out_exchanged": (
        lambda case, _: with_plans(copies_out_exchanged, every=1)(case, FINE),
        (tokens_are_those_alone,),
    ),
    "host_page_twice": (with_plans(host_page_twice, every=1), (copies_are_timely,)),
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
EQUAL_FAULTS = {
    "prefixes_found_too_early": (with_calls(plan=prefixes_found_too_early), (hits_were_seen_before,)),
    "prefixes_found_late": (with_calls(commit=prefixes_found_late), (no_page_is_computed_twice,)),
    "nobody_waits_for_pages": (with_calls(plan=nobody_waits_for_pages), (no_page_is_computed_twice,)),
    "looked_up_once": (with_calls(plan=looked_up_once), (no_page_is_computed_twice,)),
    "waits_for_ever": (with_calls(plan=waits_for_ever), (requests_finish, nobody_waits_in_vain)),
    "waits_for_others": (with_calls(plan=waits_for_others), (nobody_waits_in_vain,)),
}
BROKEN_FAULTS = {
    "prefix_kept_that_is_not_finite": (
        with_calls(commit=prefix_kept_that_is_not_finite),
        (hits_were_seen_before,),
    ),
    "prefix_taken_for_finite": (with_calls(commit=prefix_taken_for_finite), (hits_were_seen_before,)),
}
PREEMPTED_FAULTS = {
    "prompt_scored_again": (with_calls(plan=prompt_scored_again), (scores_are_those_alone,)),
}
LATE_FAULTS = {
    "planned_before_its_mask": (
        with_late_masks(with_calls(plan=planned_before_its_mask)),
        (masks_follow_tokens, no_row_is_delayed, order_is_fair),
    ),
    "comes_back_before_its_mask": (
        with_late_masks(with_calls(plan=comes_back_before_its_mask)),
        (masks_follow_tokens,),
    ),
    "late_masks_lost": (
        with_late_masks(with_calls(take_masks=late_masks_lost)),
        (requests_finish, nothing_leaks),
    ),
    "late_ends_lost": (with_late_masks(with_calls(take_masks=late_ends_lost)), (requests_finish,)),
    "late_masks_exchanged": (
        with_late_masks(with_calls(take_masks=late_masks_exchanged)),
        (masks_follow_tokens, requests_finish),
    ),
}
PLANTED = [
    (fault, run_with_fault, law, cases)
    for faults, cases in (
        (FAULTS, crowded_cases),
        (BOUND_FAULTS, bound_cases),
        (EQUAL_FAULTS, equal_cases),
        (BROKEN_FAULTS, broken_cases),
        (PREEMPTED_FAULTS, preempted_cases),
        (LATE_FAULTS, held_cases),
    )
    for fault, (run_with_fault, laws) in faults.items()
    for law in laws
]


def breaks(law, journal: Journal) -> bool:
    try:
        law(journal)
    except AssertionError:
        return True
    return False


def is_caught(law, run_with_fault, case: Case, house: House) -> bool:
    """By the law, or by the scheduler's own invariants before there is a journal."""
    try:
        journal = run_with_fault(case, house)
    except AssertionError:
        return True
    return breaks(law, journal)


@pytest.mark.parametrize("house", [SMALL, ROOMY])
@pytest.mark.parametrize("cases", [crowded_cases, bound_cases, equal_cases, broken_cases])
def test_without_a_fault_all_laws_hold(cases, house: House) -> None:
    journals = [run(case, house) for case in cases()]
    assert not [law for law in LAWS for journal in journals if breaks(law, journal)]
    preempted = [journal.stats.preemptions > 0 for journal in journals]
    assert any(preempted) == (house is SMALL)


def test_without_a_fault_all_laws_hold_with_late_masks() -> None:
    runs = with_late_masks(run)
    journals = [runs(case, house) for case in held_cases()[:6] for house in (SMALL, ROOMY)]
    assert not [law for law in LAWS for journal in journals if breaks(law, journal)]


@pytest.mark.parametrize(
    ("run_with_fault", "law", "cases"),
    [planted[1:] for planted in PLANTED],
    ids=[f"{fault}-{law.__name__}" for fault, _, law, _ in PLANTED],
)
def test_fault_is_caught(run_with_fault, law, cases) -> None:
    assert any(is_caught(law, run_with_fault, case, house) for case in cases() for house in (SMALL, ROOMY))


def test_every_law_has_a_fault() -> None:
    assert {law for _, _, law, _ in PLANTED} == set(LAWS)
