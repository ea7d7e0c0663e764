"""Measures an engine's steps under loads of its own, and fits the terms that the simulator takes.

The loads are decode batches of every size over contexts of several lengths, and prompts that fill steps of
every size, alone and beside rows that decode. They run through the real loop on a service's thread, so that
what is measured includes what host and device do to each other; the timeline says when each step was queued
and ended, and a step's size is noted when it is dispatched::

    device   seconds between the end of the step before, or its own dispatch, and its end, without sampling
    T1, T2   schedule and dispatch, from the stamps
    T5       from the end of a step, or the host's own work before it waited, to the next plan

What took three times as long as a first fit says is left out: something else ran on the machine.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import Executor, StepHandle, StepPlan
from albireo_jax.core.types import Request
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import ALL_STEPS, StepRecord, Timeline
from albireo_jax.launch import Prepared
from albireo_jax.measure.load_generator import run_load
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sim.host import HostTerms, TaskTerms
from albireo_jax.sim.planning.calibration import (
    BucketTerms,
    LoopTerms,
    SamplingTerms,
    Shard,
    StepSize,
    StepTable,
    step_size,
)

_Floats = NDArray[np.float64]

DECODE_STEPS = 12
_PREFILL_STEPS = 8
_SLOW = 3.0
_LEAST_S = 1e-6


class PaddedSize(NamedTuple):
    """Tokens and rows that steps are padded to."""

    tokens: int
    rows: int


class StepTime(NamedTuple):
    """A step and what it took: on the device without sampling, and on the host for T1, T2 and T5."""

    size: StepSize
    forward_s: float
    schedule_s: float
    prepare_s: float
    process_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredEngine:
    """An engine to measure: what its loop drives, its limits, and the sizes that its steps are padded to."""

    executor: Executor
    limits: EngineLimits
    config: SchedulerConfig
    buckets: tuple[PaddedSize, ...]


class NotingExecutor:
    """Another executor, and the sizes of the plans that it was given."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.sizes: list[StepSize] = []

    def dispatch(self, plan: StepPlan) -> StepHandle:
        """Note the plan's size and queue it."""
        self.sizes.append(step_size(plan))
        return self._executor.dispatch(plan)


def measure_shard(
    ready: Prepared,
    *,
    depths: Sequence[int],
    repeats: int,
    source: str,
    between: Callable[[], None] | None = None,
) -> Shard:
    """Measure the steps of an engine, whose sampling is measured already, in loops of these depths.

    All loads run `repeats` times, after a last one that warms up, at the depths in turn, and `between` is
    called after each round but the last. Raises ValueError if the engine is too small to be measured.
    """
    subject = MeasuredEngine(
        executor=ready.executor,
        limits=ready.limits,
        config=ready.config.scheduler,
        buckets=tuple(PaddedSize(*bucket) for bucket in ready.executor.buckets),
    )
    times: dict[int, list[StepTime]] = {depth: [] for depth in depths}
    *_, last = loads(subject, seed=repeats)
    time_steps(subject, last, depth=max(depths))
    for repeat in range(repeats):
        for load in loads(subject, seed=repeat):
            for depth, known in times.items():
                known += time_steps(subject, load, depth=depth)
        if between is not None and repeat < repeats - 1:
            between()
    loops = tuple(
        LoopTerms(
            depth=depth,
            steps=fit_steps(known, subject.buckets),
            host=fit_host(known, source=f"{source}, depth {depth}"),
        )
        for depth, known in times.items()
    )
    return Shard(
        tp=ready.config.parallel.tp, is_shard_shaped=False, loops=loops, sampling=_sampling_terms(ready)
    )


def _sampling_terms(ready: Prepared) -> SamplingTerms:
    costs = ready.executor.sampling_costs()
    by_rows = {
        rows: [cost.seconds for sampling, cost in costs.items() if sampling.rows == rows]
        for rows in sorted({sampling.rows for sampling in costs})
    }
    return SamplingTerms(
        rows=tuple(by_rows),
        greedy_s=tuple(seconds[0] for seconds in by_rows.values()),
        filtered_s=tuple(seconds[-1] for seconds in by_rows.values()),
    )


