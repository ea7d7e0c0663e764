"""A laboratory for the scheduler: run cases on the simulator and write down all that happens.

A `Case` says which requests arrive before which step, what they are bound to, and which are aborted; a
`House` says how the engine is built. `run` gives the `Journal` of what happened, in order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

import numpy as np

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.errors import ConstraintError
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import NOT_FINITE, Int32s, LogprobArrays, SampledTokens, StepPlan
from albireo_jax.core.types import Request, RequestOutput
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import Timeline
from albireo_jax.sched.constraints import ConstrainedAnswer
from albireo_jax.sched.policy import FCFS, Policy
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sched.scheduler_stats import SchedulerStats
from albireo_jax.sched.sequence import Place
from albireo_jax.sched.sequence import Sequence as Live
from albireo_jax.sim.cost import linear_cost
from albireo_jax.sim.lanes import Clock
from albireo_jax.sim.simulated_executor import SimExecutor

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
    num_host_pages: int = 0
    shares_prefixes: bool = True
    max_copied_pages: int = 64
    decode_steps: int = 1
    late_masks: int | None = None  # seed of the order in which masks are made; None if none is late
    policy: Policy = FCFS

    @property
    def limits(self) -> EngineLimits:
        return EngineLimits(
            max_model_len=MAX_LEN,
            vocab_size=VOCAB_SIZE,
            num_pages=self.num_pages,
            page_size=self.page_size,
            num_host_pages=self.num_host_pages,
            takes_priority=True,
        )

    @property
    def config(self) -> SchedulerConfig:
        return SchedulerConfig(
            max_rows=self.max_rows,
            max_step_tokens=self.max_step_tokens,
            depth=self.depth,
            max_copied_pages=self.max_copied_pages,
            decode_steps=self.decode_steps,
        )


@dataclass(frozen=True, kw_only=True)
class Bond:
    """The rule that a request's tokens must follow, if any, and its faults.

    With a `modulus` its tokens must follow a rule: modulo `modulus`, the next one is the last one plus 1, 2
    or 3; after `max_length` tokens nothing may follow; after `fails_after` it is not known what may. Once
    `breaks_after` tokens are sampled, the logits are not finite.
    """

    modulus: int = 0
    max_length: int | None = None
    fails_after: int | None = None
    breaks_after: int | None = None

    def allowed(self, tokens: tuple[int, ...]) -> list[int]:
        """The tokens that may follow `tokens`."""
        if len(tokens) == self.max_length:
            return []
        last = tokens[-1] if tokens else 0
        nexts = {(last + step) % self.modulus for step in (1, 2, 3)}
        return [token for token in range(VOCAB_SIZE) if token % self.modulus in nexts]


FREE = Bond()


class Rule:
    """The `TokenConstraint` of a bond."""

    def __init__(self, bond: Bond) -> None:
        self.bond = bond
        self.tokens: tuple[int, ...] = ()

    def mask(self) -> Int32s:
        if len(self.tokens) == self.bond.fails_after:
            raise ConstraintError("the rule is too complex")
        return mask_of(self.bond.allowed(self.tokens))

    def advance(self, token_id: int) -> None:
        assert token_id in self.bond.allowed(self.tokens)
        self.tokens += (token_id,)


def mask_of(tokens: list[int]) -> Int32s:
    bits = np.zeros(-(-VOCAB_SIZE // 32) * 32, np.bool_)
    bits[tokens] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Requests in order of arrival, the step before which each arrives, and aborts (step, request).

    `bonds` are those of the requests, in their order; none at all if it is empty. Before the steps in
    `preemptions` the request that started last is preempted, be it in the middle of its prompt.
    """

    requests: tuple[Request, ...]
    arrivals: tuple[int, ...]
    aborts: tuple[tuple[int, int], ...] = ()
    bonds: tuple[Bond, ...] = ()
    preemptions: tuple[int, ...] = ()

    def bond(self, request: Request) -> Bond:
        return self.bonds[self.requests.index(request)] if self.bonds else FREE


@dataclass(frozen=True)
class MaskAwaited:
    """A request goes on, and what it may say next is not known yet."""

    request_id: str


@dataclass(frozen=True)
class MaskMade:
    """It is known now."""

    request_id: str


@dataclass(frozen=True)
class Preempted:
    """A request lost its pages to another one of those that were `running`, itself among them."""

    request_id: str
    running: tuple[str, ...]
    is_forced: bool


