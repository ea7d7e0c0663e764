"""Rows with a constraint: masks, holding, ends and failures, step by step."""

import numpy as np
import pytest

from albireo_jax.core.plan import NOT_FINITE, SampledTokens
from albireo_jax.core.types import FinishReason, RequestOutput
from tests.labs.constraint_lab import EOS, Script, commit, mask_of, planned, request, scheduler


def test_a_constrained_row_is_held_until_its_token_is_known_and_no_other_row_is() -> None:
    engine = scheduler()
    script = Script((5, 33), (6,), (7,))
    engine.add(*request("free"))
    engine.add(*request("bound", script))
    first, second = planned(engine), planned(engine)
    assert (first.request_ids, second.request_ids) == (("free", "bound"), ("free",))
    assert first.mask_slots.tolist() == first.slots[1:].tolist()
    assert first.masks.tolist() == [mask_of(5, 33).tolist()]
    assert (second.mask_slots.size, second.masks.size) == (0, 0)
    assert commit(engine, first, 1, 33) == [("free", 1, None), ("bound", 33, None)]
    third, fourth = planned(engine), planned(engine)
    assert (third.request_ids, fourth.request_ids) == (("free", "bound"), ("free",))
    assert third.masks.tolist() == [mask_of(6).tolist()]
    assert third.starts.tolist() == [4, 3]
    assert script.taken == [33]


def test_a_prompt_in_chunks_has_a_mask_with_its_last_chunk_only() -> None:
    engine = scheduler(max_step_tokens=4)
    engine.add(*request("bound", Script((5,), (6,)), prompt_token_ids=tuple(range(10))))
    assert [planned(engine).mask_slots.size for _ in range(3)] == [0, 0, 1]
    assert engine.plan() is None


def test_the_end_is_an_ordinary_stop_token() -> None:
    engine = scheduler()
    script = Script((5,), (EOS,))
    engine.add(*request("bound", script))
    assert commit(engine, planned(engine), 5) == [("bound", 5, None)]
    assert commit(engine, planned(engine), EOS) == [("bound", EOS, FinishReason.STOP)]
    assert script.taken == [5]


def test_a_request_ends_with_the_token_after_which_nothing_may_follow() -> None:
    engine = scheduler()
    engine.add(*request("bound", Script((5,), ()), stop_ids=()))
    assert commit(engine, planned(engine), 5) == [("bound", 5, FinishReason.STOP)]
    assert not engine.has_work


def test_an_output_says_whether_its_token_is_text() -> None:
    engine = scheduler()
    engine.add(*request("complete", Script((5,), ()), stop_ids=()))
    engine.add(*request("stopped", Script((6, EOS))))
    engine.add(*request("free"))
    sampled = SampledTokens(ids=np.array([5, EOS, 7], np.int32), finished_s=0.0)
    outputs = engine.commit(planned(engine), sampled)
    assert [(output.finish_reason, output.is_text) for output in outputs] == [
        (FinishReason.STOP, True),
        (FinishReason.STOP, False),
        (None, True),
    ]


def test_stop_tokens_are_no_part_of_the_mask_before_min_tokens() -> None:
    engine = scheduler()
    engine.add(*request("bound", Script((5, EOS), (6, EOS), (7, EOS)), min_tokens=2))
    masks = []
    for token_id in (5, 6, 7):
        plan = planned(engine)
        masks += plan.masks.tolist()
        commit(engine, plan, token_id)
        if token_id == 7:
            break
    assert masks == [mask_of(5).tolist(), mask_of(6).tolist(), mask_of(7, EOS).tolist()]


def test_an_answer_that_is_complete_before_min_tokens_ends() -> None:
    engine = scheduler()
    engine.add(*request("bound", Script((5,), (EOS,)), min_tokens=4))
    assert commit(engine, planned(engine), 5) == [("bound", 5, FinishReason.STOP)]


@pytest.mark.parametrize(("script", "reason"), [(Script(()), "stop"), (Script(None), "error")])
def test_a_request_that_may_say_nothing_ends_when_it_is_added(script: Script, reason: str) -> None:
    engine = scheduler()
    assert engine.add(*request("bound", script)) == RequestOutput("bound", None, FinishReason(reason))
    assert not engine.has_work
    assert engine.add(*request("bound", Script((5,)))) is None


def test_a_constraint_that_fails_ends_its_request_and_no_other() -> None:
    engine = scheduler()
    engine.add(*request("bound", Script((5,), None)))
    engine.add(*request("other", Script((6,), (7,))))
    assert commit(engine, planned(engine), 5, 6) == [("bound", 5, FinishReason.ERROR), ("other", 6, None)]
    assert planned(engine).request_ids == ("other",)


def test_a_token_that_the_mask_forbids_is_a_bug() -> None:
    engine = scheduler()
    engine.add(*request("bound", Script((5,))))
    with pytest.raises(AssertionError, match="request bound: token 4 was sampled and is not allowed"):
        commit(engine, planned(engine), 4)


def test_the_last_token_is_checked_too() -> None:
    engine = scheduler()
    engine.add(*request("bound", Script((5,)), max_tokens=1))
    plan = planned(engine)
    with pytest.raises(AssertionError, match="not allowed"):
        commit(engine, plan, 4)


def test_a_preempted_row_keeps_its_constraint_and_what_it_took_in() -> None:
    engine = scheduler(num_pages=3, max_rows=2)
    script = Script((5,), (6,), (7,), (8,), (9,))
    engine.add(*request("old", stop_ids=()))
    engine.add(*request("bound", script, max_tokens=5))
    commit(engine, planned(engine), 1, 5)
    in_flight = [planned(engine)]
    assert in_flight[0].request_ids == ("old", "bound")
    while engine.stats().preemptions == 0:
        in_flight.append(planned(engine))
        assert len(in_flight) < 10
        assert in_flight[-1].request_ids == ("old",)
    assert commit(engine, in_flight.pop(0), 1, 6) == [("old", 1, None)]  # what it said in flight is dropped
    said: list[object] = []
    for _ in range(20):
        if (plan := engine.plan()) is not None:
            in_flight.append(plan)
        if not in_flight:
            break
        plan = in_flight.pop(0)
        ids = [script.next()[0] if request_id == "bound" else 1 for request_id in plan.request_ids]
        said += [token for name, token, _ in commit(engine, plan, *ids) if name == "bound"]
        engine.check_invariants()
    assert said == [6, 7, 8, 9]
    assert script.taken == [5, 6, 7, 8]


def test_logits_that_are_not_finite_end_their_row_with_an_error() -> None:
    engine = scheduler()
    for name in ("a", "b", "last"):
        engine.add(*request(name, max_tokens=1 if name == "last" else 8, stop_ids=(EOS,)))
    first, second = planned(engine), planned(engine)
    assert commit(engine, first, 1, NOT_FINITE, NOT_FINITE) == [
        ("a", 1, None),
        ("b", None, FinishReason.ERROR),
        ("last", None, FinishReason.ERROR),
    ]
    engine.check_invariants()
    assert commit(engine, second, 2, 3) == [("a", 2, None)]
    assert engine.stats().nonfinite == 2


def test_a_bound_row_whose_logits_are_not_finite_ends_too() -> None:
    engine = scheduler()
    engine.add(*request("bound", Script((5,))))
    assert commit(engine, planned(engine), NOT_FINITE) == [("bound", None, FinishReason.ERROR)]
    assert engine.stats().nonfinite == 1
