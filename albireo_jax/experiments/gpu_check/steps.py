"""Single steps of the engine, decode and prefill, through its own executor and compiled programs.

The plans are made here and not by a scheduler: rows whose context is "already computed", in pages scattered
over the pool, as after a hit in the prefix cache. So a step at 16k tokens of context is measured without
computing them first. Keys and values are zeros then, which no kernel can tell from others by its time.

Bytes and flops are those of `sim.cost.RankWork`: weights read once, each row's keys and values read once.
"""

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from albireo_jax.core.config import Quantization
from albireo_jax.core.plan import TOKEN_ON_DEVICE, Executor, SlotParams, StepHandle, StepPlan
from albireo_jax.experiments.gpu_check.ceilings import best_copy_bytes_per_s, best_matrix_flops_per_s
from albireo_jax.experiments.gpu_check.check import LARGE, LARGE_QWEN, LEAST_ROWS, SMALL_QWEN, Check, prepared
from albireo_jax.launch import Prepared
from albireo_jax.runtime.batch import Bucket
from albireo_jax.sim.cost import RankWork, StepWork

_DEPTH = 2
_REPEATS = 3
_MOST_STEPS, _LEAST_STEPS = 24, 3
_REPEAT_S = 0.5
_ADMITTING = Bucket(32, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCase:
    """A decode step of `rows` rows, each over `context` cached tokens."""

    rows: int
    context: int

    @property
    def name(self) -> str:
        """The case in a table."""
        return f"{self.rows} rows, {self.context} context"

    def fits(self, ready: Prepared) -> bool:
        """Whether the engine's memory and limits hold it."""
        tokens = self.context + _MOST_STEPS + 1
        pages = self.rows * -(-tokens // ready.limits.page_size)
        return tokens <= ready.limits.max_model_len and pages <= ready.limits.num_pages


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Random weights of a model's shape, as codes of one byte if they are quantised."""

    model: str
    quantization: Quantization | None = None

    @property
    def name(self) -> str:
        """The subject in a table."""
        return self.model if self.quantization is None else f"{self.model} {self.quantization}"


_DECODE = (
    (DecodeCase(rows=1, context=32), DecodeCase(rows=4, context=64)),
    tuple(
        DecodeCase(rows=rows, context=context)
        for context in (1024, 4096, 16384)
        for rows in (16, 64, 1, 4, 256)
    ),
)
_WEIGHTS = (
    Weights(model=LARGE),
    Weights(model=SMALL_QWEN),
    Weights(model=LARGE, quantization=Quantization.INT8),
    Weights(model=LARGE_QWEN),
    Weights(model=LARGE, quantization=Quantization.FP8),
)
_PREFILL = ((32, 64), (2048, 512, 8192))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Mean seconds of a step in each repeat, and seconds of each dispatch on the host."""

    step_s: tuple[float, ...]
    dispatch_s: tuple[float, ...]


def scattered_pages(rows: int, tokens: int, *, page_size: int, num_pages: int) -> list[tuple[int, ...]]:
    """Pages for so many tokens of each row, in no order; none twice. Raises ValueError if too few."""
    each = -(-tokens // page_size)
    if rows * each > num_pages:
        raise ValueError(f"{rows} rows of {tokens} tokens take {rows * each} pages, there are {num_pages}")
    drawn = 1 + np.random.default_rng(0).permutation(num_pages)[: rows * each]
    return [tuple(pages) for pages in drawn.reshape(rows, each).tolist()]


def admission(pages: Sequence[tuple[int, ...]]) -> StepPlan:
    """A step that gives each row a slot that begins with its pages, and computes one token of the first."""
    slots = tuple(
        SlotParams(
            slot=slot,
            temperature=0.0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            seed=0,
            banned_until=0,
            stop_ids=(),
            pages=own,
        )
        for slot, own in enumerate(pages)
    )
    return _plan(0, starts=[0], counts=[1], token_id=0, new_slots=slots)


def decode_plans(case: DecodeCase, *, steps: int) -> list[StepPlan]:
    """Decode steps of rows that were admitted, one after the other."""
    return [
        _plan(
            1 + step,
            starts=[case.context + step] * case.rows,
            counts=[1] * case.rows,
            token_id=TOKEN_ON_DEVICE,
        )
        for step in range(steps)
    ]


def prompt_plan(tokens: int) -> StepPlan:
    """A step that computes a whole prompt of the first slot."""
    return _plan(1, starts=[0], counts=[tokens], token_id=1)


def run_steps(executor: Executor, plans: Sequence[StepPlan]) -> StepTimes:
    """Steps with two in flight, as the overlapped engine has them; one mean over all but the first."""
    in_flight: deque[StepHandle] = deque()
    ends_s: list[float] = []
    dispatches_s: list[float] = []
    for plan in plans:
        began_s = time.perf_counter()
        in_flight.append(executor.dispatch(plan))
        dispatches_s.append(time.perf_counter() - began_s)
        if len(in_flight) == _DEPTH:
            ends_s.append(in_flight.popleft().wait().finished_s)
    ends_s += [handle.wait().finished_s for handle in in_flight]
    return StepTimes(
        step_s=((ends_s[-1] - ends_s[0]) / (len(ends_s) - 1),), dispatch_s=tuple(dispatches_s[1:])
    )


def time_steps(executor: Executor, plans: Sequence[StepPlan]) -> StepTimes:
    """Repeats of these steps, of as many of them as take half a second."""
    run_steps(executor, plans[:_LEAST_STEPS])  # warms up
    estimate_s = max(run_steps(executor, plans[:_LEAST_STEPS]).step_s[0], 1e-6)
    count = max(_LEAST_STEPS, min(len(plans), int(_REPEAT_S / estimate_s)))
    runs = [run_steps(executor, plans[:count]) for _ in range(_REPEATS)]
    return StepTimes(
        step_s=tuple(run.step_s[0] for run in runs),
        dispatch_s=tuple(seconds for run in runs for seconds in run.dispatch_s),
    )


def run_decode(check: Check) -> None:
    """Decode steps by rows and context against the bytes that they must read."""
    bandwidth = best_copy_bytes_per_s(small=check.small)
    cases = _DECODE[not check.small]
    for weights in _WEIGHTS:
        if check.notebook.has_time(f"decode of {weights.name}"):
            _decode_model(check, weights, cases, bandwidth=bandwidth)


def run_prefill(check: Check) -> None:
    """Whole prompts in one step each against the flops that they take."""
    rate = best_matrix_flops_per_s(small=check.small)
    lengths = _PREFILL[not check.small]
    for model in (LARGE, SMALL_QWEN):
        if check.notebook.has_time(f"prefill of {model}"):
            _prefill_model(check, model, lengths, rate=rate)


def _decode_model(check: Check, weights: Weights, cases: Sequence[DecodeCase], *, bandwidth: float) -> None:
    model, rows = weights.name, sorted({max(LEAST_ROWS, case.rows) for case in cases})
    buckets = (*(Bucket(count, count) for count in rows), _ADMITTING)
    ready = prepared(check, weights.model, buckets, quantization=weights.quantization)
    for case in cases:
        if not case.fits(ready):
            check.notebook.leave_out(f"{model}, {case.name}", "the KV pool does not hold it")
        elif check.notebook.has_time(f"{model}, {case.name}"):
            _decode_case(check, model, ready, case=case, bandwidth=bandwidth)


def _prefill_model(check: Check, model: str, lengths: Sequence[int], *, rate: float) -> None:
    ready = prepared(check, model, tuple(Bucket(length, _ADMITTING.rows) for length in sorted(lengths)))
    for length in lengths:
        if check.notebook.has_time(f"{model}, {length} tokens"):
            _prefill_case(check, model, ready, length=length, rate=rate)


def _decode_case(check: Check, model: str, ready: Prepared, *, case: DecodeCase, bandwidth: float) -> None:
    _admit(ready, rows=case.rows, tokens=case.context + _MOST_STEPS + 1)
    plans = decode_plans(case, steps=_MOST_STEPS)
    times = time_steps(ready.executor, plans)
    memory_bytes = _work(ready, plans[len(plans) // 2]).memory_bytes
    _note(check, model, case.name, times=times)
    check.notebook.add(model, case.name, metric="bytes", unit="bytes", samples=[memory_bytes])
    check.notebook.add(
        model,
        case.name,
        metric="share of byte roofline",
        unit="1",
        samples=[memory_bytes / bandwidth / seconds for seconds in times.step_s],
    )


def _prefill_case(check: Check, model: str, ready: Prepared, *, length: int, rate: float) -> None:
    _admit(ready, rows=1, tokens=length + 1)
    plan = prompt_plan(length)
    times = time_steps(ready.executor, [plan] * _MOST_STEPS)
    flops, case = _work(ready, plan).flops, f"{length} tokens"
    _note(check, model, case, times=times)
    check.notebook.add(model, case, metric="flops", unit="flops", samples=[flops])
    check.notebook.add(
        model,
        case,
        metric="share of matrix rate",
        unit="1",
        samples=[flops / rate / seconds for seconds in times.step_s],
    )


def _note(check: Check, model: str, case: str, *, times: StepTimes) -> None:
    notebook = check.notebook
    notebook.add(model, case, metric="step", unit="ms", samples=[1e3 * each for each in times.step_s])
    dispatch_us = 1e6 * statistics.median(times.dispatch_s)
    notebook.add(model, case, metric="dispatch", unit="us", samples=[dispatch_us])


def _admit(ready: Prepared, *, rows: int, tokens: int) -> None:
    pages = scattered_pages(rows, tokens, page_size=ready.limits.page_size, num_pages=ready.limits.num_pages)
    ready.executor.dispatch(admission(pages)).wait()


def _work(ready: Prepared, plan: StepPlan) -> StepWork:
    kv_dtype = ready.config.cache.kv_dtype
    return RankWork(ready.model_config, tp=1, dtype=ready.dtype, kv_dtype=kv_dtype).of(plan)


def _plan(
    step: int,
    *,
    starts: Sequence[int],
    counts: Sequence[int],
    token_id: int,
    new_slots: tuple[SlotParams, ...] = (),
) -> StepPlan:
    """Rows in the first slots, each of which samples; nothing moves between pages."""
    rows, none = len(starts), np.zeros(0, np.int32)
    return StepPlan(
        step=step,
        request_ids=tuple(map(str, range(rows))),
        epochs=np.zeros(rows, np.int32),
        slots=np.arange(rows, dtype=np.int32),
        starts=np.array(starts, np.int32),
        counts=np.array(counts, np.int32),
        samples=np.ones(rows, np.bool_),
        token_ids=np.full(sum(counts), token_id, np.int32),
        update_slots=none,
        update_columns=none,
        update_pages=none,
        new_slots=new_slots,
    )
