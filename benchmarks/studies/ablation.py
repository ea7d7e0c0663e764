"""Gains of overlap and sharded sampling over the synchronous engine, and the time of a step by task.

The paper's Table 1 and Figure 3 with one number of requests at several tensor-parallel degrees, its Figure 12
with several numbers at one degree. A random Llama, each degree in a process of its own, the variants in turn.
Writes a record, and plots beside it.

    python -m benchmarks.studies.ablation --degrees 1 2 4 8 --rows 16       virtual devices share the cores
    python -m benchmarks.studies.ablation --degrees 2 --rows 1 2 4 8 16 32 64 128
    python -m benchmarks.studies.ablation --real --degrees 4                on the GPUs of this machine
    python -m benchmarks.studies.ablation --small                           a quick try
"""

import json
import statistics
import subprocess
import sys
import tempfile
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from albireo_jax.core.config import (
    CacheConfig,
    EngineConfig,
    ParallelConfig,
    SamplingMode,
    SchedulerConfig,
)
from albireo_jax.core.dataclass_json import dataclass_from_json
from albireo_jax.core.hf_config import model_config_from_hf
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.measure.figures import Line, line_figure, stacked_bars, svg_file
from albireo_jax.measure.loads import FixedBatch, cluster_arrivals, sampled_requests
from albireo_jax.measure.records import Device, SampleTable, Series, cpu_device
from albireo_jax.report.amdahl import amdahl, parts
from albireo_jax.report.report_page import number, time_bars
from albireo_jax.sweep.devices import gpu_device, gpus_here
from albireo_jax.sweep.results import ReplicaRun
from albireo_jax.sweep.sweep_settings import Variant
from benchmarks.lib.recording import Recording, script_parser

PAGE_SIZE = 16
_MODULE = "benchmarks.studies.ablation"
MID_LLAMA = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=4,
    hidden_size=512,
    intermediate_size=1536,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=16_384,
    max_position=4096,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
)
"""About 30 million parameters, so that a step takes milliseconds; heads enough for eight ranks."""

TINY_LLAMA = replace(MID_LLAMA, num_layers=2, hidden_size=256, intermediate_size=768, head_dim=32)
"""As little as shows that the study runs, but no less than a CPU computes beside the host."""

