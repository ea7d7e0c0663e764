"""Runs on a clock whose host and device take known times, with the deliveries that a service would stamp."""

from collections.abc import Sequence
from dataclasses import dataclass

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import Executor, SampledTokens, StepHandle, StepPlan
from albireo_jax.core.types import Request
from albireo_jax.measure.records import Device
from albireo_jax.report.amdahl import ReportedEngine
from albireo_jax.report.measured_run import MeteredLoop
from albireo_jax.sim.clocked import ClockedScheduler, ClockExecutor
from albireo_jax.sim.host import HostTerms, TaskTerms
from albireo_jax.sim.lanes import Clock
from albireo_jax.sim.outcome import Outcome, outcome
from albireo_jax.sim.workload import TimedOutput, play

LIMITS = EngineLimits(max_model_len=128, vocab_size=50, num_pages=200, page_size=4)
PLAN_S, PREPARE_S, COMMIT_S, DELIVER_S, SAMPLE_S = 4e-3, 3e-3, 2e-3, 1e-3, 1.5e-3
SLOW_HOST = HostTerms(
    schedule=TaskTerms(step_s=PLAN_S),
    prepare=TaskTerms(step_s=PREPARE_S),
    process=TaskTerms(step_s=COMMIT_S),
    source="made for a test",
)
SUBJECT = ReportedEngine(
    model="a model",
    tp=2,
    depth=2,
    sampling="sharded",
    dtype="float32",
    max_rows=4,
    max_step_tokens=16,
    device=Device(kind="cpu", name="a processor", count=2, memory_bytes=2**30, virtual_devices=2),
    software="albireo-jax 0",
    date="2026-01-02T03:04:05+00:00",
)


class Watch:
    """An executor that keeps what each step's result says; not a part of what is tested."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner
        self.results: list[SampledTokens] = []
        self.plans: list[StepPlan] = []

    def dispatch(self, plan: StepPlan) -> StepHandle:
        handle = self._inner.dispatch(plan)
        self.plans.append(plan)
        self.results.append(handle.sampled)
        return handle


@dataclass(frozen=True, kw_only=True)
class ClockedRun:
    """A run that is over."""

    metered: MeteredLoop
    watch: Watch
    requests: Sequence[Request]
    outcome: Outcome

    @property
    def window_s(self) -> float:
        """From the end of the first step to the end of the last, by the device's own account."""
        return self.watch.results[-1].finished_s - self.watch.results[0].finished_s


def run_on_clock(
    requests: Sequence[Request],
    *,
    depth: int,
    step_s: float,
    limits: EngineLimits = LIMITS,
    page_copy_s: float = 0.0,
    max_rows: int = 4,
) -> ClockedRun:
    """All requests through a loop whose host takes the times above and whose device takes `step_s`."""
    clock = Clock()
    config = SchedulerConfig(max_rows=max_rows, max_step_tokens=16, depth=depth)
    watch = Watch(
        ClockExecutor(
            clock,
            cost=lambda _: step_s - SAMPLE_S,
            sampling=lambda _: SAMPLE_S,
            host=SLOW_HOST,
            page_copy_s=page_copy_s,
        )
    )
    scheduler = ClockedScheduler(config, limits, clock=clock, host=SLOW_HOST)
    metered = MeteredLoop(scheduler, watch, config=config, clock=clock)
    outputs: list[TimedOutput] = []
    for _, step_outputs in play(metered.loop, requests, clock=clock):
        if step_outputs:
            begin_s = clock()
            clock.advance_to(begin_s + DELIVER_S)
            metered.loop.timeline.record_delivery(begin_s, clock())
            outputs += [TimedOutput(clock(), output) for output in step_outputs]
    return ClockedRun(metered=metered, watch=watch, requests=requests, outcome=outcome(requests, outputs))


def requests_at(*arrived_s: float, output_len: int = 10) -> list[Request]:
    """Requests with prompts of different lengths that arrive at these moments."""
    return [
        Request(
            request_id=str(index),
            prompt_token_ids=tuple((7 * index + place) % 50 for place in range(6 + 5 * index % 17)),
            max_tokens=output_len + index % 3,
            arrived_s=moment,
        )
        for index, moment in enumerate(arrived_s)
    ]
