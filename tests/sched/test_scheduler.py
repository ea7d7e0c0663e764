import dataclasses
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import TOKEN_ON_DEVICE, SampledTokens, SlotParams, StepPlan
from albireo_jax.core.token_sampling import GREEDY, TokenSampling
from albireo_jax.core.types import FinishReason, Request, RequestOutput
from albireo_jax.sched.scheduler import Scheduler

STOP_ID = 9


def scheduler(*, num_pages: int = 64, max_rows: int = 4, max_step_tokens: int = 8) -> Scheduler:
    limits = EngineLimits(max_model_len=64, vocab_size=10, num_pages=num_pages, page_size=4)
    return Scheduler(SchedulerConfig(max_rows=max_rows, max_step_tokens=max_step_tokens), limits)


def request(request_id: str, prompt: int | tuple[int, ...] = 3, **fields) -> Request:
    prompt_ids = tuple(token % 8 for token in range(prompt)) if isinstance(prompt, int) else prompt
    return Request(request_id=request_id, prompt_token_ids=prompt_ids, **{"max_tokens": 5, **fields})


def sampled(plan: StepPlan, *ids: int) -> SampledTokens:
    return SampledTokens(ids=np.array(ids or [1] * plan.num_rows, np.int32), finished_s=0.0)


def told(outputs: list[RequestOutput]) -> list[tuple]:
    """Request, token and reason of each output."""
    return [tuple(output[:3]) for output in outputs]


def planned(engine: Scheduler) -> StepPlan:
    plan = engine.plan()
    engine.check_invariants()
    assert plan is not None
    return plan


