import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo_jax.core.plan import SampledTokens
from albireo_jax.engine.timeline import RouteTotals, StepStamps, TaskTable, Timeline, render

PLAN_S, DISPATCH_S, COMMIT_S, DELIVER_S, WAKE_S = 0.004, 0.003, 0.002, 0.001, 0.0005


class ManualClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def spend(self, seconds: float) -> float:
        """Let time pass; gives the moment before."""
        before = self.now_s
        self.now_s += seconds
        return before


def play(
    *,
    depth: int,
    device_s: list[float],
    sample_s: float = 0.0,
    copy_wait_s: float = 0.0,
    pauses_s: dict[int, float] | None = None,
) -> TaskTable:
    """The table of a loop with constant host times; step i takes device_s[i], pauses follow some steps."""
    clock = ManualClock()
    timeline = Timeline(clock=clock)
    in_flight: list[tuple[StepStamps, float]] = []
    free_s = 0.0
    pauses_s = pauses_s or {}

    def commit() -> None:
        stamps, finished_s = in_flight.pop(0)
        clock.spend(max(0.0, finished_s - clock()) + WAKE_S)
        commit_s = clock.spend(COMMIT_S)
        sampled = SampledTokens(
            ids=None,
            finished_s=finished_s,
            sample_s=sample_s,
            copy_s=3 * copy_wait_s,
            copy_wait_s=copy_wait_s,
        )
        timeline.record(stamps, sampled, commit_s=commit_s)
        timeline.record_delivery(clock.spend(DELIVER_S), clock())

    for step, seconds in enumerate(device_s):
        plan_s = clock.spend(PLAN_S)
        dispatch_s = clock.spend(DISPATCH_S)
        free_s = max(clock(), free_s) + seconds
        in_flight.append((StepStamps(plan_s, dispatch_s, clock(), step - 1 in pauses_s), free_s))
        if len(in_flight) == depth:
            commit()
        if step in pauses_s:
            while in_flight:
                commit()
            clock.spend(pauses_s[step])
    while in_flight:
        commit()
    return timeline.table()


def by_name(table: TaskTable) -> dict[str, tuple[float, float]]:
    return {task.name[:2]: (task.total_s, task.exposed_s) for task in table.tasks}


def test_depth_1_exposes_all_host_work() -> None:
    table = play(depth=1, device_s=[0.02] * 11, sample_s=0.005)
    assert table.steps == 10
    tasks = by_name(table)
    for name, seconds in (("T1", PLAN_S), ("T2", DISPATCH_S), ("T5", COMMIT_S + DELIVER_S)):
        assert tasks[name] == (pytest.approx(10 * seconds), pytest.approx(10 * seconds))
    assert tasks["T3"] == (pytest.approx(0.15), 0.0)
    assert tasks["T4"] == (pytest.approx(0.05), 0.0)
    assert table.between_s == pytest.approx(10 * WAKE_S)
    assert table.no_work_s == 0
    assert table.idle_share == pytest.approx(1 - 0.2 / table.wall_s)


def test_depth_2_exposes_nothing_while_the_host_is_faster_than_the_device() -> None:
    table = play(depth=2, device_s=[0.02] * 11)
    tasks = by_name(table)
    for name, seconds in (("T1", PLAN_S), ("T2", DISPATCH_S), ("T5", COMMIT_S + DELIVER_S)):
        assert tasks[name] == (pytest.approx(10 * seconds), pytest.approx(0.0, abs=1e-12))
    assert table.wall_s == pytest.approx(0.2)
    assert table.idle_share == pytest.approx(0.0, abs=1e-9)


def test_depth_2_exposes_what_the_host_takes_longer_than_the_device() -> None:
    host_s = PLAN_S + DISPATCH_S + WAKE_S + COMMIT_S + DELIVER_S
    table = play(depth=2, device_s=[0.006] * 101)
    assert table.exposed_s == pytest.approx(100 * (host_s - 0.006), rel=0.02)


