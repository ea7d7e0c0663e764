"""Contention for KV memory during a run: pages in use, preemptions, and what requests waited for.

A meter stands between the loop and its executor. When a step was dispatched its plan is complete, so whoever
still waits then was not let into it, and why can be told: the engine had no row left, the step had no tokens
left, or else there were too few free pages. The time until the next poll counts for that. It polls when the
loop is about to wait for a step, so that its microseconds pass while the device computes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from albireo_jax.core.plan import Executor, SampledTokens, StepHandle, StepPlan
from albireo_jax.sched.scheduler import Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class KvUse:
    """Pages of a replica in use, of `num_pages`, and the waiting of its requests, in seconds added up.

    The mean is over the time between the first and the last step.
    """

    num_pages: int
    peak_pages: int
    mean_pages: float
    preemptions: int
    waited_for_tokens_s: float
    waited_for_rows_s: float
    waited_for_pages_s: float


class ContentionMeter:
    """An executor that polls the scheduler before each wait for a step of the one behind it."""

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        *,
        max_rows: int,
        max_step_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._max_rows = max_rows
        self._max_step_tokens = max_step_tokens
        self._clock = clock
        self._peak_pages = 0
        self._page_s = self._measured_s = 0.0
        self._waited_s = {"tokens": 0.0, "rows": 0.0, "pages": 0.0}
        self._seen_s: float | None = None
        self._pages = self._waiting = 0
        self._reason = "tokens"
        self._newest: StepPlan | None = None

    def dispatch(self, plan: StepPlan) -> StepHandle:
        """Queue the step behind the meter."""
        self._newest = plan
        return _PolledHandle(self, self._executor.dispatch(plan))

    def use(self) -> KvUse:
        """The use so far, of a scheduler that is as old as the meter."""
        stats = self._scheduler.stats()
        return KvUse(
            num_pages=stats.num_pages,
            peak_pages=self._peak_pages,
            mean_pages=self._page_s / self._measured_s if self._measured_s else 0.0,
            preemptions=stats.preemptions,
            waited_for_tokens_s=self._waited_s["tokens"],
            waited_for_rows_s=self._waited_s["rows"],
            waited_for_pages_s=self._waited_s["pages"],
        )

    def poll(self) -> None:
        """Note what there is, and that what was noted before has lasted until now."""
        now_s, stats = self._clock(), self._scheduler.stats()
        if self._seen_s is not None:
            passed_s = now_s - self._seen_s
            self._measured_s += passed_s
            self._page_s += self._pages * passed_s
            self._waited_s[self._reason] += self._waiting * passed_s
        self._seen_s = now_s
        self._pages, self._waiting = stats.pages_in_use, stats.waiting
        self._peak_pages = max(self._peak_pages, stats.pages_in_use)
        self._reason = self._why()

    def _why(self) -> str:
        plan = self._newest
        assert plan is not None, "the scheduler is polled after a dispatch"
        if plan.num_rows >= self._max_rows:
            return "rows"
        return "tokens" if plan.num_tokens >= self._max_step_tokens else "pages"


class _PolledHandle(NamedTuple):
    meter: ContentionMeter
    handle: StepHandle

    def wait(self) -> SampledTokens:
        self.meter.poll()
        return self.handle.wait()
