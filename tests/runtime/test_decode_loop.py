"""Several steps in one dispatch: the tokens of single steps, and nothing computed behind a stop."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
import pytest

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import NOT_FINITE, SampledTokens, StepHandle, StepPlan
from albireo_jax.core.types import FinishReason, Request
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import Timeline
from albireo_jax.experiments.collectives import collectives
from albireo_jax.experiments.gpu_programs import PAGE_SIZE, state_of
from albireo_jax.experiments.hlo import parse
from albireo_jax.nn.decoder import unstack
from albireo_jax.runtime.decode_loop import DecodeLoop, DecodeLoops
from albireo_jax.runtime.executor import JaxExecutor
from albireo_jax.runtime.step import LayerLoop
from albireo_jax.sampling.routes import Route
from albireo_jax.sched.scheduler import Scheduler

Build = Callable[..., Any]
STEPS = 4


def _requests(count: int) -> list[Request]:
    """Greedy and sampled ones, half of which end at ids that they often say."""
    draw = np.random.default_rng(5)
    return [
        Request(
            request_id=f"r{index}",
            prompt_token_ids=tuple(draw.integers(0, 105, draw.integers(1, 40)).tolist()),
            max_tokens=int(draw.integers(1, 30)),
            temperature=float(draw.choice((0.0, 0.8, 1.2))),
            top_p=float(draw.choice((1.0, 0.9))),
            top_k=int(draw.choice((0, 30))),
            min_tokens=1 if index % 3 else 0,
            stop_ids=tuple(draw.choice(105, size=8, replace=False).tolist()) if index % 2 else (),
            seed=index,
        )
        for index in range(count)
    ]


REQUESTS = _requests(20)
GREEDY = [replace(request, temperature=0.0) for request in REQUESTS[:8]]


@dataclass
class Noting:
    """An executor that keeps the results of plans of several steps."""

    executor: JaxExecutor
    results: list[SampledTokens] = field(default_factory=list)

    def dispatch(self, plan: StepPlan) -> "NotingHandle":
        return NotingHandle(self, plan, self.executor.dispatch(plan))


@dataclass
class NotingHandle:
    noting: Noting
    plan: StepPlan
    handle: StepHandle

    def wait(self) -> SampledTokens:
        sampled = self.handle.wait()
        if len(self.plan.steps):
            self.noting.results.append(sampled)
        return sampled


def noted(small: Any, *, num_pages: int = 400) -> tuple[Any, list[SampledTokens]]:
    """A fresh loop of depth 2 over an engine's programs, of whose pages it uses so many, and its results."""
    noting = Noting(small.executor)
    limits = EngineLimits(max_model_len=192, vocab_size=105, num_pages=num_pages, page_size=4)
    config = SchedulerConfig(max_rows=8, max_step_tokens=48, depth=2, decode_steps=STEPS)
    loop = EngineLoop(Scheduler(config, limits), noting, depth=2, timeline=Timeline())
    return replace(small, loop=loop), noting.results


@pytest.fixture(scope="module")
def expected(engine: Build) -> list[dict[str, list[int]]]:
    return [engine(tp=1, depth=1).run(requests) for requests in (REQUESTS, GREEDY)]


@pytest.mark.parametrize(
    ("tp", "depth"), [(1, 1), (1, 2), (4, 2), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_tokens_are_those_of_single_steps_and_nothing_is_compiled(
    engine: Build, expected: list[dict[str, list[int]]], compilations: list[str], tp: int, depth: int
) -> None:
    single, many = engine(tp=tp, depth=depth), engine(tp=tp, depth=depth, decode_steps=STEPS)
    compilations.clear()
    assert [many.run(requests) for requests in (REQUESTS, GREEDY)] == expected
    assert not compilations
    assert [single.run(requests) for requests in (REQUESTS, GREEDY)] == expected
    assert many.loop.scheduler.stats().steps < single.loop.scheduler.stats().steps * 3 / 4


def test_tokens_are_those_of_single_steps_where_pages_are_few(
    engine: Build, expected: list[dict[str, list[int]]]
) -> None:
    small, results = noted(engine(tp=1, decode_steps=STEPS), num_pages=30)
    assert small.run(REQUESTS) == expected[0]
    assert small.loop.scheduler.stats().preemptions > 0
    assert results


def test_a_row_that_stopped_does_nothing_in_the_loop_that_is_queued_behind(engine: Build) -> None:
    request = Request(request_id="r", prompt_token_ids=(5, 6, 7), max_tokens=20, temperature=1.0, seed=3)
    small, results = noted(engine(tp=1, decode_steps=STEPS))
    free = small.run([request])["r"]
    stop = free[3]
    assert stop not in free[:3]
    results.clear()
    assert small.run([replace(request, stop_ids=(stop,))])["r"] == free[:4]
    assert [result.counts.tolist() for result in results] == [[3], [0]]
    assert small.loop.scheduler.stats().dropped == 0


def test_a_row_ends_where_its_logits_are_not_finite(engine: Build) -> None:
    small, results = noted(engine(tp=1, decode_steps=STEPS))
    small.loop.scheduler.add(Request(request_id="r", prompt_token_ids=(5, 6, 7), max_tokens=20))
    weights = small.model.weights()
    assert small.loop.step() == []  # its prompt is queued
    small.executor.replace_weights(weights._replace(final_norm_D=np.nan * weights.final_norm_D))
    outputs = [output for _ in range(6) for output in small.loop.step()]
    small.executor.replace_weights(weights)
    assert [output.finish_reason for output in outputs] == [None, FinishReason.ERROR]
    assert [result.counts.tolist() for result in results] == [[1], [0]]
    assert results[0].ids[0].tolist() == [NOT_FINITE]
    assert not small.loop.has_work


def test_the_loop_writes_the_cache_in_place(engine: Build) -> None:
    """Compiled for four devices: the pool is aliased, and collectives are those of one step."""
    small = engine(tp=4)
    program = replace(small.program, layers=LayerLoop.UNROLLED, page_size=PAGE_SIZE)
    loop, state = DecodeLoop(rows=8, route=Route.GREEDY, steps=STEPS), state_of(program)
    loops = DecodeLoops(program, max_steps=STEPS)
    compiled = loops.lower(loop, unstack(small.model.weights()), state).compile()
    pool_bytes = sum(array.size * 2 for array in jax.tree.leaves(state.cache.kv)) // 4
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 4
    layers, embedding, best_of_ranks = 3, 1, 2
    names = [one.kind for one in collectives(parse(compiled.as_text()))]
    assert names == ["all-reduce"] * (2 * layers + embedding + best_of_ranks)