def test_time_without_work_is_not_exposed() -> None:
    busy = play(depth=2, device_s=[0.02] * 11)
    paused = play(depth=2, device_s=[0.02] * 11, pauses_s={4: 7.0})
    assert paused.no_work_s == pytest.approx(7.0 + DELIVER_S)
    assert paused.wall_s - paused.no_work_s > busy.wall_s  # the pipeline is filled anew
    assert paused.exposed_s == pytest.approx(WAKE_S + COMMIT_S + PLAN_S + DISPATCH_S)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    depth=st.integers(1, 4),
    device_s=st.lists(st.floats(0, 0.05), min_size=2, max_size=30),
    pauses_s=st.dictionaries(st.integers(0, 30), st.floats(0, 1), max_size=3),
    sample_s=st.floats(0, 0.02),
    wait_s=st.floats(0, 0.02),
)
def test_busy_exposed_and_idle_add_up_to_the_wall_time(depth, device_s, pauses_s, sample_s, wait_s) -> None:
    table = play(depth=depth, device_s=device_s, pauses_s=pauses_s, sample_s=sample_s, copy_wait_s=wait_s)
    assert table.steps == len(device_s) - 1
    parts = table.device_busy_s + table.no_work_s + table.between_s + sum(t.exposed_s for t in table.tasks)
    assert parts == pytest.approx(table.wall_s)
    assert table.between_s >= -1e-9
    for task in (*table.tasks, table.copies):
        assert -1e-9 <= task.exposed_s <= task.total_s + 1e-9
    device = [task.total_s for task in table.tasks if task.on_device]
    assert sum(device) + table.copies.exposed_s == pytest.approx(table.device_busy_s)


def test_what_a_step_waits_for_copies_is_exposed_and_none_of_its_forward_pass() -> None:
    table = play(depth=2, device_s=[0.02] * 11, sample_s=0.005, copy_wait_s=0.004)
    tasks = by_name(table)
    assert (table.copies.total_s, table.copies.exposed_s) == (pytest.approx(0.12), pytest.approx(0.04))
    assert (tasks["T3"][0], tasks["T4"][0]) == (pytest.approx(0.11), pytest.approx(0.05))
    (line,) = [line for line in render(table).splitlines() if line.startswith("copies")]
    assert line.split()[-2:] == ["12000.0", "4000.0"]
    assert "copies" not in render(play(depth=2, device_s=[0.02] * 11))


def test_a_device_that_ends_before_its_dispatch_returns_is_never_busy() -> None:
    clock = ManualClock()
    timeline = Timeline(clock=clock)
    for _ in range(5):
        plan_s, dispatch_s = clock.spend(PLAN_S), clock.spend(DISPATCH_S)
        finished_s = dispatch_s
        stamps = StepStamps(plan_s, dispatch_s, clock(), False)
        commit_s = clock.spend(COMMIT_S)
        sampled = SampledTokens(ids=None, finished_s=finished_s)
        timeline.record(stamps, sampled, commit_s=commit_s)
    table = timeline.table()
    assert table.device_busy_s == 0
    assert table.exposed_s == pytest.approx(table.wall_s)


def test_only_the_latest_steps_are_kept_and_clear_forgets_them() -> None:
    timeline = Timeline(capacity=4, clock=ManualClock())
    assert timeline.table().steps == 0
    for moment in range(10):
        stamps = StepStamps(moment, moment, moment, False)
        sampled = SampledTokens(ids=None, finished_s=moment + 0.5)
        timeline.record(stamps, sampled, commit_s=moment + 0.5)
        timeline.record_delivery(moment + 0.5, moment + 0.6)
    assert timeline.table().steps == 3
    assert timeline.table().wall_s == pytest.approx(3.0)
    timeline.clear()
    assert timeline.table().wall_s == 0


def test_totals_by_route_are_of_all_steps_since_the_start() -> None:
    timeline = Timeline(capacity=2, clock=ManualClock())
    for route, wire_bytes in (("greedy", 10), ("", 0), ("candidates", 500), ("greedy", 20), ("greedy", 0)):
        sampled = SampledTokens(ids=None, finished_s=0.0, route=route, wire_bytes=wire_bytes)
        timeline.record(StepStamps(0.0, 0.0, 0.0, False), sampled, commit_s=0.0)
    expected = {
        "greedy": RouteTotals(steps=3, wire_bytes=30),
        "candidates": RouteTotals(steps=1, wire_bytes=500),
    }
    assert timeline.routes() == expected
    timeline.clear()
    assert timeline.routes() == expected


def test_the_text_shows_each_task_and_what_of_it_was_exposed() -> None:
    lines = render(play(depth=1, device_s=[0.02] * 11, sample_s=0.005)).splitlines()
    cells = {line[:2]: line.split()[-2:] for line in lines if line.startswith("T")}
    assert cells["T1"] == ["4000.0", "4000.0"]
    assert cells["T5"] == ["3000.0", "3000.0"]
    assert next(line for line in lines if line.startswith("T3")).split()[-3:] == ["15000.0", "on", "device"]
    assert lines[-1].startswith("10 steps in 0.305 s: device busy 0.200 s")
    assert "0 steps" in render(Timeline().table())
