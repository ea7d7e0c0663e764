"""Whole forward passes in bfloat16 on this device against the same in float32 on the CPU.

A step with prompts fills pages, and a decode step reads them: so rotation, norms of keys, writes of keys and
values, attention and products are held to an oracle together, whichever kernels do them.
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from albireo_jax.core.config import KvDtype
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.plan import StepPlan
from albireo_jax.nn.decoder import DecoderWeights
from albireo_jax.ops.kv_cache import dequantise
from albireo_jax.runtime.batch import Bucket, layout, pack
from albireo_jax.runtime.state import CacheState, StateShape, plan_state
from albireo_jax.runtime.step import ForwardOutput, StepProgram, jit_forward
from benchmarks.gpu_check.check import Check
from benchmarks.gpu_check.numerics import program_on
from benchmarks.gpu_programs.compiled_programs import weights_of
from benchmarks.lib.plain_plans import plain_plan

_SHAPE = partial(
    ModelConfig,
    num_layers=2,
    num_kv_heads=2,
    vocab_size=1024,
    max_position=2048,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
)
_SIZES = (
    {"hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "head_dim": 16},
    {"hidden_size": 1024, "intermediate_size": 2048, "num_heads": 8, "head_dim": 128},
)


class _CheckedModel(NamedTuple):
    architecture: str
    kv_dtype: KvDtype
    more: Mapping[str, Any] = MappingProxyType({})


_KINDS = (
    _CheckedModel("LlamaForCausalLM", KvDtype.BFLOAT16),
    _CheckedModel("Qwen3ForCausalLM", KvDtype.INT8, {"qk_norm": True}),
    _CheckedModel("Qwen2ForCausalLM", KvDtype.FP8, {"attention_bias": True}),
)
_COUNTS = (20, 1, 37)
_PAGES_PER_ROW = 4
_dequantise = jax.jit(dequantise)
_STEPS = ((Bucket(64, 3), (0, 0, 0), _COUNTS), (Bucket(3, 3), _COUNTS, (1, 1, 1)))


def note_steps(check: Check) -> None:
    """Every kind of model and of pages, each two steps; a small check only the first kind."""
    figures = check.figures
    for kind in _KINDS[:1] if check.small else _KINDS:
        case = f"{kind.architecture} {kind.kv_dtype}"
        if figures.has_time(f"step, {case}"):
            with figures.attempt(f"step, {case}"):
                model = _SHAPE(architecture=kind.architecture, **_SIZES[not check.small], **kind.more)
                errors = step_errors(check, model, kind.kv_dtype)
                figures.add("step", case, metric="largest error", unit="1", samples=[max(errors)])


def step_errors(check: Check, model: ModelConfig, kv_dtype: KvDtype) -> list[float]:
    """The largest errors of each step's logits and pages, as shares of the largest value; NaN is one."""
    here, cpu = jax.devices()[0], jax.devices("cpu")[0]
    weights = _weights(program_on(check, model, cpu))
    got = _outputs(program_on(check, model, here), weights, kv_dtype, dtype=jnp.dtype(jnp.bfloat16))
    want = _outputs(program_on(check, model, cpu), weights, kv_dtype, dtype=jnp.dtype(jnp.float32))
    return [
        float(np.max(np.abs(mine - theirs)) / np.max(np.abs(theirs)))
        for mine, theirs in zip(got, want, strict=True)
    ]


def _weights(program: StepProgram) -> DecoderWeights:
    """Weights that keep the scale of activations, exact in bfloat16, as arrays of the host."""
    random = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        drawn = random.standard_normal(shape).astype(np.float32)
        drawn = 1 + drawn / 8 if "norm" in name else drawn * program.model.hidden_size**-0.5
        return drawn.astype(jnp.bfloat16).astype(np.float32)

    shapes = weights_of(program)._asdict()
    return DecoderWeights(
        **{name: None if each is None else draw(name, each.shape) for name, each in shapes.items()}  # type: ignore[arg-type]
    )


def _outputs(
    program: StepProgram, weights: DecoderWeights, kv_dtype: KvDtype, *, dtype: jnp.dtype
) -> list[NDArray[np.float32]]:
    """Logits of both steps, computed in `dtype` on the program's device, and the pages after each."""
    device = program.mesh.devices.flat[0]

    def place(array: NDArray[np.float32]) -> Array:
        return jax.device_put(array.astype(dtype), device)

    placed = jax.tree.map(place, weights)
    cache = _cache(program, kv_dtype)
    last_token_Z = jax.device_put(np.zeros(len(_COUNTS) + 1, np.int32), device)
    found: list[NDArray[np.float32]] = []
    for bucket, starts, counts in _STEPS:
        shape = layout(bucket, program.page_size)
        buffer = pack(_plan(starts, counts), shape, padding_slot=len(_COUNTS))
        forward = jit_forward(program, shape, placed)
        done: ForwardOutput = forward(placed, cache, last_token_Z, jax.device_put(buffer, device))
        cache = done.cache
        pages = _dequantise(cache.kv)
        found += [np.asarray(x) for x in (done.logits_RV, pages.k_LPSNK[:, 1:], pages.v_LPSNK[:, 1:])]
    return found


def _cache(program: StepProgram, kv_dtype: KvDtype) -> CacheState:
    """Empty pages, those of each row in no order."""
    rows, model = len(_COUNTS), program.model
    shape = StateShape(
        num_layers=model.num_layers,
        num_pages=rows * _PAGES_PER_ROW + 1,
        page_size=program.page_size,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        num_slots=rows + 1,
        pages_per_slot=_PAGES_PER_ROW,
    )
    cache = plan_state(shape, program.mesh, axis=program.axis, kv_dtype=kv_dtype).make().cache
    table_ZM = np.zeros((rows + 1, _PAGES_PER_ROW), np.int32)
    table_ZM[:rows] = 1 + np.random.default_rng(1).permutation(rows * _PAGES_PER_ROW).reshape(rows, -1)
    placed: Array = jax.device_put(table_ZM, cache.page_table_ZM.sharding)
    return cache._replace(page_table_ZM=placed)


def _plan(starts: tuple[int, ...], counts: tuple[int, ...]) -> StepPlan:
    tokens = np.random.default_rng(sum(starts)).integers(0, 1000, sum(counts))
    return plain_plan(starts, counts, token_ids=tokens.astype(np.int32))
