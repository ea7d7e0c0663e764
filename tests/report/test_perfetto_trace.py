"""Lanes are in order and add up to the task table, whatever the run."""

import json
from collections import defaultdict
from itertools import pairwise

import pytest

from albireo_jax.core.limits import EngineLimits
from albireo_jax.engine.timeline import TaskTable
from albireo_jax.report.perfetto_trace import (
    BETWEEN,
    COPY_WAIT,
    DELIVERY,
    DEVICE,
    EXPOSED,
    HOST,
    T5,
    LaneSpan,
    lane_spans,
    trace_content,
)
from tests.labs.clocked_lab import ClockedRun, requests_at, run_on_clock

TIGHT = EngineLimits(max_model_len=64, vocab_size=50, num_pages=12, page_size=4, num_host_pages=20)
AT_ONCE = requests_at(*[0.0] * 6)
IN_TURN = requests_at(0.0, 0.3, 0.9, 0.95, 2.0, 2.0)
RUNS = {
    "synchronous": lambda: run_on_clock(AT_ONCE, depth=1, step_s=0.02),
    "overlapped": lambda: run_on_clock(AT_ONCE, depth=2, step_s=0.02),
    "slow host": lambda: run_on_clock(AT_ONCE, depth=2, step_s=0.004),
    "pauses": lambda: run_on_clock(IN_TURN, depth=2, step_s=0.02),
    "synchronous pauses": lambda: run_on_clock(IN_TURN, depth=1, step_s=0.004),
    "swapping": lambda: run_on_clock(AT_ONCE, depth=2, step_s=0.02, limits=TIGHT, page_copy_s=0.2),
}


def _spans(run: ClockedRun) -> list[LaneSpan]:
    timeline = run.metered.loop.timeline
    return lane_spans(timeline.records(), timeline.deliveries())


def _sums(spans: list[LaneSpan], lane: str) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for span in spans:
        if span.lane == lane:
            sums[span.name] += span.seconds
    return sums


@pytest.mark.parametrize("name", RUNS)
def test_spans_of_a_lane_do_not_overlap_and_those_of_a_step_lie_within_it(name: str) -> None:
    spans = _spans(RUNS[name]())
    for lane in (HOST, DEVICE, EXPOSED):
        own = [span for span in spans if span.lane == lane and not span.name.startswith("step")]
        assert all(span.seconds >= 0 for span in own)
        assert all(before.end_s <= after.begin_s + 1e-12 for before, after in pairwise(own))
    steps = {span.step: span for span in spans if span.name.startswith("step")}
    assert all(before.end_s <= after.begin_s + 1e-12 for before, after in pairwise(steps.values()))
    inner = [span for span in spans if span.lane == DEVICE and not span.name.startswith("step")]
    for span in inner:
        step = steps[span.step]
        assert step.begin_s - 1e-12 <= span.begin_s <= span.end_s <= step.end_s + 1e-12
    assert sum(span.seconds for span in inner) == pytest.approx(sum(step.seconds for step in steps.values()))


@pytest.mark.parametrize("name", RUNS)
def test_lanes_add_up_to_the_task_table(name: str) -> None:
    run = RUNS[name]()
    table = run.metered.loop.timeline.table()
    spans = _spans(run)
    # The table's window begins at the end of the first step and lacks the commit of the last.
    device = [span for span in spans if span.lane == DEVICE and span.step]
    for task in table.tasks:
        if task.on_device:
            assert _sums(device, DEVICE)[task.name] == pytest.approx(task.total_s)
    _check_host(table, spans)
    exposed = _sums(spans, EXPOSED)
    for task in table.tasks:
        shown = exposed[task.name] + (exposed[DELIVERY] if task.name == T5 else 0.0)
        assert shown == pytest.approx(task.exposed_s, abs=1e-9)
    assert exposed[BETWEEN] == pytest.approx(table.between_s, abs=1e-9)
    assert _sums(device, DEVICE)[COPY_WAIT] == pytest.approx(table.copies.exposed_s, abs=1e-9)
    assert (table.copies.exposed_s > 0) == (name == "swapping")


def _check_host(table: TaskTable, spans: list[LaneSpan]) -> None:
    host = [span for span in spans if span.lane == HOST]
    commits = [span for span in host if span.name == T5]
    counted = {
        "T1": sum(span.seconds for span in host if span.name.startswith("T1") and span.step),
        "T2": sum(span.seconds for span in host if span.name.startswith("T2") and span.step),
        "T5": sum(span.seconds for span in commits[:-1])
        + sum(
            span.seconds
            for span in host
            if span.name == DELIVERY and commits[0].end_s <= span.begin_s < commits[-1].begin_s
        ),
    }
    for task in table.tasks:
        if not task.on_device:
            assert counted[task.name[:2]] == pytest.approx(task.total_s)


def test_the_file_is_a_trace_with_a_named_thread_for_each_lane() -> None:
    spans = _spans(RUNS["pauses"]())
    content = json.loads(json.dumps(trace_content(spans)))
    events = content["traceEvents"]
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert sorted(threads.values()) == sorted((HOST, DEVICE, EXPOSED))
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == len(spans)
    assert min(event["ts"] for event in complete) == 0
    for event, span in zip(complete, spans, strict=True):
        assert threads[event["tid"]] == span.lane
        assert event["dur"] == pytest.approx(span.seconds * 1e6)
        assert event["args"].get("step") == span.step


def test_nothing_recorded_is_an_empty_trace() -> None:
    assert lane_spans([], []) == []
    assert all(event["ph"] == "M" for event in trace_content([])["traceEvents"])


def test_the_host_waits_for_the_device_and_for_nothing_else() -> None:
    spans = _spans(RUNS["synchronous"]())
    waits = [span for span in spans if span.name == "wait for result"]
    steps = {span.step: span for span in spans if span.name.startswith("step")}
    assert len(waits) == len(steps)
    for span in waits:
        assert (span.begin_s, span.end_s) == pytest.approx((steps[span.step].begin_s, steps[span.step].end_s))