@dataclass(frozen=True)
class Result:
    """The tokens of this plan are on the host."""

    plan: StepPlan
    sampled: SampledTokens


Event = Request | StepPlan | Preempted | Result | MaskAwaited | MaskMade | RequestOutput


class Scores(NamedTuple):
    """The scores that a request got: with each token, and of its prompt with the first."""

    token: list[list[tuple] | None]
    prompt: list[tuple] | None
    prompt_comes_late: bool


def numbers(scores: LogprobArrays) -> list[tuple]:
    """All numbers of each scored token."""
    columns = (scores.logprobs, scores.ranks, scores.top_ids, scores.top_logprobs)
    return list(zip(*(map(str, column.tolist()) for column in columns), strict=True))


@dataclass(kw_only=True)
class Journal:
    """All that was seen of a run, in order, and figures at the end.

    A result comes before the outputs that it brings. `iterations` are the loop's, one for each plan. A plan
    of several steps is written down as so many plans; `repeats` counts them.
    """

    case: Case
    house: House
    events: list[Event] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)
    repeats: int = 0
    stats: SchedulerStats | None = None
    stats_when_answered: SchedulerStats | None = None

    @property
    def plans(self) -> list[StepPlan]:
        return [event for event in self.events if isinstance(event, StepPlan)]

    def place(self, request: Request) -> Place:
        """Where the policy puts a request."""
        return (*self.house.policy.order(request), self.case.requests.index(request))

    def outputs(self, request: Request) -> list[RequestOutput]:
        mine = request.request_id
        return [e for e in self.events if isinstance(e, RequestOutput) and e.request_id == mine]

    def tokens(self, request: Request) -> list[int]:
        return [output.token_id for output in self.outputs(request) if output.token_id is not None]

    def scores(self, request: Request) -> Scores:
        given = [(output.token_id, output.scores) for output in self.outputs(request)]
        pieces = given[0][1].prompt if given and given[0][1] is not None else None
        return Scores(
            token=[scores and numbers(scores.token) for token, scores in given if token is not None],
            prompt=None if pieces is None else [row for piece in pieces for row in numbers(piece)],
            prompt_comes_late=any(
                scores is not None and scores.prompt is not None for _, scores in given[1:]
            ),
        )


class Watched:
    """An executor whose plans and results are written to a journal, and which breaks logits."""

    def __init__(self, executor, journal: Journal) -> None:
        self.executor = executor
        self.journal = journal
        self.iteration = 0
        case = journal.case
        self.broken = {
            (request.request_id, len(request.prompt_token_ids) + bond.breaks_after)
            for request, bond in zip(case.requests, case.bonds, strict=False)
            if bond.breaks_after is not None
        }

    def dispatch(self, plan: StepPlan):
        steps = unrolled(plan, page_size=self.journal.house.page_size)
        self.journal.events += steps
        self.journal.iterations += [self.iteration] * len(steps)
        self.journal.repeats += len(steps) > 1
        return WatchedHandle(self, plan, self.executor.dispatch(plan))


class WatchedHandle:
    def __init__(self, watched: Watched, plan: StepPlan, handle) -> None:
        self.watched = watched
        self.plan = plan
        self.handle = handle

    def wait(self) -> SampledTokens:
        sampled = self.handle.wait()
        ends = (self.plan.starts + self.plan.counts).tolist()
        rows = list(zip(self.plan.request_ids, ends, strict=True))
        finite = [
            [(request_id, end + step) not in self.watched.broken for request_id, end in rows]
            for step in range(self.plan.num_steps)
        ]
        ids = np.where(np.reshape(finite, sampled.ids.shape), sampled.ids, NOT_FINITE)
        sampled = replace(sampled, ids=ids.astype(np.int32))
        self.watched.journal.events.append(Result(self.plan, sampled))
        return sampled


class LateMasks:
    """A `MaskMaker` whose masks are made some time later, in a random order, or at once now and then."""

    def __init__(self, journal: Journal, seed: int) -> None:
        self.events = journal.events
        self.random = np.random.default_rng(seed)
        self.pending: list[ConstrainedAnswer] = []

    def make(self, answers: Sequence[ConstrainedAnswer]) -> None:
        for answer in answers:
            if self.random.random() < 0.2:
                answer.make()
            else:
                self.pending.append(answer)
                self.events.append(MaskAwaited(answer.request_id))

    def wait(self, answers: Sequence[ConstrainedAnswer], timeout_s: float) -> None:
        assert timeout_s > 0
        assert answers
        assert not any(answer.is_made for answer in answers)
        self.go_on()

    def go_on(self) -> None:
        """Make any of the masks, or none."""
        self.random.shuffle(self.pending)
        for _ in range(self.random.integers(len(self.pending) + 1)):
            answer = self.pending.pop()
            answer.make()
            self.events.append(MaskMade(answer.request_id))


