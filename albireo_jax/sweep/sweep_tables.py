"""The figures of a sweep as cells of text: for the terminal, the page and the record.

Every row ends with how its figures came about, so that none of them can be read without it: in full where
they are the cluster's, and elsewhere as the replicas that were measured.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from albireo_jax.measure.html_page import Table
from albireo_jax.measure.records import Record, Series, series_by_metric, write_record
from albireo_jax.sweep.results import ClusterRun, Summary, Sweep, VariantFigures
from albireo_jax.sweep.sweep_settings import Variant

T_E = "◀\N{NO-BREAK SPACE}t_e"
"""Stands beside the best degree of a variant."""

_HOW = "how measured"
_REPLICAS = "replicas measured"
_NOTHING = "-"
_MIN_WIDTH = 150


def throughput_table(summary: Summary) -> Table:
    """Tokens per second of the cluster, medians with the spread of the repeats; a row per degree."""

    def cell(one: VariantFigures) -> str:
        mark = f" {T_E}" if summary.t_e[one.variant.value] == one.tp else ""
        spread = one.output_tokens_per_s
        return f"{_number(spread.median)} {_whole(f'({_number(spread.low)} … {_number(spread.high)})')}{mark}"

    rows = [
        (f"{tp}", *(cell(one) if one else _NOTHING for one in ones), _how(ones))
        for tp, ones in _by_degree(summary)
    ]
    return Table(header=("t", *(variant.value for variant in Variant), _HOW), rows=rows)


def gain_table(summary: Summary) -> Table:
    """Tokens per second per GPU of each variant, and gains over the first; a row per degree."""

    def gain(one: VariantFigures | None) -> str:
        if one is None or one.gain is None:
            return _NOTHING
        spread = _whole(f"({one.gain.low:.2f} … {one.gain.high:.2f})")
        return f"{one.gain.median:.2f}x {spread}"

    rows = [
        (
            f"{tp}",
            _whole(" / ".join(_number(one.per_gpu_tokens_per_s) if one else _NOTHING for one in ones)),
            *(gain(one) for one in ones[1:]),
            _how(ones),
        )
        for tp, ones in _by_degree(summary)
    ]
    gains = [f"gain: {variant.value}" for variant in Variant][1:]
    return Table(header=("t", "tokens/s per GPU", *gains, _HOW), rows=rows)


def latency_table(summary: Summary) -> Table:
    """Milliseconds to the first token and per output token, and the idle share of the device."""
    rows = [
        (
            f"{one.tp} {one.variant.short}",
            _ms(one.ttft_p50_s),
            _ms(one.ttft_p99_s),
            _ms(one.tpot_p50_s.median if one.tpot_p50_s else None),
            _ms(one.tpot_p99_s),
            f"{one.idle_share:.1%}",
            _whole(one.replicas),
        )
        for one in summary.figures
    ]
    header = ("t and variant", "TTFT p50, ms", "p99", "TPOT p50, ms", "p99", "device idle", _REPLICAS)
    return Table(header=header, rows=rows)


def step_table(summary: Summary) -> Table:
    """Microseconds per step of each task, spent and (for the host's) exposed."""
    names = list(summary.figures[0].spent_s) if summary.figures else []

    def cell(one: VariantFigures, name: str) -> str:
        spent = f"{one.spent_s[name] * 1e6:,.0f}"
        if name.startswith(("T3", "T4")):
            return spent
        return _whole(f"{spent} / {one.exposed_s[name] * 1e6:,.0f}")

    rows = [
        (
            f"{one.tp} {one.variant.short}",
            *(cell(one, name) for name in names),
            f"{one.between_s * 1e6:,.0f}",
            f"{one.step_s * 1e6:,.0f}",
            _whole(one.replicas),
        )
        for one in summary.figures
    ]
    header = ("t and variant", *(name.split()[0] for name in names), "between", "step", _REPLICAS)
    return Table(header=header, rows=rows)


def memory_table(summary: Summary) -> Table:
    """Use of the KV pages of a replica, and what its requests waited for on average."""
    rows = [
        (
            f"{one.tp} {one.variant.short}",
            f"{one.num_pages:,}",
            f"{one.kv_peak_share:.1%}",
            f"{one.kv_mean_share:.1%}",
            f"{one.preemptions:g}",
            _ms(one.waited_for_pages_s),
            _ms(one.waited_for_rows_s),
            _whole(one.replicas),
        )
        for one in summary.figures
    ]
    header = (
        "t and variant",
        "pages",
        "peak use",
        "mean use",
        "preemptions",
        "waited for pages, ms",
        "for rows, ms",
        _REPLICAS,
    )
    return Table(header=header, rows=rows)


def energy_table(summary: Summary) -> Table | None:
    """Joules per output token; None if nothing measured any."""
    if all(one.energy_j_per_token is None for one in summary.figures):
        return None
    rows = [
        (
            f"{one.tp} {one.variant.short}",
            one.energy_reason if one.energy_j_per_token is None else f"{one.energy_j_per_token:.3g}",
            _whole(one.replicas),
        )
        for one in summary.figures
    ]
    return Table(header=("t and variant", "J per output token", _REPLICAS), rows=rows)


def energy_text(summary: Summary) -> str:
    """Why energy is not known, empty where it is."""
    reasons = dict.fromkeys(one.energy_reason for one in summary.figures if one.energy_j_per_token is None)
    return f"Not measured: {'; '.join(reasons)}." if reasons else ""


def rule_text(summary: Summary) -> str:
    """t_e as measured beside the rule of thumb."""
    measured = "; ".join(f"{variant} {tp}" for variant, tp in summary.t_e.items()) or "not measured"
    weights = f"M = {summary.weight_bytes / 2**30:.3g} GiB of weights"
    if summary.rule_value is None:
        rule = f"4M/C is not known: {weights}, but no memory C per GPU was given"
    else:
        memory = f"C = {(summary.gpu_memory_bytes or 0) / 2**30:.3g} GiB per GPU"
        rule = f"4M/C = {summary.rule_value:.3g}, rounded up {summary.rule_tp} ({weights}, {memory})"
    timed = (
        ""
        if summary.at_once
        else " Requests came at moments of their own, so throughput tells only which degrees kept up with "
        "them: compare the latencies."
    )
    return f"t_e measured: {measured}.{timed} Rule of thumb: {rule}."


def print_summary(summary: Summary) -> None:
    """The tables on standard output; as wide as the terminal, but not too narrow to be read."""
    console = Console(width=max(_MIN_WIDTH, Console().width), highlight=False)
    console.print(f"{summary.model} on {device_text(summary)}: {summary.load}")
    for title, table in (
        ("output tokens/s of the cluster: median (least … most)", throughput_table(summary)),
        (
            "output tokens/s per GPU of the three, and gain over synchronous in the same repeats",
            gain_table(summary),
        ),
        ("latency", latency_table(summary)),
        ("µs per step: spent / exposed", step_table(summary)),
        ("key/value memory of a replica", memory_table(summary)),
        ("energy", energy_table(summary)),
    ):
        if table is None:
            continue
        shown = RichTable(*table.header, title=title, title_justify="left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    if energy_text(summary):
        console.print(f"Energy. {energy_text(summary)}")
    console.print(rule_text(summary))
    for name, error in summary.failures.items():
        console.print(f"{name} failed: {error}", style="red", markup=False)


def device_text(summary: Summary) -> str:
    """The cluster: real GPUs, or what stood for them."""
    device = summary.device
    if device.virtual_devices:
        return (
            f"{summary.gpus} virtual GPUs ({device.count} cores of {device.name}; a virtual device is not a "
            "GPU, so degrees compare what the program does, not what GPUs would gain)"
        )
    return f"{summary.gpus} GPUs ({device.count} here, {device.name})"


def record_sweep(sweep: Sweep, folder: Path) -> Path:
    """Write the samples of all repeats as a record, and give its path."""
    summary = sweep.summary()
    record = Record(
        name=f"sweep-{summary.model}",
        device=sweep.device,
        settings={"gpus": summary.gpus, "load": summary.load, "dtype": summary.dtype, **summary.settings},
        series=[
            series
            for result in sweep.results
            for variant in result.case.variants
            for series in _series(
                variant,
                f"tp {result.case.tp} ({result.case.how})",
                [run for run in result.runs if run.variant is variant],
            )
        ],
        note=f"{rule_text(summary)} Failed: {', '.join(summary.failures) or 'none'}.",
        load_before=sweep.load_before,
    )
    return write_record(record, folder)


def _series(variant: Variant, case: str, runs: Sequence[ClusterRun]) -> list[Series]:
    columns: dict[tuple[str, str], list[float | None]] = {
        ("output of the cluster", "tokens/s"): [run.output_tokens_per_s for run in runs],
        ("time to first token p50", "s"): [run.ttft_p50_s for run in runs],
        ("time to first token p99", "s"): [run.ttft_p99_s for run in runs],
        ("time per output token p50", "s"): [run.tpot_p50_s for run in runs],
        ("time per output token p99", "s"): [run.tpot_p99_s for run in runs],
        ("device idle share", "1"): [run.table.idle_share for run in runs],
        ("KV pages in use, peak share", "1"): [run.kv.peak_pages / run.kv.num_pages for run in runs],
        ("preemptions", "1"): [run.kv.preemptions for run in runs],
        ("energy per output token", "J"): [run.energy_j_per_token for run in runs],
    }
    for task in runs[0].table.tasks:
        columns[f"{task.name} spent per step", "s"] = [run.task_s(task.name, exposed=False) for run in runs]
        if not task.on_device:
            columns[f"{task.name} exposed per step", "s"] = [
                run.task_s(task.name, exposed=True) for run in runs
            ]
    known = {
        metric: [sample for sample in samples if sample is not None] for metric, samples in columns.items()
    }
    complete = {metric: samples for metric, samples in known.items() if len(samples) == len(runs)}
    return series_by_metric(variant.value, case, complete)


def _by_degree(summary: Summary) -> list[tuple[int, list[VariantFigures | None]]]:
    """The figures of each degree, one per variant or None."""
    by_key = {(one.tp, one.variant): one for one in summary.figures}
    degrees = dict.fromkeys(one.tp for one in summary.figures)
    return [(tp, [by_key.get((tp, variant)) for variant in Variant]) for tp in degrees]


def _how(ones: Sequence[VariantFigures | None]) -> str:
    return next(one.how for one in ones if one is not None)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _whole(text: str) -> str:
    """Text that no line break divides."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _ms(seconds: float | None) -> str:
    return _NOTHING if seconds is None else f"{seconds * 1e3:.2f}"
