"""Calibration: terms that are known come back from the steps of a simulated engine that has them."""

from dataclasses import replace

import numpy as np
import pytest

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import StepPlan
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import Timeline
from albireo_jax.measure.step_terms import (
    MeasuredEngine,
    NotingExecutor,
    PaddedSize,
    StepTime,
    fit_host,
    fit_steps,
    loads,
    step_times,
)
from albireo_jax.runtime.batch import bucket_grid, choose_bucket
from albireo_jax.sim.clocked import ClockedScheduler, ClockExecutor
from albireo_jax.sim.host import HostTerms, TaskTerms
from albireo_jax.sim.lanes import Clock
from albireo_jax.sim.planning.calibration import (
    BucketTerms,
    Calibration,
    LoopTerms,
    SamplingTerms,
    Shard,
    StepSize,
    StepTable,
    read_calibration,
    step_size,
    write_calibration,
)
from albireo_jax.sim.workload import replay

LIMITS = EngineLimits(max_model_len=400, vocab_size=50, num_pages=400, page_size=8)
CONFIG = SchedulerConfig(max_rows=12, max_step_tokens=100)
BUCKETS = bucket_grid(12, 100)
TABLE = StepTable(
    buckets=tuple(
        BucketTerms(tokens=tokens, rows=rows, step_s=1e-3 + 3e-5 * tokens + 2e-6 * rows**2, samples=1)
        for tokens, rows in sorted(BUCKETS)
    ),
    row_pair_s=3e-7,
    chunk_pair_s=1e-7,
)
HOST = HostTerms(
    schedule=TaskTerms(step_s=4e-5, row_s=1e-6),
    prepare=TaskTerms(step_s=1e-4, token_s=5e-7),
    process=TaskTerms(step_s=7e-5, row_s=9e-6),
    source="known",
)


def _measured(depth: int, *, host: HostTerms = HOST) -> list[StepTime]:
    """Times of all loads on an engine with the known terms."""
    subject = MeasuredEngine(
        executor=ClockExecutor(Clock(), cost=TABLE.forward_s),
        limits=LIMITS,
        config=CONFIG,
        buckets=tuple(PaddedSize(*bucket) for bucket in BUCKETS),
    )
    times: list[StepTime] = []
    for load in loads(subject, seed=0):
        clock = Clock()
        noting = NotingExecutor(ClockExecutor(clock, cost=TABLE.forward_s, host=host))
        config = replace(CONFIG, depth=depth)
        scheduler = ClockedScheduler(config, LIMITS, clock=clock, host=host)
        loop = EngineLoop(scheduler, noting, depth=depth, timeline=Timeline(clock=clock))
        replay(loop, load, clock=clock)
        times += step_times(loop.timeline.records(), noting.sizes)
    return times


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_known_terms_come_back(depth: int) -> None:
    times = _measured(depth)
    table = fit_steps(times, [PaddedSize(*bucket) for bucket in BUCKETS])
    assert (table.row_pair_s, table.chunk_pair_s) == (pytest.approx(3e-7), pytest.approx(1e-7))
    assert sum(bucket.samples for bucket in table.buckets) == len(times) > 200
    for got, want in zip(table.buckets, TABLE.buckets, strict=True):
        assert (got.tokens, got.rows) == (want.tokens, want.rows)
        assert got.samples, "every bucket is measured"
        assert got.step_s == pytest.approx(want.step_s)
    host = fit_host(times, source="known")
    for name in ("schedule", "prepare", "process"):
        got, want = getattr(host, name), getattr(HOST, name)
        assert got.step_s == pytest.approx(want.step_s, abs=1e-9)
        assert got.row_s == pytest.approx(want.row_s, abs=1e-11)
        assert got.token_s == pytest.approx(want.token_s, abs=1e-11)


def test_what_disturbs_a_few_steps_does_not_change_the_terms() -> None:
    times = _measured(2)
    want = fit_steps(times, [PaddedSize(*bucket) for bucket in BUCKETS])
    disturbed = [
        time._replace(forward_s=20 * time.forward_s, process_s=50 * time.process_s) if i % 41 == 7 else time
        for i, time in enumerate(times)
    ]
    got = fit_steps(disturbed, [PaddedSize(*bucket) for bucket in BUCKETS])
    for mine, theirs in zip(got.buckets, want.buckets, strict=True):
        assert mine.step_s == pytest.approx(theirs.step_s, rel=0.03)
    assert fit_host(disturbed, source="").process.row_s == pytest.approx(HOST.process.row_s, rel=0.03)