def time_steps(subject: MeasuredEngine, requests: Sequence[Request], *, depth: int) -> list[StepTime]:
    """Run a load in a loop of this depth and time its steps."""
    noting = NotingExecutor(subject.executor)
    timeline = Timeline(capacity=ALL_STEPS)
    config = replace(subject.config, depth=depth)
    scheduler = Scheduler(config, subject.limits, shares_prefixes=False)
    loop = EngineLoop(scheduler, noting, depth=depth, timeline=timeline)
    run_load(loop, subject.limits, requests)
    return step_times(timeline.records(), noting.sizes)


def fit_steps(times: Sequence[StepTime], buckets: Sequence[PaddedSize]) -> StepTable:
    """The table that is closest to the measured seconds, errors taken as shares of each bucket's median.

    A bucket that no step had gets seconds by its sizes, between or beyond those of its kind.
    """
    frame = StepTable(
        buckets=tuple(
            BucketTerms(tokens=tokens, rows=rows, step_s=0.0, samples=0) for tokens, rows in sorted(buckets)
        ),
        row_pair_s=0.0,
        chunk_pair_s=0.0,
    )
    place = {bucket: index for index, bucket in enumerate(frame.buckets)}
    computing = [time for time in times if time.size.tokens]
    bucket_of = np.array([place[frame.bucket(time.size)] for time in computing])
    seen, sample_of, samples = np.unique(bucket_of, return_inverse=True, return_counts=True)
    seconds = np.array([time.forward_s for time in computing])
    medians = np.array([max(np.median(seconds[bucket_of == index]), _LEAST_S) for index in seen])
    pairs = [(time.size.row_pairs, time.size.chunk_pairs) for time in computing]
    columns = np.concatenate((np.eye(len(seen))[sample_of], np.array(pairs, float)), axis=1)
    *steps_s, row_pair_s, chunk_pair_s = _fit(columns, seconds, scale=medians[sample_of])
    measured = list(frame.buckets)
    for index, step_s, count in zip(seen.tolist(), steps_s, samples.tolist(), strict=True):
        measured[index] = replace(measured[index], step_s=step_s, samples=count)
    return StepTable(
        buckets=tuple(bucket if bucket.samples else _interpolated(bucket, measured) for bucket in measured),
        row_pair_s=row_pair_s,
        chunk_pair_s=chunk_pair_s,
    )


def fit_host(times: Sequence[StepTime], *, source: str) -> HostTerms:
    """Terms of the host's tasks: of a step, of its rows and of its tokens."""
    sizes = np.array([(1.0, time.size.rows, time.size.tokens) for time in times])

    def fit(seconds: Sequence[float]) -> TaskTerms:
        step_s, row_s, token_s = _fit(sizes, np.array(seconds), scale=np.ones(len(seconds)))
        return TaskTerms(step_s=step_s, row_s=row_s, token_s=token_s)

    return HostTerms(
        schedule=fit([time.schedule_s for time in times]),
        prepare=fit([time.prepare_s for time in times]),
        process=fit([time.process_s for time in times]),
        source=source,
    )


def step_times(records: Sequence[StepRecord], sizes: Sequence[StepSize]) -> list[StepTime]:
    """Times of committed steps and their sizes, but for those whose T5 ran into something else."""
    planned = np.array([record.plan_s for record in records])
    queued = np.array([record.queued_s for record in records])
    before = [None, *records[:-1]]
    times: list[StepTime] = []
    for index, (record, last, size) in enumerate(zip(records, before, sizes, strict=True)):
        following = int(np.searchsorted(planned, record.committed_s))
        if following == len(records) or records[following].after_pause:
            continue
        if index + 1 < len(records) and records[index + 1].commit_s < planned[following]:
            continue  # another step was waited for before the next was planned
        began_s = max(record.queued_s, last.finished_s) if last else record.queued_s
        waiting_s = queued[int(np.searchsorted(queued, record.commit_s, side="right")) - 1]
        times.append(
            StepTime(
                size=size,
                forward_s=max(record.finished_s - began_s - record.sample_s, 0.0),
                schedule_s=record.dispatch_s - record.plan_s,
                prepare_s=record.queued_s - record.dispatch_s,
                process_s=max(float(planned[following]) - max(record.finished_s, float(waiting_s)), 0.0),
            )
        )
    return times


