"""Results of the engine's programs on this device beside a CPU's: sampled tokens, written pages, whole steps.

The programs are those of the step and of sampling, so that whatever kernels this device's engine has are in
them. Both devices get the same logits to sample from, and the same weights; a CPU computes steps in float32.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from albireo_jax.core.config import KvDtype, SamplingMode
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.plan import SlotParams
from albireo_jax.core.token_sampling import TokenSampling
from albireo_jax.nn.sharding import TP
from albireo_jax.ops.kv_cache import KvCache
from albireo_jax.ops.kv_write import token_pages, write_kv
from albireo_jax.runtime.batch import ADMISSIONS, pack_params
from albireo_jax.runtime.sampling_programs import admit, choose_sampling, jit_sample, routes, slot_route
from albireo_jax.runtime.state import SamplerState, StateShape, plan_state
from albireo_jax.runtime.step import LayerLoop, StepProgram
from albireo_jax.runtime.step_attention import BY_OPERATIONS
from albireo_jax.sampling.routes import Route
from benchmarks.gpu_check.attention_cases import (
    LAYER,
    LAYERS,
    PAGE_DTYPES,
    cache_of,
    step_attention,
)
from benchmarks.gpu_check.check import LARGE, Check
from benchmarks.gpu_programs.compiled_programs import mesh_of

_ROWS, _TIMED_ROWS = 64, (64, 2, 256)
_SMALL_ROWS, _SMALL_TIMED_ROWS = 8, (8,)
_VOCABULARIES = (512, 128256)
_REPEATS, _CALLS = 3, 20
_Parameters = dict[str, Sequence[float]]
_SELECTED = "drawn, filtered"
_KINDS: dict[str, _Parameters] = {
    "greedy": {},
    "drawn, unfiltered": {"temperature": [0.7, 1.3]},
    "drawn, top-p": {"temperature": [0.8], "top_p": [0.9]},
    _SELECTED: {
        "temperature": [0.8, 0.0],
        "top_p": [0.9, 1.0, 0.5],
        "top_k": [0, 40],
        "min_p": [0.0, 0.0, 0.05],
    },
}
"""Parameters of rows by what they ask for; each list is repeated over the rows."""


def run_sampling(check: Check) -> None:
    """Sampled tokens first, then pages and a layer's kernels, then whole steps, then times of sampling."""
    from benchmarks.gpu_check.layer_kernels import note_layer_kernels
    from benchmarks.gpu_check.whole_steps import note_steps

    figures = check.figures
    rows = _SMALL_ROWS if check.small else _ROWS
    for kind in _KINDS:
        with figures.attempt(f"sampling, {kind}"):
            share = equal_tokens(check, kind, rows=rows)
            figures.add("sampling", kind, metric="share of equal tokens", unit="1", samples=[share])
    if not check.on_cpu:
        with figures.attempt(f"sampling, {_SELECTED}, by operations"):
            share = equal_selections(check, _SELECTED, rows=rows)
            metric = "share of tokens that operations of XLA draw here"
            figures.add("sampling", _SELECTED, metric=metric, unit="1", samples=[share])
    for name, dtype in PAGE_DTYPES.items():
        with figures.attempt(f"KV write, {name}"):
            shares = _equal_bytes(dtype, head_dim=16 if check.small else 128)
            figures.add("KV write", name, metric="share of equal bytes", unit="1", samples=shares)
    note_layer_kernels(check)
    note_steps(check)
    for count in _SMALL_TIMED_ROWS if check.small else _TIMED_ROWS:
        for kind in _KINDS:
            if figures.has_time(f"time of sampling, {kind}, {count} rows"):
                with figures.attempt(f"time of sampling, {kind}, {count} rows"):
                    samples = _times_us(check, kind, rows=count)
                    figures.add(
                        "sampling", f"{kind}, {count} rows", metric="time", unit="us", samples=samples
                    )


def program_on(check: Check, model: ModelConfig, device: Any) -> StepProgram:
    """The step program as an engine on this one device has it."""
    mesh = mesh_of([device], 1)
    return StepProgram(
        model=model,
        mesh=mesh,
        axis=TP,
        page_size=16,
        sampling=SamplingMode.SHARDED,
        layers=LayerLoop.UNROLLED,
        attention=BY_OPERATIONS if device.platform == "cpu" else step_attention(check),
        sample_launch=choose_sampling(mesh),
    )


def equal_tokens(check: Check, kind: str, *, rows: int) -> float:
    """The share of rows for which this device draws the token that the CPU draws."""
    here, there = (
        np.asarray(_Sampling(check, device, kind, rows=rows).draw())
        for device in (jax.devices()[0], jax.devices("cpu")[0])
    )
    return float(np.mean(here == there))


def equal_selections(check: Check, kind: str, *, rows: int) -> float:
    """The share of rows for which kernels and operations of XLA draw the same token on this device."""
    kernels, operations = (
        np.asarray(_Sampling(check, jax.devices()[0], kind, rows=rows, by_kernels=by_kernels).draw())
        for by_kernels in (True, False)
    )
    return float(np.mean(kernels == operations))


