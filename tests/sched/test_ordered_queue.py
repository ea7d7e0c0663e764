"""A queue in the order of places does what a sorted list does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo_jax.core.types import Request
from albireo_jax.sched.ordered_queue import OrderedQueue
from albireo_jax.sched.sequence import Place, Sequence, place_of


def sequence(place: Place) -> Sequence:
    request = Request(request_id=str(place), prompt_token_ids=np.ones(1, np.int32), max_tokens=1)
    return Sequence(request, request.prompt_token_ids, place)


@given(
    num_first=st.integers(1, 5),
    calls=st.lists(st.tuples(st.integers(-3, 3), st.floats(0, 1), st.booleans()), max_size=60),
)
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_the_first_are_those_of_a_sorted_list(num_first: int, calls: list[tuple[int, float, bool]]) -> None:
    queue, model = OrderedQueue(num_first), list[Sequence]()
    for arrival, (key, share, pushes) in enumerate(calls):
        if pushes or not model:
            added, before = sequence((key, arrival)), list(queue.first)
            assert queue.push(added) == [each for each in before if each.place > added.place]
            model.append(added)
        else:
            removed = model.pop(int(share * (len(model) - 1)))
            queue.remove(removed)
        model.sort(key=place_of)
        queue.check_invariants()
        assert queue.first == model[:num_first]
        assert len(queue) == len(model)
        assert sorted(queue, key=place_of) == model


def test_sequences_that_come_back_and_leave_again_leave_no_trace() -> None:
    queue = OrderedQueue(4)
    for index in range(10):
        queue.push(sequence((index,)))
    behind = sequence((100,))
    for _ in range(5_000):
        queue.push(behind)
        queue.remove(behind)
    assert len(queue) == 10
    assert len(queue._heap) < 200


@pytest.mark.parametrize("change", ["place", "heap"])
def test_a_sequence_that_is_never_found_is_missed(change: str) -> None:
    queue = OrderedQueue(1)
    for index in range(4):
        queue.push(sequence((index,)))
    if change == "place":
        queue._behind[3,].place = (0.5,)
    else:
        queue._heap.remove((3,))
    with pytest.raises(AssertionError):
        queue.check_invariants()
