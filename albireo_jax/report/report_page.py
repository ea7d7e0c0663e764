"""The Amdahl report for its readers: on a terminal, and as a page with plots."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from matplotlib.figure import Figure

from albireo_jax.engine.timeline import TaskTable, render
from albireo_jax.measure.figures import (
    COLORS,
    BarSegment,
    Lane,
    LaneSegment,
    Line,
    lane_figure,
    line_figure,
    stacked_bars,
    svg,
)
from albireo_jax.measure.html_page import Section, Table, render_page
from albireo_jax.report.amdahl import Report, amdahl, content, parts, percentiles, to_json
from albireo_jax.report.perfetto_trace import DEVICE, EXPOSED, HOST, LaneSpan, trace_content

_TIMES = (1, 2, 4, 8)
_EXPOSED = ", exposed"
_ON_CPU = "\n\nOn a CPU, XLA may compute a small step within the call that dispatches it: that is then in T2."
_BLUE, _ORANGE, _GREEN, _PINK, _SKY, _RED, _GREY = COLORS
_TASK_COLORS = {"T1": _BLUE, "T2": _SKY, "T3": _GREEN, "T4": _ORANGE, "T5": _PINK, "co": _RED, "be": _GREY}
"""By the first two letters of a task's name."""


def terminal_text(report: Report) -> str:
    """The report as plain text."""
    law = amdahl(report.table)
    facts = [
        ("scalable share P: T3 of the time with work", f"{law.scalable_share:.1%}"),
        *(
            (
                f"predicted speed-up at {times} x the devices",
                f"{law.at(times):.2f}; with nothing exposed {law.hidden_at(times):.2f}",
            )
            for times in (2, 4)
        ),
        ("predicted speed-up with nothing exposed", f"{law.hidden:.2f}"),
        *_served_facts(report),
        *_other_facts(report),
    ]
    lines = [f"{name:<46}{value}" for name, value in facts]
    return "\n".join((_title(report), report.load, _machine(report), "", render(report.table), "", *lines))


def page(report: Report) -> str:
    """The report as one self-contained page, its JSON inside."""
    sections = [
        _time_section(report),
        _prediction_section(report),
        Section(
            title="A few steps of the run",
            text="From the middle of the run. Where the last lane is empty, the host's work is hidden.",
            figures=(svg(_lanes(report)),) if report.excerpt else (),
        ),
        Section(title="What requests got", table=_fact_table(_served_facts(report))),
        Section(title="Memory, work and energy", table=_fact_table(_other_facts(report))),
    ]
    shown = [section for section in sections if section.figures or section.table]
    lead = f"{report.load}\n\n{_machine(report)}"
    return render_page(_title(report), shown, data=content(report), lead=lead)


def write_report(report: Report, folder: Path, *, spans: Sequence[LaneSpan] = ()) -> list[Path]:
    """Write report.json, report.html and, if `spans` are given, trace.json; gives the paths.

    The folder is made where it is missing; earlier files of these names are replaced.
    """
    texts = {"report.json": to_json(report), "report.html": page(report)}
    if spans:
        texts["trace.json"] = json.dumps(trace_content(spans))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def time_bars(tables: Sequence[TaskTable]) -> list[BarSegment]:
    """For each table a bar of milliseconds per step: the device's tasks and what was exposed beside them."""
    columns = [parts(table) for table in tables]
    per_step_ms = [1e3 / table.steps for table in tables]
    bars = [
        BarSegment(
            name=same[0].name,
            values=[part.seconds * each for part, each in zip(same, per_step_ms, strict=True)],
            color=_TASK_COLORS[same[0].name[:2]],
        )
        for same in zip(*columns, strict=True)
    ]
    return _seen(bars)


def number(value: float) -> str:
    """A figure with three digits or all those before the point, thousands apart."""
    decimals = max(0, 2 - len(f"{abs(value):.0f}") + 1) if value else 0
    return f"{value:,.{decimals}f}"


def _title(report: Report) -> str:
    subject = report.subject
    overlap = "synchronous" if subject.depth == 1 else f"overlapped (depth {subject.depth})"
    sampling = f", {subject.sampling} sampling" if subject.tp > 1 else ""
    return f"Amdahl report of {subject.model}: t = {subject.tp}, {overlap}{sampling}"


def _machine(report: Report) -> str:
    subject, device = report.subject, report.subject.device
    date = f"{datetime.fromisoformat(subject.date):%Y-%m-%d %H:%M}"
    unit = "cores" if device.kind == "cpu" else "GPUs"
    machine = f"{device.name} ({device.count} {unit})"
    if device.virtual_devices:
        machine += f", standing for {device.virtual_devices} devices that share it: T3 does not shrink with t"
    return f"{machine}; {subject.dtype}, up to {subject.max_rows} rows; {subject.software}; {date} UTC"


def _time_section(report: Report) -> Section:
    table = report.table
    per_step_us = 1e6 / table.steps
    with_work_s = table.wall_s - table.no_work_s
    rows = [
        (
            task.name,
            number(per_step_us * task.total_s),
            "" if task.on_device else number(per_step_us * task.exposed_s),
            f"{(task.total_s if task.on_device else task.exposed_s) / with_work_s:.1%}",
        )
        for task in (*table.tasks, *((table.copies,) if table.copies.total_s else ()))
    ]
    for name, seconds in (("between tasks", max(table.between_s, 0.0)), ("time with work", with_work_s)):
        rows.append((name, "", number(per_step_us * seconds), f"{seconds / with_work_s:.1%}"))
    return Section(
        title="Where the time of a step goes",
        text=(
            f"{table.steps} steps in {table.wall_s:.2f} s. The device was busy for "
            f"{table.device_busy_s:.2f} s, idle although there was work for {table.exposed_s:.2f} s "
            f"({table.idle_share:.1%}), and without work for {table.no_work_s:.2f} s.\n\n"
            "What the host does is exposed where the device had nothing to do meanwhile. The last column is "
            "the part of the time with work that a task takes by itself: all of T3 and T4, of the others "
            "what is exposed. The second bar shows the same tasks one after the other, with nothing hidden."
            f"{_ON_CPU if report.subject.device.kind == 'cpu' else ''}"
        ),
        table=Table(header=("task", "spent, µs per step", "exposed, µs per step", "share"), rows=rows),
        figures=(svg(_time_figure(table)),),
    )


