"""Steps whose attention is the CUDA kernels, run on the CPU, beside steps of XLA operations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from albireo_jax.core.config import AttentionBackend, Dtype, KvDtype, SamplingMode
from albireo_jax.core.errors import ModelError
from albireo_jax.core.plan import StepPlan
from albireo_jax.nn.module import Decoder
from albireo_jax.nn.sharding import TP, make_mesh
from albireo_jax.ops.attention_ref import reference_attention
from albireo_jax.runtime.attention_choice import choose_attention
from albireo_jax.runtime.batch import Bucket, layout, pack
from albireo_jax.runtime.sampling_programs import choose_sampling
from albireo_jax.runtime.state import StateShape, plan_state
from albireo_jax.runtime.step import LayerLoop, StepProgram, jit_forward
from albireo_jax.runtime.step_attention import (
    BY_OPERATIONS,
    AttentionByKernels,
    AttentionByOperations,
    StepAttention,
)
from tests.labs.cuda_lab import Order, launch_on_cpu, needs_compiler

PAGE_SIZE = 4
TOKENS = np.random.default_rng(0).integers(0, 105, 51).astype(np.int32)
STEPS = ((Bucket(32, 2), 0, 30), (Bucket(32, 2), 30, 50), (Bucket(2, 2), 50, 51))


def _plan(start: int, end: int) -> StepPlan:
    none = np.zeros(0, np.int32)
    columns = np.arange(-(-start // PAGE_SIZE), -(-end // PAGE_SIZE), dtype=np.int32)
    return StepPlan(
        step=0,
        request_ids=("r",),
        epochs=none,
        slots=np.array([1], np.int32),
        starts=np.array([start], np.int32),
        counts=np.array([end - start], np.int32),
        samples=np.array([True]),
        token_ids=TOKENS[start:end],
        update_slots=np.ones_like(columns),
        update_columns=columns,
        update_pages=20 + columns,
    )


def _logits(model: Decoder, *, dtype: Any, kind: KvDtype, attention: StepAttention) -> np.ndarray:
    """Logits after two chunks of a prompt and a decode step, each of which reads what lies before it."""
    program = StepProgram(
        model=model.config,
        mesh=model.mesh,
        axis=TP,
        page_size=PAGE_SIZE,
        sampling=SamplingMode.SHARDED,
        layers=LayerLoop.SCANNED,
        attention=attention,
    )
    weights = jax.tree.map(lambda array: array.astype(dtype), model.weights())
    shape = StateShape(
        num_layers=model.config.num_layers,
        num_pages=40,
        page_size=PAGE_SIZE,
        num_kv_heads=model.config.kv_heads_at(model.mesh.size),
        head_dim=model.config.head_dim,
        num_slots=3,
        pages_per_slot=16,
    )
    state = plan_state(shape, model.mesh, axis=TP, kv_dtype=kind).make()
    cache, found = state.cache, []
    for bucket, start, end in STEPS:
        how = layout(bucket, PAGE_SIZE)
        forward = jit_forward(program, how, weights)
        out = forward(
            weights, cache, state.sampler.last_token_Z, pack(_plan(start, end), how, padding_slot=2)
        )
        cache = out.cache
        found.append(np.asarray(out.logits_RV)[0, :105])
    return np.stack(found)


@needs_compiler
def test_steps_by_kernels_are_as_exact_as_steps_by_operations(decoder: Callable[[int], Decoder]) -> None:
    model, by_kernels = decoder(2), AttentionByKernels(launch_on_cpu(Order(0, is_eager=False)))
    exact = _logits(model, dtype=jnp.float32, kind=KvDtype.FLOAT32, attention=BY_OPERATIONS)
    loop = _logits(model, dtype=jnp.bfloat16, kind=KvDtype.BFLOAT16, attention=BY_OPERATIONS)
    kernels = _logits(model, dtype=jnp.bfloat16, kind=KvDtype.BFLOAT16, attention=by_kernels)
    scale = np.abs(exact).mean()
    loop_error, kernel_error = (np.abs(each - exact).mean() / scale for each in (loop, kernels))
    assert 0 < loop_error < 0.05
    assert kernel_error < 1.2 * loop_error


def test_kernels_are_chosen_where_there_are_gpus_only(decoder: Callable[[int], Decoder]) -> None:
    model, mesh = decoder(1).config, make_mesh(1)
    asked = {"dtype": Dtype.BFLOAT16, "kv_dtype": KvDtype.AUTO}
    assert choose_attention(AttentionBackend.AUTO, model, mesh, **asked) == BY_OPERATIONS
    assert choose_attention(AttentionBackend.XLA, model, mesh, **asked) == BY_OPERATIONS
    assert choose_sampling(mesh) is None
    with pytest.raises(ModelError, match="attention cuda needs NVIDIA GPUs, not devices of kind cpu"):
        choose_attention(AttentionBackend.CUDA, model, mesh, **asked)


def test_a_step_attends_by_the_function_that_it_is_given(decoder: Callable[[int], Decoder]) -> None:
    """The oracle in place of the loop gives the same logits up to rounding."""
    exact = {"dtype": jnp.float32, "kind": KvDtype.FLOAT32}
    loop = _logits(decoder(2), **exact, attention=BY_OPERATIONS)
    oracle = _logits(decoder(2), **exact, attention=AttentionByOperations(reference_attention))
    assert not np.array_equal(oracle, loop)
    np.testing.assert_allclose(oracle, loop, atol=1e-4 * np.abs(loop).max())
