"""Where the time of a step goes at each tensor-parallel degree, synchronous, overlapped and sharded.

The paper's Table 1 and the breakdown of its Figure 3, on this engine: a random Llama at t = 1, 2, 4, 8, each
degree in a process of its own, the variants in turn. Writes a record, and its plot beside it.

    python benchmarks/studies/amdahl_study.py                  virtual devices: t of them share its cores
    python benchmarks/studies/amdahl_study.py --real           on the GPUs of this machine
    python benchmarks/studies/amdahl_study.py --small          a quick try
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from albireo_jax.core.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SamplingMode,
    SchedulerConfig,
)
from albireo_jax.core.hf_config import model_config_from_hf
from albireo_jax.measure.figures import stacked_bars, svg_file
from albireo_jax.measure.records import Device, Record, Series, write_record
from albireo_jax.report.amdahl import Report, amdahl, parts, read_report, to_json
from albireo_jax.report.report_load import ReportLoad
from albireo_jax.report.report_page import number, time_bars
from albireo_jax.sweep.sweep_settings import Variant
from benchmarks.lib.study_shapes import MID_LLAMA, TINY_LLAMA

ROOT = Path(__file__).resolve().parents[2]
SHORT = {Variant.SYNCHRONOUS: "sync", Variant.OVERLAPPED: "overlap", Variant.SHARDED: "+ shard"}
PAGE_SIZE = 16
SHARED_CORES = (
    "Virtual devices: t of them share {cores} cores. T3 does not shrink with t as it does on t GPUs, and "
    "collectives are threads that wait for each other, which is most of T4 when it is sharded. What of the "
    "host's work is exposed is what this shows."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A report of one repeat of a variant."""

    variant: Variant
    report: Report


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2, 4, 8], metavar="T")
    parser.add_argument("--config", type=Path, help="config.json of another shape for the random weights")
    parser.add_argument("--rows", type=int, default=16, help="requests at once, the same at every degree")
    parser.add_argument("--input-len", type=int, default=16)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--real", action="store_true", help="real devices instead of virtual ones")
    parser.add_argument("--small", action="store_true", help="a tiny model, few tokens, one repeat")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small:
        options.rows, options.input_len, options.output_len, options.repeats = 4, 8, 12, 1
    return options


def model_of(options: argparse.Namespace) -> ModelConfig:
    """The shape that the random weights have."""
    if options.config is not None:
        return model_config_from_hf(json.loads(options.config.read_text()))
    return TINY_LLAMA if options.small else MID_LLAMA


def variants_at(tp: int) -> list[Variant]:
    """All of them but sharded sampling on one device, which is the same as replicated."""
    return [variant for variant in Variant if tp > 1 or variant is not Variant.SHARDED]


