"""A laboratory for the scheduler: run cases on the simulator and write down all that happens.

A `Case` says which requests arrive before which step and which are aborted; a `House` says how the
engine is built. `run` gives the `Journal` of what happened, in order.
"""

from dataclasses import dataclass, field
from functools import cache

import numpy as np

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import StepPlan
from albireo_jax.core.types import Request, RequestOutput
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import Timeline
from albireo_jax.sched.scheduler import Scheduler, SchedulerStats
from albireo_jax.sim.cost import linear_cost
from albireo_jax.sim.executor import Clock, SimExecutor

VOCAB_SIZE = 23
MAX_LEN = 40
MAX_STEPS = 1500


@dataclass(frozen=True, kw_only=True)
class House:
    """How an engine is built."""

    depth: int = 2
    page_size: int = 4
    num_pages: int = 200
    max_rows: int = 4
    max_step_tokens: int = 16

    @property
    def limits(self) -> EngineLimits:
        return EngineLimits(
            max_model_len=MAX_LEN, vocab_size=VOCAB_SIZE, num_pages=self.num_pages, page_size=self.page_size
        )

    @property
    def config(self) -> SchedulerConfig:
        return SchedulerConfig(max_rows=self.max_rows, max_step_tokens=self.max_step_tokens, depth=self.depth)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Requests in order of arrival, the step before which each arrives, and aborts (step, request)."""

    requests: tuple[Request, ...]
    arrivals: tuple[int, ...]
    aborts: tuple[tuple[int, int], ...] = ()


@dataclass(kw_only=True)
class Journal:
    """All that was seen of a run: added requests, plans and outputs in order, and figures at the end."""

    case: Case
    house: House
    events: list[Request | StepPlan | RequestOutput] = field(default_factory=list)
    stats: SchedulerStats | None = None
    stats_when_answered: SchedulerStats | None = None

    @property
    def plans(self) -> list[StepPlan]:
        return [event for event in self.events if isinstance(event, StepPlan)]

    def outputs(self, request: Request) -> list[RequestOutput]:
        mine = request.request_id
        return [e for e in self.events if isinstance(e, RequestOutput) and e.request_id == mine]

    def tokens(self, request: Request) -> list[int]:
        return [output.token_id for output in self.outputs(request) if output.token_id is not None]


class Watched:
    """An executor whose plans are written to a journal when they are dispatched."""

    def __init__(self, executor, journal: Journal) -> None:
        self.executor = executor
        self.journal = journal

    def dispatch(self, plan: StepPlan):
        self.journal.events.append(plan)
        return self.executor.dispatch(plan)


def _same(inner):
    return inner


def run(case: Case, house: House, *, break_scheduler=_same, break_executor=_same) -> Journal:
    """Run a case to its end, or for MAX_STEPS steps."""
    journal = Journal(case=case, house=house)
    clock = Clock()
    cost = linear_cost(step_s=1.0, token_s=0.01)
    executor = SimExecutor(house.limits, max_rows=house.max_rows, cost=cost, clock=clock)
    watched = Watched(break_executor(executor), journal)
    real = Scheduler(house.config, house.limits)
    scheduler = break_scheduler(real)
    loop = EngineLoop(scheduler, watched, depth=house.depth, timeline=Timeline(clock=clock))
    arriving = list(zip(case.arrivals, case.requests, strict=True))
    for step in range(MAX_STEPS):
        if not arriving and not loop.has_work:
            break
        while arriving and arriving[0][0] <= step:
            request = arriving.pop(0)[1]
            scheduler.add(request)
            journal.events.append(request)
        for request in [case.requests[index] for at, index in case.aborts if at == step]:
            if (output := scheduler.abort(request.request_id)) is not None:
                journal.events.append(output)
        journal.events += loop.step()
        answered = {e.request_id for e in journal.events if isinstance(e, RequestOutput) and e.finish_reason}
        if len(answered) == len(case.requests) and journal.stats_when_answered is None:
            journal.stats_when_answered = real.stats()
        if scheduler is real:
            real.check_invariants()
    journal.stats = real.stats()
    return journal


@cache
def alone(request: Request) -> tuple[int, ...]:
    """The tokens of a request that has the engine to itself, one step at a time, its prompt in one chunk."""
    house = House(depth=1, page_size=64, num_pages=1, max_rows=1, max_step_tokens=MAX_LEN)
    return tuple(run(Case(requests=(request,), arrivals=(0,)), house).tokens(request))


def draw_request(request_id: str, random: np.random.Generator) -> Request:
    prompt = random.integers(VOCAB_SIZE, size=random.integers(1, 21))
    max_tokens = int(random.integers(1, 17))
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt.tolist()),
        max_tokens=max_tokens,
        min_tokens=int(random.integers(0, max_tokens + 1)) if random.random() < 0.5 else 0,
        temperature=float(random.choice((0.0, 0.7))),
        seed=int(random.integers(4)),
        stop_ids=tuple(random.choice(VOCAB_SIZE, size=random.integers(3), replace=False).tolist()),
    )