def unrolled(plan: StepPlan, *, page_size: int) -> list[StepPlan]:
    """The steps of a plan, each with the pages that it is the first to need."""
    if not len(plan.steps):
        return [plan]
    start_of = dict(zip(plan.slots.tolist(), plan.starts.tolist(), strict=True))
    starts = np.array([start_of[slot] for slot in plan.update_slots.tolist()], np.int32)
    at_step = plan.update_columns * page_size - starts
    assert (at_step >= 0).all()
    steps: list[StepPlan] = []
    for step in range(plan.num_steps):
        one = plan.nth_step(step, np.flatnonzero(plan.steps > step).astype(np.int32))
        steps.append(
            replace(
                one,
                update_slots=plan.update_slots[at_step == step],
                update_columns=plan.update_columns[at_step == step],
                update_pages=plan.update_pages[at_step == step],
            )
        )
    return steps


def run(
    case: Case, house: House, *, break_scheduler=lambda real: real, break_executor=lambda real: real
) -> Journal:
    """Run a case to its end, or for MAX_STEPS steps."""
    journal = Journal(case=case, house=house)
    clock = Clock()
    cost = linear_cost(step_s=1.0, token_s=0.01)
    executor = SimExecutor(house.limits, max_rows=house.max_rows, cost=cost, clock=clock)
    watched = Watched(break_executor(executor), journal)
    masks = None if house.late_masks is None else LateMasks(journal, house.late_masks)
    real = Scheduler(
        house.config,
        house.limits,
        shares_prefixes=house.shares_prefixes,
        mask_maker=masks,
        policy=house.policy,
    )
    preempt = write_preemptions(real, journal)
    scheduler = break_scheduler(real)
    loop = EngineLoop(scheduler, watched, depth=house.depth, timeline=Timeline(clock=clock))
    arriving = list(zip(case.arrivals, case.requests, strict=True))
    for step in range(MAX_STEPS):
        watched.iteration = step
        if not arriving and not loop.has_work:
            break
        while arriving and arriving[0][0] <= step:
            request = arriving.pop(0)[1]
            bond = case.bond(request)
            ended = scheduler.add(request, Rule(bond) if bond.modulus else None)
            journal.events += [request] if ended is None else [request, ended]
        for request in [case.requests[index] for at, index in case.aborts if at == step]:
            if (output := scheduler.abort(request.request_id)) is not None:
                journal.events.append(output)
        if step in case.preemptions and len(real._running):
            preempt(real._live[real._table.request_id[real._running.slots[-1]]], is_forced=True)
        if masks is not None:
            masks.go_on()
            journal.events += scheduler.take_masks()
        journal.events += loop.step()
        answered = {e.request_id for e in journal.events if isinstance(e, RequestOutput) and e.finish_reason}
        if len(answered) == len(case.requests) and journal.stats_when_answered is None:
            journal.stats_when_answered = real.stats()
        if scheduler is real:
            real.check_invariants()
    journal.stats = real.stats()
    if scheduler is real and not loop.has_work:
        real.check_idle()
    return journal


def write_preemptions(real: Scheduler, journal: Journal) -> Callable[..., None]:
    """Have a scheduler's preemptions written to a journal; gives a function that forces one."""
    preempt = real._preempt

    def write(sequence: Live, *, is_forced: bool = False) -> None:
        running = tuple(real._table.request_id[real._running.slots].tolist())
        journal.events.append(Preempted(sequence.request.request_id, running, is_forced))
        preempt(sequence)

    real._preempt = write
    return write


@cache
def run_alone(request: Request, bond: Bond = FREE) -> Journal:
    """A request that has the engine to itself, one step at a time, its prompt in one chunk."""
    house = House(depth=1, page_size=64, num_pages=1, max_rows=1, max_step_tokens=MAX_LEN)
    return run(Case(requests=(request,), arrivals=(0,), bonds=(bond,)), house)


def alone(request: Request, bond: Bond = FREE) -> tuple[int, ...]:
    """The tokens of a request that has the engine to itself."""
    return tuple(run_alone(request, bond).tokens(request))
