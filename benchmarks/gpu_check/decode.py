"""Decode steps against the bytes that they must read, their kernels, and what the engine's start took."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from albireo_jax.core.config import Quantization
from albireo_jax.core.plan import StepPlan
from albireo_jax.core.token_sampling import GREEDY, TokenSampling
from albireo_jax.launch import Prepared
from albireo_jax.runtime.batch import Bucket
from benchmarks.gpu_check.ceilings import best_copy_bytes_per_s
from benchmarks.gpu_check.check import LARGE, LARGE_QWEN, LEAST_ROWS, SMALL_QWEN, Check
from benchmarks.gpu_check.check_engines import note_start, shared_engine, step_buckets
from benchmarks.gpu_check.device import note_memory
from benchmarks.gpu_check.kernel_spans import idle_share, kernel_spans, seconds_by_name
from benchmarks.gpu_check.steps import (
    MOST_STEPS,
    DecodeCase,
    admit,
    decode_plans,
    run_steps,
    time_steps,
    work_of,
)

_CASES = (
    (DecodeCase(rows=4, context=64), DecodeCase(rows=2, context=32)),
    tuple(
        DecodeCase(rows=rows, context=context)
        for rows, context in ((64, 1024), (2, 1024), (256, 1024), (16, 16384))
    ),
)
_MODEL_CASES = (
    (DecodeCase(rows=4, context=32),),
    tuple(
        DecodeCase(rows=rows, context=context)
        for context in (1024, 4096, 16384)
        for rows in (16, 64, 1, 4, 256)
    ),
)
_TOP_P = TokenSampling(temperature=0.8, top_p=0.9, seed=0)
_PROFILED_STEPS = 10
_NAMED_KERNELS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Random weights of a model's shape, as codes of one byte if they are quantised."""

    model: str
    quantization: Quantization | None = None

    @property
    def name(self) -> str:
        """The subject in a table."""
        return self.model if self.quantization is None else f"{self.model} {self.quantization}"


_MODELS = (
    Weights(model=SMALL_QWEN),
    Weights(model=LARGE, quantization=Quantization.INT8),
    Weights(model=LARGE_QWEN),
    Weights(model=LARGE, quantization=Quantization.FP8),
)


def run_decode(check: Check) -> None:
    """The large model: its start, its decode steps by rows and context, a step that draws, a profile."""
    bandwidth = best_copy_bytes_per_s(small=check.small)  # while the memory is free
    started = shared_engine(check, LARGE, step_buckets(check))
    note_start(check, "few sizes of steps", started)
    first, *others = _CASES[not check.small]
    _try_case(check, LARGE, started.ready, case=first, bandwidth=bandwidth)
    with check.figures.attempt("profile"):
        _profile(check, LARGE, started.ready, first)
    _try_case(check, LARGE, started.ready, case=first, bandwidth=bandwidth, drawn=_TOP_P)
    for case in others:
        _try_case(check, LARGE, started.ready, case=case, bandwidth=bandwidth)
    note_memory(check, LARGE)


def run_models(check: Check) -> None:
    """Other models and quantised weights."""
    bandwidth = best_copy_bytes_per_s(small=check.small)
    cases = _MODEL_CASES[not check.small]
    rows = sorted({max(LEAST_ROWS, case.rows) for case in cases})
    buckets = (*(Bucket(count, count) for count in rows), Bucket(64, rows[0]))
    for weights in _MODELS:
        if not check.figures.has_time(f"decode of {weights.name}"):
            continue
        with check.figures.attempt(f"decode of {weights.name}"):
            started = shared_engine(check, weights.model, buckets, quantization=weights.quantization)
            for case in cases:
                _try_case(check, weights.name, started.ready, case=case, bandwidth=bandwidth)


def _try_case(
    check: Check,
    model: str,
    ready: Prepared,
    *,
    case: DecodeCase,
    bandwidth: float,
    drawn: TokenSampling | None = None,
) -> None:
    name = case.name if drawn is None else f"{case.name}, top-p"
    if not case.fits(ready):
        check.figures.leave_out(f"{model}, {name}", "the KV pool does not hold it")
    elif check.figures.has_time(f"{model}, {name}"):
        with check.figures.attempt(f"{model}, {name}"):
            _measure(check, model, ready, case=case, bandwidth=bandwidth, drawn=drawn)


def _measure(
    check: Check,
    model: str,
    ready: Prepared,
    *,
    case: DecodeCase,
    bandwidth: float,
    drawn: TokenSampling | None,
) -> None:
    plans = _admitted(ready, case, drawn or GREEDY)
    times = time_steps(ready.executor, plans)
    memory_bytes = work_of(ready, plans[len(plans) // 2]).memory_bytes
    name = case.name if drawn is None else f"{case.name}, top-p"
    figures = {
        ("step", "ms"): [1e3 * seconds for seconds in times.step_s],
        ("dispatch", "us"): [1e6 * statistics.median(times.dispatch_s)],
        ("bytes", "bytes"): [memory_bytes],
        ("share of byte roofline", "1"): [memory_bytes / bandwidth / seconds for seconds in times.step_s],
    }
    for (metric, unit), samples in figures.items():
        if drawn is None or metric == "step":  # what a row draws adds to no roofline
            check.figures.add(model, name, metric=metric, unit=unit, samples=samples)


def _admitted(ready: Prepared, case: DecodeCase, sampling: TokenSampling) -> Sequence[StepPlan]:
    admit(ready, rows=case.rows, tokens=case.context + MOST_STEPS + 1, sampling=sampling)
    return decode_plans(case, steps=MOST_STEPS)


def _profile(check: Check, model: str, ready: Prepared, case: DecodeCase) -> None:
    """Share of the time in which no kernel runs, and the kernels that take most of a step."""
    plans = _admitted(ready, case, GREEDY)[:_PROFILED_STEPS]
    run_steps(ready.executor, plans)
    spans = kernel_spans(lambda: run_steps(ready.executor, plans))
    if not spans:
        check.figures.leave_out(f"profile of {model}", "the trace shows no kernels of a GPU")
        return
    figures = check.figures
    figures.add(model, case.name, metric="idle share by kernels", unit="1", samples=[idle_share(spans)])
    figures.add(model, case.name, metric="kernels per step", unit="1", samples=[len(spans) / len(plans)])
    for name, seconds in list(seconds_by_name(spans).items())[:_NAMED_KERNELS]:
        per_step_us = 1e6 * seconds / len(plans)
        figures.add(model, f"kernel {name[:60]}", metric="per step", unit="us", samples=[per_step_us])