def test_a_bucket_that_no_step_had_is_interpolated_and_says_so() -> None:
    missing = sorted(BUCKETS)[2]
    assert missing[0] == missing[1]
    times = [time for time in _measured(1) if TABLE.bucket(time.size).tokens != missing.tokens]
    table = fit_steps(times, [PaddedSize(*bucket) for bucket in BUCKETS])
    (bucket,) = [bucket for bucket in table.buckets if (bucket.tokens, bucket.rows) == missing]
    assert bucket.samples == 0
    assert bucket.step_s == pytest.approx(1e-3 + 3e-5 * 4, rel=0.1)


def test_a_step_is_padded_to_the_bucket_that_the_runtime_chooses() -> None:
    clock = Clock()
    executor = ClockExecutor(clock, cost=lambda _: 1.0)
    subject = MeasuredEngine(executor=executor, limits=LIMITS, config=CONFIG, buckets=())
    checked = 0
    for load in loads(subject, seed=3):
        scheduler = ClockedScheduler(CONFIG, LIMITS, clock=clock, host=HOST)
        for request in load:
            scheduler.add(request)
        while (plan := scheduler.plan()) is not None:
            bucket = TABLE.bucket(step_size(plan))
            assert (bucket.tokens, bucket.rows) == choose_bucket(plan, BUCKETS)
            scheduler.commit(plan, executor.dispatch(plan).wait())
            checked += 1
    assert checked > 300


def test_a_file_holds_all_of_a_calibration(tmp_path) -> None:
    sampling = SamplingTerms(rows=(1, 2, 16), greedy_s=(1e-5, 2e-5, 3e-5), filtered_s=(1e-4, 2e-4, 3e-4))
    shard = Shard(
        tp=2,
        is_shard_shaped=True,
        loops=(LoopTerms(depth=1, steps=TABLE, host=HOST), LoopTerms(depth=2, steps=TABLE, host=HOST)),
        sampling=sampling,
    )
    calibration = Calibration(model="m", dtype="float32", device="d", source="s", shards=(shard,))
    path = tmp_path / "c.json"
    write_calibration(calibration, path)
    assert read_calibration(path) == calibration
    with pytest.raises(ValueError, match=r"tp 4 was not measured for m, only \[2\]"):
        calibration.shard(4)
    with pytest.raises(ValueError, match=r"depth 3 was not measured, only \[1, 2\]"):
        shard.at_depth(3)
    path.write_text('{"format": 99}')
    with pytest.raises(ValueError, match="no calibration of format 1"):
        read_calibration(path)


def test_a_step_larger_than_all_measured_is_refused() -> None:
    size = StepSize(tokens=500, rows=3, is_decode=False, row_pairs=0, chunk_pairs=0, sampled=3)
    with pytest.raises(ValueError, match="500 tokens and 3 rows is larger than those measured"):
        TABLE.bucket(size)


def test_pairs_count_what_each_query_sees() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        rows = int(draw.integers(1, 6))
        starts, counts = draw.integers(0, 50, rows), draw.integers(1, 9, rows)
        plan = _plan(starts, counts)
        seen = [[start + i + 1 for i in range(count)] for start, count in zip(starts, counts, strict=True)]
        size = step_size(plan)
        assert size.row_pairs == sum(sum(each) for each in seen if len(each) == 1)
        assert size.chunk_pairs == sum(sum(each) for each in seen if len(each) > 1)


def _plan(starts: np.ndarray, counts: np.ndarray) -> StepPlan:
    none = np.zeros(0, np.int32)
    return StepPlan(
        step=0,
        request_ids=tuple(map(str, range(len(starts)))),
        epochs=np.ones(len(starts), np.int32),
        slots=np.arange(len(starts), dtype=np.int32),
        starts=starts.astype(np.int32),
        counts=counts.astype(np.int32),
        samples=np.ones(len(starts), bool),
        token_ids=np.zeros(counts.sum(), np.int32),
        update_slots=none,
        update_columns=none,
        update_pages=none,
    )
