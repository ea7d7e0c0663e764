"""The work of host and device, as spans on lanes and as a trace file that Perfetto and Chrome open.

The lanes of a depth-2 engine (a host that is faster than the device exposes nothing)::

    host      [T1][T2][wait .........][T5][delivery][T1][T2][wait ...
    device    [step 7: T3 ......... T4][step 8: T3 ............... T4]
    exposed                                                            idle with work, by the task that ran

They are made of a timeline's stamps, each span on its own, and add up to the task table: a test holds that.
The host waits where it commits a step and did nothing else before. Open the file at https://ui.perfetto.dev.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from albireo_jax.engine.timeline import Delivery, StepRecord

HOST, DEVICE, EXPOSED = "host", "device", "exposed"
T1, T2, T3, T4, T5 = (
    "T1 schedule",
    "T2 prepare inputs",
    "T3 forward",
    "T4 sample",
    "T5 process outputs",
)
DELIVERY, WAIT, COPY_WAIT, BETWEEN = "T5 delivery", "wait for result", "wait for page copies", "between tasks"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSpan:
    """One thing on one lane; `step` counts the recorded steps from 0, deliveries and waits have none."""

    lane: str
    name: str
    begin_s: float
    end_s: float
    step: int | None = None

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.end_s - self.begin_s


def lane_spans(records: Sequence[StepRecord], deliveries: Sequence[Delivery]) -> list[LaneSpan]:
    """The spans of all lanes, lane by lane, each lane in order and without overlap."""
    host = _host_spans(records, deliveries)
    busy = list(_busy_times(records))
    return [*_with_waits(host), *_device_spans(records, busy), *_exposed_spans(records, busy, host)]


def trace_content(spans: Sequence[LaneSpan]) -> dict[str, object]:
    """The trace event format: a process with a thread for each lane, times in microseconds from the first."""
    lanes = {lane: number for number, lane in enumerate((HOST, DEVICE, EXPOSED), start=1)}
    began_s = min((span.begin_s for span in spans), default=0.0)
    named: list[dict[str, object]] = [_metadata("process_name", 0, "albireo")]
    named += [_metadata("thread_name", number, lane) for lane, number in lanes.items()]
    return {
        "displayTimeUnit": "ms",
        "traceEvents": named
        + [
            {
                "name": span.name,
                "ph": "X",
                "pid": 1,
                "tid": lanes[span.lane],
                "ts": (span.begin_s - began_s) * 1e6,
                "dur": span.seconds * 1e6,
                "args": {} if span.step is None else {"step": span.step},
            }
            for span in spans
        ],
    }


class _BusyTime(NamedTuple):
    begin_s: float
    end_s: float


class _Idle(NamedTuple):
    """Idle time of the device, with work, before a step."""

    step: int
    begin_s: float
    end_s: float


def _host_spans(records: Sequence[StepRecord], deliveries: Sequence[Delivery]) -> list[LaneSpan]:
    """The tasks of the engine's thread, in order."""
    spans = [
        LaneSpan(lane=HOST, name=name, begin_s=begin_s, end_s=end_s, step=step)
        for step, record in enumerate(records)
        for name, begin_s, end_s in (
            (T1, record.plan_s, record.dispatch_s),
            (T2, record.dispatch_s, record.queued_s),
            (T5, record.commit_s, record.committed_s),
        )
    ]
    spans += [LaneSpan(lane=HOST, name=DELIVERY, begin_s=begin, end_s=end) for begin, end in deliveries]
    return sorted(spans, key=_begin_s)


def _with_waits(host: Sequence[LaneSpan]) -> Iterator[LaneSpan]:
    """The host's spans, and what it waited before it committed."""
    if host:
        yield host[0]
    for before, span in pairwise(host):
        if span.name == T5 and span.begin_s > before.end_s:
            yield LaneSpan(lane=HOST, name=WAIT, begin_s=before.end_s, end_s=span.begin_s, step=span.step)
        yield span


def _busy_times(records: Sequence[StepRecord]) -> Iterator[_BusyTime]:
    """Begin and end of each step on the device, equal if it was done before its dispatch returned."""
    free_s = 0.0
    for record in records:
        end_s = max(record.finished_s, record.queued_s, free_s)
        yield _BusyTime(max(record.queued_s, free_s), end_s)
        free_s = end_s


def _device_spans(records: Sequence[StepRecord], busy: Sequence[_BusyTime]) -> Iterator[LaneSpan]:
    for step, (record, (begin_s, end_s)) in enumerate(zip(records, busy, strict=True)):
        yield LaneSpan(lane=DEVICE, name=f"step {step}", begin_s=begin_s, end_s=end_s, step=step)
        computes_s = begin_s + min(record.copy_wait_s, end_s - begin_s)
        samples_s = end_s - min(record.sample_s, end_s - computes_s)
        for name, part_begin_s, part_end_s in (
            (COPY_WAIT, begin_s, computes_s),
            (T3, computes_s, samples_s),
            (T4, samples_s, end_s),
        ):
            if part_end_s > part_begin_s:
                yield LaneSpan(lane=DEVICE, name=name, begin_s=part_begin_s, end_s=part_end_s, step=step)


def _exposed_spans(
    records: Sequence[StepRecord], busy: Sequence[_BusyTime], host: Sequence[LaneSpan]
) -> Iterator[LaneSpan]:
    """Idle times of the device, divided by what the host did meanwhile."""
    first = 0
    for idle in _idle_times(records, busy):
        while first < len(host) and host[first].end_s <= idle.begin_s:
            first += 1
        now_s, index = idle.begin_s, first
        while now_s < idle.end_s:
            task = host[index] if index < len(host) and host[index].begin_s < idle.end_s else None
            begins_s = idle.end_s if task is None else max(task.begin_s, now_s)
            if begins_s > now_s:
                yield _exposed(BETWEEN, now_s, begins_s, step=idle.step)
            now_s = begins_s
            if task is not None:
                now_s = min(task.end_s, idle.end_s)
                if now_s > begins_s:
                    yield _exposed(task.name, begins_s, now_s, step=idle.step)
            index += 1


def _idle_times(records: Sequence[StepRecord], busy: Sequence[_BusyTime]) -> Iterator[_Idle]:
    """The gaps between steps, less the time from the last commit to the next plan if no request was there."""
    steps = zip(pairwise(records), pairwise(busy), strict=True)
    for step, ((before, record), (busy_before, busy_now)) in enumerate(steps, start=1):
        if record.after_pause and before.committed_s < record.plan_s:
            gaps = ((busy_before.end_s, before.committed_s), (record.plan_s, busy_now.begin_s))
        else:
            gaps = ((busy_before.end_s, busy_now.begin_s),)
        yield from (_Idle(step, begin_s, end_s) for begin_s, end_s in gaps if end_s > begin_s)


def _exposed(name: str, begin_s: float, end_s: float, *, step: int) -> LaneSpan:
    return LaneSpan(lane=EXPOSED, name=name, begin_s=begin_s, end_s=end_s, step=step)


def _begin_s(span: LaneSpan) -> float:
    return span.begin_s


def _metadata(kind: str, thread: int, name: str) -> dict[str, object]:
    return {"name": kind, "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}
