"""Throughput and latency runs do the work that was asked for, and count it once."""

import dataclasses
import math
import statistics

import pytest

from albireo_jax.measure.throughput import (
    BenchWorkload,
    bench_latency,
    bench_throughput,
    percentile,
    render_latency,
    render_throughput,
)
from tests.labs.engine_lab import lab

WORKLOAD = BenchWorkload(num_prompts=5, input_len=20, output_len=7, vocab_size=90)


def test_throughput_counts_every_token_and_no_warm_up():
    with lab() as engine:
        result = bench_throughput(engine.frontend, engine.timeline, WORKLOAD, repeats=3, warmups=2)
    assert [run.num_tokens for run in result.runs] == [35, 35, 35]
    for run in result.runs:
        assert len(run.first_s) == len(run.end_s) == 5
        assert len(run.gaps_s) == 5 * 6
        assert 0 < min(run.first_s) <= max(run.first_s) < run.total_s
        assert math.isclose(sum(run.first_s) + sum(run.gaps_s), sum(run.end_s))
    one = bench_steps(repeats=1)
    assert bench_steps(repeats=3) > 2 * one > 0, "the task table does not cover the counted runs alone"


def bench_steps(*, repeats: int) -> int:
    with lab() as engine:
        table = bench_throughput(engine.frontend, engine.timeline, WORKLOAD, repeats=repeats).task_table
    return table.steps


def test_latency_of_one_request_has_its_gaps():
    with lab() as engine:
        result = bench_latency(
            engine.frontend, engine.timeline, dataclasses.replace(WORKLOAD, num_prompts=1), repeats=4
        )
    assert len(result.first_s) == len(result.end_s) == 4
    assert len(result.gaps_s) == 4 * 6
    assert "time to first token" in render_latency(result)


def test_no_request_is_left_behind():
    with lab() as engine:
        bench_throughput(engine.frontend, engine.timeline, WORKLOAD, repeats=1)
        assert engine.frontend.num_readers == 0
        assert engine.service.stats().pages_in_use == 0


def test_prompts_are_fresh_in_every_run_and_repeatable():
    runs = [prompt for run in range(-2, 5) for prompt in WORKLOAD.prompts(run)]
    assert len(set(runs)) == len(runs)
    assert WORKLOAD.prompts(3) == WORKLOAD.prompts(3)
    assert dataclasses.replace(WORKLOAD, seed=1).prompts(3) != WORKLOAD.prompts(3)
    assert all(len(prompt) == 20 and max(prompt) < 90 for prompt in runs)


def test_workload_that_does_not_fit_is_refused():
    with lab() as engine, pytest.raises(ValueError, match="2048"):
        bench_throughput(engine.frontend, engine.timeline, dataclasses.replace(WORKLOAD, output_len=4096))
    with pytest.raises(ValueError, match="num_prompts must be at least 1, got 0"):
        dataclasses.replace(WORKLOAD, num_prompts=0)


def test_the_text_tells_the_median_of_the_runs():
    with lab() as engine:
        result = bench_throughput(engine.frontend, engine.timeline, WORKLOAD, repeats=3)
    rates = [35 / run.total_s for run in result.runs]
    assert result.output_tokens_per_s == tuple(rates)
    assert f"{statistics.median(rates):.1f}" in render_throughput(result)
    assert "5 requests 20 in 7 out" in render_throughput(result)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.9, 90), (0.99, 99), (1.0, 100)])
def test_percentile(share: float, expected: int):
    assert percentile(list(range(100, 0, -1)), share) == expected
    assert percentile([7.0], share) == 7.0
