"""The shipped scheduler and loop on a clock, with nothing on the device: what planning experiments run.

All that takes time passes on one clock, each part where the engine spends it::

    Scheduler.plan      T1
    Executor.dispatch   T2, then the step is queued on the device (T3 + T4)
    StepHandle.wait     until the device has ended the step
    Scheduler.commit    T5

So at depth 1 a step takes host and device time one after the other, and at depth 2 the longer of both:
no formula says so. Sampled ids are all 0, so a request must end by its length.
"""

from dataclasses import replace
from typing import NamedTuple

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import CopyCosts, SampledTokens, StepPlan
from albireo_jax.core.types import RequestOutput
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import ALL_STEPS, Timeline
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sim.host import NO_HOST, HostTerms
from albireo_jax.sim.lanes import Clock, CopyTimes, Cost, Lanes, cost_of_steps
from albireo_jax.sim.simulated_executor import same_token


def no_cost(plan: StepPlan) -> float:
    """Takes no time."""
    del plan
    return 0.0


class ClockExecutor:
    """Runs plans in order, each `cost(plan)` and `sampling(plan)` seconds after the one before; ids are 0.

    A dispatch takes the host as long as `host` says.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        cost: Cost,
        sampling: Cost = no_cost,
        host: HostTerms = NO_HOST,
        page_copy_s: float = 0.0,
    ) -> None:
        self._clock = clock
        self._cost = cost
        self._sampling = sampling
        self._host = host
        self._lanes = Lanes(clock, page_copy_s=page_copy_s)

    @property
    def copy_times(self) -> CopyTimes:
        """Times of all copies so far."""
        return self._lanes.copy_times

    @property
    def computed_s(self) -> float:
        """Seconds that the device computed so far."""
        return self._lanes.computed_s

    def dispatch(self, plan: StepPlan) -> "_ClockHandle":
        """Queue a step as soon as the host has prepared it."""
        self._clock.advance_to(self._clock() + self._host.prepare(plan))
        sample_s = cost_of_steps(plan, self._sampling)
        step = self._lanes.queue(plan, cost_s=cost_of_steps(plan, self._cost) + sample_s)
        return _ClockHandle(
            self._clock,
            replace(
                same_token(plan, 0, finished_s=step.finished_s),
                sample_s=sample_s,
                copy_s=step.copies.copied_s,
                copy_wait_s=step.copies.exposed_s,
            ),
        )


class _ClockHandle(NamedTuple):
    clock: Clock
    sampled: SampledTokens

    def wait(self) -> SampledTokens:
        self.clock.advance_to(self.sampled.finished_s)
        return self.sampled


class ClockedScheduler(Scheduler):
    """The scheduler, whose plans and commits take the time on `clock` that `host` says."""

    def __init__(
        self,
        config: SchedulerConfig,
        limits: EngineLimits,
        *,
        clock: Clock,
        host: HostTerms,
        shares_prefixes: bool = True,
        copy_costs: CopyCosts | None = None,
    ) -> None:
        super().__init__(config, limits, shares_prefixes=shares_prefixes, copy_costs=copy_costs)
        self._clock = clock
        self._host = host

    def plan(self) -> StepPlan | None:
        """The next step, once its scheduling has taken its time."""
        plan = super().plan()
        if plan is not None:
            self._clock.advance_to(self._clock() + self._host.schedule(plan))
        return plan

    def commit(self, plan: StepPlan, sampled: SampledTokens) -> list[RequestOutput]:
        """The outputs of a step, once processing them has taken its time."""
        outputs = super().commit(plan, sampled)
        self._clock.advance_to(self._clock() + cost_of_steps(plan, self._host.process))
        return outputs


class ClockedEngine(NamedTuple):
    """An engine on a clock, and the parts of it that tell what happened."""

    loop: EngineLoop
    executor: ClockExecutor
    clock: Clock


def clocked_engine(
    config: SchedulerConfig,
    limits: EngineLimits,
    *,
    cost: Cost,
    sampling: Cost = no_cost,
    host: HostTerms = NO_HOST,
    shares_prefixes: bool = True,
) -> ClockedEngine:
    """An engine whose device and host take the time that the terms say; its clock starts at 0."""
    clock = Clock()
    executor = ClockExecutor(clock, cost=cost, sampling=sampling, host=host)
    scheduler = ClockedScheduler(config, limits, clock=clock, host=host, shares_prefixes=shares_prefixes)
    timeline = Timeline(capacity=ALL_STEPS, clock=clock)
    return ClockedEngine(
        EngineLoop(scheduler, executor, depth=config.depth, timeline=timeline), executor, clock
    )
