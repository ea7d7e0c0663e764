"""Weights in a form that does not depend on the tensor-parallel degree, and the way there and back.

Checkpoints hold it and random weights are drawn in it. It differs from `DecoderWeights` in three things:
the vocabulary is not padded, a key/value head is there once, and query heads (J) have an axis of their own,
so that every rank finds its queries, and its keys and values, in slices of its own.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from albireo_jax.core.gpu_options import LayerForm
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.nn.axes import axes_of, has_layers
from albireo_jax.nn.decoder import DecoderWeights, Layered
from albireo_jax.nn.quantise import quantised
from albireo_jax.nn.shapes import SCALES, axis_sizes, layer_name, unquantised, weight_names
from albireo_jax.nn.sharding import TP, named_sharding, partition_spec

_PARTS = {
    "wqkv_LDNXK": ("wq_LDJK", "wkv_LDN2K"),
    "bqkv_LNXK": ("bq_LJK", "bkv_LN2K"),
    "wo_LAD": ("wo_LJKD",),
}
"""Field of `DecoderWeights` -> its canonical fields; every other field is its own."""

_VOCABULARY = ("embed_VD", "lm_head_VD")

Canonical: TypeAlias = Mapping[str, Layered]
"""Canonical fields, those of layers as one array or as one for each layer."""

CanonicalRead: TypeAlias = Callable[[str, int | None], Array]
"""read(field, layer): a canonical field on the mesh, or one layer of it."""


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical field -> shape, for the fields that the model has before it is quantised."""
    sizes = {**axis_sizes(config, 1), "J": config.num_heads}
    names = [part for name in weight_names(unquantised(config)) for part in _PARTS.get(name, (name,))]
    return {name: tuple(sizes[axis] for axis in axes_of(name)) for name in names}


def canonical_sharding(config: ModelConfig, name: str, mesh: Mesh) -> NamedSharding:
    """The split of a canonical field over `mesh`, evenly or not at all."""
    tp, axes = mesh.shape[TP], axes_of(name)
    sizes = dict(zip(axes, canonical_shapes(config)[name], strict=True))
    split = [axis for axis, rule in zip(axes, partition_spec(name), strict=True) if rule is not None]
    if all(sizes[axis] % tp == 0 for axis in split):
        return named_sharding(mesh, name)
    if "V" in axes and config.hidden_size % tp == 0:
        return NamedSharding(mesh, PartitionSpec(*(TP if axis == "D" else None for axis in axes)))
    return NamedSharding(mesh, PartitionSpec())  # key/value heads, where ranks share them


def layer_sharding(config: ModelConfig, name: str, mesh: Mesh) -> NamedSharding:
    """The split of one layer of a canonical field over `mesh`."""
    return NamedSharding(mesh, PartitionSpec(*canonical_sharding(config, name, mesh).spec[1:]))


def to_canonical(config: ModelConfig, weights: DecoderWeights, mesh: Mesh) -> dict[str, Layered]:
    """The canonical fields of weights that lie on `mesh`, still split over it where they divide.

    They have the form of the weights: one array for all layers, or one for each.
    Raises ValueError for a quantised model, which is no longer what it was made of.
    """
    if config.quantization is not None:
        raise ValueError(f"weights quantised to {config.quantization} have no canonical form")
    sizes = axis_sizes(config, mesh.shape[TP])

    def convert(name: str, array: Array) -> list[Array]:
        if name in _VOCABULARY:
            return [array[: config.vocab_size]]
        if "X" in name:
            return _split(array, sizes, num_kv_heads=config.num_kv_heads)
        return [_split_heads(array, head_dim=config.head_dim)]

    canonical: dict[str, Layered] = {}
    for name in weight_names(config):
        array = weights._asdict()[name]
        if name not in (*_VOCABULARY, *_PARTS):
            canonical[name] = array
            continue
        parts = _PARTS.get(name, (name,))
        layered = isinstance(array, tuple)
        sharding = layer_sharding if layered else canonical_sharding
        on_mesh = jax.jit(partial(convert, name), out_shardings=[sharding(config, p, mesh) for p in parts])
        arrays = tuple(zip(*map(on_mesh, array), strict=True)) if layered else on_mesh(array)
        canonical |= dict(zip(parts, arrays, strict=True))
    return canonical


