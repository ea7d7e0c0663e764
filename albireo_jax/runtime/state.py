"""The state that lives on the device between steps, donated from each step to the next.

Two tuples, one per stage that writes them: a forward pass replaces the cache, and sampling replaces the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from albireo_jax.core.config import KvDtype
from albireo_jax.nn.sharding import shardings
from albireo_jax.ops.kv_cache import FP8_BITS, KvCache, new_cache
from albireo_jax.runtime.batch import SLOT_FIELDS

PAGE_DTYPES = {
    KvDtype.FLOAT32: jnp.dtype(jnp.float32),
    KvDtype.BFLOAT16: jnp.dtype(jnp.bfloat16),
    KvDtype.INT8: jnp.dtype(jnp.int8),
    KvDtype.FP8: FP8_BITS,
}


class CacheState(NamedTuple):
    """The part that the forward pass writes: KV pages of all layers, and the page table of each slot.

    P pages, the null page first; M pages per request at most; Z slots as in `SamplerState`.
    """

    kv: KvCache
    page_table_ZM: Int32[Array, "Z M"]


class SamplerState(NamedTuple):
    """The part that sampling writes: per slot, the last sampled token and the sampling parameters.

    Z slots: one per live request and a last one that padding writes to. F int32 words per slot, written
    by `batch.pack_params`.
    """

    last_token_Z: Int32[Array, " Z"]
    params_ZF: Int32[Array, "Z F"]


class DeviceState(NamedTuple):
    """All that lives on the device between steps besides the weights."""

    cache: CacheState
    sampler: SamplerState


class StateShape(NamedTuple):
    """Sizes of a DeviceState over all ranks: layers, pages (the null page included), … ."""

    num_layers: int
    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    num_slots: int
    pages_per_slot: int


def cache_specs(axis: str) -> CacheState:
    """Partition of the cache: pages and scales by key/value head, the table on every rank.

    A prefix of the tree of any cache: the specs of scales fall on nothing where there are none.
    """
    return CacheState(kv_specs(axis), PartitionSpec())  # type: ignore[arg-type]


def kv_specs(axis: str) -> KvCache:
    """Partition of the pages alone."""
    scales = PartitionSpec(None, None, None, axis)
    pages = PartitionSpec(None, None, None, axis, None)
    return KvCache(pages, pages, scales, scales)  # type: ignore[arg-type]


def sampler_specs() -> SamplerState:
    """Partition of the sampler's state: all of it on every rank."""
    return SamplerState(PartitionSpec(), PartitionSpec())  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedState:
    """A state before it takes memory: shapes and shardings of its arrays, and the function that makes it."""

    arrays: DeviceState
    make: Callable[[], DeviceState]


def plan_state(shape: StateShape, mesh: Mesh, *, axis: str, kv_dtype: KvDtype) -> PlannedState:
    """A zeroed state on the devices of `mesh`; `kv_dtype` is resolved, not AUTO."""
    kv = (shape.num_layers, shape.num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim)

    def zeros() -> DeviceState:
        return DeviceState(
            CacheState(
                kv=new_cache(kv, PAGE_DTYPES[kv_dtype]),
                page_table_ZM=jnp.zeros((shape.num_slots, shape.pages_per_slot), jnp.int32),
            ),
            SamplerState(
                last_token_Z=jnp.zeros(shape.num_slots, jnp.int32),
                params_ZF=jnp.zeros((shape.num_slots, SLOT_FIELDS), jnp.int32),
            ),
        )

    placed = shardings(mesh, DeviceState(cache_specs(axis), sampler_specs()))
    return PlannedState(
        arrays=jax.tree.map(_place, placed, jax.eval_shape(zeros)), make=jax.jit(zeros, out_shardings=placed)
    )


def _place(sharding: NamedSharding, below: Any) -> Any:
    """The arrays below a place in a tree, all of them with its sharding."""

    def place(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(place, below)
