"""Finds the t, replicas, rows and step tokens that serve most requests within latency targets.

The planner simulates: one replica of each plan runs the same share of the trace, with the shipped
scheduler on a clock (`sim.replica`), at faster and faster arrivals. A plan's *goodput* is the highest rate
of requests, over all replicas, at which enough of them meet both targets. Rates are those of a geometric
grid, so that every plan is tried at the same ones::

    for each t that fits
        alone      requests one at a time: if these miss the targets, no rate meets them
        closed     all requests at once, the most rows: what is done until the last has started bounds
                   any rate that lasts; a run of its length at a higher one would only fill the queue
        for each (rows, step tokens), a fifth of the requests, every second rate
            only if it serves the next rate above the best so far: higher rates, doubling the distance,
            then bisection
        the best of them again, all requests, every rate

A plan that misses the targets at the next rate is bounded by the best so far and costs one run, which ends at
once when too many requests have missed. That attainment falls as the rate rises is assumed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.types import Request
from albireo_jax.sim.outcome import RequestTimes
from albireo_jax.sim.planning.plan_sizes import (
    Degree,
    Degrees,
    Question,
    Workload,
    fit,
    read_workload,
    replica_requests,
)
from albireo_jax.sim.replica import Replica, SimulatedRun, meets, run, scaled_arrivals
from albireo_jax.sim.step_model import StepModel

RATES_PER_OCTAVE = 16
_LOWEST_OCTAVES = 7  # below the rate that lasts
_ALONE_REQUESTS, _ALONE_TOKENS = 40, 32
_SEARCH_PART, _LEAST_PART, _SEARCH_STRIDE = 5, 150, 2

StepModels = Callable[[int], StepModel]
"""What the steps of a replica of this tensor-parallel degree take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alone:
    """Latencies of requests that have a replica to themselves, met by the share of them that must meet."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The best plan of a degree: its goodput, its run at that rate, and its run at the next rate above.

    `lasting_per_s` is the rate that bounds the goodput whatever the targets are.
    """

    degree: Degree
    config: SchedulerConfig
    rate_per_s: float
    lasting_per_s: float
    alone: Alone
    run: SimulatedRun
    beyond: SimulatedRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Unserved:
    """A degree that meets the targets at no rate."""

    degree: Degree
    alone: Alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The best plan, and what else there was, by degree.

    `runner_up` is the best plan of another degree; `runner_up_beyond` is its run at the best plan's rate, or
    at the rate above its own where both are equal.
    """

    question: Question
    workload: Workload
    steps: StepModel
    degrees: Degrees
    served: tuple[Served, ...]
    unserved: tuple[Unserved, ...]
    best: Served
    runner_up: Served | None
    runner_up_beyond: SimulatedRun | None


class NoPlanError(ValueError):
    """No plan meets the targets; the message says which latencies are attainable."""


def make_plan(
    question: Question, steps_at: StepModels, *, progress: Callable[[str], None] | None = None
) -> Plan:
    """The plan of the highest goodput.

    `progress` is told what is simulated. Raises ValueError, saying what would be possible, where nothing
    fits, the trace is empty, or (NoPlanError) the targets cannot be met.
    """
    workload = read_workload(question)
    degrees = fit(question, workload)
    served: list[Served] = []
    unserved: list[Unserved] = []
    for degree in degrees.fitting:
        found = _Search(question, workload, degree, steps_at(degree.tp), progress).best()
        if isinstance(found, Served):
            served.append(found)
        else:
            unserved.append(found)
    if not served:
        raise NoPlanError(_nothing_meets(question, unserved))
    order = sorted(served, key=lambda each: (-each.rate_per_s, each.degree.tp))
    best, runner_up = order[0], order[1] if len(order) > 1 else None
    beyond = None
    if runner_up is not None:
        search = _Search(question, workload, runner_up.degree, steps_at(runner_up.degree.tp), progress)
        lost_at = max(best.rate_per_s, runner_up.rate_per_s * 2 ** (1 / RATES_PER_OCTAVE))
        beyond = search.run_at(runner_up.config, lost_at)
    return Plan(
        question=question,
        workload=workload,
        steps=steps_at(best.degree.tp),
        degrees=degrees,
        served=tuple(served),
        unserved=tuple(unserved),
        best=best,
        runner_up=runner_up,
        runner_up_beyond=beyond,
    )


class _Search:
    """The best plan of one degree. Rates are steps of a grid: k is 2^(k / RATES_PER_OCTAVE) a second."""

    def __init__(
        self,
        question: Question,
        workload: Workload,
        degree: Degree,
        steps: StepModel,
        progress: Callable[[str], None] | None,
    ) -> None:
        self._question = question
        self._degree = degree
        self._steps = steps
        self._shares_prefixes = workload.shares_prefixes
        self._requests = replica_requests(question, workload)
        self._progress = progress

    def best(self) -> Served | Unserved:
        """The plan of the highest goodput, of equal ones the first."""
        configs = self._configs()
        widest = max(configs, key=lambda each: (each.max_step_tokens, each.max_rows))
        alone = self._alone(widest)
        unserved = Unserved(degree=self._degree, alone=alone)
        targets = self._question.targets
        if alone.ttft_s > targets.ttft_s or alone.tpot_s > targets.tpot_s:
            return unserved
        highest = self._rate_that_lasts(widest)
        lowest = highest - _LOWEST_OCTAVES * RATES_PER_OCTAVE
        grid = _Grid(lowest=lowest, highest=highest, stride=_SEARCH_STRIDE)
        rate, chosen = grid.lowest, configs[0]
        for config in configs:
            found = grid.climb(self._serves_part(config), above=rate)
            if found > rate:
                rate, chosen = found, config
        grid = _Grid(lowest=lowest, highest=highest, stride=1)
        rate = grid.settle(self._serves(chosen), start=rate)
        if rate == lowest:
            return unserved
        return Served(
            degree=self._degree,
            config=chosen,
            rate_per_s=_rate(rate),
            lasting_per_s=_rate(highest),
            alone=alone,
            run=self.run_at(chosen, _rate(rate)),
            beyond=self.run_at(chosen, _rate(rate + 1)),
        )

    def run_at(self, config: SchedulerConfig, rate_per_s: float) -> SimulatedRun:
        """A run of a plan at a rate of requests over all replicas, to its end."""
        self._tell(f"running {config.max_rows} rows to the end at {rate_per_s:.3g} requests/s")
        return run(self._replica(config), self._arriving(self._requests, rate_per_s))

    def _configs(self) -> list[SchedulerConfig]:
        """All plans, those of the most rows first, and of these those of the fewest step tokens."""
        return [
            SchedulerConfig(max_rows=rows, max_step_tokens=tokens, depth=self._question.depth)
            for rows in sorted(self._question.rows, reverse=True)
            for tokens in sorted(self._question.step_tokens)
            if rows <= tokens
        ]

    def _serves(self, config: SchedulerConfig) -> "_Serves":
        """Whether a plan serves all requests at a step of the grid."""
        return partial(self._serves_some, config, self._requests)

    def _serves_part(self, config: SchedulerConfig) -> "_Serves":
        """Whether a plan serves the first of the requests at a step of the grid."""
        count = min(len(self._requests), max(_LEAST_PART, len(self._requests) // _SEARCH_PART))
        return partial(self._serves_some, config, self._requests[:count])

    def _serves_some(self, config: SchedulerConfig, requests: Sequence[Request], step: int) -> bool:
        rate_per_s = _rate(step)
        self._tell(
            f"{len(requests)} requests in {config.max_rows} rows, {config.max_step_tokens} tokens "
            f"at {rate_per_s:.3g} requests/s"
        )
        return meets(self._replica(config), self._arriving(requests, rate_per_s), self._question.targets)

    def _arriving(self, requests: Sequence[Request], rate_per_s: float) -> list[Request]:
        return scaled_arrivals(requests, rate_per_s=rate_per_s / self._degree.replicas)

    def _replica(self, config: SchedulerConfig) -> Replica:
        return Replica(
            config=config,
            limits=self._degree.limits,
            steps=self._steps,
            shares_prefixes=self._shares_prefixes,
        )

    def _rate_that_lasts(self, config: SchedulerConfig) -> int:
        """The step of the grid above the rate at which requests that all wait are served.

        Counted in tokens, until the last of them has its first one, since then fewer and fewer run.
        """
        self._tell("all requests at once")
        closed = run(self._replica(config), [replace(each, arrived_s=0.0) for each in self._requests])
        times = closed.outcome.requests
        until_s = max(each.first_s for each in times)
        prompts = sum(len(each.prompt_token_ids) for each in self._requests)
        answers = sum(each.num_tokens for each in times)
        answered = sum(_answered(each, until_s) for each in times)
        done = len(times) * (prompts + answered) / (prompts + answers)
        return math.ceil(RATES_PER_OCTAVE * math.log2(self._degree.replicas * done / until_s))

    def _alone(self, config: SchedulerConfig) -> Alone:
        """Some requests, from the shortest prompt to the longest, one at a time, answers cut short."""
        self._tell("requests one at a time")
        by_length = sorted(self._requests, key=lambda each: len(each.prompt_token_ids))
        count = min(_ALONE_REQUESTS, len(by_length))
        picked = [by_length[(2 * index + 1) * len(by_length) // (2 * count)] for index in range(count)]
        ttft_s: list[float] = []
        tpot_s: list[float] = []
        for request in picked:
            short = replace(request, max_tokens=min(request.max_tokens, _ALONE_TOKENS), arrived_s=0.0)
            outcome = run(self._replica(config), [short]).outcome
            ttft_s += outcome.ttft_s
            tpot_s += outcome.tpot_s
        share = self._question.targets.attainment
        return Alone(ttft_s=_met_by(ttft_s, share), tpot_s=_met_by(tpot_s, share) if tpot_s else 0.0)

    def _tell(self, doing: str) -> None:
        if self._progress is not None:
            self._progress(f"t={self._degree.tp}: {doing}")


_Serves = Callable[[int], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grid:
    """Every `stride`-th of the rates above `lowest`, which stands for none that is served."""

    lowest: int
    highest: int
    stride: int

    def climb(self, serves: _Serves, *, above: int) -> int:
        """The highest rate that is served, `above` if none above it is."""
        if above == self.lowest:
            return self._descend(serves, from_=self.highest)
        if above + self.stride > self.highest or not serves(above + self.stride):
            return above
        return self._ascend(serves, above + self.stride)

    def settle(self, serves: _Serves, *, start: int) -> int:
        """The highest rate that is served, looked for around `start`."""
        if start > self.lowest and serves(start):
            return self._ascend(serves, start)
        return self._descend(serves, from_=start - self.stride)

    def _descend(self, serves: _Serves, *, from_: int) -> int:
        """From where most rates are too high, and runs end early: the steps double, up to an octave."""
        high, distance = from_ + self.stride, self.stride
        while high - distance > self.lowest:
            if serves(high - distance):
                return self._bisect(serves, high - distance, high)
            high, distance = high - distance, min(2 * distance, RATES_PER_OCTAVE)
        return self._bisect(serves, self.lowest, high)

    def _ascend(self, serves: _Serves, low: int) -> int:
        """From a rate that is served upwards: the steps double."""
        distance = self.stride
        while low + distance <= self.highest:
            if not serves(low + distance):
                return self._bisect(serves, low, low + distance)
            low, distance = low + distance, 2 * distance
        return self._bisect(serves, low, self.highest + 1)

    def _bisect(self, serves: _Serves, low: int, high: int) -> int:
        """The highest rate that is served; `low` is, or is the lowest, and `high` is not."""
        while high - low > self.stride:
            middle = low + max(1, (high - low) // (2 * self.stride)) * self.stride
            low, high = (middle, high) if serves(middle) else (low, middle)
        return low


def _rate(step: int) -> float:
    return 2 ** (step / RATES_PER_OCTAVE)


def _answered(request: RequestTimes, moment_s: float) -> float:
    """Tokens that a request has at a moment after its first, if they come evenly."""
    if request.last_s <= moment_s:
        return request.num_tokens
    passed = (moment_s - request.first_s) / (request.last_s - request.first_s)
    return 1 + passed * (request.num_tokens - 1)


def _met_by(values: list[float], share: float) -> float:
    """The least target that a share of the values meets."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def _nothing_meets(question: Question, unserved: list[Unserved]) -> str:
    targets = question.targets
    quickest = min(unserved, key=lambda each: each.alone.ttft_s)
    steadiest = min(unserved, key=lambda each: each.alone.tpot_s)
    return (
        f"no plan serves {targets.attainment:.0%} of the requests within {targets.ttft_s * 1e3:g} ms to the "
        f"first token and {targets.tpot_s * 1e3:g} ms a token on {question.num_gpus} x {question.gpu.title}. "
        f"Alone on a replica, that share of them gets {quickest.alone.ttft_s * 1e3:.1f} ms to the first "
        f"token at best (t={quickest.degree.tp}) and {steadiest.alone.tpot_s * 1e3:.2f} ms a token at best "
        f"(t={steadiest.degree.tp})"
    )
