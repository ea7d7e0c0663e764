"""The laws of scheduling hold on the simulator, whatever arrives, is bound, is aborted, and does not fit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo_jax.core.types import Request
from albireo_jax.sched.policy import POLICIES, Policy, last_in_order
from albireo_jax.sched.sequence import Place
from tests.labs.sched_draws import draw_bond, draw_request
from tests.labs.sched_lab import FREE, MAX_LEN, Case, House, Journal, run
from tests.labs.sched_laws import LAWS


def longest_first(request: Request) -> Place:
    return (-request.max_tokens,)


def salt_first(request: Request) -> Place:
    return (float(not request.cache_salt),)


ORDERS = (
    *POLICIES.values(),
    *(Policy(order=order, victim=last_in_order) for order in (longest_first, salt_first)),
)
"""Any order of requests is a policy."""


@st.composite
def cases(draw, *, max_requests: int = 7) -> Case:
    requests = [
        draw_request(f"r{index}", np.random.default_rng(draw(st.integers(0, 200))))
        for index in range(draw(st.integers(1, max_requests)))
    ]
    count = len(requests)
    bound = draw(st.integers(0, 200))
    bonds = [draw_bond(np.random.default_rng((bound, index))) if bound else FREE for index in range(count)]
    arrivals = sorted(draw(st.lists(st.integers(0, 15), min_size=count, max_size=count)))
    aborts = draw(st.lists(st.tuples(st.integers(0, 25), st.integers(0, count - 1)), max_size=3))
    aborts = [(step, index) for step, index in aborts if step >= arrivals[index]]
    return Case(
        requests=tuple(requests),
        arrivals=tuple(arrivals),
        aborts=tuple(aborts),
        bonds=tuple(bonds),
        preemptions=tuple(draw(st.lists(st.integers(1, 25), max_size=3))),
    )


@st.composite
def houses(draw, *, max_depth: int = 4) -> House:
    page_size = draw(st.sampled_from((1, 2, 4, 8)))
    max_rows = draw(st.integers(1, 6))
    return House(
        depth=draw(st.integers(1, max_depth)),
        page_size=page_size,
        num_pages=MAX_LEN // page_size + draw(st.sampled_from((0, 1, 2, 4, 6, 600))),
        max_rows=max_rows,
        max_step_tokens=draw(st.integers(max_rows, 24)),
        num_host_pages=draw(st.sampled_from((0, 1, 3, 9, 40))),
        shares_prefixes=draw(st.booleans()),
        max_copied_pages=draw(st.sampled_from((1, 2, 64))),
        decode_steps=draw(st.sampled_from((1, 2, 8))),
        late_masks=draw(st.sampled_from((None, 0, 1, 2))),
        policy=draw(st.sampled_from(ORDERS)),
    )


def broken_laws(journal: Journal) -> dict[str, str]:
    """The laws that a run breaks, by name, and what each says."""
    broken: dict[str, str] = {}
    for law in LAWS:
        try:
            law(journal)
        except AssertionError as error:
            broken[law.__name__] = str(error)
    return broken


@settings(max_examples=240, deadline=None, derandomize=True, database=None)
@given(case=cases(), house=houses())
def test_all_laws_hold(case: Case, house: House) -> None:
    assert broken_laws(run(case, house)) == {}


@pytest.mark.slow
@settings(max_examples=400, deadline=None, database=None, print_blob=True)
@given(case=cases(max_requests=14), house=houses(max_depth=8))
def test_all_laws_hold_in_larger_cases_that_are_new_each_time(case: Case, house: House) -> None:
    assert broken_laws(run(case, house)) == {}


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(case=cases(), depth=st.integers(1, 4), late_masks=st.sampled_from((None, 0, 1, 2)))
def test_free_rows_run_as_if_there_were_no_bound_ones(case: Case, depth: int, late_masks: int | None) -> None:
    """Given pages and a budget for all, each step of theirs is in the same iteration of the loop.

    That is so however long the masks of the bound ones take.
    """
    house = House(
        depth=depth,
        page_size=4,
        num_pages=200,
        max_rows=8,
        max_step_tokens=200,
        shares_prefixes=False,
        late_masks=late_masks,
    )
    bonds = [replace(case.bond(request), breaks_after=None) for request in case.requests]
    requests = [
        request if bond.modulus else replace(request, stop_ids=(), min_tokens=0)
        for request, bond in zip(case.requests, bonds, strict=True)
    ]
    mixed = Case(requests=tuple(requests), arrivals=case.arrivals, bonds=tuple(bonds))
    free = [index for index, bond in enumerate(bonds) if not bond.modulus]
    pure = Case(
        requests=tuple(requests[index] for index in free),
        arrivals=tuple(case.arrivals[index] for index in free),
    )
    assert rows_of(run(pure, house), pure) == rows_of(run(mixed, house), pure)


def rows_of(journal: Journal, case: Case) -> list[tuple[str, int, int, int]]:
    """The rows of the requests of `case`: iteration, start and count."""
    wanted = {request.request_id for request in case.requests}
    return [
        (request_id, iteration, start, count)
        for iteration, plan in zip(journal.iterations, journal.plans, strict=True)
        for request_id, start, count in zip(
            plan.request_ids, plan.starts.tolist(), plan.counts.tolist(), strict=True
        )
        if request_id in wanted
    ]


def test_the_cases_have_hits_evictions_and_copies_both_ways() -> None:
    """Or the laws would say nothing about them."""
    house = House(
        depth=2, page_size=2, num_pages=MAX_LEN // 2, max_rows=3, max_step_tokens=10, num_host_pages=6
    )
    cached = evicted = copied_in = lost = preempted = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        requests = tuple(draw_request(f"r{index}", random) for index in range(8))
        stats = run(Case(requests=requests, arrivals=tuple(range(0, 24, 3))), house).stats
        assert stats is not None
        cached += stats.cache.cached_tokens
        evicted += stats.tiers.copied_out
        copied_in += stats.tiers.copied_in
        lost += stats.tiers.lost
        preempted += stats.preemptions
    assert min(cached, evicted, copied_in, lost, preempted) > 20