class _Sampling:
    """The engine's sampling of rows of one kind on one device."""

    def __init__(self, check: Check, device: Any, kind: str, *, rows: int, by_kernels: bool = True) -> None:
        model = replace(check.shape(LARGE), vocab_size=_VOCABULARIES[not check.small])
        program = program_on(check, model, device)
        if not by_kernels:
            program = replace(program, sample_launch=None)
        slots = _slots(_KINDS[kind], rows=rows)
        route = max((slot_route(slot, routes(program)) for slot in slots), default=Route.GREEDY)
        self._sample = jit_sample(program, route)
        self._state = _sampler_state(program, slots)
        self._buffer = np.concatenate([np.arange(rows), np.arange(rows) + 17, np.ones(rows)]).astype(np.int32)
        logits_RV = _logits(rows=rows, vocab=model.vocab_size)
        self._logits_RV = jax.device_put(logits_RV, program.logits(rows).sharding)

    def draw(self) -> Array:
        """The rows' tokens; the same each time."""
        self._state, id_R = self._sample(self._state, self._logits_RV, self._buffer)
        return id_R


def _slots(asked: _Parameters, *, rows: int) -> list[SlotParams]:
    neutral = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

    def of(name: str, row: int) -> float:
        values = asked.get(name, [neutral[name]])
        return values[row % len(values)]

    return [
        SlotParams(
            slot=row,
            sampling=TokenSampling(
                temperature=of("temperature", row),
                top_k=int(of("top_k", row)),
                top_p=of("top_p", row),
                min_p=of("min_p", row),
                seed=row,
            ),
            banned_until=0,
            stop_ids=(),
        )
        for row in range(rows)
    ]


def _sampler_state(program: StepProgram, slots: Sequence[SlotParams]) -> SamplerState:
    """The state of a sampler whose slots these rows have, and one more."""
    shape = StateShape(
        num_layers=1,
        num_pages=1,
        page_size=program.page_size,
        num_kv_heads=1,
        head_dim=8,
        num_slots=len(slots) + 1,
        pages_per_slot=1,
    )
    state = plan_state(shape, program.mesh, axis=program.axis, kv_dtype=KvDtype.BFLOAT16).make().sampler
    for first in range(0, len(slots), ADMISSIONS):
        state = admit(state, pack_params(slots[first : first + ADMISSIONS], padding_slot=len(slots)))
    return state


def _logits(*, rows: int, vocab: int) -> NDArray[np.float32]:
    """Logits as peaked as a language model's, in steps of 1/64 so that some tie."""
    drawn_RV = 4 * np.random.default_rng(0).standard_normal((rows, vocab)).astype(np.float32)
    return np.round(64 * drawn_RV) / np.float32(64)


def _times_us(check: Check, kind: str, *, rows: int) -> list[float]:
    """Microseconds of a call among others that are queued, a mean per repeat."""
    sampling = _Sampling(check, jax.devices()[0], kind, rows=rows)
    sampling.draw().block_until_ready()
    times_us: list[float] = []
    for _ in range(_REPEATS):
        began_s = time.perf_counter()
        for _ in range(_CALLS - 1):
            sampling.draw()
        sampling.draw().block_until_ready()
        times_us.append(1e6 * (time.perf_counter() - began_s) / _CALLS)
    return times_us


def _on_both(call: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """The results of a call on the default device and on the CPU, as NumPy arrays."""
    cpu = jax.devices("cpu")[0]
    here = jax.jit(call)(*jax.device_put(arguments))
    with jax.default_device(cpu):
        there = jax.jit(call)(*jax.device_put(arguments, cpu))
    return jax.tree.map(np.asarray, here), jax.tree.map(np.asarray, there)


def _equal_bytes(dtype: jnp.dtype, *, head_dim: int) -> list[float]:
    """Shares of bytes of pages, and of scales, that are the CPU's after a write; NaN where none wrote."""
    random = np.random.default_rng(0)
    tokens, heads, pages, page_size = 33, 2, 12, 16
    new = [random.standard_normal((tokens, heads, head_dim)).astype(np.float32) for _ in range(2)]
    before = cache_of(np.full((2, LAYERS, pages, page_size, heads, head_dim), np.nan, np.float32), dtype)
    table_RM = 1 + random.permutation(pages - 1)[:8].reshape(2, 4).astype(np.int32)
    row_T = np.array([0] * 20 + [1] * 12 + [2], np.int32)  # the last is padding
    position_T = np.array([*range(13, 33), *range(40, 52), 0], np.int32)

    def write(cache: KvCache, k_TNK: Array, v_TNK: Array) -> KvCache:
        places = token_pages(
            jnp.asarray(table_RM), jnp.asarray(row_T), jnp.asarray(position_T), page_size=page_size
        )
        return write_kv(cache, k_TNK=k_TNK, v_TNK=v_TNK, layer=LAYER, pages=places)

    here, there = _on_both(write, before, *new)
    pairs = zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True)
    return [float(np.mean(_bytes(mine) == _bytes(theirs))) for mine, theirs in pairs]


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).view(np.uint8)
