"""Small engines on virtual devices: a random model, the shipped scheduler, loop and executor."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import pytest

from albireo_jax.core.config import KvDtype, SamplingMode, SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.plan import TokenConstraint
from albireo_jax.core.types import Request
from albireo_jax.engine.loop import EngineLoop
from albireo_jax.engine.timeline import Timeline
from albireo_jax.nn.decoder import DecoderWeights
from albireo_jax.nn.module import Decoder
from albireo_jax.nn.shapes import weight_shapes
from albireo_jax.nn.sharding import TP, make_mesh, named_sharding
from albireo_jax.runtime.batch import bucket_grid
from albireo_jax.runtime.compile import compile_all
from albireo_jax.runtime.decode_loop import DecodeLoops
from albireo_jax.runtime.executor import JaxExecutor
from albireo_jax.runtime.logit_rule_programs import LogitRulesShape, new_rules
from albireo_jax.runtime.state import DeviceState, StateShape, plan_state
from albireo_jax.runtime.step import LayerLoop, StepProgram
from albireo_jax.sched.scheduler import Scheduler

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=3,
    hidden_size=64,
    intermediate_size=128,
    num_heads=16,
    num_kv_heads=8,
    head_dim=8,
    vocab_size=105,
    max_position=192,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="session")
def shape() -> ModelConfig:
    """The shape of the small model of these tests."""
    return MODEL


@dataclass(frozen=True, kw_only=True)
class EngineShape:
    """What a small engine is built from; equal shapes share one engine's executables."""

    tp: int = 1
    depth: int = 2
    sampling: SamplingMode = SamplingMode.SHARDED
    max_rows: int = 8
    max_step_tokens: int = 48
    num_pages: int = 400
    page_size: int = 4
    kv_dtype: KvDtype = KvDtype.FLOAT32
    num_host_pages: int = 0
    layers: LayerLoop = LayerLoop.SCANNED
    max_logprobs: int = 0
    decode_steps: int = 1
    all_buckets: bool = False
    """Compile the whole grid, as a served engine does, and not only its two largest kinds of steps."""


@dataclass(frozen=True, kw_only=True)
class SmallEngine:
    """A loop and what the tests look at behind it."""

    model: Decoder
    program: StepProgram
    executor: JaxExecutor
    loop: EngineLoop

    def run(
        self,
        requests: Sequence[Request],
        *,
        constraints: Mapping[str, TokenConstraint] = MappingProxyType({}),
    ) -> dict[str, list[int]]:
        """Token ids of each request; every step is bounded by what the requests can need.

        `constraints` are those of the requests by id.
        """
        for request in requests:
            self.loop.scheduler.add(request, constraints.get(request.request_id))
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        bound = 100 + 20 * sum(len(request.prompt_token_ids) + request.max_tokens for request in requests)
        for _ in range(bound):
            if not self.loop.has_work:
                break
            for output in self.loop.step():
                assert output.token_id is not None
                tokens[output.request_id].append(output.token_id)
        assert not self.loop.has_work
        assert self.loop.scheduler.stats().pages_in_use == 0
        return tokens


@cache
def decoder(tp: int) -> Decoder:
    """The same random weights at every degree."""
    mesh = make_mesh(tp)
    draw = np.random.default_rng(0)
    arrays = {
        name: (draw.normal(size=shape) * 0.3).astype(np.float32)
        for name, shape in weight_shapes(MODEL, 1).items()
    }
    padding = MODEL.padded_vocab_size(tp) - MODEL.vocab_size
    for name in ("embed_VD", "lm_head_VD"):
        arrays[name] = np.pad(arrays[name], ((0, padding), (0, 0)))
    placed = {name: jax.device_put(array, named_sharding(mesh, name)) for name, array in arrays.items()}
    return Decoder(MODEL, DecoderWeights(**placed), mesh)


@cache
def _executor(shape: EngineShape) -> JaxExecutor:
    model = decoder(shape.tp)
    program = StepProgram(
        model=MODEL,
        mesh=model.mesh,
        axis=TP,
        page_size=shape.page_size,
        sampling=shape.sampling,
        layers=shape.layers,
    )
    sizes = StateShape(
        num_layers=MODEL.num_layers,
        num_pages=shape.num_pages + 1,
        page_size=shape.page_size,
        num_kv_heads=MODEL.kv_heads_at(shape.tp),
        head_dim=MODEL.head_dim,
        num_slots=shape.max_rows + 1,
        pages_per_slot=MODEL.max_position // shape.page_size,
    )
    state = plan_state(sizes, model.mesh, axis=TP, kv_dtype=shape.kv_dtype)
    grid = bucket_grid(shape.max_rows, shape.max_step_tokens)
    largest = (max(bucket for bucket in grid if bucket.is_decode), max(grid))
    buckets = grid if shape.all_buckets else largest
    rules = LogitRulesShape(
        num_slots=sizes.num_slots,
        padded_vocab=MODEL.padded_vocab_size(shape.tp),
        max_len=MODEL.max_position,
    )
    return JaxExecutor(
        program,
        model.weights(),
        state,
        buckets=buckets,
        rules=new_rules(rules, model.mesh, axis=TP),
        max_len=rules.max_len,
        max_logprobs=shape.max_logprobs,
        num_host_pages=shape.num_host_pages,
    )


@cache
def _with_loops(shape: EngineShape) -> JaxExecutor:
    """The executor of engines that take single steps, which takes several from now on as well."""
    executor = _executor(replace(shape, decode_steps=1))
    loops = DecodeLoops(executor.program, max_steps=shape.decode_steps)
    arranged = {executor.program.layer_loop(bucket): weights for bucket, weights in executor._weights.items()}
    loops.use_weights(arranged, decoder(shape.tp).weights())
    state = DeviceState(executor._cache, executor._sampler)
    loops.use(compile_all(loops.programs(executor.buckets, state)))
    executor._loops = loops
    executor._packer._decode_steps = shape.decode_steps
    return executor


def small_engine(shape: EngineShape) -> SmallEngine:
    """A fresh scheduler and loop over an executor that engines of any depth share."""
    build = _executor if shape.decode_steps == 1 else _with_loops
    executor = build(replace(shape, depth=1))
    limits = EngineLimits(
        max_model_len=MODEL.max_position,
        vocab_size=MODEL.vocab_size,
        num_pages=shape.num_pages,
        page_size=shape.page_size,
        max_logprobs=shape.max_logprobs,
        num_host_pages=shape.num_host_pages,
    )
    config = SchedulerConfig(
        max_rows=shape.max_rows,
        max_step_tokens=shape.max_step_tokens,
        depth=shape.depth,
        decode_steps=shape.decode_steps,
    )
    loop = EngineLoop(Scheduler(config, limits), executor, depth=shape.depth, timeline=Timeline())
    return SmallEngine(model=decoder(shape.tp), program=executor.program, executor=executor, loop=loop)


@pytest.fixture(scope="session")
def engine() -> Callable[..., SmallEngine]:
    """Builds a SmallEngine from the fields of an EngineShape."""
    return lambda **fields: small_engine(EngineShape(**fields))


@pytest.fixture(scope="session", name="decoder")
def decoder_at() -> Callable[[int], Decoder]:
    """The model of all small engines at a degree of parallelism."""
    return decoder


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Grows by one entry per program that XLA compiles."""
    events: list[str] = []

    def count(event: str, _: float, **__: Any) -> None:
        if event == _COMPILE_EVENT:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    yield events
    jax.monitoring.unregister_event_duration_listener(count)
