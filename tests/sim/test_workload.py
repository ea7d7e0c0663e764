from pathlib import Path

import numpy as np
import pytest

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import Timeline
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sim.cost import linear_cost
from albireo_jax.sim.lanes import Clock
from albireo_jax.sim.simulated_executor import SimExecutor
from albireo_jax.sim.workload import (
    Arrival,
    make_requests,
    poisson_arrivals,
    read_trace,
    replay,
    scale_lengths,
)

TRACE = """arrived_at,input_tokens,output_tokens,block_size,blocks
0.0,10,4,0,
1.5,11,3,4,7 8 9
"""


def test_a_trace_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    assert read_trace(path) == [
        Arrival(arrived_s=0.0, input_tokens=10, output_tokens=4),
        Arrival(arrived_s=1.5, input_tokens=11, output_tokens=3, block_size=4, block_ids=(7, 8, 9)),
    ]


@pytest.mark.parametrize(
    ("name", "count"), [("azure_conv_2023.csv", 19366), ("mooncake_conversation_first300.csv", 300)]
)
def test_real_traces_are_read(data_dir: Path, name: str, count: int) -> None:
    arrivals = read_trace(data_dir / "traces" / name)
    assert len(arrivals) == count
    moments = [arrival.arrived_s for arrival in arrivals]
    assert moments == sorted(moments)
    blocks_cover = [a.input_tokens <= a.block_size * len(a.block_ids) for a in arrivals if a.block_ids]
    assert all(blocks_cover)


def test_poisson_arrivals_have_the_rate_and_lengths_asked_for() -> None:
    lengths = [Arrival(arrived_s=0, input_tokens=n, output_tokens=n) for n in (3, 5)]
    arrivals = poisson_arrivals(lengths, rate_per_s=20.0, count=4000, seed=1)
    moments = np.array([arrival.arrived_s for arrival in arrivals])
    gaps = np.diff(moments)
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 20, rel=0.05)  # exponential: as wide as its mean
    assert {arrival.input_tokens for arrival in arrivals} == {3, 5}
    assert arrivals == poisson_arrivals(lengths, rate_per_s=20.0, count=4000, seed=1)
    assert arrivals != poisson_arrivals(lengths, rate_per_s=20.0, count=4000, seed=2)


def test_scaled_lengths_are_never_empty() -> None:
    arrival = Arrival(arrived_s=2.0, input_tokens=1000, output_tokens=3, block_size=500, block_ids=(1, 2))
    assert scale_lengths([arrival], 0.1) == [
        Arrival(arrived_s=2.0, input_tokens=100, output_tokens=1, block_size=50, block_ids=(1, 2))
    ]


def test_requests_share_the_tokens_of_the_blocks_that_they_share() -> None:
    arrivals = [
        Arrival(arrived_s=0, input_tokens=10, output_tokens=2, block_size=4, block_ids=(1, 2, 3)),
        Arrival(arrived_s=0, input_tokens=12, output_tokens=2, block_size=4, block_ids=(1, 2, 4)),
        Arrival(arrived_s=0, input_tokens=12, output_tokens=2),
    ]
    first, second, third = (
        request.prompt_token_ids.tolist() for request in make_requests(arrivals, vocab_size=1000, seed=3)
    )
    assert [len(first), len(second), len(third)] == [10, 12, 12]
    assert first[:8] == second[:8]
    assert first[8:] != second[8:10]
    assert third[:4] != first[:4]


def test_replay_adds_each_request_at_its_arrival_and_skips_idle_time() -> None:
    clock = Clock()
    limits = EngineLimits(max_model_len=64, vocab_size=100, num_pages=64, page_size=4)
    scheduler = Scheduler(SchedulerConfig(max_rows=4, max_step_tokens=32), limits)
    cost = linear_cost(step_s=1.0, token_s=0.0)
    executor = SimExecutor(limits, max_rows=4, cost=cost, clock=clock)
    timeline = Timeline(clock=clock)
    loop = EngineLoop(scheduler, executor, depth=2, timeline=timeline)
    arrivals = [Arrival(arrived_s=t, input_tokens=5, output_tokens=2) for t in (0.5, 0.75, 100.0)]
    outputs = replay(loop, make_requests(arrivals, vocab_size=100, seed=0), clock=clock)
    moments = [(output.request_id, moment_s) for moment_s, output in outputs]
    # Two steps are queued at 0.5, so request 1 is in the third, which ends at 3.5.
    assert moments == [("0", 1.5), ("0", 2.5), ("1", 3.5), ("1", 4.5), ("2", 101.0), ("2", 102.0)]
    table = timeline.table()
    assert table.no_work_s == pytest.approx(100.0 - 4.5)
    assert table.exposed_s == pytest.approx(0.0)
