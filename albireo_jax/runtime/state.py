"""What lives on the device between steps, in one donated tuple of five arrays."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

from albireo_jax.runtime.batch import SLOT_FIELDS


class DeviceState(NamedTuple):
    """KV pages of all layers, and per slot: the last sampled token, the page table, sampling parameters.

    Z slots: one per live request and a last one that padding writes to. M pages per request at most.
    P pages, the null page first. F int32 words per slot, written by `batch.pack`.
    """

    k_LPSNK: Float[Array, "L P S N K"]
    v_LPSNK: Float[Array, "L P S N K"]
    last_token_Z: Int32[Array, " Z"]
    page_table_ZM: Int32[Array, "Z M"]
    params_ZF: Int32[Array, "Z F"]


class StateShape(NamedTuple):
    """Sizes of a DeviceState over all ranks: layers, pages (the null page included), … ."""

    num_layers: int
    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    num_slots: int
    pages_per_slot: int


def state_specs(axis: str) -> DeviceState:
    """Partition of each array: pages by key/value head, the rest on every rank."""
    kv = PartitionSpec(None, None, None, axis, None)
    return DeviceState(kv, kv, *([PartitionSpec()] * 3))  # type: ignore[arg-type]


def new_state(shape: StateShape, mesh: Mesh, *, axis: str, dtype: np.dtype) -> DeviceState:
    """A zeroed state, made on the devices of `mesh`."""
    kv = (shape.num_layers, shape.num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim)

    def zeros() -> DeviceState:
        return DeviceState(
            k_LPSNK=jnp.zeros(kv, dtype),
            v_LPSNK=jnp.zeros(kv, dtype),
            last_token_Z=jnp.zeros(shape.num_slots, jnp.int32),
            page_table_ZM=jnp.zeros((shape.num_slots, shape.pages_per_slot), jnp.int32),
            params_ZF=jnp.zeros((shape.num_slots, SLOT_FIELDS), jnp.int32),
        )

    shardings = DeviceState(*(NamedSharding(mesh, spec) for spec in state_specs(axis)))  # type: ignore[arg-type]
    return jax.jit(zeros, out_shardings=shardings)()
