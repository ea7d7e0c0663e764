"""A layer's kernels beside attention on this device, against single operations on the CPU.

`rotate_and_write` is what engines on GPUs put keys and values into pages with; `add_and_normalise` follows
their all-reduces. Their results are rounded as those of the operations are, so that bits are compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32
from numpy.typing import NDArray

from albireo_jax.nn.decoder import Projected, add_norm, queries_keys_values
from albireo_jax.nn.layers import Rotation
from albireo_jax.ops.cuda.kernels import LaunchFn
from albireo_jax.ops.kv_cache import KvCache
from albireo_jax.ops.kv_write import NULL_PAGE, TokenPages, write_kv
from albireo_jax.ops.kv_write_cuda import HeadParams, Rotated, rotate_and_write
from albireo_jax.runtime.step_attention import add_norm_by_kernel
from benchmarks.gpu_check.attention_cases import (
    LAYER,
    LAYERS,
    PAGE_DTYPES,
    attention_launch,
    cache_of,
)
from benchmarks.gpu_check.check import Check

_TOKENS, _PADDING, _PAGES, _PAGE_SIZE, _EPS = 45, 3, 9, 16, 1e-5
_HEADS = ({"heads": 2, "group": 3, "head_dim": 16}, {"heads": 8, "group": 4, "head_dim": 128})
_WIDTHS = (64, 4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class RotateCase:
    """A layer's projections, with biases and with norms of queries and keys if `has_norms`."""

    heads: int
    group: int
    head_dim: int
    kv_dtype: str
    has_norms: bool

    @property
    def name(self) -> str:
        """The case in a table."""
        return f"{self.kv_dtype}, {'biases and norms' if self.has_norms else 'plain'}"


class _Given(NamedTuple):
    """The arguments of a layer's kernel."""

    projected: Projected
    cache: KvCache
    place_T: Int32[Array, " T"]


def note_layer_kernels(check: Check) -> None:
    """Every precision of pages with and without norms, then the residual; shares of equal bytes."""
    figures, launch = check.figures, attention_launch(check)
    for case in rotate_cases(small=check.small):
        if figures.has_time(f"rotate and write, {case.name}"):
            with figures.attempt(f"rotate and write, {case.name}"):
                share = rotate_share(case, launch=launch)
                metric = "share of equal bytes"
                figures.add("rotate and write", case.name, metric=metric, unit="1", samples=[share])
    width = _WIDTHS[not check.small]
    with figures.attempt("add and normalise"):
        share = add_share(width, launch=launch)
        case = f"norms of {width} channels"
        figures.add("add and normalise", case, metric="share of equal bytes", unit="1", samples=[share])


def rotate_cases(*, small: bool) -> Iterator[RotateCase]:
    """All precisions of pages without norms, and then with norms."""
    for has_norms in (False, True):
        for kv_dtype in PAGE_DTYPES:
            yield RotateCase(**_HEADS[not small], kv_dtype=kv_dtype, has_norms=has_norms)


def rotate_share(case: RotateCase, *, launch: LaunchFn | None) -> float:
    """The least share of equal bytes among queries, pages and scales, by the kernel that `launch` runs.

    Without `launch` operations are asked here too. The null page, where padding is written, is left out.
    """
    with jax.default_device(jax.devices("cpu")[0]):
        given = _given(case)
        there = _by_operations(given)  # not compiled as one, so that each operation rounds its result
    by = _by_operations if launch is None else jax.jit(partial(_by_kernel, launch=launch))
    here = by(jax.device_put(given, jax.devices()[0]))
    place_T = np.asarray(given.place_T)
    pairs = zip(_read(here, place_T), _read(there, place_T), strict=True)
    return min(_share(one, other) for one, other in pairs)


def add_share(width: int, *, launch: LaunchFn | None) -> float:
    """The least share of equal bytes of sums and of their norms, for rows of very different sizes."""
    random = np.random.default_rng(width)
    sizes = np.geomspace(1e-3, 1e3, _TOKENS)[:, None]
    drawn = [*(sizes * random.standard_normal((2, _TOKENS, width))), random.standard_normal(width)]
    with jax.default_device(jax.devices("cpu")[0]):
        given = [jnp.asarray(each, jnp.bfloat16) for each in drawn]
        there = add_norm(*given, eps=_EPS)
    by = add_norm if launch is None else jax.jit(add_norm_by_kernel(launch), static_argnames="eps")
    here = by(*jax.device_put(given, jax.devices()[0]), eps=_EPS)
    return min(_share(one, other) for one, other in zip(here, there, strict=True))


def _given(case: RotateCase) -> _Given:
    """Random projections of tokens at random places, no two at one but the padding."""
    random = np.random.default_rng(0)

    def draw(*shape: int) -> Array:
        return jnp.asarray(random.standard_normal(shape), jnp.bfloat16)

    vectors = case.group + 2
    angle_TH = jnp.asarray(random.uniform(0, 7, (_TOKENS, case.head_dim // 2)), jnp.float32)
    norms = [draw(case.head_dim) if case.has_norms else None for _ in range(2)]
    projected = Projected(
        draw(_TOKENS, case.heads, vectors, case.head_dim),
        draw(case.heads, vectors, case.head_dim) if case.has_norms else None,
        *norms,
        eps=_EPS,
        by=Rotation(jnp.cos(angle_TH), jnp.sin(angle_TH)),
    )
    pages = np.full((2, LAYERS, _PAGES, _PAGE_SIZE, case.heads, case.head_dim), 7.0, np.float32)
    place_T = _PAGE_SIZE + random.permutation((_PAGES - 1) * _PAGE_SIZE)[:_TOKENS]
    place_T[-_PADDING:] = NULL_PAGE * _PAGE_SIZE
    return _Given(projected, cache_of(pages, PAGE_DTYPES[case.kv_dtype]), jnp.asarray(place_T, jnp.int32))


def _by_kernel(given: _Given, *, launch: LaunchFn) -> Rotated:
    projected = given.projected
    return rotate_and_write(
        given.cache,
        qkv_TNXK=projected.qkv_TNXK,
        params=HeadParams(projected.bias_NXK, projected.q_norm_K, projected.k_norm_K, _EPS),
        cos_TH=projected.by.cos_TH,
        sin_TH=projected.by.sin_TH,
        place_T=given.place_T,
        layer=LAYER,
        launch=launch,
    )


def _by_operations(given: _Given) -> Rotated:
    q_TNGK, k_TNK, v_TNK = queries_keys_values(given.projected._replace(eps=_EPS))
    pages = TokenPages(given.place_T // _PAGE_SIZE, given.place_T % _PAGE_SIZE)
    return Rotated(q_TNGK, write_kv(given.cache, k_TNK=k_TNK, v_TNK=v_TNK, layer=LAYER, pages=pages))


def _read(rotated: Rotated, place_T: NDArray[np.int32]) -> Iterator[NDArray[Any]]:
    """The queries, of all pages and scales what was written, and then all that rows own."""
    tokens = slice(0, _TOKENS - _PADDING)
    yield np.asarray(rotated.q_TNGK[tokens])
    for array in map(np.asarray, jax.tree.leaves(rotated.cache)):
        yield array[LAYER].reshape(_PAGES * _PAGE_SIZE, *array.shape[3:])[place_T[tokens]]
        yield array[:, NULL_PAGE + 1 :]


def _share(one: NDArray[Any] | Array, other: NDArray[Any] | Array) -> float:
    """The share of bytes of two arrays that are equal."""
    mine, theirs = (np.ascontiguousarray(each).view(np.uint8) for each in (one, other))
    return float(np.mean(mine == theirs))
