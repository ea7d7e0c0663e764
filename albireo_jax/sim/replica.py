"""One replica under a load: the shipped scheduler on a clock, and what its users and its device saw."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import StepPlan
from albireo_jax.core.types import Request, RequestOutput
from albireo_jax.engine.timeline import TaskTable
from albireo_jax.sim.clocked import ClockedEngine, clocked_engine
from albireo_jax.sim.lanes import Cost
from albireo_jax.sim.outcome import Outcome, RequestTimes
from albireo_jax.sim.step_model import StepModel
from albireo_jax.sim.workload import play


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Seconds in which the first token of a request, and each later one on average, should come.

    A load is served well if `attainment`, a share of its requests, meets both.
    """

    ttft_s: float
    tpot_s: float
    attainment: float = 0.9

    def __post_init__(self) -> None:
        """Refuse targets that nothing or everything meets."""
        for name, value in (("ttft", self.ttft_s), ("tpot", self.tpot_s)):
            if not value > 0:
                raise ValueError(f"the {name} target must be above 0 ms, got {value * 1e3:g}")
        if not 0 < self.attainment <= 1:
            raise ValueError(f"attainment must be above 0 and at most 1, got {self.attainment}")

    def are_met_by(self, request: RequestTimes) -> bool:
        """Whether a request was served well."""
        return request.meets(ttft_s=self.ttft_s, tpot_s=self.tpot_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """An engine to simulate: its configuration, what it can hold, and what its steps take."""

    config: SchedulerConfig
    limits: EngineLimits
    steps: StepModel
    shares_prefixes: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """Use of resources: pages in use, requests waiting and running, at most and over steps; preemptions."""

    peak_pages: int
    mean_pages: float
    num_pages: int
    mean_waiting: float
    peak_waiting: int
    peak_running: int
    preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRun:
    """A load, run to its end.

    The device was busy for `busy_share` of the time with work; `extrapolated_share` of the steps were outside
    of what was measured.
    """

    outcome: Outcome
    tasks: TaskTable
    pressure: Pressure
    steps: int
    extrapolated_share: float
    busy_share: float


def scaled_arrivals(requests: Sequence[Request], *, rate_per_s: float) -> list[Request]:
    """The same requests in their rhythm, at this mean rate; evenly if they all arrived at once."""
    first_s = requests[0].arrived_s
    span_s = requests[-1].arrived_s - first_s
    count = len(requests) - 1
    return [
        replace(
            request,
            arrived_s=((request.arrived_s - first_s) / span_s * count if span_s else index) / rate_per_s,
        )
        for index, request in enumerate(requests)
    ]


def run(replica: Replica, requests: Sequence[Request]) -> SimulatedRun:
    """Run `requests`, in order of arrival, to their ends."""
    counted = _Counted(replica.steps)
    engine = _engine(replica, counted.forward)
    times = _Times(requests)
    waiting = running = pages = total_pages = total_waiting = turns = 0
    for moment_s, outputs in play(engine.loop, requests, clock=engine.clock):
        times.take(moment_s, outputs)
        turns += 1
        stats = engine.loop.scheduler.stats()
        waiting, running = max(waiting, stats.waiting), max(running, stats.running)
        pages = max(pages, stats.pages_in_use)
        total_pages, total_waiting = total_pages + stats.pages_in_use, total_waiting + stats.waiting
    stats, tasks = engine.loop.scheduler.stats(), engine.loop.timeline.table()
    with_work_s = tasks.wall_s - tasks.no_work_s
    return SimulatedRun(
        outcome=times.outcome(ended_s=engine.clock()),
        tasks=tasks,
        pressure=Pressure(
            peak_pages=pages,
            mean_pages=total_pages / turns,
            mean_waiting=total_waiting / turns,
            num_pages=stats.num_pages,
            peak_waiting=waiting,
            peak_running=running,
            preemptions=stats.preemptions,
        ),
        steps=stats.steps,
        extrapolated_share=counted.extrapolated / max(counted.steps, 1),
        busy_share=tasks.device_busy_s / with_work_s if with_work_s > 0 else 0.0,
    )


def meets(replica: Replica, requests: Sequence[Request], targets: Targets) -> bool:
    """Whether a load is served well; the run ends as soon as too many requests have missed a target.

    A request whose first token is overdue has missed its target though the token has not come.
    """
    allowed = int((1 - targets.attainment) * len(requests) + 1e-9)
    engine = _engine(replica, replica.steps.forward)
    times = _Times(requests)
    missed: set[str] = set()
    due = 0  # requests before this one should have their first token
    for moment_s, outputs in play(engine.loop, requests, clock=engine.clock):
        for request_id in times.take(moment_s, outputs):
            if not targets.are_met_by(times.of(request_id)):
                missed.add(request_id)
        while due < len(requests) and requests[due].arrived_s + targets.ttft_s < moment_s:
            if not times.has_begun(requests[due].request_id):
                missed.add(requests[due].request_id)
            due += 1
        if len(missed) > allowed:
            return False
    return True


class _Counted:
    """A step model's forward pass, counting the steps that it was asked for."""

    def __init__(self, steps: StepModel) -> None:
        self._model = steps
        self.steps = self.extrapolated = 0

    def forward(self, plan: StepPlan) -> float:
        """Seconds of the forward pass."""
        self.steps += 1
        self.extrapolated += self._model.is_extrapolated(plan)
        return self._model.forward(plan)


def _engine(replica: Replica, forward: Cost) -> ClockedEngine:
    return clocked_engine(
        replica.config,
        replica.limits,
        cost=forward,
        sampling=replica.steps.sampling,
        host=replica.steps.host,
        shares_prefixes=replica.shares_prefixes,
    )


class _Times:
    """Times of requests' tokens."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._arrived_s = {request.request_id: request.arrived_s for request in requests}
        self._first_s: dict[str, float] = {}
        self._last_s: dict[str, float] = {}
        self._num_tokens = dict.fromkeys(self._arrived_s, 0)

    def take(self, moment_s: float, outputs: Sequence[RequestOutput]) -> list[str]:
        """Note tokens; gives the requests that got their first one or their last."""
        news: list[str] = []
        for output in outputs:
            name = output.request_id
            self._num_tokens[name] += 1
            if name not in self._first_s:
                self._first_s[name] = moment_s
                news.append(name)
            if output.finish_reason is not None:
                self._last_s[name] = moment_s
                news.append(name)
        return news

    def has_begun(self, name: str) -> bool:
        """Whether a request got a token."""
        return name in self._first_s

    def of(self, name: str) -> RequestTimes:
        """The times of a request that got a token; its last one is the first until it has ended."""
        first_s = self._first_s[name]
        return RequestTimes(
            arrived_s=self._arrived_s[name],
            first_s=first_s,
            last_s=self._last_s.get(name, first_s),
            num_tokens=self._num_tokens[name],
        )

    def outcome(self, *, ended_s: float) -> Outcome:
        """The times of all requests, which have ended."""
        return Outcome(requests=tuple(map(self.of, self._arrived_s)), began_s=0.0, ended_s=ended_s)
