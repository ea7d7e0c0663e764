"""A load on a loop that runs on a service's thread."""

import pytest

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.types import Request
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import Timeline
from albireo_jax.measure.load_generator import run_load
from albireo_jax.sched.scheduler import Scheduler
from albireo_jax.sim.cost import linear_cost
from albireo_jax.sim.lanes import Clock
from albireo_jax.sim.simulated_executor import SimExecutor

LIMITS = EngineLimits(max_model_len=64, vocab_size=50, num_pages=40, page_size=4)


def _loop() -> EngineLoop:
    clock = Clock()
    executor = SimExecutor(LIMITS, max_rows=4, cost=linear_cost(step_s=1, token_s=0), clock=clock)
    scheduler = Scheduler(SchedulerConfig(max_rows=4, max_step_tokens=16), LIMITS)
    return EngineLoop(scheduler, executor, depth=2, timeline=Timeline(clock=clock))


def _requests(*arrived_s: float) -> list[Request]:
    return [
        Request(request_id=str(index), prompt_token_ids=(1, 2, index), max_tokens=5 + index, arrived_s=moment)
        for index, moment in enumerate(arrived_s)
    ]


def test_every_request_gets_its_tokens_and_none_before_it_arrives() -> None:
    loop = _loop()
    requests = _requests(0.0, 0.0, 0.02, 0.05, 0.05, 0.05)
    for _ in range(2):
        run = run_load(loop, LIMITS, requests)
        assert [request.num_tokens for request in run.requests] == [5, 6, 7, 8, 9, 10]
        assert [request.arrived_s for request in run.requests] == [0.0, 0.0, 0.02, 0.05, 0.05, 0.05]
        for request in run.requests:
            assert request.arrived_s <= request.first_s < request.last_s <= run.ended_s
    assert loop.scheduler.stats().pages_in_use == 0


def test_a_request_that_could_never_end_is_refused_before_any_is_run() -> None:
    loop = _loop()
    long = Request(request_id="long", prompt_token_ids=(1,) * 64, max_tokens=5)
    with pytest.raises(ValueError, match="64"):
        run_load(loop, LIMITS, [*_requests(0.0), long])
    assert loop.scheduler.stats().steps == 0