def _fit(columns: _Floats, values: _Floats, *, scale: _Floats) -> list[float]:
    """Factors of `columns`, none negative, that give `values` with the least squares of error over scale."""
    width = np.maximum(columns.max(axis=0), 1e-30)

    def solve(kept: NDArray[np.bool_]) -> _Floats:
        weighted = columns[kept] / width / scale[kept, None]
        return nnls(weighted, values[kept] / scale[kept])[0] / width

    first = columns @ solve(np.ones(len(values), bool))
    return solve(values <= _SLOW * np.maximum(first, _LEAST_S)).tolist()


def _interpolated(bucket: BucketTerms, measured: Sequence[BucketTerms]) -> BucketTerms:
    """A bucket with seconds by a plane over the sizes of the others of its kind."""
    known = [other for other in measured if other.samples and other.is_decode == bucket.is_decode]
    if not known:
        raise ValueError(f"no step was measured like those of {bucket.tokens} tokens and {bucket.rows} rows")
    sizes = np.array([(1.0, other.tokens, other.rows) for other in known])
    seconds = np.array([other.step_s for other in known])
    plane = nnls(sizes / seconds[:, None], np.ones(len(known)))[0]
    return replace(bucket, step_s=float(plane @ (1.0, bucket.tokens, bucket.rows)))


def loads(subject: MeasuredEngine, *, seed: int) -> Iterator[list[Request]]:
    """Loads that together have steps of all sizes, each of an engine without other requests."""
    config, limits = subject.config, subject.limits
    draw = np.random.default_rng(seed)
    longest = limits.max_sequence_len - DECODE_STEPS
    if longest < 2:
        raise ValueError(
            f"sequences of {limits.max_sequence_len} tokens are too short to be measured, "
            f"{DECODE_STEPS + 2} are needed"
        )

    def requests(lengths: Sequence[int], answers: Sequence[int]) -> list[Request]:
        return [
            Request(
                request_id=str(index),
                prompt_token_ids=draw.integers(limits.vocab_size, size=length).astype(np.int32),
                max_tokens=answer,
            )
            for index, (length, answer) in enumerate(zip(lengths, answers, strict=True))
        ]

    for rows in _powers(config.max_rows):
        fitting = limits.num_pages // rows * limits.page_size - DECODE_STEPS - limits.page_size
        share = min(fitting, _PREFILL_STEPS * config.max_step_tokens // rows)
        for length in dict.fromkeys(max(1, min(share, length)) for length in _between(8, longest)):
            yield requests([length] * rows, [DECODE_STEPS] * rows)
    prompts = [
        max(1, min(longest, 3 * tokens // 4)) for tokens in _powers(config.max_step_tokens) if tokens > 8
    ]
    for length in prompts:
        yield requests([length], [2])
        yield requests([max(1, length // 3)] * min(3, config.max_rows), [2, 4, 6][: config.max_rows])
    count = 4 * config.max_rows
    yield requests(
        [prompts[index % len(prompts)] for index in range(count)], draw.integers(2, 20, count).tolist()
    )


def _powers(most: int) -> list[int]:
    """Powers of two below `most`, and itself."""
    return [2**exponent for exponent in range((most - 1).bit_length())] + [most]


def _between(least: int, most: int) -> list[int]:
    """The two, and one size between them in equal ratios."""
    return [round(size) for size in np.geomspace(min(least, most), most, 3)]
