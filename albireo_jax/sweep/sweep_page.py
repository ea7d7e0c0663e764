"""The page of a sweep: plots like the paper's, tables, and the data behind each number."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from albireo_jax.measure.figures import COLORS, BarSegment, Line, Mark, line_figure, stacked_bars, svg
from albireo_jax.measure.html_page import Section, render_page
from albireo_jax.sweep.results import Spread, Summary, Sweep, VariantFigures
from albireo_jax.sweep.sweep_run import write_whole
from albireo_jax.sweep.sweep_settings import Variant
from albireo_jax.sweep.sweep_tables import (
    device_text,
    energy_table,
    energy_text,
    gain_table,
    latency_table,
    memory_table,
    rule_text,
    step_table,
    throughput_table,
)

_DEGREE = "tensor-parallel degree t"


def sweep_page(summary: Summary, data: Mapping[str, object]) -> str:
    """The page as text; `data` is the content of sweep.json, which holds the summary."""
    kind = "virtual GPUs" if summary.device.virtual_devices else "GPUs"
    return render_page(
        f"{summary.model} on {summary.gpus} {kind}: which tensor-parallel degree serves most",
        sections(summary),
        data=data,
        lead=_lead(summary),
    )


def write_report(sweep: Sweep, folder: Path) -> Path:
    """Write sweep.json and sweep.html; gives the path of the page."""
    summary = sweep.summary()
    data = {"summary": asdict(summary), "cases": [result.to_json() for result in sweep.results]}
    write_whole(folder / "sweep.json", json.dumps(data, indent=1) + "\n")
    page = folder / "sweep.html"
    write_whole(page, sweep_page(summary, data))
    return page


def sections(summary: Summary) -> list[Section]:
    """The sections of the page, in its order."""
    found: list[Section] = []
    if summary.figures:
        found += [
            _throughput(summary),
            Section(
                title="What each step of the ablation gains",
                text="Tokens per second per GPU of the three variants, and ratios to the synchronous one in "
                "the same repeat. At t = 1 the last two variants sample with the same program: what differs "
                "between them there is noise.",
                table=gain_table(summary),
            ),
            _latency(summary),
            _steps(summary),
            Section(
                title="Key/value memory",
                text="Waiting is per request, in the engine, by what kept it out of the step: no free row, "
                "or too few free pages.",
                table=memory_table(summary),
                figures=[svg(_memory_figure(summary))],
            ),
            Section(
                title="Energy",
                text=energy_text(summary),
                table=energy_table(summary),
                figures=_energy_figures(summary),
            ),
        ]
    if summary.failures:
        errors = "\n\n".join(f"{name}: {error}" for name, error in summary.failures.items())
        found.append(Section(title="Cases that failed", text=errors))
    return found


def _throughput(summary: Summary) -> Section:
    table = throughput_table(summary)
    degrees = dict.fromkeys(one.tp for one in summary.figures)
    best = [row for row, tp in enumerate(degrees) if tp in summary.t_e.values()]
    return Section(
        title="Throughput of the cluster",
        text=f"{rule_text(summary)}\n\nPoints are medians over the repeats, bars their range. In short the "
        f"variants are called {', '.join(variant.short for variant in Variant)}.",
        table=replace(table, marked=best),
        figures=[svg(_throughput_figure(summary)), svg(_per_gpu_figure(summary))],
    )


def _latency(summary: Summary) -> Section:
    figure = _over_degrees(
        summary,
        lambda one: _ms(one.tpot_p50_s),
        y_label="ms per output token, p50",
        title="Time per output token",
    )
    return Section(
        title="Latency",
        text="Time to the first token (TTFT) and per output token after it (TPOT), over all requests of a "
        "repeat; medians of the repeats.",
        table=latency_table(summary),
        figures=[svg(figure)],
    )


def _steps(summary: Summary) -> Section:
    return Section(
        title="Where the time of a step goes",
        text="T1 schedule, T2 prepare inputs, T3 forward, T4 sample, T5 process outputs. Of the host's tasks "
        "(T1, T2, T5) only what is exposed delays a step: the device has nothing to do meanwhile. The table "
        "has both, spent / exposed, in microseconds per step.",
        table=step_table(summary),
        figures=[svg(_step_figure(summary)), svg(_idle_figure(summary))],
    )


def _lead(summary: Summary) -> str:
    settings = "; ".join(f"{name}: {value}" for name, value in summary.settings.items())
    return (
        f"Measured on {device_text(summary)}.\n\nLoad: {summary.load}, dealt to the replicas in turn; "
        f"{summary.dtype}; {settings}. The machine's load before: {summary.load_before:.2f}.\n\n"
        "Every number here is in this page's source as JSON, under the id data, with the samples of all "
        "repeats."
    )


def _lines(summary: Summary, value: Callable[[VariantFigures], Spread | None]) -> list[Line]:
    lines: list[Line] = []
    for variant in Variant:
        points = [(one.tp, value(one)) for one in summary.figures if one.variant is variant]
        if points:
            spreads = [spread for _, spread in points]
            lines.append(
                Line(
                    name=variant.value.replace(" + ", "\n+ "),
                    x=[tp for tp, _ in points],
                    y=[spread.median if spread else None for spread in spreads],
                    low=[spread.low if spread else None for spread in spreads],
                    high=[spread.high if spread else None for spread in spreads],
                )
            )
    return lines


def _over_degrees(
    summary: Summary, value: Callable[[VariantFigures], Spread | None], *, y_label: str, title: str
) -> Figure:
    return line_figure(
        _lines(summary, value),
        x_label=f"{_DEGREE}\n({summary.how})",
        y_label=y_label,
        title=title,
        log2_x=True,
    )


def _throughput_figure(summary: Summary) -> Figure:
    lines = _lines(summary, lambda one: one.output_tokens_per_s)
    top = max(one.output_tokens_per_s.high for one in summary.figures)
    if summary.rule_tp is not None:
        rule = Line(
            name=f"4M/C = {summary.rule_value:.2g},\nrounded up",
            x=[summary.rule_tp, summary.rule_tp],
            y=[0, top],
            reference=True,
        )
        lines.append(rule)
    return line_figure(
        lines,
        x_label=f"{_DEGREE}\n({summary.how})",
        y_label="output tokens/s",
        title="Throughput of the cluster",
        log2_x=True,
        marks=_best_marks(summary),
    )


def _best_marks(summary: Summary) -> list[Mark]:
    """A ring around each t_e; those of one degree have one label, at the highest."""
    marks: list[Mark] = []
    for tp in sorted(set(summary.t_e.values())):
        best = [one for one in summary.figures if one.tp == tp and summary.t_e[one.variant.value] == tp]
        best.sort(key=lambda one: one.output_tokens_per_s.median)
        names = "" if len(best) == len(summary.t_e) else ", ".join(one.variant.short for one in best)
        label = f"t_e {names}".strip()
        marks += [
            Mark(x=tp, y=one.output_tokens_per_s.median, label=label if one is best[-1] else "")
            for one in best
        ]
    return marks


def _per_gpu_figure(summary: Summary) -> Figure:
    def per_gpu(one: VariantFigures) -> Spread:
        spread = one.output_tokens_per_s
        return Spread(
            median=one.per_gpu_tokens_per_s, low=spread.low / summary.gpus, high=spread.high / summary.gpus
        )

    return _over_degrees(summary, per_gpu, y_label="output tokens/s per GPU", title="Throughput per GPU")


def _step_figure(summary: Summary) -> Figure:
    def milliseconds(value: Callable[[VariantFigures], float]) -> list[float]:
        return [value(one) * 1e3 for one in summary.figures]

    def task(name: str, one: VariantFigures) -> float:
        device = name.startswith(("T3", "T4"))
        return one.spent_s[name] if device else one.exposed_s[name]

    order = sorted(summary.figures[0].spent_s, key=lambda name: not name.startswith(("T3", "T4")))
    parts = [
        BarSegment(
            name=name if name.startswith(("T3", "T4")) else f"{name},\nexposed",
            values=milliseconds(partial(task, name)),
            color=color,
            hatched=not name.startswith(("T3", "T4")),
        )
        for name, color in zip(order, COLORS, strict=False)
    ]
    parts.append(
        BarSegment(name="between tasks", values=milliseconds(lambda one: one.between_s), color=COLORS[-1])
    )
    return stacked_bars(
        [f"{one.variant.short}\nt={one.tp}" for one in summary.figures],
        parts,
        y_label="ms per step",
        x_label=f"({summary.how})",
        title="A step",
    )


def _idle_figure(summary: Summary) -> Figure:
    return _over_degrees(
        summary,
        lambda one: _exactly(100 * one.idle_share),
        y_label="% of the time with work",
        title="Device idle",
    )


def _memory_figure(summary: Summary) -> Figure:
    return _over_degrees(
        summary,
        lambda one: Spread(
            median=100 * one.kv_mean_share, low=100 * one.kv_mean_share, high=100 * one.kv_peak_share
        ),
        y_label="% of the pages: mean, bar to the peak",
        title="Key/value pages in use",
    )


def _energy_figures(summary: Summary) -> list[str]:
    if all(one.energy_j_per_token is None for one in summary.figures):
        return []
    figure = _over_degrees(
        summary,
        lambda one: None if one.energy_j_per_token is None else _exactly(one.energy_j_per_token),
        y_label="J per output token",
        title="Energy",
    )
    return [svg(figure)]


def _ms(spread: Spread | None) -> Spread | None:
    if spread is None:
        return None
    return Spread(median=spread.median * 1e3, low=spread.low * 1e3, high=spread.high * 1e3)


def _exactly(value: float) -> Spread:
    return Spread(median=value, low=value, high=value)
