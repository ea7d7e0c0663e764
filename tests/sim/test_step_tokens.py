"""Tokens per step of large devices, against the time per token of the simulator."""

from pathlib import Path

import numpy as np
import pytest

from albireo_jax.core.config import STEP_TOKENS, SamplingMode, SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.sizes import LARGE_STEP_TOKENS
from albireo_jax.sim.gpus import GPUS
from albireo_jax.sim.host import OWN_HOST
from albireo_jax.sim.outcome import Outcome
from albireo_jax.sim.replica import Replica, run, scaled_arrivals
from albireo_jax.sim.step_model import roofline_model
from albireo_jax.sim.workload import make_requests, read_trace
from benchmarks.gpu_programs.compiled_programs import MODELS

LIMITS = EngineLimits(max_model_len=16384, vocab_size=128256, num_pages=25000, page_size=16)


def served(path: Path, *, gpu: str, step_tokens: int) -> Outcome:
    """The first requests of a trace of conversations, eight a second."""
    steps = roofline_model(MODELS["llama-3.1-8b"], GPUS[gpu], tp=1, host=OWN_HOST, mode=SamplingMode.SHARDED)
    config = SchedulerConfig(max_step_tokens=step_tokens)
    requests = make_requests(read_trace(path)[:120], vocab_size=1000, seed=0)
    return run(
        Replica(config=config, limits=LIMITS, steps=steps), scaled_arrivals(requests, rate_per_s=8.0)
    ).outcome


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_larger_steps_cost_a_bounded_part_of_the_time_per_token(data_dir: Path, gpu: str) -> None:
    """The roofline knows no product that is slow for its few tokens: it shows the price, not the gain."""
    path = data_dir / "traces" / "azure_conv_2023_first300.csv"
    small, large = (served(path, gpu=gpu, step_tokens=tokens) for tokens in (STEP_TOKENS, LARGE_STEP_TOKENS))
    assert large.tpot_p50_s < 1.2 * small.tpot_p50_s
    p99 = [np.percentile(outcome.tpot_s, 99) for outcome in (small, large)]
    assert p99[1] < 1.5 * p99[0] < 0.03
    assert large.ttft_p50_s < 1.1 * small.ttft_p50_s
