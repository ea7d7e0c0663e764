"""The laws of scheduling hold on the simulator, whatever arrives, is aborted, and does not fit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sched_lab import MAX_LEN, Case, House, draw_request, run
from sched_laws import LAWS


@st.composite
def cases(draw) -> Case:
    requests = [
        draw_request(f"r{index}", np.random.default_rng(draw(st.integers(0, 200))))
        for index in range(draw(st.integers(1, 7)))
    ]
    count = len(requests)
    arrivals = sorted(draw(st.lists(st.integers(0, 15), min_size=count, max_size=count)))
    aborts = draw(st.lists(st.tuples(st.integers(0, 25), st.integers(0, count - 1)), max_size=3))
    aborts = [(step, index) for step, index in aborts if step >= arrivals[index]]
    return Case(requests=tuple(requests), arrivals=tuple(arrivals), aborts=tuple(aborts))


@st.composite
def houses(draw) -> House:
    page_size = draw(st.sampled_from((1, 2, 4, 8)))
    max_rows = draw(st.integers(1, 6))
    return House(
        depth=draw(st.integers(1, 4)),
        page_size=page_size,
        num_pages=MAX_LEN // page_size + draw(st.integers(0, 6)),
        max_rows=max_rows,
        max_step_tokens=draw(st.integers(max_rows, 24)),
    )


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(case=cases(), house=houses())
def test_law_holds(law, case: Case, house: House) -> None:
    law(run(case, house))
