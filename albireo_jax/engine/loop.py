"""The engine loop: plan a step, queue it on the device, take in the oldest result."""

from collections import deque
from typing import NamedTuple

import numpy as np

from albireo_jax.core.plan import TOKEN_ON_DEVICE, Executor, StepHandle, StepPlan
from albireo_jax.core.types import RequestOutput
from albireo_jax.engine.timeline import StepStamps, Timeline
from albireo_jax.sched.scheduler import Scheduler

_MAX_IDLE_S = 0.01
"""Longest wait for a mask if there is nothing else to do; new requests and aborts wait as long."""


class _InFlight(NamedTuple):
    plan: StepPlan
    handle: StepHandle
    stamps: StepStamps
    starts: dict[str, float]


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
        self._started_s: dict[int, float] = {}  # by slot, when its latest request was started

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
            self._in_flight.append(_InFlight(plan, handle, stamps, self._note_starts(plan, plan_s)))
            if len(self._in_flight) < self._depth:
                return outputs
        if not self._in_flight:
            return outputs or self.scheduler.take_masks(_MAX_IDLE_S)
        plan, handle, stamps, starts = self._in_flight.popleft()
        sampled = handle.wait()
        commit_s = now()
        outputs += _with_starts(self.scheduler.commit(plan, sampled), starts)
        self.timeline.record(stamps, sampled, commit_s=commit_s)
        return outputs

    def _note_pause(self) -> bool:
        """Whether the scheduler was without any request since the step before was planned."""
        known, self._times_emptied = self._times_emptied, self.scheduler.times_emptied
        return known != self._times_emptied

    def _note_starts(self, plan: StepPlan, plan_s: float) -> dict[str, float]:
        """The starts of the requests whose known tokens end in this step, by their ids.

        They are read now: a slot may have another request when the step is committed.
        """
        for params in plan.new_slots:
            self._started_s[params.slot] = plan_s
        first = int(np.count_nonzero(plan.token_ids == TOKEN_ON_DEVICE))  # the rows before it decode
        rows = zip(plan.request_ids[first:], plan.slots[first:].tolist(), plan.samples[first:], strict=True)
        return {request_id: self._started_s[slot] for request_id, slot, samples in rows if samples}


def _with_starts(outputs: list[RequestOutput], starts: dict[str, float]) -> list[RequestOutput]:
    """The outputs of a step, the first ones of requests with their starts; these are the last of them."""
    left = len(starts)
    for place in range(len(outputs) - 1, -1, -1):
        if not left:
            break
        started_s = starts.get(outputs[place].request_id)
        if started_s is not None:
            outputs[place] = outputs[place]._replace(started_s=started_s)
            left -= 1
    return outputs