def work(options: argparse.Namespace) -> None:
    """The runs of one degree: writes `REPEAT-VARIANT.json` into the output folder."""
    from albireo_jax.launch import prepare_random
    from albireo_jax.report.measured_run import run_report

    model, tp = model_of(options), options.worker
    length = options.input_len + options.output_len
    load = ReportLoad(requests=options.rows, input_len=options.input_len, output_len=options.output_len)

    def config(sampling: SamplingMode) -> EngineConfig:
        return EngineConfig(
            model="random",
            max_model_len=length,
            max_logprobs=0,
            sampling=sampling,
            parallel=ParallelConfig(tp=tp, virtual_devices=0 if options.real else tp),
            cache=CacheConfig(page_size=PAGE_SIZE, num_pages=options.rows * -(-length // PAGE_SIZE)),
            scheduler=SchedulerConfig(max_rows=options.rows, max_step_tokens=max(options.rows, 64)),
        )

    variants = variants_at(tp)
    engines = {
        sampling: prepare_random(config(sampling), model, measure_sampling=True)
        for sampling in dict.fromkeys(variant.sampling for variant in variants)
    }
    for repeat in range(options.repeats):
        for variant in variants:
            engine = engines[variant.sampling]
            scheduler = replace(engine.config.scheduler, depth=variant.depth)
            engine = replace(engine, config=replace(engine.config, scheduler=scheduler))
            run = run_report(engine, load, load.arrivals(), model="a random Llama")
            path = options.output / f"{repeat}-{variant.slug}.json"
            path.write_text(to_json(run.report), encoding="utf-8")


def measure(tp: int) -> list[Run]:
    """All runs at one degree, by a process with as many devices and this command's own flags."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(tp), "--output", folder]
        began_s = time.perf_counter()
        subprocess.run(command, check=True)
        print(f"t = {tp}: measured in {time.perf_counter() - began_s:.0f} s", file=sys.stderr)
        return [
            Run(variant=variant, report=read_report(path))
            for variant in variants_at(tp)
            for path in sorted(Path(folder).glob(f"*-{variant.slug}.json"))
        ]


def step_ms(report: Report) -> float:
    """Time with work per step."""
    return 1e3 * (report.table.wall_s - report.table.no_work_s) / report.table.steps


def typical(runs: Sequence[Run], tp: int, variant: Variant) -> Report:
    """The run whose steps took the median time."""
    found = [run.report for run in runs if run.variant is variant and run.report.subject.tp == tp]
    return sorted(found, key=step_ms)[len(found) // 2]


def text_table(runs: Sequence[Run], degrees: Sequence[int]) -> str:
    """Microseconds per step of each task, `spent (exposed)`, for the typical runs."""
    heads = ("T1", "T2", "T3", "T4", "T5", "between", "step", "P", "x 2t", "tokens/s", "gain")
    lines = [f"{'t, variant':<34}" + "".join(f"{head:>14}" for head in heads)]
    for tp in degrees:
        baseline = typical(runs, tp, Variant.SYNCHRONOUS).output_tokens_per_s
        for variant in variants_at(tp):
            report = typical(runs, tp, variant)
            table, law = report.table, amdahl(report.table)
            each = 1e6 / table.steps
            cells = [
                number(task.total_s * each)
                if task.on_device
                else f"{number(task.total_s * each)} ({number(task.exposed_s * each)})"
                for task in table.tasks
            ]
            cells += [number(max(table.between_s, 0.0) * each), number(1e3 * step_ms(report))]
            cells += [f"{law.scalable_share:.1%}", f"{law.at(2):.2f}", number(report.output_tokens_per_s)]
            cells.append(f"{report.output_tokens_per_s / baseline:.2f}")
            lines.append(f"{tp} {variant.value:<32}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def series_of(runs: Sequence[Run]) -> list[Series]:
    """Every repeat's figures, by variant and degree."""
    samples: dict[tuple[str, str, str, str], list[float]] = {}
    for run in runs:
        report, table = run.report, run.report.table
        law, each = amdahl(table), 1e6 / table.steps
        figures = [(f"{task.name} spent", "us per step", task.total_s * each) for task in table.tasks]
        figures += [
            (part.name, "us per step", part.seconds * each)
            for part in parts(table)
            if part.name.endswith("exposed")
        ]
        figures += [
            ("time with work", "us per step", 1e3 * step_ms(report)),
            ("scalable share", "1", law.scalable_share),
            ("predicted speed-up at 2t", "1", law.at(2)),
            ("predicted speed-up at 4t", "1", law.at(4)),
            ("predicted speed-up with nothing exposed", "1", law.hidden),
            ("output", "tokens/s", report.output_tokens_per_s),
        ]
        for metric, unit, value in figures:
            key = (run.variant.value, f"t = {report.subject.tp}", metric, unit)
            samples.setdefault(key, []).append(value)
    return [
        Series(subject=subject, case=case, metric=metric, unit=unit, samples=tuple(values))
        for (subject, case, metric, unit), values in samples.items()
    ]


def plot(runs: Sequence[Run], degrees: Sequence[int], device: Device) -> str:
    """The breakdown as an SVG file: a bar for each degree and variant."""
    cases = [(tp, variant) for tp in degrees for variant in variants_at(tp)]
    shared = f" (t virtual devices share {device.count} cores)" if device.virtual_devices else ""
    return svg_file(
        stacked_bars(
            [f"t={tp}\n{SHORT[variant]}" for tp, variant in cases],
            time_bars([typical(runs, tp, variant).table for tp, variant in cases]),
            y_label="time with work / ms per step",
            title=f"Time of a step{shared}",
        )
    )


def main() -> None:
    options = arguments()
    if options.worker:
        work(options)
        return
    model = model_of(options)
    for tp in options.degrees:
        model.check_tp(tp)
    load = os.getloadavg()[0]
    runs = [run for tp in options.degrees for run in measure(tp)]
    device = max((run.report.subject.device for run in runs), key=lambda device: device.virtual_devices)
    note = SHARED_CORES.format(cores=device.count) if device.virtual_devices else ""
    print(text_table(runs, options.degrees), note, sep="\n\n")
    record = Record(
        name="amdahl",
        device=device,
        settings={
            "model": asdict(model),
            "degrees": options.degrees,
            "load": runs[-1].report.load,
            "rows": options.rows,
            "repeats": options.repeats,
        },
        series=series_of(runs),
        note=note,
        load_before=load,
    )
    path = write_record(record, options.output)
    path.with_suffix(".svg").write_text(plot(runs, options.degrees, device), encoding="utf-8")
    print(path, path.with_suffix(".svg"), sep="\n")


if __name__ == "__main__":
    main()
