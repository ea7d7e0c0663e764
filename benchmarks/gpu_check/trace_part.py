"""The Azure conversation trace end to end: the same requests, synchronous beside overlapped, in turns.

First all at once, which is what throughput, the gain of overlap and the device's idle share are of; then in
the trace's own rhythm, for latencies that a queue does not make. A last, short run is profiled: a profiler
slows the host down, and XLA launches kernels one by one while it looks, so that its idle share is an upper
bound.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.types import Request
from albireo_jax.measure.throughput import percentile
from albireo_jax.runtime.batch import Bucket
from albireo_jax.sim.workload import read_trace
from albireo_jax.sweep.results import ReplicaRun
from albireo_jax.sweep.sweep_settings import Variant
from albireo_jax.sweep.variant_engines import VariantEngines
from benchmarks.gpu_check.check import LARGE, LEAST_ROWS, SMALL_QWEN, Check, Sizes
from benchmarks.gpu_check.check_engines import shared_engine
from benchmarks.gpu_check.kernel_spans import idle_share, kernel_spans
from benchmarks.validate_simulator import trace_load

_TRACE = "traces/azure_conv_2023_first300.csv"
_VARIANTS = (Variant.SYNCHRONOUS, Variant.OVERLAPPED)
_REPEATS = 2
_SMALL_FACTOR = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSize:
    """So many requests of the trace, and of these so many are profiled."""

    requests: int
    profiled: int


_SIZES: Mapping[str, TraceSize] = {
    SMALL_QWEN: TraceSize(requests=200, profiled=32),
    LARGE: TraceSize(requests=96, profiled=16),
}
_TAKES_S: Mapping[str, float] = {SMALL_QWEN: 0.0, LARGE: 40.0}
"""Seconds until the first figure of a model, for the second one's decision."""

_SMALL = TraceSize(requests=6, profiled=2)


def trace_buckets(sizes: Sizes) -> tuple[Bucket, ...]:
    """Few sizes of steps, which take whatever the trace asks for."""
    rows, tokens = sizes.max_rows, sizes.max_step_tokens
    decode = {count for count in (LEAST_ROWS, 16, 64, 256) if count < rows // 2} | {rows}
    return (
        *(Bucket(count, count) for count in sorted(decode)),
        Bucket(2 * rows, rows),
        Bucket(tokens, rows),
    )


def trace_requests(data: Path, *, count: int, limits: EngineLimits, small: bool) -> list[Request]:
    """The first requests of the trace in its rhythm, a tenth as long in a small check.

    What is still longer than the engine takes is cut.
    """
    arrivals = read_trace(data / _TRACE)[:count]
    span_s = arrivals[-1].arrived_s - arrivals[0].arrived_s
    rate_per_s = 1000.0 if small else (count - 1) / span_s
    factor = _SMALL_FACTOR if small else 1.0
    load = trace_load("azure conversation", arrivals, factor=factor, rate_per_s=rate_per_s, limits=limits)
    return list(load.requests)


def at_once(requests: Iterable[Request]) -> list[Request]:
    """The same requests, all at the start."""
    return [replace(request, arrived_s=0.0) for request in requests]


def run_trace(check: Check) -> None:
    """The small model first: its host has the least time. The large one if there is time for it."""
    data = check.data_folder()
    for model in (SMALL_QWEN, LARGE):
        if check.figures.has_time(f"trace with {model}", takes_s=_TAKES_S[model]):
            with check.figures.attempt(f"trace with {model}"):
                _run_model(check, model, data=data)


def _run_model(check: Check, model: str, *, data: Path) -> None:
    size = _SMALL if check.small else _SIZES[model]
    ready = shared_engine(check, model, trace_buckets(Sizes.of(small=check.small))).ready
    engines = VariantEngines(_VARIANTS, lambda _: ready, tp=1)
    requests = trace_requests(data, count=size.requests, limits=ready.limits, small=check.small)
    batch, some = at_once(requests), at_once(requests[: size.profiled])
    engines.run(Variant.OVERLAPPED, some)  # warms up
    runs: dict[Variant, list[ReplicaRun]] = {variant: [] for variant in _VARIANTS}
    for repeat in range(_REPEATS):
        for variant in _VARIANTS[:: 1 if repeat % 2 else -1]:
            if check.figures.has_time(f"{model}, {variant}, repeat {repeat}"):
                runs[variant].append(engines.run(variant, batch))
    for variant, done in runs.items():
        if done:
            _note(check, model, variant, done)
    _note_gain(check, model, runs)
    if check.figures.has_time(f"{model}, in the trace's rhythm"):
        paced = engines.run(Variant.OVERLAPPED, requests)
        _note_latencies(check, model, "in the trace's rhythm", [paced])
    if check.figures.has_time(f"{model}, profiled"):
        _profile(check, model, engines, some)


def _note(check: Check, model: str, variant: Variant, runs: Sequence[ReplicaRun]) -> None:
    def add(metric: str, unit: str, samples: list[float]) -> None:
        check.figures.add(model, variant.value, metric=metric, unit=unit, samples=samples)

    add("output", "tokens/s", [run.num_tokens / run.seconds for run in runs])
    add("idle share", "1", [run.table.idle_share for run in runs])
    for task in ("T1", "T2", "T3", "T4", "T5"):
        totals = [_task_us(run, task) for run in runs]
        add(f"{task} per step", "us", totals)
    _note_latencies(check, model, variant.value, runs)
    joules = [run.energy_j / run.num_tokens for run in runs if run.energy_j is not None]
    if joules:
        add("energy per token", "J", joules)
    else:
        check.figures.leave_out(f"energy per token of {model}, {variant}", runs[0].energy_reason)


def _task_us(run: ReplicaRun, name: str) -> float:
    (task,) = (task for task in run.table.tasks if task.name.startswith(name))
    return 1e6 * task.total_s / max(run.table.steps, 1)


def _note_latencies(check: Check, model: str, case: str, runs: Sequence[ReplicaRun]) -> None:
    seconds = {
        "time to first token": [run.ttft_s for run in runs],
        "time per output token": [run.tpot_s for run in runs],
    }
    for name, samples in seconds.items():
        for share, metric in ((0.5, f"{name}, median"), (0.99, f"{name}, p99")):
            values = [1e3 * percentile(each, share) for each in samples if each]
            if values:
                check.figures.add(model, case, metric=metric, unit="ms", samples=values)


def _note_gain(check: Check, model: str, runs: Mapping[Variant, Sequence[ReplicaRun]]) -> None:
    """Throughput of the overlapped engine over the synchronous one's, repeat by repeat."""
    pairs = zip(runs[Variant.OVERLAPPED], runs[Variant.SYNCHRONOUS], strict=False)
    gains = [(a.num_tokens / a.seconds) / (b.num_tokens / b.seconds) for a, b in pairs]
    if gains:
        case = "overlapped over synchronous"
        check.figures.add(model, case, metric="overlap gain", unit="1", samples=gains)
        print(f"{model}: overlap gains {statistics.median(gains):.3f}x", flush=True)


def _profile(check: Check, model: str, engines: VariantEngines, requests: list[Request]) -> None:
    spans = kernel_spans(lambda: engines.run(Variant.OVERLAPPED, requests))
    if not spans:
        check.figures.leave_out(f"idle share by kernels of {model}", "the trace shows no kernels of a GPU")
        return
    check.figures.add(
        model, "profiled", metric="idle share by kernels", unit="1", samples=[idle_share(spans)]
    )
