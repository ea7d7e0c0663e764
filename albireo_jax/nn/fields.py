"""A field of weights as a caller gives it, stacked or layer by layer, checked and put on the mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from albireo_jax.core.errors import WeightError
from albireo_jax.core.gpu_options import LayerForm
from albireo_jax.nn.axes import has_layers
from albireo_jax.nn.decoder import Layered
from albireo_jax.nn.shapes import layer_name
from albireo_jax.nn.sharding import named_sharding, placement


def layered(field: Any) -> Any:
    """A field whose layers are a list, or a mapping of their numbers, as a tuple; any other as it is."""
    if isinstance(field, Mapping) and field and set(field) == set(range(len(field))):  # type: ignore[reportUnknownArgumentType]
        return tuple(field[number] for number in range(len(field)))  # type: ignore[reportUnknownArgumentType,reportUnknownVariableType]
    return tuple(field) if isinstance(field, list) else field  # type: ignore[reportUnknownArgumentType,reportUnknownVariableType]


def check_field(name: str, field: Any, *, shape: tuple[int, ...] | None, dtype: jnp.dtype | None) -> None:
    """Raise WeightError unless a field is of this shape and dtype, as a whole or in its layers.

    `shape` is None for a name that the model lacks.
    """
    if shape is None:
        raise WeightError(f"the model has no weight {name}")
    if not (isinstance(field, tuple) and has_layers(name)):
        _check(name, field, shape=shape, dtype=dtype)
        return
    if len(field) != shape[0]:  # type: ignore[reportUnknownArgumentType]
        raise WeightError(f"{name} has {len(field)} layers, expected {shape[0]}")  # type: ignore[reportUnknownArgumentType]
    for number, array in enumerate(field):  # type: ignore[reportUnknownVariableType,reportUnknownArgumentType]
        _check(f"{name} of layer {number}", array, shape=shape[1:], dtype=dtype)


def copy_field(name: str, field: Any, *, mesh: Mesh, form: LayerForm) -> Layered:
    """A copy of a field on `mesh`, in this form if it has layers; the caller may donate or delete its own."""
    dtype = field[0].dtype if isinstance(field, tuple) else field.dtype  # type: ignore[reportUnknownMemberType,reportUnknownVariableType]
    if has_layers(name) and form is LayerForm.UNSTACKED:
        copy = jax.jit(jnp.copy, out_shardings=placement(mesh, layer_name(name), dtype))  # type: ignore[reportUnknownArgumentType]
        return tuple(copy(layer_on_mesh(name, field, number, mesh=mesh)) for number in range(len(field)))
    sharding = placement(mesh, name, dtype)  # type: ignore[reportUnknownArgumentType]
    if isinstance(field, tuple):
        layers: list[Array] = [
            layer_on_mesh(name, field, number, mesh=mesh)
            for number in range(len(field))  # type: ignore[reportUnknownArgumentType]
        ]
        return jax.jit(jnp.stack, out_shardings=sharding)(layers)
    # device_put alone may share buffers
    return jax.jit(jnp.copy, out_shardings=sharding)(jax.device_put(field, named_sharding(mesh, name)))


def layer_on_mesh(name: str, field: Any, layer: int, *, mesh: Mesh) -> Array:
    """One layer of a field in either form, split over `mesh`."""
    return jax.device_put(field[layer], named_sharding(mesh, layer_name(name)))


def _check(name: str, array: object, *, shape: tuple[int, ...], dtype: jnp.dtype | None) -> None:
    if not isinstance(array, jax.Array | np.ndarray):
        raise WeightError(f"{name} is a {type(array).__name__}, expected one stacked array or one per layer")
    if isinstance(array, jax.Array) and array.is_deleted():
        raise WeightError(f"{name} was deleted, or donated to another computation")
    if array.shape != shape or array.dtype != dtype:
        raise WeightError(f"{name} is {array.dtype} {array.shape}, expected {dtype} {shape}")