SHARED_CORES = (
    "Virtual devices: t of them share {cores} cores, the threads of the host's own tasks among them. T3 does "
    "not shrink with t as it does on t GPUs, overlap gains less than beside them, and collectives are "
    "threads that wait for each other, which is most of T4 when it is sharded. The record shows what of the "
    "host's work is exposed."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AblationRun:
    """One repeat of a variant with `rows` requests at once on `tp` devices."""

    tp: int
    rows: int
    variant: Variant
    measured: ReplicaRun

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second."""
        return self.measured.num_tokens / self.measured.seconds

    @property
    def step_ms(self) -> float:
        """Time with work per step."""
        table = self.measured.table
        return 1e3 * (table.wall_s - table.no_work_s) / table.steps


def parser() -> ArgumentParser:
    made = script_parser(__doc__)
    made.add_argument("--degrees", type=int, nargs="+", default=[1, 2, 4, 8], metavar="T")
    made.add_argument("--rows", type=int, nargs="+", default=[16], metavar="N", help="requests at once")
    made.add_argument("--config", type=Path, help="config.json of another shape for the random weights")
    made.add_argument("--input-len", type=int, default=16)
    made.add_argument("--output-len", type=int, default=64, help="at least 2, to time a later token")
    made.add_argument("--temperature", type=float, default=0.8)
    made.add_argument("--top-p", type=float, default=0.95)
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--real", action="store_true", help="real devices instead of virtual ones")
    made.add_argument("--small", action="store_true", help="a tiny model, few tokens, one repeat")
    made.add_argument("--worker", type=int, help=SUPPRESS)
    return made


def model_of(options: Namespace) -> ModelConfig:
    """The shape that the random weights have."""
    if options.config is not None:
        return model_config_from_hf(json.loads(options.config.read_text()))
    return TINY_LLAMA if options.small else MID_LLAMA


def variants_at(tp: int) -> list[Variant]:
    """All of them but sharded sampling on one device, which is the same as replicated."""
    return [variant for variant in Variant if tp > 1 or variant is not Variant.SHARDED]


def work(options: Namespace, tp: int) -> list[AblationRun]:
    """The runs of one degree but the first round of each load, which warms up; turns change by round."""
    from albireo_jax.launch import Prepared, prepare_random
    from albireo_jax.sweep.variant_engines import VariantEngines

    rows, length = max(options.rows), options.input_len + options.output_len

    def prepared(sampling: SamplingMode) -> Prepared:
        config = EngineConfig(
            model="random",
            max_model_len=length,
            max_logprobs=0,
            sampling=sampling,
            parallel=ParallelConfig(tp=tp, virtual_devices=0 if options.real else tp),
            cache=CacheConfig(page_size=PAGE_SIZE, num_pages=rows * (-(-length // PAGE_SIZE) + 1)),
            scheduler=SchedulerConfig(max_rows=rows, max_step_tokens=max(rows, 256)),
        )
        return prepare_random(config, model_of(options), measure_sampling=True)

    variants = variants_at(tp)
    engines = VariantEngines(tuple(variants), prepared, tp=tp)
    runs: list[AblationRun] = []
    for at_once in options.rows:
        load = FixedBatch(per_gpu=at_once, input_len=options.input_len, output_len=options.output_len)
        arrivals = cluster_arrivals(load, gpus=1, seed=0)
        for repeat in range(-1, options.repeats):
            requests = sampled_requests(
                arrivals,
                vocab_size=engines.sizes.vocab_size,
                seed=repeat + 1,
                temperature=options.temperature,
                top_p=options.top_p,
            )
            first = repeat % len(variants)
            for variant in (*variants[first:], *variants[:first]):
                measured = engines.run(variant, requests)
                if repeat >= 0:
                    runs.append(AblationRun(tp=tp, rows=at_once, variant=variant, measured=measured))
    return runs


def measure(tp: int) -> list[AblationRun]:
    """All runs at one degree, by a process with as many devices and this command's own flags."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", _MODULE, *sys.argv[1:], "--worker", str(tp), "--output", folder]
        subprocess.run(command, check=True)
        print(f"t = {tp}: measured", file=sys.stderr)
        return [
            dataclass_from_json(AblationRun, run)
            for run in json.loads((Path(folder) / "runs.json").read_text())
        ]


def chosen(runs: Iterable[AblationRun], tp: int, rows: int, variant: Variant) -> list[AblationRun]:
    """The repeats of a variant."""
    return [run for run in runs if (run.tp, run.rows, run.variant) == (tp, rows, variant)]


def typical(runs: Iterable[AblationRun]) -> AblationRun:
    """The run whose steps took the median time."""
    ordered = sorted(runs, key=lambda run: run.step_ms)
    return ordered[len(ordered) // 2]


def gains(runs: Sequence[AblationRun], tp: int, rows: int, variant: Variant) -> list[float]:
    """Throughput over the synchronous engine's, of each repeat."""
    pairs = zip(chosen(runs, tp, rows, variant), chosen(runs, tp, rows, Variant.SYNCHRONOUS), strict=True)
    return [run.tokens_per_s / synchronous.tokens_per_s for run, synchronous in pairs]


def cases(runs: Iterable[AblationRun]) -> list[tuple[int, int, Variant]]:
    """Degrees, requests at once and variants that were measured, in their order."""
    order = list(Variant)
    found = {(run.tp, run.rows, run.variant) for run in runs}
    return sorted(found, key=lambda case: (*case[:2], order.index(case[2])))


def text_table(runs: Sequence[AblationRun]) -> str:
    """Microseconds per step of each task, `spent (exposed)`, for the typical runs, and the gains."""
    heads = ("T1", "T2", "T3", "T4", "T5", "between", "step", "P", "x 2t", "tokens/s", "gain")
    lines = [f"{'t, at once, variant':<42}" + "".join(f"{head:>16}" for head in heads)]
    for tp, rows, variant in cases(runs):
        run = typical(chosen(runs, tp, rows, variant))
        table, law = run.measured.table, amdahl(run.measured.table)
        each = 1e6 / table.steps
        cells = [
            number(task.total_s * each)
            if task.on_device
            else f"{number(task.total_s * each)} ({number(task.exposed_s * each)})"
            for task in table.tasks
        ]
        cells += [number(max(table.between_s, 0.0) * each), number(1e3 * run.step_ms)]
        cells += [f"{law.scalable_share:.1%}", f"{law.at(2):.2f}", number(run.tokens_per_s)]
        cells.append(f"{statistics.median(gains(runs, tp, rows, variant)):.2f}")
        lines.append(f"{f'{tp} {rows} {variant.value}':<42}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def series_of(runs: Sequence[AblationRun]) -> list[Series]:
    """Every repeat's figures, by variant, degree and requests at once."""
    samples = SampleTable()
    for tp, rows, variant in cases(runs):
        repeats = zip(chosen(runs, tp, rows, variant), gains(runs, tp, rows, variant), strict=True)
        for run, gain in repeats:
            table, law = run.measured.table, amdahl(run.measured.table)
            each = 1e6 / table.steps
            exposed = [part for part in parts(table) if part.name.endswith("exposed")]
            figures = {
                **{(f"{task.name} spent", "us per step"): task.total_s * each for task in table.tasks},
                **{(part.name, "us per step"): part.seconds * each for part in exposed},
                ("time with work", "us per step"): 1e3 * run.step_ms,
                ("device idle share", "1"): table.idle_share,
                ("scalable share", "1"): law.scalable_share,
                ("predicted speed-up at 2t", "1"): law.at(2),
                ("predicted speed-up at 4t", "1"): law.at(4),
                ("predicted speed-up with nothing exposed", "1"): law.hidden,
                ("time per output token p50", "s"): statistics.median(run.measured.tpot_s),
                ("output", "tokens/s"): run.tokens_per_s,
                ("gain over synchronous", "1"): gain,
            }
            samples.add(variant.value, f"t = {tp}, {rows} at once", figures)
    return samples.series()


def time_figure(runs: Sequence[AblationRun], device: Device) -> Figure:
    """Where the time of a step goes: a bar for each degree and variant, at the most requests."""
    rows = max(run.rows for run in runs)
    bars = [(tp, variant) for tp, at_once, variant in cases(runs) if at_once == rows]
    shared = f" (t virtual devices share {device.count} cores)" if device.virtual_devices else ""
    return stacked_bars(
        [f"t={tp}\n{variant.short}" for tp, variant in bars],
        time_bars([typical(chosen(runs, tp, rows, variant)).measured.table for tp, variant in bars]),
        y_label="time with work / ms per step",
        title=f"Time of a step{shared}",
    )


def gain_figure(runs: Sequence[AblationRun], device: Device) -> Figure:
    """The gains over the requests at once, at the largest degree: medians and the range of the repeats."""
    tp = max(run.tp for run in runs)
    at_once = sorted({run.rows for run in runs})
    lines: list[Line] = []
    for variant in variants_at(tp)[1:]:
        found = [gains(runs, tp, rows, variant) for rows in at_once]
        lines.append(
            Line(
                name=variant.value.replace(" + ", "\n+ "),
                x=at_once,
                y=[statistics.median(values) for values in found],
                low=[min(values) for values in found],
                high=[max(values) for values in found],
            )
        )
    ends = [at_once[0], at_once[-1]]
    lines.append(Line(name="synchronous", x=ends, y=[1.0, 1.0], reference=True))
    shared = f"\n({tp} virtual devices share {device.count} cores)" if device.virtual_devices else ""
    return line_figure(
        lines,
        x_label=f"requests at once{shared}",
        y_label="throughput over synchronous",
        title=f"Gain by load at t = {tp}",
        log2_x=True,
    )


def main() -> None:
    recording = Recording.begin(parser())
    options = recording.options
    if options.output_len < 2:
        raise SystemExit(f"--output-len must be at least 2 to time a later token, got {options.output_len}")
    if options.small:
        options.rows, options.input_len, options.output_len, options.repeats = [1, 4], 8, 12, 1
    if options.worker:
        found = [asdict(run) for run in work(options, options.worker)]
        (options.output / "runs.json").write_text(json.dumps(found))
        return
    model, most = model_of(options), max(options.degrees)
    for tp in options.degrees:
        model.check_tp(tp)
    here = gpus_here()[:most]
    if options.real and len(here) < most:
        raise SystemExit(f"--real needs {most} GPUs, this machine has {len(here)}")
    device = gpu_device(here) if options.real else cpu_device(virtual_devices=most)
    runs = [run for tp in options.degrees for run in measure(tp)]
    note = SHARED_CORES.format(cores=device.count) if device.virtual_devices else ""
    print(text_table(runs), note, sep="\n\n")
    settings = {"model": asdict(model), "worker": None}
    path = recording.write("ablation", series_of(runs), note=note, device=device, settings=settings)
    figures = {"time": time_figure(runs, device)}
    if len(options.rows) > 1 and most > 1:
        figures["gain"] = gain_figure(runs, device)
    for name, figure in figures.items():
        plot = path.with_name(f"{path.stem}-{name}.svg")
        plot.write_text(svg_file(figure), encoding="utf-8")
        print(plot)


if __name__ == "__main__":
    main()
