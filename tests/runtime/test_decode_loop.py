"""Several steps in one dispatch: the tokens of single steps, and nothing computed behind a stop."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from albireo_jax.core.config import KvDtype, SamplingMode, SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.plan import (
    NOT_FINITE,
    TOKEN_ON_DEVICE,
    SampledTokens,
    SlotParams,
    StepHandle,
    StepPlan,
)
from albireo_jax.core.token_sampling import GREEDY, TokenSampling
from albireo_jax.core.types import FinishReason, Request
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import Timeline
from albireo_jax.nn.module import Decoder
from albireo_jax.nn.sharding import TP
from albireo_jax.runtime.batch import Bucket, layout, pack, pack_params, pack_rows
from albireo_jax.runtime.decode_loop import DecodeLoop, DecodeLoops, loop_layout, pack_steps
from albireo_jax.runtime.executor import JaxExecutor
from albireo_jax.runtime.sampling_programs import admit, jit_sample
from albireo_jax.runtime.state import DeviceState, StateShape, plan_state
from albireo_jax.runtime.step import LayerLoop, StepProgram, jit_forward
from albireo_jax.sampling.routes import Route
from albireo_jax.sched.scheduler import Scheduler
from benchmarks.lib.hlo import parse
from benchmarks.lib.hlo_collectives import collectives

Build = Callable[..., Any]
STEPS = 4


def _requests(count: int) -> list[Request]:
    """Greedy and sampled ones, half of which end at ids that they often say."""
    draw = np.random.default_rng(5)
    return [
        Request(
            request_id=f"r{index}",
            prompt_token_ids=tuple(draw.integers(0, 105, draw.integers(1, 40)).tolist()),
            max_tokens=int(draw.integers(2, 30)),
            sampling=TokenSampling(
                temperature=float(draw.choice((0.0, 0.8, 1.2))),
                top_p=float(draw.choice((1.0, 0.9))),
                top_k=int(draw.choice((0, 30))),
                seed=index,
            ),
            min_tokens=index % 3,
            stop_ids=tuple(draw.choice(105, size=8, replace=False).tolist()) if index % 2 else (),
        )
        for index in range(count)
    ]


REQUESTS = _requests(20)
GREEDY_REQUESTS = [replace(request, sampling=GREEDY) for request in REQUESTS[:8]]


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
    return [engine(tp=1, depth=1).run(requests) for requests in (REQUESTS, GREEDY_REQUESTS)]


@pytest.mark.parametrize(
    ("tp", "depth"),
    [(1, 1), (1, 2), *(pytest.param(tp, depth, marks=pytest.mark.slow) for tp in (2, 4) for depth in (1, 2))],
)
def test_tokens_are_those_of_single_steps_and_nothing_is_compiled(
    engine: Build, expected: list[dict[str, list[int]]], compilations: list[str], tp: int, depth: int
) -> None:
    single, many = engine(tp=tp, depth=depth), engine(tp=tp, depth=depth, decode_steps=STEPS)
    compilations.clear()
    assert [many.run(requests) for requests in (REQUESTS, GREEDY_REQUESTS)] == expected
    assert not compilations
    assert [single.run(requests) for requests in (REQUESTS, GREEDY_REQUESTS)] == expected
    assert many.loop.scheduler.stats().steps < single.loop.scheduler.stats().steps * 3 / 4


def test_tokens_are_those_of_single_steps_where_pages_are_few(
    engine: Build, expected: list[dict[str, list[int]]]
) -> None:
    small, results = noted(engine(tp=1, decode_steps=STEPS), num_pages=30)
    assert small.run(REQUESTS) == expected[0]
    assert small.loop.scheduler.stats().preemptions > 0
    assert results


def test_a_row_that_stopped_does_nothing_in_the_loop_that_is_queued_behind(engine: Build) -> None:
    request = Request(
        request_id="r",
        prompt_token_ids=(5, 6, 7),
        max_tokens=20,
        sampling=TokenSampling(temperature=1.0, seed=3),
    )
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


SLOTS, PAGES = 5, 4000
ROUTE = Route.ALL_TO_ALL


class Ranks:
    """The programs of decode steps over four ranks, compiled as an executor would."""

    def __init__(self, model: Decoder) -> None:
        self.program = StepProgram(
            model=model.config,
            mesh=model.mesh,
            axis=TP,
            page_size=4,
            sampling=SamplingMode.SHARDED,
            layers=LayerLoop.SCANNED,
        )
        self.weights = model.weights()
        self.layout = layout(Bucket(4, 4), 4)
        self.loop = DecodeLoop(rows=4, route=ROUTE, steps=STEPS)
        state = self.state()
        forward = jit_forward(self.program, self.layout, self.weights).lower(
            self.weights, state.cache, state.sampler.last_token_Z, self.program.ints(self.layout.num_words)
        )
        sample = jit_sample(self.program, ROUTE).lower(
            state.sampler, self.program.logits(4), self.program.ints(12)
        )
        self.loops = DecodeLoops(self.program, max_steps=STEPS)
        self.loops.use_weights({LayerLoop.SCANNED: self.weights}, self.weights)
        self.decode = self.loops.lower(self.loop, self.weights, state).compile()
        self.loops.use({self.loop: self.decode})
        self.forward, self.sample = forward.compile(), sample.compile()

    def state(self, *params: SlotParams) -> DeviceState:
        """Slots that have said token 7 at position 0, with these parameters."""
        model, ranks = self.program.model, self.program.mesh.size
        shape = StateShape(
            num_layers=model.num_layers,
            num_pages=PAGES,
            page_size=4,
            num_kv_heads=model.kv_heads_at(ranks),
            head_dim=model.head_dim,
            num_slots=SLOTS,
            pages_per_slot=8,
        )
        cache, sampler = plan_state(shape, self.program.mesh, axis=TP, kv_dtype=KvDtype.FLOAT32).make()
        sampler = sampler._replace(last_token_Z=sampler.last_token_Z + 7)
        return DeviceState(cache, admit(sampler, pack_params(params, padding_slot=SLOTS - 1)))

    def single_steps(self, plan: StepPlan, state: DeviceState) -> list[list[int]]:
        """The tokens of each row, step by step until it has taken all that it was given."""
        said: list[list[int]] = [[] for _ in range(plan.num_rows)]
        for step in range(plan.num_steps):
            rows = np.flatnonzero(plan.steps > step).astype(np.int32)
            one = plan.nth_step(step, rows)
            forward = self.forward(
                self.weights, state.cache, state.sampler.last_token_Z, pack(one, self.layout, padding_slot=4)
            )
            sampled = self.sample(state.sampler, forward.logits_RV, pack_rows(one, 4, padding_slot=4))
            state = DeviceState(forward.cache, sampled.state)
            for row, token in zip(rows.tolist(), np.asarray(sampled.id_R).tolist(), strict=False):
                said[row].append(token)
        return said

    def looped(self, plan: StepPlan, state: DeviceState) -> list[list[int]]:
        """The same by one call."""
        words = pack_steps(plan, loop_layout(self.loop, 4), padding_slot=4)
        result_XR = np.asarray(self.loops.run(self.loop, words, state).result_XR)
        return [result_XR[: result_XR[-1, row], row].tolist() for row in range(plan.num_rows)]


def _params(slot: int, *stop_ids: int) -> SlotParams:
    return SlotParams(
        slot=slot,
        sampling=TokenSampling(temperature=1.0, top_p=0.9, seed=slot),
        banned_until=0,
        stop_ids=stop_ids,
    )


def test_ranks_draw_the_tokens_of_single_steps_in_a_cache_written_in_place(decoder: Build) -> None:
    ranks = Ranks(decoder(4))
    slots = np.array([2, 0, 3], np.int32)
    plan = StepPlan(
        step=0,
        request_ids=("a", "b", "c"),
        epochs=np.ones(3, np.int32),
        slots=slots,
        starts=np.zeros(3, np.int32),
        counts=np.ones(3, np.int32),
        samples=np.ones(3, np.bool_),
        token_ids=np.full(3, TOKEN_ON_DEVICE, np.int32),
        update_slots=slots,
        update_columns=np.zeros(3, np.int32),
        update_pages=np.array([5, 9, 1], np.int32),
        steps=np.array([4, 4, 3], np.int32),
    )
    free = ranks.single_steps(plan, ranks.state(*map(_params, slots.tolist())))
    assert [len(tokens) for tokens in free] == [4, 4, 3]
    stop = free[0][1]
    assert stop != free[0][0]
    assert ranks.looped(plan, ranks.state(*map(_params, slots.tolist()))) == free
    stopping = ranks.state(_params(2, stop), _params(0), _params(3, 7))
    assert ranks.looped(plan, stopping) == [free[0][:2], free[1], []]

    memory, pool_bytes = ranks.decode.memory_analysis(), 2 * 3 * PAGES * 4 * 8 * 8 * 4 // 4
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 4
    kinds = [one.kind for one in collectives(parse(ranks.decode.as_text()))]
    embedding, layer = 1, 2
    assert sorted(kinds) == ["all-gather", *["all-reduce"] * (embedding + layer), "all-to-all"]
