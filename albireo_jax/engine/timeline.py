"""A record of each task of each step: its times, and the part of it for which the device waited.

T1 schedule, T2 prepare inputs and T5 process outputs run on the host; T3 forward and T4 sample on the
device. A step is *queued* when its dispatch returns, and the device runs it from then, or from the end of
the step before if that is later, until it *finished*. In between, the device is idle. Time of a host
task is **exposed** where it overlaps with that idleness; waiting for a result is not a task::

    depth 1   host    T1 T2 ............. T5 T1 T2 ............. T5
              device        [ T3    | T4 ]         [ T3    | T4 ]
              exposed                      xx xx xx                   all of T1, T2 and T5

    depth 2   host    T1 T2 ...... T5 T1 T2 ...... T5 T1 T2 ......
              device  T3    | T4 ][ T3       | T4 ][ T3       | T4 ]
              exposed                                                 nothing, while the host is faster

Idle time is divided without rest: what host tasks are exposed for, what passes *between* them (threads
waking up, requests arriving), and the time in which there was *no work* (once all requests had ended or
were aborted: from the latest commit to the next plan). With the busy time of the device these add up to the
wall time of the window, which spans from the end of the oldest recorded step to the end of the newest.

The end of a dispatch is a late estimate of when the device could start, so exposed T2 is an upper bound.

Copies of KV pages run beside the steps, on neither lane. What a step waits for them is exposed too, but
within the busy time of the device, and none of T3 or T4.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from albireo_jax.core.plan import SampledTokens

_Floats = NDArray[np.float64]


ALL_STEPS = 2**20
"""Capacity of a timeline that is to keep all steps of a measured run."""


class StepStamps(NamedTuple):
    """Times at which the host planned a step, began to dispatch it, and had it queued on the device.

    `after_pause`: it is the first step after a moment without any request.
    """

    plan_s: float
    dispatch_s: float
    queued_s: float
    after_pause: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTime:
    """Seconds that one task took over a window of steps, and those of them that were exposed.

    Tasks of the device have no exposed time: it is not idle during them.
    """

    name: str
    total_s: float
    exposed_s: float
    on_device: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTable:
    """The wall time of a window of `steps` steps, by task; `tasks` are T1 … T5.

    wall_s = device_busy_s + no_work_s + between_s + the exposed time of the tasks, and
    device_busy_s = the total time of T3 and T4 + the exposed time of `copies`, those of KV pages.
    """

    steps: int
    wall_s: float
    device_busy_s: float
    no_work_s: float
    between_s: float
    tasks: tuple[TaskTime, ...]
    copies: TaskTime

    @property
    def idle_share(self) -> float:
        """Part of the time with work in which the device had nothing queued."""
        with_work_s = self.wall_s - self.no_work_s
        return 1 - self.device_busy_s / with_work_s if with_work_s > 0 else 0.0

    @property
    def exposed_s(self) -> float:
        """Time in which the device was idle though there was work."""
        return self.between_s + sum(task.exposed_s for task in self.tasks)

    def __str__(self) -> str:
        """The table as text; see `render`."""
        return render(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTotals:
    """Steps that were sampled in one way, and the bytes that each rank received for it."""

    steps: int = 0
    wire_bytes: int = 0


class StepRecord(NamedTuple):
    """The stamps of a committed step, and what its result said of the device; see `SampledTokens`."""

    plan_s: float
    dispatch_s: float
    queued_s: float
    after_pause: bool
    finished_s: float
    sample_s: float
    copy_s: float
    copy_wait_s: float
    commit_s: float
    committed_s: float


class Delivery(NamedTuple):
    """Times between which a step's outputs were handed to their requests."""

    begin_s: float
    end_s: float


