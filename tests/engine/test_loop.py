from collections.abc import Callable

import pytest

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import SampledTokens, StepPlan
from albireo_jax.core.types import FinishReason, Request, RequestOutput
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import Timeline
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sim.cost import linear_cost
from albireo_jax.sim.lanes import Clock
from albireo_jax.sim.simulated_executor import SimExecutor

LIMITS = EngineLimits(max_model_len=64, vocab_size=50, num_pages=64, page_size=4)


class Recorder:
    """An executor that answers each row with 10 plus the step's number, and notes what it was asked for."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note
        self.in_flight = 0
        self.most_in_flight = 0

    def dispatch(self, plan: StepPlan) -> "RecordedStep":
        self.note(f"dispatch {plan.step}")
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        return RecordedStep(self, plan)


class RecordedStep:
    def __init__(self, recorder: Recorder, plan: StepPlan) -> None:
        self.recorder, self.plan = recorder, plan

    def wait(self) -> SampledTokens:
        self.recorder.note(f"wait {self.plan.step}")
        self.recorder.in_flight -= 1
        return SampledTokens(ids=(self.plan.slots * 0 + 10 + self.plan.step), finished_s=0.0)


def loop_of(depth: int, *requests: Request) -> tuple[EngineLoop, Recorder, list[str]]:
    calls: list[str] = []
    recorder = Recorder(calls.append)
    scheduler = Scheduler(SchedulerConfig(max_rows=4, max_step_tokens=16, depth=depth), LIMITS)
    loop = EngineLoop(scheduler, recorder, depth=depth, timeline=Timeline())
    for request in requests:
        scheduler.add(request)
    return loop, recorder, calls


def request(name: str, max_tokens: int, stop_ids: tuple[int, ...] = ()) -> Request:
    return Request(request_id=name, prompt_token_ids=(1, 2), max_tokens=max_tokens, stop_ids=stop_ids)


def run(loop: EngineLoop, *, max_steps: int = 100) -> list[RequestOutput]:
    outputs: list[RequestOutput] = []
    for _ in range(max_steps):
        if not loop.has_work:
            break
        outputs += loop.step()
    assert not loop.has_work
    return outputs


def test_depth_1_waits_for_each_step() -> None:
    loop, _, calls = loop_of(1, request("a", 3))
    run(loop)
    assert calls == ["dispatch 0", "wait 0", "dispatch 1", "wait 1", "dispatch 2", "wait 2"]


def test_depth_2_dispatches_the_next_step_before_it_waits_and_then_drains() -> None:
    loop, _, calls = loop_of(2, request("a", 4))
    run(loop)
    assert calls == [
        "dispatch 0",
        "dispatch 1",
        "wait 0",
        "dispatch 2",
        "wait 1",
        "dispatch 3",
        "wait 2",
        "wait 3",
    ]


@pytest.mark.parametrize("depth", [1, 2, 3, 8])
def test_as_many_steps_as_the_depth_are_in_flight_and_the_outputs_are_the_same(depth: int) -> None:
    loop, recorder, _ = loop_of(depth, request("a", 12))
    outputs = run(loop)
    assert [output.token_id for output in outputs] == [10 + step for step in range(12)]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert recorder.most_in_flight == depth


@pytest.mark.parametrize("depth", [1, 2, 3, 8])
def test_work_that_is_too_short_to_fill_the_depth_does_not_stall(depth: int) -> None:
    loop, recorder, _ = loop_of(depth, request("a", 1))
    assert [output.token_id for output in run(loop)] == [10]
    assert recorder.most_in_flight == 1


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_loop_has_work_until_the_steps_behind_a_stop_are_taken_in(depth: int) -> None:
    loop, recorder, calls = loop_of(depth, request("a", 20, stop_ids=(12,)))
    assert [output.token_id for output in run(loop)] == [10, 11, 12]
    assert recorder.in_flight == 0
    assert calls.count(f"dispatch {2 + depth - 1}") == 1
    assert f"dispatch {2 + depth}" not in calls


def test_a_step_without_work_does_nothing() -> None:
    loop, _, calls = loop_of(2)
    assert not loop.has_work
    assert loop.step() == []
    assert calls == []


def test_an_abort_between_steps_ends_one_request_only() -> None:
    loop, recorder, _ = loop_of(2, request("a", 6), request("b", 6))
    outputs = loop.step()
    assert loop.scheduler.abort("a") == RequestOutput("a", None, FinishReason.ABORT)
    outputs += run(loop)
    assert [output.token_id for output in outputs if output.request_id == "b"] == [10, 11, 12, 13, 14, 15]
    assert {output.request_id for output in outputs} == {"b"}
    assert recorder.in_flight == 0


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("max_tokens", [3, 60], ids=["ended", "aborted"])
def test_the_time_after_the_last_request_ended_or_was_aborted_is_without_work(
    depth: int, max_tokens: int
) -> None:
    clock = Clock()
    scheduler = Scheduler(SchedulerConfig(max_rows=4, max_step_tokens=16, depth=depth), LIMITS)
    executor = SimExecutor(LIMITS, max_rows=4, cost=linear_cost(step_s=1.0, token_s=0.0), clock=clock)
    loop = EngineLoop(scheduler, executor, depth=depth, timeline=Timeline(clock=clock))
    for name in ("a", "b"):
        scheduler.add(request(name, max_tokens))
        for _ in range(5):
            loop.step()
        scheduler.abort(name)
        run(loop)
        clock.advance_to(clock() + 100.0)
    assert loop.timeline.table().no_work_s == pytest.approx(100.0)
    assert loop.timeline.table().exposed_s == pytest.approx(0.0)