def _time_figure(table: TaskTable) -> Figure:
    per_step_ms = 1e3 / table.steps
    totals = {task.name: task.total_s for task in table.tasks}
    bars: list[BarSegment] = []
    for part in parts(table):
        name = part.name.removesuffix(_EXPOSED)
        shown_s = (part.seconds, totals.get(name, 0.0))
        values = [seconds * per_step_ms for seconds in shown_s]
        bars.append(BarSegment(name=name, values=values, color=_TASK_COLORS[name[:2]]))
    return stacked_bars(("as it ran", "one after the other"), _seen(bars), y_label="ms per step")


def _seen(bars: Sequence[BarSegment]) -> list[BarSegment]:
    """The bars that have a height anywhere."""
    return [bar for bar in bars if any(bar.values)]


def _prediction_section(report: Report) -> Section:
    law = amdahl(report.table)
    rows = [
        (
            f"{times} times ({report.subject.tp * times})",
            f"{law.at(times):.2f}",
            f"{law.hidden_at(times):.2f}",
        )
        for times in _TIMES
    ]
    return Section(
        title="What more devices would bring: a prediction",
        text=(
            f"T3 is {law.scalable_share:.1%} of the time with work: the share P that more devices divide. "
            f"By Amdahl's law, k times as many give 1 / ((1 - P) + P / k) times the steps per second, if T3 "
            f"shrinks as 1/k and all else stays. If nothing were exposed, only T4 would not shrink: the same "
            f"devices would give {law.hidden:.2f} times the steps, and P would be "
            f"{law.hidden_scalable_share:.1%}. Nothing of this was measured."
        ),
        table=Table(
            header=("devices (t)", "speed-up, exposed as it is", "speed-up, nothing exposed"), rows=rows
        ),
        figures=(svg(_prediction_figure(report)),),
    )


def _prediction_figure(report: Report) -> Figure:
    law, degrees = amdahl(report.table), [report.subject.tp * times for times in _TIMES]
    lines = [
        Line(name="nothing exposed", x=degrees, y=[law.hidden_at(times) for times in _TIMES]),
        Line(name="exposed as it is", x=degrees, y=[law.at(times) for times in _TIMES]),
        Line(name="in proportion", x=degrees, y=list(_TIMES), reference=True),
    ]
    return line_figure(lines, x_label="tensor-parallel degree t", y_label="predicted speed-up", log2_x=True)


def _lanes(report: Report) -> Figure:
    began_s = min(span.begin_s for span in report.excerpt)
    lanes = [
        Lane(
            name=lane,
            spans=[
                LaneSegment(
                    begin=1e3 * (span.begin_s - began_s),
                    end=1e3 * (span.end_s - began_s),
                    kind=span.name,
                    color=_TASK_COLORS.get(span.name[:2], f"{_GREY}66"),
                )
                for span in report.excerpt
                if span.lane == lane and not span.name.startswith("step")
            ],
        )
        for lane in (HOST, DEVICE, EXPOSED)
    ]
    return lane_figure(lanes, x_label="time / ms")


def _served_facts(report: Report) -> list[tuple[str, str]]:
    facts = [
        ("requests", f"{len(report.requests)}"),
        ("tokens in and out", f"{report.prompt_tokens:,} and {report.output_tokens:,}"),
        ("output tokens per second", number(report.output_tokens_per_s)),
    ]
    for name, values in (("first token", report.ttft_s), ("output token after it", report.tpot_s)):
        shares = percentiles(values)
        if shares:
            text = ", ".join(f"{share} {number(1e3 * seconds)}" for share, seconds in shares.items())
            facts.append((f"time to {name}, ms" if name == "first token" else f"time per {name}, ms", text))
    return facts


def _other_facts(report: Report) -> list[tuple[str, str]]:
    kv, work = report.kv, report.work
    facts = [
        (
            "KV pages in use, of all",
            f"peak {kv.peak_pages:,} ({kv.peak_pages / kv.num_pages:.0%}), mean {number(kv.mean_pages)} "
            f"({kv.mean_pages / kv.num_pages:.0%}) of {kv.num_pages:,}",
        ),
        ("preemptions", f"{kv.preemptions}"),
        ("waiting for pages, of all requests", f"{number(kv.waited_for_pages_s)} s"),
        (
            "tokens computed in vain",
            f"{work.wasted:,} of {work.computed:,} ({work.wasted / work.computed:.2%}): "
            f"{work.dropped:,} behind an end, {work.recomputed:,} again",
        ),
    ]
    if report.joules_per_token is None or report.joules_per_request is None:
        return [*facts, ("energy", f"not known: {report.energy.reason}")]
    return [
        *facts,
        ("energy per output token, J", number(report.joules_per_token)),
        ("energy per request, J", number(report.joules_per_request)),
    ]


def _fact_table(facts: Sequence[tuple[str, str]]) -> Table:
    return Table(header=("", ""), rows=facts)