class Timeline:
    """Stamps of the last `capacity` committed steps, and totals of all of them by their way to sample.

    A stamp takes under a microsecond, so it is always on.

    `clock` gives seconds and is the one that `SampledTokens.finished_s` is read from. The engine thread
    records; any thread may ask for the table and the totals.
    """

    def __init__(self, *, capacity: int = 4096, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._records: deque[StepRecord] = deque(maxlen=capacity)
        self._deliveries: deque[Delivery] = deque(maxlen=capacity)
        self._routes: dict[str, RouteTotals] = {}

    def record(self, stamps: StepStamps, sampled: SampledTokens, *, commit_s: float) -> None:
        """Keep a step whose commit began at `commit_s` and ends now."""
        self._records.append(
            StepRecord(
                *stamps,
                finished_s=sampled.finished_s,
                sample_s=sampled.sample_s,
                copy_s=sampled.copy_s,
                copy_wait_s=sampled.copy_wait_s,
                commit_s=commit_s,
                committed_s=self.clock(),
            )
        )
        if sampled.route:
            before = self._routes.get(sampled.route, RouteTotals())
            self._routes[sampled.route] = RouteTotals(
                steps=before.steps + 1, wire_bytes=before.wire_bytes + sampled.wire_bytes
            )

    def record_delivery(self, begin_s: float, end_s: float) -> None:
        """Keep an interval in which outputs were handed to their requests; it counts as T5."""
        self._deliveries.append(Delivery(begin_s, end_s))

    def clear(self) -> None:
        """Forget the stamps of all steps, for instance those of a warm-up."""
        self._records.clear()
        self._deliveries.clear()

    def records(self) -> list[StepRecord]:
        """The recorded steps, oldest first."""
        return list(self._records)  # one step copies the deque whole while the engine thread appends to it

    def deliveries(self) -> list[Delivery]:
        """The recorded deliveries, oldest first."""
        return list(self._deliveries)  # one step, as above

    def table(self) -> TaskTable:
        """The task table of the recorded steps; all zeros before the second of them."""
        return _task_table(self.records(), self.deliveries())

    def routes(self) -> dict[str, RouteTotals]:
        """Totals since the start, of each route that a step has taken."""
        return self._routes.copy()  # one step, as above


def render(table: TaskTable) -> str:
    """The table as text, times in microseconds per step."""
    per_step = 1e6 / max(table.steps, 1)
    lines = [f"{'task':<22}{'µs per step':>12}{'exposed':>12}"]
    for task in (*table.tasks, *((table.copies,) if table.copies.total_s else ())):
        exposed = "on device" if task.on_device else f"{task.exposed_s * per_step:.1f}"
        lines.append(f"{task.name:<22}{task.total_s * per_step:>12.1f}{exposed:>12}")
    lines.append(f"{'between tasks':<34}{max(table.between_s, 0.0) * per_step:>12.1f}")
    lines.append(
        f"{table.steps} steps in {table.wall_s:.3f} s: device busy {table.device_busy_s:.3f} s, idle "
        f"with work {table.exposed_s:.3f} s ({table.idle_share:.1%}), without work {table.no_work_s:.3f} s"
    )
    return "\n".join(lines)


def _task_table(records: list[StepRecord], deliveries: list[Delivery]) -> TaskTable:
    if len(records) < 2:
        return TaskTable(
            steps=0,
            wall_s=0.0,
            device_busy_s=0.0,
            no_work_s=0.0,
            between_s=0.0,
            tasks=_tasks(_ZEROS, _ZEROS),
            copies=_copies(0.0, 0.0),
        )
    plan, dispatch, queued, paused, ended, sample, copy, wait, commit, committed = np.array(records, float).T
    # A device that was done before its dispatch returned counts as busy for no time at all.
    finished = np.maximum.accumulate(np.maximum(ended, queued))
    begun = np.maximum(queued[1:], finished[:-1])
    busy = finished[1:] - begun
    without_work = (paused[1:] > 0) & (committed[:-1] < plan[1:])
    work_ended = np.where(without_work, committed[:-1], begun)
    work_began = np.where(without_work, plan[1:], begun)
    idle = _IdleTime(np.stack((finished[:-1], work_ended, work_began, begun), axis=1))

    delivery = np.array(deliveries, float).reshape(-1, 2)
    delivery = delivery[(delivery[:, 0] >= committed[0]) & (delivery[:, 0] < commit[-1])]
    t1 = np.stack((plan, dispatch), axis=1)[1:]
    t2 = np.stack((dispatch, queued), axis=1)[1:]
    t5 = np.concatenate((np.stack((commit, committed), axis=1)[:-1], delivery))
    waited = np.minimum(wait[1:], busy)
    t4_s = float(np.minimum(sample[1:], busy - waited).sum())
    t3_s = float((busy - waited).sum()) - t4_s
    totals_s = (_length(t1), _length(t2), t3_s, t4_s, _length(t5))
    exposed_s = (idle.overlap(t1), idle.overlap(t2), 0.0, 0.0, idle.overlap(t5))
    return TaskTable(
        steps=len(records) - 1,
        wall_s=float(finished[-1] - finished[0]),
        device_busy_s=float(busy.sum()),
        no_work_s=float((work_began - work_ended).sum()),
        between_s=idle.total_s - sum(exposed_s),
        tasks=_tasks(totals_s, exposed_s),
        copies=_copies(float(np.maximum(copy[1:], waited).sum()), float(waited.sum())),
    )


_NAMES = ("T1 schedule", "T2 prepare inputs", "T3 forward", "T4 sample", "T5 process outputs")
_ON_DEVICE = (False, False, True, True, False)
_ZEROS = (0.0, 0.0, 0.0, 0.0, 0.0)


def _tasks(totals_s: tuple[float, ...], exposed_s: tuple[float, ...]) -> tuple[TaskTime, ...]:
    columns = zip(_NAMES, totals_s, exposed_s, _ON_DEVICE, strict=True)
    return tuple(
        TaskTime(name=name, total_s=total, exposed_s=exposed, on_device=on_device)
        for name, total, exposed, on_device in columns
    )


def _copies(total_s: float, exposed_s: float) -> TaskTime:
    return TaskTime(name="copies of KV pages", total_s=total_s, exposed_s=exposed_s, on_device=False)


def _length(intervals: _Floats) -> float:
    return float((intervals[:, 1] - intervals[:, 0]).sum())


class _IdleTime:
    """The device's idle time while there was work, up to any moment.

    A gap between two steps is a row (idle from, work ended, work began, idle until); its middle has no work.
    """

    def __init__(self, gaps: _Floats) -> None:
        self._moments = gaps.ravel()
        idle = np.diff(self._moments) * np.resize((1.0, 0.0, 1.0, 0.0), self._moments.size - 1)
        self._idle_s = np.concatenate(((0.0,), np.cumsum(idle)))

    @property
    def total_s(self) -> float:
        """Idle time with work over all gaps."""
        return float(self._idle_s[-1])

    def overlap(self, intervals: _Floats) -> float:
        """Idle time with work that lies within `intervals`, rows of (begin, end)."""
        return _length(np.interp(intervals, self._moments, self._idle_s))
