"""The engine loop: plan a step, queue it on the device, take in the oldest result."""

from collections import deque
from typing import NamedTuple

from albireo_jax.core.plan import Executor, StepHandle, StepPlan
from albireo_jax.core.types import RequestOutput
from albireo_jax.engine.timeline import StepStamps, Timeline
from albireo_jax.sched.scheduler import Scheduler

_MAX_IDLE_S = 0.01
"""Longest wait for a mask if there is nothing else to do; new requests and aborts wait as long."""


class _InFlight(NamedTuple):
    plan: StepPlan
    handle: StepHandle
    stamps: StepStamps


class EngineLoop:
    """Keeps up to `depth` steps queued on the device; depth 1 waits for each step before the next.

    Depth 2, the plan of step 2 made while the device runs step 1::

        host    plan 1  dispatch 1  plan 2  dispatch 2  wait 1 ...  commit 1  plan 3  dispatch 3 ...
        device                      [ step 1 ..................... ][ step 2 ........................

    One thread calls all methods.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, *, depth: int, timeline: Timeline) -> None:
        self.scheduler = scheduler
        self.timeline = timeline
        self._executor = executor
        self._depth = depth
        self._in_flight: deque[_InFlight] = deque()
        self._times_emptied = scheduler.times_emptied

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended, or a step is still in flight."""
        return self.scheduler.has_work or bool(self._in_flight)

    def step(self) -> list[RequestOutput]:
        """Queue the next step if there is one; commit the oldest unless more steps can be queued before it.

        An empty list means that nothing was committed, or nothing that still has a request. If nothing can be
        planned before a mask is made aside, and nothing is in flight, a mask is waited for, for a while.
        """
        outputs = self.scheduler.take_masks()
        now = self.timeline.clock
        plan_s = now()
        plan = self.scheduler.plan()
        if plan is not None:
            dispatch_s = now()
            handle = self._executor.dispatch(plan)
            stamps = StepStamps(plan_s, dispatch_s, now(), self._note_pause())
            self._in_flight.append(_InFlight(plan, handle, stamps))
            if len(self._in_flight) < self._depth:
                return outputs
        if not self._in_flight:
            return outputs or self.scheduler.take_masks(_MAX_IDLE_S)
        plan, handle, stamps = self._in_flight.popleft()
        sampled = handle.wait()
        commit_s = now()
        outputs += self.scheduler.commit(plan, sampled)
        self.timeline.record(stamps, sampled, commit_s=commit_s)
        return outputs

    def _note_pause(self) -> bool:
        """Whether the scheduler was without any request since the step before was planned."""
        known, self._times_emptied = self._times_emptied, self.scheduler.times_emptied
        return known != self._times_emptied