def from_canonical(
    config: ModelConfig,
    canonical: dict[str, Layered],
    mesh: Mesh,
    *,
    form: LayerForm = LayerForm.STACKED,
) -> DecoderWeights:
    """Weights on `mesh` from canonical fields that lie on it, quantised where the model is.

    Takes the fields out of `canonical` one by one, so that the two forms never exist whole together.
    """
    return read_canonical(config, by_layers(config, canonical.pop), mesh, form=form)


def by_layers(
    config: ModelConfig,
    field: Callable[[str], Any],
    *,
    place: Callable[[str, Any], Array] | None = None,
) -> CanonicalRead:
    """Reads layers out of fields that `field` gives whole, each once; each is let go after its last layer.

    `place` puts a layer of a named field on the devices, where fields lie on the host.
    """
    held: dict[str, Any] = {}

    def read(name: str, layer: int | None) -> Array:
        if layer is None:
            whole = field(name)
            return jnp.stack(whole) if isinstance(whole, tuple) else whole
        if name not in held:
            held[name] = field(name)
        is_last = layer == config.num_layers - 1
        array = (held.pop(name) if is_last else held[name])[layer]
        return array if place is None else place(name, array)

    return read


def read_canonical(
    config: ModelConfig, read: CanonicalRead, mesh: Mesh, *, form: LayerForm = LayerForm.STACKED
) -> DecoderWeights:
    """Weights on `mesh` from canonical fields that are asked for one by one.

    Fields whose layers become codes, or arrays of their own, are asked for layer by layer.
    """
    sizes = axis_sizes(config, mesh.shape[TP])

    def convert(name: str, parts: list[Array]) -> Array:
        if name in _VOCABULARY:
            return jnp.pad(parts[0], ((0, sizes["V"] - config.vocab_size), (0, 0)))
        if "X" in name:
            return _fuse(*parts, sizes=sizes)
        return parts[0].reshape([sizes[axis] for axis in axes_of(name)])

    def reader(name: str, own: str) -> Callable[[int | None], Array]:
        """Reads the whole of a field, or layers of it, which are called `own`."""
        if name not in (*_VOCABULARY, *_PARTS):
            return partial(read, name)
        on_mesh = jax.jit(partial(convert, own), out_shardings=named_sharding(mesh, own))

        def fused(layer: int | None) -> Array:
            return on_mesh([read(part, layer) for part in _PARTS.get(name, (name,))])

        return fused

    arrays: dict[str, Any] = {}
    for name in weight_names(unquantised(config)):
        if config.quantization is not None and name in SCALES:
            arrays |= quantised(config, name, reader(name, layer_name(name)), mesh=mesh, form=form)
        elif has_layers(name) and form is LayerForm.UNSTACKED:
            arrays[name] = tuple(map(reader(name, layer_name(name)), range(config.num_layers)))
        else:
            arrays[name] = reader(name, name)(None)
    return DecoderWeights(**arrays)


def _split(array_NXK: Array, sizes: Mapping[str, int], *, num_kv_heads: int) -> list[Array]:
    """[..., N, X, K] -> queries [..., J, K] and keys and values [..., N, 2, K] of each head once."""
    copies = sizes["N"] // num_kv_heads
    queries, keys_values = array_NXK[..., : sizes["G"], :], array_NXK[..., ::copies, sizes["G"] :, :]
    return [queries.reshape(*queries.shape[:-3], -1, sizes["K"]), keys_values]


def _fuse(queries_JK: Array, keys_values_N2K: Array, *, sizes: Mapping[str, int]) -> Array:
    """The inverse of `_split`, at the degree that `sizes` are of."""
    queries = queries_JK.reshape(*queries_JK.shape[:-2], sizes["N"], sizes["G"], sizes["K"])
    copies = sizes["N"] // keys_values_N2K.shape[-3]
    return jnp.concatenate([queries, jnp.repeat(keys_values_N2K, copies, axis=-3)], axis=-2)


def _split_heads(wo_AD: Array, *, head_dim: int) -> Array:
    """[..., A, D] -> [..., J, K, D]."""
    *layers, width, hidden = wo_AD.shape
    return wo_AD.reshape(*layers, width // head_dim, head_dim, hidden)
