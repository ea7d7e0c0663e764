"""Kernels on this device against float32 on the CPU: attention, sampling, and writes of keys and values.

Attention is called as the engine calls it, jitted, on bfloat16 queries. Pages that no row owns hold NaN, so
that reading one shows. Sampling is timed as well: what rows that filter add to a step.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from albireo_jax.experiments.gpu_check.check import Check
from albireo_jax.ops.attention import paged_attention
from albireo_jax.ops.attention_ref import reference_attention
from albireo_jax.ops.cuda.kernels import LaunchFn, launch
from albireo_jax.ops.kv_cache import FP8_BITS, KvCache, dequantise, encode
from albireo_jax.ops.kv_write import token_pages, write_kv
from albireo_jax.sampling.draw import SamplerParams
from albireo_jax.sampling.sample import sample

_LAYERS, _LAYER = 2, 1
_REPEATS, _CALLS = 3, 20
_STATIC = ("layer", "scale", "sliding_window")
_attend = jax.jit(paged_attention, static_argnames=(*_STATIC, "launch"))
_expect = jax.jit(reference_attention, static_argnames=_STATIC)
_SMALL_HEADS = ({"heads": 2, "group": 3, "head_dim": 16},)
_HEADS = (
    {"heads": 8, "group": 4, "head_dim": 128},
    {"heads": 8, "group": 2, "head_dim": 128},
    {"heads": 1, "group": 8, "head_dim": 128},
    {"heads": 8, "group": 5, "head_dim": 128},
    {"heads": 2, "group": 7, "head_dim": 64},
    {"heads": 8, "group": 1, "head_dim": 256},
)
_PAGE_DTYPES = {"bfloat16": jnp.dtype(jnp.bfloat16), "int8": jnp.dtype(jnp.int8), "fp8": FP8_BITS}


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
    """Decode and mixed steps: of one model in all precisions, of others' heads and their shards' in some."""
    first, *others = _SMALL_HEADS if small else _HEADS
    longest, chunk = (70, 23) if small else (1500, 77)
    kinds = (1,) * 7, (1, chunk, 0, 1, 5)
    case = partial(AttentionCase, longest=longest)
    for counts in kinds:
        for kv_dtype in _PAGE_DTYPES:
            yield case(**first, page_size=16, counts=counts, kv_dtype=kv_dtype)
        yield case(**first, page_size=16, counts=counts, kv_dtype="bfloat16", window=longest // 3)
        yield case(**first, page_size=64, counts=counts, kv_dtype="bfloat16")
    for heads in others:
        for counts in kinds:
            yield case(**heads, page_size=16, counts=counts, kv_dtype="bfloat16")
        yield case(**heads, page_size=16, counts=kinds[1], kv_dtype="int8")


def attention_step(case: AttentionCase, *, seed: int) -> Step:
    """A random step of this case, on the device that is the default."""
    random = np.random.default_rng(seed)
    counts = np.array(case.counts)
    contexts = np.array([int(random.integers(max(count, 1), case.longest + 1)) for count in counts])
    contexts[counts == 0] = 0
    columns = -(-case.longest // case.page_size)
    num_pages = len(counts) * columns + 1
    table_RM = 1 + random.permutation(num_pages - 1).reshape(len(counts), columns)
    shape = (_LAYERS, num_pages, case.page_size, case.heads, case.head_dim)
    pages = np.full((2, *shape), np.nan, np.float32)
    for row, context in enumerate(contexts):
        entry_C = np.arange(context)
        where = table_RM[row, entry_C // case.page_size], entry_C % case.page_size
        pages[:, :, *where] = random.standard_normal(pages[:, :, *where].shape)
    tokens = len(counts) if set(case.counts) == {1} else int(counts.sum()) + 3  # and some padding
    q_TNGK = random.standard_normal((tokens, case.heads, case.group, case.head_dim))
    return Step(
        q_TNGK=jnp.asarray(q_TNGK, jnp.bfloat16),
        cache=_cache(pages, _PAGE_DTYPES[case.kv_dtype]),
        rows={
            "row_start_R1": jnp.asarray([0, *np.cumsum(counts)], jnp.int32),
            "context_R": jnp.asarray(contexts, jnp.int32),
            "page_table_RM": jnp.asarray(table_RM, jnp.int32),
        },
    )


def attention_error(case: AttentionCase, *, seed: int, launch: LaunchFn | None = None) -> float:
    """The largest difference between this device's attention and the reference in float32; NaN is one.

    With `launch` the CUDA kernels are asked, otherwise operations of XLA.
    """
    step, cpu = attention_step(case, seed=seed), jax.devices("cpu")[0]
    options = {"layer": _LAYER, "scale": case.head_dim**-0.5, "sliding_window": case.window}
    got = np.asarray(_attend(step.q_TNGK, step.cache, **step.rows, **options, launch=launch), np.float32)
    step = jax.device_put(step, cpu)
    with jax.default_device(cpu):  # in float32, so that all precisions of a step share what was compiled
        want = _expect(step.q_TNGK.astype(jnp.float32), dequantise(step.cache), **step.rows, **options)
    return float(np.max(np.abs(got - np.asarray(want))))


def run_numerics(check: Check) -> None:
    """All kernels, every case a figure; attention last, as it has the most cases."""
    notebook = check.notebook
    for name, dtype in _PAGE_DTYPES.items():
        shares = _equal_bytes(dtype, head_dim=16 if check.small else 128)
        notebook.add("KV write", name, metric="share of equal bytes", unit="1", samples=shares)
    vocab = 512 if check.small else 128256
    for kind, params in _sampled_rows(rows=64).items():
        logits_RV = _logits(rows=64, vocab=vocab)
        here, there = _on_both(sample, logits_RV, params)
        notebook.add(
            "sampling", kind, metric="share of equal tokens", unit="1", samples=[np.mean(here == there)]
        )
        notebook.add("sampling", kind, metric="time", unit="us", samples=_times_us(sample, logits_RV, params))
    ways = {"xla": None} if check.on_cpu else {"cuda": launch, "xla": None}  # as an engine chooses
    for way, launched in ways.items():
        for seed, case in enumerate(attention_cases(small=check.small)):
            what = f"{way} attention"
            if notebook.has_time(f"{what}, {case.name}"):
                error = attention_error(case, seed=seed, launch=launched)
                notebook.add(what, case.name, metric="largest error", unit="1", samples=[error])


def _on_both(call: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """What a call gives on the default device and on the CPU, as NumPy arrays."""
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
    before = _cache(np.full((2, _LAYERS, pages, page_size, heads, head_dim), np.nan, np.float32), dtype)
    table_RM = 1 + random.permutation(pages - 1)[:8].reshape(2, 4).astype(np.int32)
    row_T = np.array([0] * 20 + [1] * 12 + [2], np.int32)  # the last is padding
    position_T = np.array([*range(13, 33), *range(40, 52), 0], np.int32)

    def write(cache: KvCache, k_TNK: Array, v_TNK: Array) -> KvCache:
        places = token_pages(
            jnp.asarray(table_RM), jnp.asarray(row_T), jnp.asarray(position_T), page_size=page_size
        )
        return write_kv(cache, k_TNK=k_TNK, v_TNK=v_TNK, layer=_LAYER, pages=places)

    here, there = _on_both(write, before, *new)
    pairs = zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True)
    return [float(np.mean(_bytes(mine) == _bytes(theirs))) for mine, theirs in pairs]


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).view(np.uint8)


def _sampled_rows(rows: int) -> dict[str, SamplerParams]:
    """Parameters of rows by what they ask for."""

    def params(**asked: Sequence[float]) -> SamplerParams:
        def of(name: str, neutral: float, dtype: Any) -> Array:
            return jnp.asarray(np.resize(asked.get(name, [neutral]), rows), dtype)

        return SamplerParams(
            temperature_R=of("temperature", 0.0, jnp.float32),
            top_k_R=of("top_k", 0, jnp.int32),
            top_p_R=of("top_p", 1.0, jnp.float32),
            min_p_R=of("min_p", 0.0, jnp.float32),
            seed_R2=jnp.stack([jnp.zeros(rows, jnp.uint32), jnp.arange(rows, dtype=jnp.uint32)], axis=1),
            position_R=jnp.arange(rows, dtype=jnp.int32) + 17,
        )

    return {
        "greedy": params(),
        "drawn, unfiltered": params(temperature=[0.7, 1.3]),
        "drawn, filtered": params(
            temperature=[0.8], top_p=[0.9, 1.0, 0.5], top_k=[0, 40], min_p=[0.0, 0.0, 0.05]
        ),
    }


def _logits(*, rows: int, vocab: int) -> NDArray[np.float32]:
    return 4 * np.random.default_rng(0).standard_normal((rows, vocab)).astype(np.float32)


def _times_us(call: Callable[..., Array], *arguments: Any) -> list[float]:
    """Microseconds of a call among others that are queued, a mean per repeat."""
    jitted, given = jax.jit(call), jax.device_put(arguments)
    jitted(*given).block_until_ready()
    times_us: list[float] = []
    for _ in range(_REPEATS):
        began_s = time.perf_counter()
        for _ in range(_CALLS - 1):
            jitted(*given)
        jitted(*given).block_until_ready()
        times_us.append(1e6 * (time.perf_counter() - began_s) / _CALLS)
    return times_us


def _cache(pages: NDArray[np.float32], dtype: jnp.dtype) -> KvCache:
    """A cache that reads as these keys and values [2, L, P, S, N, K], rounded to its dtype."""
    shape = pages.shape[1:]
    k, v = (encode(jnp.asarray(x.reshape(-1, *shape[-2:])), dtype) for x in pages)
    return KvCache(
        k.x_TNK.reshape(shape),
        v.x_TNK.reshape(shape),
        None if k.scale_TN is None else k.scale_TN.reshape(shape[:-1]),
        None if v.scale_TN is None else v.scale_TN.reshape(shape[:-1]),
    )
