"""An engine as its callers see it, in the same process or in another."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import Int32s
from albireo_jax.core.types import Request, StructuredOutput
from albireo_jax.engine.energy import EnergyReading, Meter
from albireo_jax.engine.service import Deliver, ServiceState
from albireo_jax.engine.timeline import RouteTotals, TaskTable, Timeline
from albireo_jax.sched.scheduler_stats import SchedulerStats


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFigures:
    """Measurements of an engine beside its statistics: its latest steps, the routes to sample, its energy."""

    table: TaskTable
    routes: dict[str, RouteTotals]
    energy: EnergyReading


def read_figures(timeline: Timeline, energy: Meter) -> EngineFigures:
    """The figures of this moment; takes milliseconds."""
    return EngineFigures(table=timeline.table(), routes=timeline.routes(), energy=energy.read())


class EngineClient(Protocol):
    """Takes requests and hands out their outputs; `EngineService` and `RemoteEngine` are the two there are.

    Any thread may call it. Every request that `submit` accepted ends with exactly one output that has a
    finish reason, whatever happens to the engine.
    """

    @property
    def limits(self) -> EngineLimits:
        """The limits that `submit` checks."""
        ...

    @property
    def state(self) -> ServiceState:
        """Whether requests are taken, and why not."""
        ...

    @property
    def failure(self) -> BaseException | None:
        """The error that ended the engine, if one did."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether requests are never taken again, though nobody stopped the engine."""
        ...

    def stats(self) -> SchedulerStats:
        """The scheduler's latest figures that are known; never blocks."""
        ...

    def check_running(self) -> None:
        """Raise EngineDeadError, the cause chained, unless requests are taken."""
        ...

    def start(self, deliver: Deliver) -> None:
        """Hand the outputs of each step to `deliver`, on one thread, from now on; once only."""
        ...

    def first_mask(self, structured: StructuredOutput) -> "Future[Int32s]":
        """Compile a constraint for requests to come; the words of the tokens an answer may begin with."""
        ...

    def submit(self, *requests: Request) -> None:
        """Queue requests, all of them or none; raises ValueError or EngineDeadError."""
        ...

    def abort(self, *request_ids: str) -> None:
        """End requests early; one that already ended is left alone."""
        ...

    def forget_prefixes(self) -> None:
        """Let requests that are submitted from now on find no cached page of earlier ones."""
        ...

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until no request is open; False if some still are after `timeout_s`."""
        ...

    def stop(self) -> None:
        """Abort what is open, and take no more requests."""
        ...
