"""Engines on a clock: the same schedule as the simulator's, and an overlap that no formula makes."""

import dataclasses

import numpy as np
import pytest

from albireo_jax.core.config import SchedulerConfig, SchedulingPolicy
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import PageCopies, SampledTokens, StepHandle, StepPlan
from albireo_jax.core.types import Request
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import Timeline
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sim.clocked import ClockedEngine, ClockExecutor, clocked_engine
from albireo_jax.sim.cost import linear_cost
from albireo_jax.sim.host import HostTerms, TaskTerms
from albireo_jax.sim.lanes import Clock, Lanes
from albireo_jax.sim.simulated_executor import SimExecutor
from albireo_jax.sim.workload import Arrival, make_requests, play, poisson_arrivals, replay

LIMITS = EngineLimits(max_model_len=64, vocab_size=50, num_pages=24, page_size=4)
STEPS = 20


def terms(*, schedule_s: float, prepare_s: float, process_s: float) -> HostTerms:
    return HostTerms(
        schedule=TaskTerms(step_s=schedule_s),
        prepare=TaskTerms(step_s=prepare_s),
        process=TaskTerms(step_s=process_s),
        source="a test",
    )


def decode(depth: int, *, device_s: float, host: HostTerms) -> ClockedEngine:
    """Two rows of `STEPS` tokens, run to their ends."""
    engine = clocked_engine(
        SchedulerConfig(max_rows=2, max_step_tokens=8, depth=depth),
        LIMITS,
        cost=lambda _: device_s,
        host=host,
    )
    requests = [Request(request_id=str(n), prompt_token_ids=(1, 2), max_tokens=STEPS) for n in range(2)]
    replay(engine.loop, requests, clock=engine.clock)
    return engine


@pytest.mark.parametrize(("device_s", "host_s"), [(10.0, 4.0), (4.0, 10.0)])
def test_depth_1_takes_host_and_device_and_depth_2_the_longer_of_both(device_s: float, host_s: float) -> None:
    host = terms(schedule_s=host_s / 2, prepare_s=host_s / 4, process_s=host_s / 4)
    assert decode(1, device_s=device_s, host=host).clock() == STEPS * (host_s + device_s)
    longer, shorter = max(device_s, host_s), min(device_s, host_s)
    assert decode(2, device_s=device_s, host=host).clock() == pytest.approx(
        STEPS * longer + shorter, rel=0.02
    )


def test_the_timeline_finds_what_was_exposed() -> None:
    host = terms(schedule_s=1.0, prepare_s=2.0, process_s=0.5)
    table = decode(1, device_s=10.0, host=host).loop.timeline.table()
    tasks = {task.name: (task.total_s / table.steps, task.exposed_s / table.steps) for task in table.tasks}
    assert tasks["T1 schedule"] == (1.0, 1.0)
    assert tasks["T2 prepare inputs"] == (2.0, 2.0)
    assert tasks["T5 process outputs"] == (0.5, 0.5)
    overlapped = decode(2, device_s=10.0, host=host).loop.timeline.table()
    assert overlapped.exposed_s == pytest.approx(0)
    assert overlapped.device_busy_s == pytest.approx(overlapped.wall_s)


def test_terms_count_steps_rows_and_tokens() -> None:
    host = dataclasses.replace(
        terms(schedule_s=0, prepare_s=0, process_s=0),
        prepare=TaskTerms(step_s=1.0, row_s=0.1, token_s=0.01),
    )
    engine = clocked_engine(
        SchedulerConfig(max_rows=2, max_step_tokens=8), LIMITS, cost=lambda _: 0, host=host
    )
    request = Request(request_id="a", prompt_token_ids=(1, 2, 3), max_tokens=1)
    replay(engine.loop, [request], clock=engine.clock)
    assert engine.clock() == pytest.approx(1.0 + 0.1 + 0.03)


class Watched:
    """An executor and the plans that it was given."""

    def __init__(self, executor: SimExecutor | ClockExecutor) -> None:
        self._executor = executor
        self.plans: list[StepPlan] = []

    def dispatch(self, plan: StepPlan) -> StepHandle:
        self.plans.append(plan)
        return self._executor.dispatch(plan)


