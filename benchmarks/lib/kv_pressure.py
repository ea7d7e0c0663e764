"""How short of KV pages simulated replicas of each t are, under a trace at several rates."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.sim.planning.plan_sizes import (
    Degree,
    Excluded,
    Question,
    fit,
    read_workload,
    replica_requests,
)
from albireo_jax.sim.planning.planner import StepModels
from albireo_jax.sim.replica import Replica, Run, run, scaled_arrivals


@dataclass(frozen=True, slots=True, kw_only=True)
class PressurePoint:
    """A replica of a degree at a rate of requests over all replicas."""

    degree: Degree
    rate_per_s: float
    run: Run

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of all replicas."""
        return self.degree.replicas * self.run.outcome.output_tokens_per_s

    @property
    def mean_pages_share(self) -> float:
        """Share of the pages in use, mean over the steps."""
        return self.run.pressure.mean_pages / self.run.pressure.num_pages

    @property
    def peak_pages_share(self) -> float:
        """Share of the pages in use at most."""
        return self.run.pressure.peak_pages / self.run.pressure.num_pages


def pressure_points(
    question: Question, steps_at: StepModels, *, rates_per_s: Sequence[float]
) -> Iterator[PressurePoint | Excluded]:
    """Each degree at each rate, degree by degree; those that do not fit come first, with the reason.

    All have the most rows and step tokens that the question names. Its targets play no part.
    """
    workload = read_workload(question)
    degrees = fit(question, workload)
    yield from degrees.excluded
    config = SchedulerConfig(
        max_rows=max(question.rows), max_step_tokens=max(question.step_tokens), depth=question.depth
    )
    for degree in degrees.fitting:
        requests = replica_requests(question, workload)
        replica = Replica(
            config=config,
            limits=degree.limits,
            steps=steps_at(degree.tp),
            shares_prefixes=workload.shares_prefixes,
        )
        for rate_per_s in rates_per_s:
            arriving = scaled_arrivals(requests, rate_per_s=rate_per_s / degree.replicas)
            yield PressurePoint(degree=degree, rate_per_s=rate_per_s, run=run(replica, arriving))
