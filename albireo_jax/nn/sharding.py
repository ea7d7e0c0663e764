"""The mesh, and where each axis of an array lies on it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from albireo_jax.nn.axes import AXES, axes_of, has_layers, logical_axes

TP = "tp"
"""Mesh axis of tensor parallelism."""

_SPLIT = ("kv_heads", "query_heads", "query_width", "feed_forward", "vocabulary")

SHARDING_RULES = tuple((axis, TP if axis in _SPLIT else None) for axis in AXES.values())
"""Logical axis -> the mesh axis that splits it, or None where it is whole on every rank."""


def make_mesh(tp: int) -> Mesh:
    """Mesh of the first `tp` devices along the axis `tp`.

    Raises ValueError with both numbers if there are fewer devices.
    """
    devices = jax.devices()
    if len(devices) < tp:
        raise ValueError(
            f"tp {tp} needs {tp} devices, there are {len(devices)} ({devices[0].platform}); "
            f"on a CPU, ask for virtual devices"
        )
    return Mesh(np.array(devices[:tp]), (TP,), axis_types=(AxisType.Auto,))


def partition_spec(name: str) -> PartitionSpec:
    """The split of the array called `name` over the mesh, from the axis letters that end its name."""
    rules = dict(SHARDING_RULES)
    return PartitionSpec(*(rules[axis] for axis in logical_axes(name)))


def named_sharding(mesh: Mesh, name: str) -> NamedSharding:
    """Sharding on `mesh` of the array called `name`."""
    return NamedSharding(mesh, partition_spec(name))


def placement(mesh: Mesh, name: str, dtype: jnp.dtype) -> NamedSharding | Format:
    """Sharding of the array called `name`, and on GPUs the order in memory of a matrix of fp8 codes.

    cuBLASLt multiplies fp8 only where the inputs of an output lie side by side; stored otherwise, each step
    would transpose a copy of the matrix. The order is the array's own: shapes do not change.
    """
    sharding = named_sharding(mesh, name)
    if dtype != jnp.float8_e4m3fn or mesh.devices.flat[0].platform != "gpu":
        return sharding
    inputs = 1 if has_layers(name) else 0
    order = [axis for axis in range(len(axes_of(name))) if axis != inputs]
    return Format(Layout(major_to_minor=(*order, inputs)), sharding)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """The same tree with shardings on `mesh` in place of its partition specs."""
    return jax.tree.map(
        partial(NamedSharding, mesh), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )
