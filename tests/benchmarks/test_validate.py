"""Loads that the simulator and the engine run, and the errors between them."""

from itertools import pairwise
from statistics import mean

import pytest

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.sim.host import HostTerms, TaskTerms
from albireo_jax.sim.outcome import Outcome, RequestTimes
from albireo_jax.sim.planning.calibration import BucketTerms, LoopTerms, SamplingTerms, Shard, StepTable
from albireo_jax.sim.workload import Arrival
from benchmarks.validate_simulator import PredictedLoad, batch_load, poisson_load, predict, trace_load

LIMITS = EngineLimits(max_model_len=200, vocab_size=50, num_pages=100, page_size=8)
TRACE = [
    Arrival(
        arrived_s=10.0 + 2 * i, input_tokens=100 * (i + 1), output_tokens=50, block_size=40, block_ids=(7,)
    )
    for i in range(11)
]


def test_a_trace_keeps_its_rhythm_and_its_prefixes_at_another_rate_and_length() -> None:
    load = trace_load("t", TRACE, factor=0.1, rate_per_s=5.0, limits=LIMITS)
    assert [request.arrived_s for request in load.requests] == [pytest.approx(i / 5) for i in range(11)]
    assert [len(request.prompt_token_ids) for request in load.requests] == [
        min(10 * (i + 1), 100) for i in range(11)
    ]
    assert {request.max_tokens for request in load.requests} == {5}
    assert load.shares_prefixes
    assert len({tuple(request.prompt_token_ids[:4].tolist()) for request in load.requests}) == 1
    for request in load.requests:
        LIMITS.check(request)


def test_a_poisson_process_has_its_rate_and_no_shared_prefixes() -> None:
    load = poisson_load("p", TRACE, factor=0.1, rate_per_s=3.0, count=400, limits=LIMITS, seed=5)
    moments = [request.arrived_s for request in load.requests]
    assert (len(moments) - 1) / (moments[-1] - moments[0]) == pytest.approx(3.0, rel=0.15)
    gaps = [b - a for a, b in pairwise(moments)]
    assert max(gaps) > 2 * mean(gaps)
    assert not load.shares_prefixes


def test_a_batch_comes_at_once() -> None:
    load = batch_load("b", count=3, input_len=9, output_len=4, vocab_size=50)
    assert {request.arrived_s for request in load.requests} == {0.0}
    assert len({request.prompt_token_ids.tobytes() for request in load.requests}) == 3


@pytest.mark.parametrize(("depth", "step_s"), [(1, 0.010 + 0.003), (2, 0.010)])
def test_the_prediction_has_the_measured_terms_of_its_depth(depth: int, step_s: float) -> None:
    """Host tasks of 3 ms in all are exposed at depth 1 and hidden behind a step of 10 ms at depth 2."""
    host = HostTerms(
        schedule=TaskTerms(step_s=0.001),
        prepare=TaskTerms(step_s=0.001),
        process=TaskTerms(step_s=0.001),
        source="known",
    )
    buckets = tuple(
        BucketTerms(tokens=tokens, rows=rows, step_s=0.008, samples=1) for tokens, rows in ((4, 4), (64, 4))
    )
    table = StepTable(buckets=buckets, row_pair_s=0.0, chunk_pair_s=0.0)
    shard = Shard(
        tp=1,
        is_shard_shaped=False,
        loops=tuple(LoopTerms(depth=each, steps=table, host=host) for each in (1, 2)),
        sampling=SamplingTerms(rows=(4,), greedy_s=(0.002,), filtered_s=(0.5,)),
    )
    load = batch_load("b", count=4, input_len=9, output_len=30, vocab_size=50)
    config = SchedulerConfig(max_rows=4, max_step_tokens=64, depth=depth)
    seen = predict(shard, load, config=config, limits=LIMITS)
    assert seen.tpot_p50_s == pytest.approx(step_s)
    assert seen.num_tokens == 120


def _outcome(tokens_per_s: float, tpot_s: float, ttft_s: float) -> Outcome:
    """Three requests of 11 tokens, one slower than the others."""
    requests = tuple(
        RequestTimes(arrived_s=0.0, first_s=ttft, last_s=ttft + 10 * tpot_s, num_tokens=11)
        for ttft in (ttft_s, ttft_s, 5 * ttft_s)
    )
    return Outcome(requests=requests, began_s=0.0, ended_s=33 / tokens_per_s)


def test_errors_are_of_medians_over_the_runs() -> None:
    comparison = PredictedLoad(
        load="b",
        tp=2,
        depth=1,
        predicted=_outcome(110.0, 0.018, 0.5),
        measured=(_outcome(100.0, 0.02, 0.4), _outcome(90.0, 0.04, 0.1), _outcome(500.0, 0.01, 0.9)),
    )
    assert comparison.throughput_error == pytest.approx(0.1)
    assert comparison.tpot_error == pytest.approx(-0.1)
    assert comparison.ttft_error == pytest.approx(0.25)
