"""Costs of the scheduler that must not grow: by counts of operations, or by ratios of the best of several."""

import time
from collections.abc import Callable

import numpy as np
import pytest

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import SampledTokens, StepPlan
from albireo_jax.core.types import FinishReason, Request, RequestOutput
from albireo_jax.sched.scheduler import Scheduler

ROWS = 16
STOP_ID, SAMPLED_ID = 2, 7


def scheduler(*, num_pages: int, rows: int = ROWS) -> Scheduler:
    limits = EngineLimits(max_model_len=256, vocab_size=100, num_pages=num_pages, page_size=16)
    return Scheduler(SchedulerConfig(max_rows=rows, max_step_tokens=4096), limits)


def request(request_id: str, **fields) -> Request:
    values = {"prompt_token_ids": np.full(32, 5, np.int32), "max_tokens": 200, "stop_ids": (STOP_ID,)}
    return Request(request_id=request_id, **(values | fields))


def sampled(plan: StepPlan, token_id: int = SAMPLED_ID) -> SampledTokens:
    return SampledTokens(ids=np.full(plan.num_rows, token_id, np.int32), finished_s=0.0)


def step(engine: Scheduler, token_id: int = SAMPLED_ID) -> list:
    plan = engine.plan()
    assert plan is not None
    return engine.commit(plan, sampled(plan, token_id))


def crowded(num_waiting: int, *, num_pages: int) -> Scheduler:
    engine = scheduler(num_pages=num_pages)
    for index in range(ROWS + num_waiting):
        engine.add(request(f"r{index}"))
    for _ in range(4):
        step(engine)
    return engine


def seconds(call: Callable[[], object], *, times: int = 1) -> float:
    """CPU seconds of a call, the best of five runs of several."""
    best = float("inf")
    for _ in range(5):
        begin_s = time.thread_time()
        for _ in range(times):
            call()
        best = min(best, time.thread_time() - begin_s)
    return best / times


def steps_s(engine: Scheduler) -> float:
    return seconds(lambda: step(engine), times=12)


def add_and_abort_s(engine: Scheduler) -> float:
    """Of a request at the very end of the queue."""

    def call() -> None:
        engine.add(request("late"))
        assert engine.abort("late") is not None

    return seconds(call, times=20)


def abort_in_the_middle_s(engine: Scheduler) -> float:
    waiting = [f"r{index}" for index in range(ROWS + 30, ROWS + 90)]
    return seconds(lambda: engine.abort(waiting.pop()), times=10)


@pytest.mark.parametrize("cost_s", [steps_s, add_and_abort_s, abort_in_the_middle_s])
@pytest.mark.parametrize("num_pages", [ROWS * 16, ROWS * 4])
def test_no_call_costs_more_when_many_requests_wait(cost_s, num_pages: int) -> None:
    few, many = (cost_s(crowded(num_waiting, num_pages=num_pages)) for num_waiting in (100, 10_000))
    assert many < 5 * few


def test_to_preempt_costs_no_more_when_many_requests_wait() -> None:
    """Rows that grow take all pages, so that the youngest are preempted while the queue is full."""

    def longest_plan_s(num_waiting: int) -> float:
        engine = crowded(num_waiting, num_pages=ROWS * 3)
        longest_s = 0.0
        for _ in range(40):
            preemptions = engine.stats().preemptions
            begin_s = time.thread_time()
            plan = engine.plan()
            if engine.stats().preemptions > preemptions:
                longest_s = max(longest_s, time.thread_time() - begin_s)
            assert plan is not None
            engine.commit(plan, sampled(plan))
        assert longest_s > 0
        return longest_s

    few, many = (min(longest_plan_s(num_waiting) for _ in range(2)) for num_waiting in (100, 10_000))
    assert many < 5 * few


@pytest.mark.parametrize("stops", [False, True])
def test_rows_that_end_together_are_released_by_one_call(
    stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = scheduler(num_pages=2_000, rows=128)
    for index in range(128):
        engine.add(request(f"r{index}", max_tokens=20, prompt_token_ids=(index % 100, index // 100) * 16))
    for _ in range(18):
        step(engine)
    calls: list[int] = []
    release = engine._tiers.release

    def count(pages: np.ndarray, **fields) -> None:
        calls.append(len(pages))
        release(pages, **fields)

    monkeypatch.setattr(engine._tiers, "release", count)
    if not stops:
        step(engine)
    assert not calls
    outputs = step(engine, STOP_ID if stops else SAMPLED_ID)
    reason = FinishReason.STOP if stops else FinishReason.LENGTH
    assert [output.finish_reason for output in outputs] == [reason] * 128
    assert len(calls) == 1
    engine.check_invariants()
    engine.check_idle()


def test_stop_ids_are_forgotten_with_the_last_request_that_has_them() -> None:
    engine = scheduler(num_pages=64)
    ids = np.array([3, 4, STOP_ID], np.int32)

    def may_end() -> list[bool]:
        engine.check_invariants()
        return engine._stop_ids.may_end(ids).tolist()

    for name, stop_ids in (("a", (3, 4, 3)), ("b", (4,)), ("c", ()), ("waits", (STOP_ID, 4))):
        engine.add(request(name, stop_ids=stop_ids))
        step(engine)
    assert may_end() == [True, True, True]
    engine.abort("a")
    assert may_end() == [False, True, True]
    engine.abort("waits")
    assert may_end() == [False, True, False]
    step(engine, token_id=4)  # ends b
    assert may_end() == [False, False, False]


def test_stop_ids_that_are_counted_wrongly_are_missed() -> None:
    engine = scheduler(num_pages=64)
    engine.add(request("a"))
    engine.add(request("b"))
    engine._stop_ids.remove((STOP_ID,))
    with pytest.raises(AssertionError, match="stop ids are counted wrongly"):
        engine.check_invariants()


def test_outputs_of_rows_that_go_on_are_those_that_the_class_makes() -> None:
    engine = scheduler(num_pages=64)
    engine.add(request("a"))
    (output,) = step(engine)
    assert output == RequestOutput("a", SAMPLED_ID, None)
    assert type(output) is RequestOutput