def rows(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    columns = (plan.starts.tolist(), plan.counts.tolist(), plan.samples.tolist())
    return list(zip(plan.request_ids, *columns, strict=True))


def arrays(plan: StepPlan) -> dict[str, np.ndarray]:
    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def drain_in_flight(
    engine: Scheduler, in_flight: list[StepPlan], *, max_steps: int = 500
) -> list[RequestOutput]:
    """Run to the end with as many steps in flight as there are now."""
    outputs: list[RequestOutput] = []
    for _ in range(max_steps):
        plan = engine.plan()
        in_flight = in_flight + ([] if plan is None else [plan])
        if not in_flight:
            break
        oldest, *in_flight = in_flight
        outputs += engine.commit(oldest, sampled(oldest))
        engine.check_invariants()
    assert not engine.has_work
    assert engine.stats().pages_in_use == 0
    return outputs


def drain(engine: Scheduler) -> list[RequestOutput]:
    return drain_in_flight(engine, [])


def all_plans(engine: Scheduler, *, max_steps: int = 500) -> Iterator[StepPlan]:
    """The plans to the end, each committed before the next is made."""
    for _ in range(max_steps):
        if (plan := engine.plan()) is None:
            break
        yield plan
        engine.commit(plan, sampled(plan))
    assert not engine.has_work


def test_a_prompt_is_computed_in_chunks_and_its_last_one_samples() -> None:
    engine = scheduler(max_step_tokens=4)
    engine.add(request("a", (5, 6, 7, 8, 5, 6), max_tokens=3))
    first, second, third, fourth = (planned(engine) for _ in range(4))
    assert [rows(plan) for plan in (first, second, third, fourth)] == [
        [("a", 0, 4, False)],
        [("a", 4, 2, True)],
        [("a", 6, 1, True)],
        [("a", 7, 1, True)],
    ]
    assert first.token_ids.tolist() == [5, 6, 7, 8]
    assert second.token_ids.tolist() == [5, 6]
    assert third.token_ids.tolist() == [TOKEN_ON_DEVICE]
    assert engine.plan() is None  # the rest of the answer is known to be in flight
    assert told(engine.commit(first, sampled(first))) == []
    outputs = [
        engine.commit(plan, sampled(plan, id_))[0] for plan, id_ in ((second, 3), (third, 4), (fourth, 5))
    ]
    assert told(outputs) == [("a", 3, None), ("a", 4, None), ("a", 5, FinishReason.LENGTH)]
    assert not engine.has_work


def test_decoding_rows_come_first_and_prompts_take_what_is_left_of_the_budget() -> None:
    engine = scheduler(max_step_tokens=8)
    for name, prompt in (("a", 3), ("b", 4), ("c", 9), ("d", 2)):
        engine.add(request(name, prompt, cache_salt=name))
    assert rows(planned(engine)) == [("a", 0, 3, True), ("b", 0, 4, True), ("c", 0, 1, False)]
    assert rows(planned(engine)) == [("a", 3, 1, True), ("b", 4, 1, True), ("c", 1, 6, False)]
    last = planned(engine)
    assert rows(last) == [("a", 4, 1, True), ("b", 5, 1, True), ("c", 7, 2, True), ("d", 0, 2, True)]
    assert last.token_ids.tolist() == [TOKEN_ON_DEVICE, TOKEN_ON_DEVICE, 7, 0, 0, 1]


def test_a_prompt_token_left_over_comes_from_the_host() -> None:
    engine = scheduler(max_step_tokens=4)
    engine.add(request("a", (1, 2, 3, 4, 5)))
    planned(engine)
    assert planned(engine).token_ids.tolist() == [5]


def test_pages_are_given_for_the_tokens_of_the_step_and_no_more() -> None:
    engine = scheduler(max_step_tokens=8)
    engine.add(request("a", 10, max_tokens=4))
    columns = [planned(engine).update_columns.tolist() for _ in range(5)]
    assert columns == [[0, 1], [2], [], [], [3]]


def test_sampling_parameters_go_with_the_first_step_of_an_admission() -> None:
    engine = scheduler()
    sampling = TokenSampling(temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, seed=11)
    engine.add(request("a", 3, sampling=sampling, stop_ids=(STOP_ID,)))
    engine.add(request("b", 2, min_tokens=2, stop_ids=(STOP_ID, 8)))
    first = planned(engine)
    slots = first.slots.tolist()
    assert first.new_slots == (
        SlotParams(
            slot=slots[0],
            sampling=sampling,
            banned_until=3,
            stop_ids=(STOP_ID,),
        ),
        SlotParams(
            slot=slots[1],
            sampling=GREEDY,
            banned_until=4,
            stop_ids=(STOP_ID, 8),
        ),
    )
    assert planned(engine).new_slots == ()


def test_a_stop_token_ends_a_request_and_what_is_in_flight_is_dropped() -> None:
    engine = scheduler()
    engine.add(request("a", stop_ids=(STOP_ID,)))
    engine.add(request("b", stop_ids=(STOP_ID,)))
    first, second = planned(engine), planned(engine)
    assert told(engine.commit(first, sampled(first, STOP_ID, 2))) == [
        ("a", STOP_ID, FinishReason.STOP),
        ("b", 2, None),
    ]
    engine.check_invariants()
    assert told(engine.commit(second, sampled(second, 1, STOP_ID))) == [("b", STOP_ID, FinishReason.STOP)]
    assert engine.stats().pages_in_use == 0


def test_the_stop_ids_of_one_request_do_not_end_another() -> None:
    engine = scheduler()
    engine.add(request("a", stop_ids=(STOP_ID,), max_tokens=2))
    engine.add(request("b", stop_ids=(8,), max_tokens=2))
    first = planned(engine)
    assert told(engine.commit(first, sampled(first, 8, STOP_ID))) == [("a", 8, None), ("b", STOP_ID, None)]


def test_a_stop_token_at_the_last_position_is_a_stop() -> None:
    engine = scheduler()
    engine.add(request("a", max_tokens=1, stop_ids=(STOP_ID,)))
    plan = planned(engine)
    assert told(engine.commit(plan, sampled(plan, STOP_ID))) == [("a", STOP_ID, FinishReason.STOP)]


def test_slot_and_pages_are_free_once_the_last_step_is_planned() -> None:
    engine = scheduler(max_rows=1, num_pages=2)
    engine.add(request("a", 3, max_tokens=1))
    engine.add(request("b", 7, max_tokens=1))
    first = planned(engine)
    assert engine.stats().finishing == 1
    second = planned(engine)
    assert (first.slots.tolist(), second.slots.tolist()) == ([0], [0])
    assert set(first.update_pages.tolist()) <= set(second.update_pages.tolist())
    assert told(engine.commit(first, sampled(first, 4))) == [("a", 4, FinishReason.LENGTH)]
    assert told(engine.commit(second, sampled(second, 5))) == [("b", 5, FinishReason.LENGTH)]


def test_the_youngest_gives_its_pages_back_and_computes_its_known_tokens_anew() -> None:
    engine = scheduler(num_pages=3, max_rows=2)
    engine.add(request("a", (1, 1, 1), max_tokens=4))
    engine.add(request("b", (2, 2, 2), max_tokens=6, stop_ids=(STOP_ID,), min_tokens=1))
    first, second = planned(engine), planned(engine)
    assert told(engine.commit(first, sampled(first, 5, 6))) == [("a", 5, None), ("b", 6, None)]
    third = planned(engine)  # both need a second page and one is left
    assert rows(third) == [("a", 4, 1, True)]
    assert engine.stats().preemptions == 1
    assert told(engine.commit(second, sampled(second, 5, STOP_ID))) == [("a", 5, None)]
    fourth = planned(engine)
    assert rows(fourth) == [("a", 5, 1, True)]  # its last one, so the next step has room for b
    again = planned(engine)
    assert rows(again) == [("b", 0, 4, True)]
    assert again.token_ids.tolist() == [2, 2, 2, 6]
    assert again.new_slots[0].banned_until == 4
    assert again.epochs[0] not in first.epochs
    outputs = drain_in_flight(engine, [third, fourth, again])
    assert [output.request_id for output in outputs].count("b") == 5
    assert outputs[-1] == RequestOutput("b", 1, FinishReason.LENGTH)


def test_a_preempted_request_goes_before_those_that_arrived_after_it() -> None:
    engine = scheduler(num_pages=3, max_rows=2)
    for index, name in enumerate(("a", "b", "c")):
        engine.add(request(name, (index, 1, 2), max_tokens=4))
    starts = [
        dict(zip(plan.slots.tolist(), plan.request_ids, strict=True))[params.slot]
        for plan in all_plans(engine)
        for params in plan.new_slots
    ]
    assert starts == ["a", "b", "b", "c"]


def test_a_request_starts_only_beside_others_if_pages_for_all_of_it_and_one_each_are_free() -> None:
    engine = scheduler(num_pages=6, max_step_tokens=4)
    engine.add(request("a", 4, max_tokens=8))
    engine.add(request("b", 16, max_tokens=1))
    assert engine.plan() is not None
    assert planned(engine).request_ids == ("a",)  # 4 pages and one more, 4 are free
    engine.abort("b")
    engine.add(request("c", 12, max_tokens=1, cache_salt="other"))
    assert planned(engine).request_ids == ("a", "c")


def test_a_request_that_needs_all_pages_starts_alone() -> None:
    engine = scheduler(num_pages=4)
    engine.add(request("a", 15, max_tokens=1))
    assert [output.finish_reason for output in drain(engine)] == [FinishReason.LENGTH]


def test_abort_frees_a_request_wherever_it_is() -> None:
    engine = scheduler(max_rows=2)
    for name, max_tokens in (("running", 5), ("finishing", 1), ("waiting", 5), ("other", 2)):
        engine.add(request(name, 3, max_tokens=max_tokens))
    plan = planned(engine)
    for name in ("running", "finishing", "waiting"):
        assert engine.abort(name) == RequestOutput(name, None, FinishReason.ABORT)
        assert engine.abort(name) is None
        engine.check_invariants()
    assert engine.stats().pages_in_use == 0
    assert told(engine.commit(plan, sampled(plan))) == []
    assert {output.request_id for output in drain(engine)} == {"other"}


def test_a_result_is_not_taken_for_a_later_request_of_the_same_id() -> None:
    engine = scheduler()
    engine.add(request("a", max_tokens=2))
    old = planned(engine)
    engine.abort("a")
    engine.add(request("a", max_tokens=2))
    new = planned(engine)
    assert told(engine.commit(old, sampled(old, 7))) == []
    assert told(engine.commit(new, sampled(new, 8))) == [("a", 8, None)]


def test_a_plan_does_not_change_after_it_was_made() -> None:
    engine = scheduler(num_pages=4, max_rows=3)
    for name in ("a", "b", "c", "d"):
        engine.add(request(name, 4, max_tokens=6))
    made = [
        (plan, {name: array.copy() for name, array in arrays(plan).items()}) for plan in all_plans(engine)
    ]
    assert all((arrays(plan)[name] == array).all() for plan, copy in made for name, array in copy.items())


def test_the_same_calls_give_the_same_plans() -> None:
    def plans() -> list[StepPlan]:
        engine = scheduler(num_pages=4, max_rows=3)
        for name in ("a", "b", "c", "d"):
            engine.add(request(name, 4, max_tokens=6))
        return list(all_plans(engine))

    for one, other in zip(plans(), plans(), strict=True):
        assert (one.step, one.request_ids, one.new_slots) == (other.step, other.request_ids, other.new_slots)
        assert all(np.array_equal(array, arrays(other)[name]) for name, array in arrays(one).items())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request("a", 3), "'a' is in use"),
        (
            request("b", 31, max_tokens=34),
            "31 prompt tokens and max_tokens 34 exceed the model's limit of 64",
        ),
        (request("b", 3, max_tokens=30), "need 33 tokens of KV cache, it holds 32"),
        (request("b", (1, 10)), "token id 10 is outside the vocabulary of 10"),
    ],
)
def test_a_request_that_could_never_finish_is_refused_and_the_others_go_on(
    bad: Request, message: str
) -> None:
    engine = scheduler(num_pages=8)
    engine.add(request("a", 3))
    with pytest.raises(ValueError, match=message):
        engine.add(bad)
    assert [output.request_id for output in drain(engine)] == ["a"] * 5


def test_a_lost_page_is_found() -> None:
    engine = scheduler()
    engine.add(request("a"))
    planned(engine)
    engine._tiers.take(1)
    with pytest.raises(AssertionError, match="owners differ"):
        engine.check_invariants()


def test_a_page_of_two_owners_is_found() -> None:
    engine = scheduler()
    for name in ("a", "b"):
        engine.add(request(name))
    planned(engine)
    engine._table.pages[1, 0] = engine._table.pages[0, 0]
    with pytest.raises(AssertionError, match="owners differ"):
        engine.check_invariants()


def test_a_waiting_request_keeps_its_prompt_once_in_four_bytes_a_token() -> None:
    num_requests, num_tokens = 100, 5_000
    limits = EngineLimits(max_model_len=2 * num_tokens, vocab_size=512, num_pages=1_000, page_size=16)
    scheduler = Scheduler(SchedulerConfig(max_rows=4), limits)
    random = np.random.default_rng(0)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for index in range(num_requests):
            prompt = random.integers(512, size=num_tokens).tolist()
            scheduler.add(request(str(index), prompt, max_tokens=1))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / (num_requests * num_tokens) < 4.5
