"""What overlap and sharded sampling gain over the synchronous engine, by how many requests run at once.

The paper's Figure 12, on this engine: at one tensor-parallel degree, 1 to 128 requests at once, served by the
three variants in turn within one process. Writes a record, and its plot beside it.

    python benchmarks/studies/load_study.py                      virtual devices: t of them share its cores
    python benchmarks/studies/load_study.py --real --tp 4        on the GPUs of this machine
    python benchmarks/studies/load_study.py --small              a quick try
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from albireo_jax.launch import Prepared, prepare_random
from albireo_jax.measure.figures import Line, line_figure, svg_file
from albireo_jax.measure.loads import FixedBatch, cluster_arrivals, sampled_requests
from albireo_jax.measure.records import Device, Record, Series, cpu_device, write_record
from albireo_jax.sweep.devices import gpu_device, gpus_here
from albireo_jax.sweep.results import ReplicaRun
from albireo_jax.sweep.sweep_settings import Variant
from albireo_jax.sweep.variant_engines import VariantEngines
from benchmarks.lib.study_shapes import MID_LLAMA, TINY_LLAMA

ROOT = Path(__file__).resolve().parents[2]
PAGE_SIZE = 16
SHARED_CORES = (
    "Virtual devices: {tp} of them share {cores} cores. They compute in the threads that the host needs for "
    "its own tasks, so that overlap gains less than beside GPUs, and a forward pass takes longer."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One repeat of a variant with so many requests at once."""

    concurrency: int
    variant: Variant
    repeat: int
    measured: ReplicaRun

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second."""
        return self.measured.num_tokens / self.measured.seconds


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128], metavar="N"
    )
    parser.add_argument("--config", type=Path, help="config.json of another shape for the random weights")
    parser.add_argument("--input-len", type=int, default=16)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--real", action="store_true", help="real devices instead of virtual ones")
    parser.add_argument("--small", action="store_true", help="a tiny model, few tokens and requests")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if options.output_len < 2:
        parser.error(
            f"--output-len must be at least 2 to time a token after the first, got {options.output_len}"
        )
    if options.small:
        options.concurrency, options.output_len, options.repeats = [1, 2, 4], 8, 2
    return options


def model_of(options: argparse.Namespace) -> ModelConfig:
    """The shape that the random weights have."""
    if options.config is not None:
        return model_config_from_hf(json.loads(options.config.read_text()))
    return TINY_LLAMA if options.small else MID_LLAMA


def launched(options: argparse.Namespace, model: ModelConfig) -> VariantEngines:
    """Engines for as many rows as ever run at once, with pages for all of them."""
    rows = max(options.concurrency)
    length = options.input_len + options.output_len

    def prepared(sampling: SamplingMode) -> Prepared:
        config = EngineConfig(
            model="random",
            max_model_len=length,
            max_logprobs=0,
            sampling=sampling,
            parallel=ParallelConfig(tp=options.tp, virtual_devices=0 if options.real else options.tp),
            cache=CacheConfig(page_size=PAGE_SIZE, num_pages=rows * (-(-length // PAGE_SIZE) + 1)),
            scheduler=SchedulerConfig(max_rows=rows, max_step_tokens=max(rows, 256)),
        )
        return prepare_random(config, model, measure_sampling=True)

    return VariantEngines(tuple(Variant), prepared, tp=options.tp)


def measure(engines: VariantEngines, options: argparse.Namespace) -> list[Run]:
    """All runs but the first round of each concurrency, which warms up; another variant begins each round."""
    runs: list[Run] = []
    for concurrency in options.concurrency:
        load = FixedBatch(per_gpu=concurrency, input_len=options.input_len, output_len=options.output_len)
        arrivals = cluster_arrivals(load, gpus=1, seed=0)
        for repeat in range(-1, options.repeats):
            requests = sampled_requests(
                arrivals,
                vocab_size=engines.sizes.vocab_size,
                seed=repeat + 1,
                temperature=options.temperature,
                top_p=options.top_p,
            )
            first = repeat % len(Variant)
            for variant in (*tuple(Variant)[first:], *tuple(Variant)[:first]):
                run = Run(
                    concurrency=concurrency,
                    variant=variant,
                    repeat=repeat,
                    measured=engines.run(variant, requests),
                )
                if repeat >= 0:
                    runs.append(run)
        print(f"{concurrency} at once: measured", file=sys.stderr)
    return runs


def rates(runs: Sequence[Run], concurrency: int, variant: Variant) -> list[float]:
    """Tokens per second of each repeat."""
    return [run.tokens_per_s for run in runs if (run.concurrency, run.variant) == (concurrency, variant)]


def gains(runs: Sequence[Run], concurrency: int, variant: Variant) -> list[float]:
    """Throughput over the synchronous engine's, of each repeat."""
    pairs = zip(rates(runs, concurrency, variant), rates(runs, concurrency, Variant.SYNCHRONOUS), strict=True)
    return [rate / synchronous for rate, synchronous in pairs]


