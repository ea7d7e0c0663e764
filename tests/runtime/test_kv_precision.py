"""Engines whose keys and values have a precision of their own: bytes, tokens, logits, and the program."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from albireo_jax.core.config import Dtype, KvDtype
from albireo_jax.core.memory import page_bytes
from albireo_jax.core.plan import StepPlan
from albireo_jax.core.token_sampling import TokenSampling
from albireo_jax.core.types import Request
from albireo_jax.nn.sharding import TP, make_mesh
from albireo_jax.runtime.batch import Bucket, layout, pack
from albireo_jax.runtime.state import StateShape, plan_state
from albireo_jax.runtime.step import jit_forward

Build = Callable[..., Any]
KINDS = [kind for kind in KvDtype if kind is not KvDtype.AUTO]
QUANTISED = [KvDtype.INT8, KvDtype.FP8]
PAGE_SIZE = 4


def _state(model: Any, tp: int, kind: KvDtype) -> Any:
    shape = StateShape(
        num_layers=model.num_layers,
        num_pages=40,
        page_size=PAGE_SIZE,
        num_kv_heads=model.kv_heads_at(tp),
        head_dim=model.head_dim,
        num_slots=3,
        pages_per_slot=16,
    )
    return plan_state(shape, make_mesh(tp), axis=TP, kv_dtype=kind).make()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tp", [1, 4])
def test_the_state_has_the_bytes_that_the_memory_plan_counts(engine: Build, tp: int, kind: KvDtype) -> None:
    model = engine(tp=tp).program.model
    page = page_bytes(model, tp=tp, page_size=PAGE_SIZE, dtype=Dtype.FLOAT32, kv_dtype=kind)
    arrays = jax.tree.leaves(_state(model, tp, kind).cache.kv)
    assert sum(array.nbytes for array in arrays) == 40 * page * tp
    for array in arrays:
        assert {shard.data.nbytes for shard in array.addressable_shards} == {array.nbytes // tp}


def _prompt_logits(engine: Build, tp: int, kind: KvDtype) -> tuple[np.ndarray, Any]:
    """Logits after a prompt of two chunks, whose second one reads the first from the cache; the cache."""
    small = engine(tp=tp)
    program, weights = small.program, small.model.weights()
    shape = layout(Bucket(32, 2), PAGE_SIZE)
    forward = jit_forward(program, shape, weights)
    state = _state(program.model, tp, kind)
    tokens = np.random.default_rng(0).integers(0, 105, 50).astype(np.int32)
    none = np.zeros(0, np.int32)
    cache, logits_RV = state.cache, None
    for start, end in ((0, 30), (30, 50)):
        columns = np.arange(-(-start // PAGE_SIZE), -(-end // PAGE_SIZE), dtype=np.int32)
        plan = StepPlan(
            step=0,
            request_ids=("r",),
            epochs=none,
            slots=np.array([1], np.int32),
            starts=np.array([start], np.int32),
            counts=np.array([end - start], np.int32),
            samples=np.array([True]),
            token_ids=tokens[start:end],
            update_slots=np.ones_like(columns),
            update_columns=columns,
            update_pages=20 + columns,
        )
        buffer = pack(plan, shape, padding_slot=2)
        out = forward(weights, cache, state.sampler.last_token_Z, buffer)
        cache, logits_RV = out.cache, np.asarray(out.logits_RV)
    assert logits_RV is not None
    return logits_RV[0, :105], cache.kv


@pytest.mark.parametrize(("kind", "bound"), [("bfloat16", 0.01), ("int8", 0.02), ("fp8", 0.1)])
def test_logits_are_near_those_of_float32_keys_and_values(engine: Build, kind: str, bound: float) -> None:
    exact_V, _ = _prompt_logits(engine, 1, KvDtype.FLOAT32)
    near_V, _ = _prompt_logits(engine, 1, KvDtype(kind))
    error = np.abs(near_V - exact_V).max() / np.abs(exact_V).max()
    assert 0 < error < bound


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("tp", [2, 4])
def test_first_layer_codes_and_scales_do_not_depend_on_t(engine: Build, tp: int, kind: KvDtype) -> None:
    """Later layers see sums over ranks, whose rounding may push a number over the edge between two codes."""
    (one_V, one), (other_V, other) = _prompt_logits(engine, 1, kind), _prompt_logits(engine, tp, kind)
    for array, wanted in zip(other, one, strict=True):
        np.testing.assert_array_equal(np.asarray(array)[0, 1:], np.asarray(wanted)[0, 1:])
    np.testing.assert_allclose(other_V, one_V, atol=0.02 * np.abs(one_V).max())


def _requests() -> list[Request]:
    draw = np.random.default_rng(5)
    return [
        Request(
            request_id=f"r{index}",
            prompt_token_ids=tuple(draw.integers(0, 105, 4 + 5 * index).tolist()),
            max_tokens=30,
            sampling=TokenSampling(temperature=0.8 * (index % 2), seed=index),
        )
        for index in range(6)
    ]


@pytest.mark.parametrize(("kind", "degrees"), [(KvDtype.INT8, (4,))])
def test_tokens_do_not_depend_on_t(engine: Build, kind: KvDtype, degrees: tuple[int, ...]) -> None:
    want = engine(tp=1, kv_dtype=kind).run(_requests())
    for tp in degrees:
        assert engine(tp=tp, kv_dtype=kind).run(_requests()) == want


def test_tokens_do_not_depend_on_preemption_and_depth(engine: Build) -> None:
    want = engine(tp=1, kv_dtype=KvDtype.INT8).run(_requests())
    small = engine(tp=1, kv_dtype=KvDtype.INT8, depth=1, num_pages=32)
    assert small.run(_requests()) == want
    assert small.loop.scheduler.stats().preemptions > 0


def test_pages_and_scales_are_aliased_and_never_copied(engine: Build, bfloat16_is_in_place: bool) -> None:
    small = engine(tp=2, kv_dtype=KvDtype.INT8, num_pages=16000)
    pool_bytes = 16001 * page_bytes(
        small.program.model, tp=2, page_size=PAGE_SIZE, dtype=Dtype.FLOAT32, kv_dtype=KvDtype.INT8
    )
    for bucket in (Bucket(8, 8), Bucket(64, 8)):
        memory = small.executor.compiled(bucket).memory_analysis()
        assert memory.alias_size_in_bytes >= pool_bytes
        assert memory.temp_size_in_bytes < pool_bytes / 4 or not bfloat16_is_in_place
