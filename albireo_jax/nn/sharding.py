"""The mesh, and where each axis of an array lies on it."""

from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from albireo_jax.nn.axes import AXES, logical_axes

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
    """How the array called `name` is split over the mesh, from the axis letters that end its name."""
    rules = dict(SHARDING_RULES)
    return PartitionSpec(*(rules[axis] for axis in logical_axes(name)))


def named_sharding(mesh: Mesh, name: str) -> NamedSharding:
    """Sharding on `mesh` of the array called `name`."""
    return NamedSharding(mesh, partition_spec(name))


def shardings(mesh: Mesh, specs: Any) -> Any:
    """The same tree with shardings on `mesh` in place of its partition specs."""
    return jax.tree.map(
        partial(NamedSharding, mesh), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )
