"""Attention on this device against float32 on the CPU.

It is called as the engine calls it, jitted, on bfloat16 queries. Pages that no row owns hold NaN, so that
reading one shows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from albireo_jax.ops.attention import PagedAttentionFn
from albireo_jax.ops.attention_cuda import cuda_attention
from albireo_jax.ops.attention_loop import loop_attention
from albireo_jax.ops.attention_ref import reference_attention
from albireo_jax.ops.cuda.kernels import LaunchFn, architecture_of, launch_on
from albireo_jax.ops.kv_cache import FP8_BITS, KvCache, dequantise, encode
from albireo_jax.runtime.step_attention import BY_OPERATIONS, AttentionByKernels, StepAttention
from benchmarks.gpu_check.check import Check

LAYERS, LAYER = 2, 1
_STATIC = ("layer", "scale", "sliding_window")
_expect = jax.jit(reference_attention, static_argnames=_STATIC)
_SMALL_HEADS = ({"heads": 2, "group": 3, "head_dim": 16},)
_LONGEST, _CHUNK = (70, 1500), (23, 77)
_HEADS = (
    {"heads": 8, "group": 4, "head_dim": 128},
    {"heads": 2, "group": 7, "head_dim": 64},
    {"heads": 8, "group": 1, "head_dim": 256},
    {"heads": 1, "group": 8, "head_dim": 128},
    {"heads": 8, "group": 5, "head_dim": 128},
    {"heads": 8, "group": 2, "head_dim": 128},
)
PAGE_DTYPES = {"bfloat16": jnp.dtype(jnp.bfloat16), "int8": jnp.dtype(jnp.int8), "fp8": FP8_BITS}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """A step of rows with `counts` queries each, over contexts of up to `longest` tokens."""

    heads: int
    group: int
    head_dim: int
    page_size: int
    counts: tuple[int, ...]
    longest: int
    kv_dtype: str
    window: int | None = None

    @property
    def name(self) -> str:
        """The case in a table."""
        kind = "decode" if set(self.counts) == {1} else "mixed"
        window = f" window {self.window}" if self.window else ""
        return (
            f"{kind} {self.heads}x{self.group}x{self.head_dim} page {self.page_size} {self.kv_dtype}{window}"
        )


class Step(NamedTuple):
    """Queries, the cache, and where rows and their pages are: what attention is called with."""

    q_TNGK: Array
    cache: KvCache
    rows: dict[str, Array]


def attention_cases(*, small: bool) -> Iterator[AttentionCase]:
    """Decode and mixed steps: of one model in all precisions, then windows and other heads, then the rest."""
    first, *others = _SMALL_HEADS if small else _HEADS
    longest, chunk = _LONGEST[not small], _CHUNK[not small]
    decode, mixed = kinds = (1,) * 7, (1, chunk, 0, 1, 5)
    case = partial(AttentionCase, longest=longest)
    for kv_dtype in PAGE_DTYPES:
        for counts in kinds:
            yield case(**first, page_size=16, counts=counts, kv_dtype=kv_dtype)
    for counts in kinds:
        yield case(**first, page_size=16, counts=counts, kv_dtype="bfloat16", window=longest // 3)
    for heads in others:
        yield case(**heads, page_size=16, counts=mixed, kv_dtype="bfloat16")
    for counts in kinds:
        yield case(**first, page_size=64, counts=counts, kv_dtype="bfloat16")
    for heads in others:
        yield case(**heads, page_size=16, counts=decode, kv_dtype="bfloat16")
        yield case(**heads, page_size=16, counts=mixed, kv_dtype="int8")


def attention_step(case: AttentionCase, *, seed: int) -> Step:
    """A random step of this case, on the device that is the default."""
    random = np.random.default_rng(seed)
    counts = np.array(case.counts)
    contexts = np.array([int(random.integers(max(count, 1), case.longest + 1)) for count in counts])
    contexts[counts == 0] = 0
    columns = -(-case.longest // case.page_size)
    num_pages = len(counts) * columns + 1
    table_RM = 1 + random.permutation(num_pages - 1).reshape(len(counts), columns)
    shape = (LAYERS, num_pages, case.page_size, case.heads, case.head_dim)
    pages = np.full((2, *shape), np.nan, np.float32)
    for row, context in enumerate(contexts):
        entry_C = np.arange(context)
        where = table_RM[row, entry_C // case.page_size], entry_C % case.page_size
        pages[:, :, *where] = random.standard_normal(pages[:, :, *where].shape)
    tokens = len(counts) if set(case.counts) == {1} else int(counts.sum()) + 3  # and some padding
    q_TNGK = random.standard_normal((tokens, case.heads, case.group, case.head_dim))
    return Step(
        q_TNGK=jnp.asarray(q_TNGK, jnp.bfloat16),
        cache=cache_of(pages, PAGE_DTYPES[case.kv_dtype]),
        rows={
            "row_start_R1": jnp.asarray([0, *np.cumsum(counts)], jnp.int32),
            "context_R": jnp.asarray(contexts, jnp.int32),
            "page_table_RM": jnp.asarray(table_RM, jnp.int32),
        },
    )


def attention_error(case: AttentionCase, *, seed: int, attend: PagedAttentionFn = loop_attention) -> float:
    """The largest difference between attention on this device and the reference in float32; NaN is one."""
    step, cpu, options = attention_step(case, seed=seed), jax.devices("cpu")[0], _options(case)
    got = np.asarray(_jitted(attend)(step.q_TNGK, step.cache, **step.rows, **options), np.float32)
    step = jax.device_put(step, cpu)
    with jax.default_device(cpu):  # in float32, so that all precisions of a step share what was compiled
        want = _expect(step.q_TNGK.astype(jnp.float32), dequantise(step.cache), **step.rows, **options)
    return float(np.max(np.abs(got - np.asarray(want))))


def run_attention(check: Check) -> None:
    """The kernels that this device's engine uses, every case a figure."""
    figures = check.figures
    what = "xla attention" if check.on_cpu else "cuda attention"
    for seed, case in enumerate(attention_cases(small=check.small)):
        if figures.has_time(f"{what}, {case.name}"):
            with figures.attempt(f"{what}, {case.name}"):
                error = attention_error(case, seed=seed, attend=_attention(check))
                figures.add(what, case.name, metric="largest error", unit="1", samples=[error])


def attention_launch(check: Check) -> LaunchFn | None:
    """The function that launches the CUDA kernels of layers on this device; None where there are none."""
    return None if check.on_cpu else launch_on(architecture_of(jax.devices()[0]))


def step_attention(check: Check) -> StepAttention:
    """The attention of an engine's steps on this device."""
    launch = attention_launch(check)
    return BY_OPERATIONS if launch is None else AttentionByKernels(launch)


def _attention(check: Check) -> PagedAttentionFn:
    """The same for one layer alone."""
    launch = attention_launch(check)
    return loop_attention if launch is None else partial(cuda_attention, launch=launch)


def _jitted(attend: PagedAttentionFn) -> jax.stages.Wrapped:
    return jax.jit(attend, static_argnames=_STATIC)


class FirstAttention:
    """Attention of the first case, stage by stage: traced, compiled, then called."""

    def __init__(self, check: Check) -> None:
        case = next(attention_cases(small=check.small))
        self._step = attention_step(case, seed=0)
        self._options = _options(case)
        self._attend = _jitted(_attention(check))

    def trace(self) -> None:
        """Trace it, for which the kernel is compiled to PTX."""
        self._lowered = self._attend.lower(
            self._step.q_TNGK, self._step.cache, **self._step.rows, **self._options
        )

    def compile(self) -> None:
        """Compile what was traced."""
        self._compiled = self._lowered.compile()

    def call(self) -> None:
        """Run what was compiled, to its end."""
        self._compiled(self._step.q_TNGK, self._step.cache, **self._step.rows).block_until_ready()


def _options(case: AttentionCase) -> dict[str, Any]:
    return {"layer": LAYER, "scale": case.head_dim**-0.5, "sliding_window": case.window}


def cache_of(pages: NDArray[np.float32], dtype: jnp.dtype) -> KvCache:
    """A cache that reads as these keys and values [2, L, P, S, N, K], rounded to its dtype."""
    shape = pages.shape[1:]
    k, v = (encode(jnp.asarray(x.reshape(-1, *shape[-2:])), dtype) for x in pages)
    return KvCache(
        k.x_TNK.reshape(shape),
        v.x_TNK.reshape(shape),
        None if k.scale_TN is None else k.scale_TN.reshape(shape[:-1]),
        None if v.scale_TN is None else v.scale_TN.reshape(shape[:-1]),
    )
