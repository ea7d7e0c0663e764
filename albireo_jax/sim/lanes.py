"""Simulated time: the clock, and the lanes on which a device computes steps and copies pages beside them.

A step starts when it is queued, or when the step before it ends, and not before the copies to the device that
earlier steps asked for are done. Copies run on a lane for each direction, beside the device::

    device      [ step 1 ......... ][ step 2 ........ ]    [ step 3 ....
    to host     [ 1's ]
    to device          [ 1's ]       [ 2's .............. ]            step 3 waits for those of step 2
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from albireo_jax.core.plan import StepPlan

Cost = Callable[[StepPlan], float]
"""Seconds that the device takes for a step."""


def cost_of_steps(plan: StepPlan, cost: Cost) -> float:
    """Seconds of all steps of a plan, each at its cost, if no row ends before its last one."""
    if not len(plan.steps):
        return cost(plan)
    rows_of = (np.flatnonzero(plan.steps > step).astype(np.int32) for step in range(plan.num_steps))
    return sum(cost(plan.nth_step(step, rows)) for step, rows in enumerate(rows_of))


class Clock:
    """Simulated seconds; called like `time.perf_counter`."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def __call__(self) -> float:
        """Seconds since the start."""
        return self._now_s

    def advance_to(self, moment_s: float) -> None:
        """Let time pass until `moment_s`, if it is not past already."""
        self._now_s = max(self._now_s, moment_s)


class CopyTimes(NamedTuple):
    """Seconds of copies between the tiers, and those of them in which the device had to wait for one."""

    copied_s: float
    exposed_s: float


class QueuedStep(NamedTuple):
    """A step's end, the time of its copies, and the device's wait for these or earlier copies."""

    finished_s: float
    copies: CopyTimes


class Lanes:
    """A clock of queued steps and their copies; a page takes `page_copy_s` in either direction."""

    def __init__(self, clock: Clock, *, page_copy_s: float = 0.0) -> None:
        self._clock = clock
        self._page_copy_s = page_copy_s
        self._free_s = 0.0  # when the last queued step ends
        self._copied_out_s = self._copied_in_s = 0.0  # when the last copy of each direction ends
        self._on_host_s: dict[int, float] = {}  # when a host page was there
        self._computed_s = 0.0
        self._copy_times = CopyTimes(0.0, 0.0)

    @property
    def copy_times(self) -> CopyTimes:
        """Times of all copies so far."""
        return self._copy_times

    @property
    def computed_s(self) -> float:
        """Seconds that the device computed, or will for what is queued."""
        return self._computed_s

    def queue(self, plan: StepPlan, *, cost_s: float) -> QueuedStep:
        """Queue a step now that computes for `cost_s`."""
        ready_s = max(self._clock(), self._free_s)
        starts_s = max(ready_s, self._copied_in_s) if plan.num_rows else ready_s
        copy_s = self._copy(plan, starts_s)
        ends_s = starts_s + cost_s
        # The device has nothing to compute beside copies that are all of a step: it waits for them.
        self._free_s = ends_s if plan.num_rows else max(ends_s, self._copied_in_s)
        copies = CopyTimes(copy_s, (starts_s - ready_s) + (self._free_s - ends_s))
        before = self._copy_times
        self._copy_times = CopyTimes(before.copied_s + copy_s, before.exposed_s + copies.exposed_s)
        self._computed_s += cost_s
        return QueuedStep(self._free_s, copies)

    def _copy(self, plan: StepPlan, starts_s: float) -> float:
        """Queue the copies of a step that starts at `starts_s`; gives the seconds that they take."""
        page_s = self._page_copy_s
        for _, host_page in plan.copies.to_host:
            self._copied_out_s = max(self._copied_out_s, starts_s) + page_s
            self._on_host_s[host_page] = self._copied_out_s
        for host_page, _ in plan.copies.to_device:
            self._copied_in_s = max(self._copied_in_s, self._clock(), self._on_host_s[host_page]) + page_s
        return page_s * (len(plan.copies.to_host) + len(plan.copies.to_device))