def text_table(runs: Sequence[Run], options: argparse.Namespace) -> str:
    """Median tokens per second of each variant, and the gains."""
    heads = [
        *(f"{variant.short} tokens/s" for variant in Variant),
        *(f"gain {variant.short}" for variant in tuple(Variant)[1:]),
    ]
    lines = [f"{'at once':<8}" + "".join(f"{head:>26}" for head in heads)]
    for concurrency in options.concurrency:
        cells = [f"{statistics.median(rates(runs, concurrency, variant)):,.1f}" for variant in Variant]
        for variant in tuple(Variant)[1:]:
            found = gains(runs, concurrency, variant)
            cells.append(f"{statistics.median(found):.2f} ({min(found):.2f} … {max(found):.2f})")
        lines.append(f"{concurrency:<8}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def series_of(runs: Sequence[Run], options: argparse.Namespace) -> list[Series]:
    """Every repeat's figures, by variant and concurrency."""
    samples: dict[tuple[Variant, int, str, str], list[float]] = {}
    for run in runs:
        table = run.measured.table
        figures = [
            ("output", "tokens/s", run.tokens_per_s),
            ("time per output token p50", "s", statistics.median(run.measured.tpot_s)),
            ("device idle share", "1", table.idle_share),
            *((f"{task.name} spent per step", "s", task.total_s / table.steps) for task in table.tasks),
        ]
        for metric, unit, value in figures:
            samples.setdefault((run.variant, run.concurrency, metric, unit), []).append(value)
    for concurrency in options.concurrency:
        for variant in tuple(Variant)[1:]:
            key = (variant, concurrency, "gain over synchronous", "1")
            samples[key] = gains(runs, concurrency, variant)
    return [
        Series(
            subject=variant.value,
            case=f"{concurrency} at once",
            metric=metric,
            unit=unit,
            samples=tuple(values),
        )
        for (variant, concurrency, metric, unit), values in samples.items()
    ]


def plot(runs: Sequence[Run], options: argparse.Namespace, device: Device) -> str:
    """The gains as an SVG file, medians and the range of the repeats."""
    lines = []
    for variant in tuple(Variant)[1:]:
        found = [gains(runs, concurrency, variant) for concurrency in options.concurrency]
        lines.append(
            Line(
                name=variant.value.replace(" + ", "\n+ "),
                x=options.concurrency,
                y=[statistics.median(values) for values in found],
                low=[min(values) for values in found],
                high=[max(values) for values in found],
            )
        )
    ends = [min(options.concurrency), max(options.concurrency)]
    lines.append(Line(name="synchronous", x=ends, y=[1.0, 1.0], reference=True))
    shared = f"\n({options.tp} virtual devices share {device.count} cores)" if device.virtual_devices else ""
    figure = line_figure(
        lines,
        x_label=f"requests at once{shared}",
        y_label="throughput over synchronous",
        title=f"Gain by load at t = {options.tp}",
        log2_x=True,
    )
    return svg_file(figure)


def main() -> None:
    options = arguments()
    model = model_of(options)
    model.check_tp(options.tp)
    here = gpus_here()[: options.tp]
    if options.real and len(here) < options.tp:
        raise SystemExit(f"--real needs {options.tp} GPUs, this machine has {len(here)}")
    device = gpu_device(here) if options.real else cpu_device(virtual_devices=options.tp)
    load = os.getloadavg()[0]
    runs = measure(launched(options, model), options)
    note = SHARED_CORES.format(tp=options.tp, cores=device.count) if device.virtual_devices else ""
    print(text_table(runs, options), note, sep="\n\n")
    record = Record(
        name=f"load-tp{options.tp}",
        device=device,
        settings={
            "model": asdict(model),
            "tp": options.tp,
            "concurrency": options.concurrency,
            "input_len": options.input_len,
            "output_len": options.output_len,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "repeats": options.repeats,
        },
        series=series_of(runs, options),
        note=note,
        load_before=load,
    )
    path = write_record(record, options.output)
    path.with_suffix(".svg").write_text(plot(runs, options, device), encoding="utf-8")
    print(path, path.with_suffix(".svg"), sep="\n")


if __name__ == "__main__":
    main()