def columns(plan: StepPlan) -> dict[str, np.ndarray]:
    return {
        "slots": plan.slots,
        "epochs": plan.epochs,
        "starts": plan.starts,
        "counts": plan.counts,
        "samples": plan.samples,
        "pages": plan.update_pages,
    }


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_schedule_is_that_of_the_simulator(depth: int) -> None:
    """Pages are few, so that requests wait and are preempted."""
    lengths = [
        Arrival(arrived_s=0, input_tokens=count, output_tokens=answer)
        for count, answer in ((3, 9), (17, 30), (9, 2), (30, 20))
    ]
    arrivals = poisson_arrivals(lengths, rate_per_s=0.05, count=30, seed=1)
    requests = make_requests(arrivals, vocab_size=50, seed=0)
    cost = linear_cost(step_s=1.0, token_s=0.1)
    config = SchedulerConfig(max_rows=4, max_step_tokens=16, depth=depth)

    def run(kind: type[SimExecutor] | type[ClockExecutor]) -> tuple[list[StepPlan], list[tuple[float, str]]]:
        clock = Clock()
        watched = Watched(
            SimExecutor(LIMITS, max_rows=4, cost=cost, clock=clock)
            if kind is SimExecutor
            else ClockExecutor(clock, cost=cost)
        )
        # Prefixes would depend on the sampled ids, which a clock does not have.
        scheduler = Scheduler(config, LIMITS, shares_prefixes=False)
        loop = EngineLoop(scheduler, watched, depth=depth, timeline=Timeline(clock=clock))
        moments = [
            (moment_s, output.request_id)
            for moment_s, outputs in play(loop, requests, clock=clock)
            for output in outputs
        ]
        assert scheduler.stats().preemptions > 0
        return watched.plans, moments

    (plans, moments), (clocked, clocked_moments) = run(SimExecutor), run(ClockExecutor)
    assert clocked_moments == moments
    assert len(plans) == len(clocked)
    for plan, other in zip(plans, clocked, strict=True):
        assert plan.request_ids == other.request_ids
        for name in columns(plan):
            assert np.array_equal(columns(plan)[name], columns(other)[name]), name


def test_copies_take_lanes_and_steps_wait_for_them_as_in_the_simulator() -> None:
    def step(*, rows: int, copies: PageCopies) -> StepPlan:
        none = np.zeros(0, np.int32)
        return StepPlan(
            step=0,
            request_ids=tuple(map(str, range(rows))),
            epochs=np.zeros(rows, np.int32),
            slots=np.zeros(rows, np.int32),
            starts=np.zeros(rows, np.int32),
            counts=np.ones(rows, np.int32),
            samples=np.ones(rows, np.bool_),
            token_ids=np.zeros(rows, np.int32),
            update_slots=none,
            update_columns=none,
            update_pages=none,
            copies=copies,
        )

    lanes = Lanes(Clock(), page_copy_s=4.0)
    lanes.queue(step(rows=1, copies=PageCopies(to_host=((1, 1), (2, 2)))), cost_s=3.0)
    back = lanes.queue(step(rows=1, copies=PageCopies(to_device=((1, 1), (2, 2)))), cost_s=3.0)
    assert (back.finished_s, back.copies) == (6, (8, 0))  # on the host at 4 and 8, on the device at 8 and 12
    waits = lanes.queue(step(rows=1, copies=PageCopies()), cost_s=3.0)
    assert (waits.finished_s, waits.copies.exposed_s) == (15, 6)
    assert (lanes.computed_s, lanes.copy_times) == (9, (16, 6))


def test_a_handle_lets_time_pass_and_knows_what_was_sampling() -> None:
    clock = Clock()
    executor = ClockExecutor(clock, cost=lambda _: 2.0, sampling=lambda _: 0.5)
    lone = Request(request_id="a", prompt_token_ids=(1,), max_tokens=2)
    scheduler = Scheduler(SchedulerConfig(max_rows=1, max_step_tokens=4), LIMITS)
    scheduler.add(lone)
    plan = scheduler.plan()
    assert plan is not None
    sampled: SampledTokens = executor.dispatch(plan).wait()
    assert (clock(), sampled.finished_s, sampled.sample_s, sampled.ids.tolist()) == (2.5, 2.5, 0.5, [0])


def test_urgent_requests_have_their_first_token_sooner_and_all_have_the_same_tokens() -> None:
    limits = dataclasses.replace(LIMITS, takes_priority=True)
    requests = [
        Request(request_id=str(n), prompt_token_ids=(n, 2, 3), max_tokens=8, priority=-(n % 4 == 3))
        for n in range(24)
    ]
    first_s: dict[SchedulingPolicy, dict[str, float]] = {}
    tokens: dict[SchedulingPolicy, list[tuple[str, int | None]]] = {}
    for policy in SchedulingPolicy:
        config = SchedulerConfig(max_rows=2, max_step_tokens=8, scheduling_policy=policy)
        engine = clocked_engine(config, limits, cost=lambda _: 1.0)
        timed = replay(engine.loop, requests, clock=engine.clock)
        first_s[policy] = {output.request_id: moment_s for moment_s, output in reversed(timed)}
        tokens[policy] = sorted(
            ((output.request_id, output.token_id) for _, output in timed), key=lambda each: each[0]
        )
    fcfs, priority = first_s[SchedulingPolicy.FCFS], first_s[SchedulingPolicy.PRIORITY]
    urgent = [request.request_id for request in requests if request.priority]
    assert max(priority[name] for name in urgent) < 0.5 * max(fcfs[name] for name in urgent)
    assert max(priority.values()) <= max(fcfs.values())
    assert tokens[SchedulingPolicy.PRIORITY] == tokens[SchedulingPolicy.FCFS]
