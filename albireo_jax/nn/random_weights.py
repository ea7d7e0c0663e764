"""Random weights, drawn on the devices that hold them: models of any size for benchmarks, without files."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from albireo_jax.core.config import Dtype
from albireo_jax.core.gpu_options import LayerForm
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.nn.axes import axes_of
from albireo_jax.nn.canonical import canonical_shapes, canonical_sharding, layer_sharding, read_canonical
from albireo_jax.nn.decoder import DecoderWeights

_INPUT_AXES = {
    "wq_LDJK": "D",
    "wkv_LDN2K": "D",
    "wo_LJKD": "JK",
    "w_gate_up_LD2F": "D",
    "w_down_LFD": "F",
    "lm_head_VD": "D",
}
_OTHER_SCALE = 0.02  # of embeddings and biases
_MAX_FIELDS = 64
_GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio: multiples of it lie far apart


def random_weights(
    config: ModelConfig, *, dtype: Dtype, mesh: Mesh, seed: int, form: LayerForm = LayerForm.STACKED
) -> DecoderWeights:
    """Uniform weights that keep the scale of activations, norms of ones; the same model at any degree.

    They are drawn in canonical form on the devices, each its share; none ever exists on the host. A quantised
    model is that of the same weights unquantised; it, and one of unstacked layers, are drawn layer by layer.
    """
    shapes = canonical_shapes(config)
    draws: dict[tuple[str, bool], Callable[[int], Array]] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        draw = partial(_draw, name, dtype=dtype, seed=seed * _MAX_FIELDS + number)
        whole, of_layer = (where(config, name, mesh) for where in (canonical_sharding, layer_sharding))
        draws[name, False] = jax.jit(partial(draw, shape), out_shardings=whole)
        draws[name, True] = jax.jit(partial(draw, shape[1:]), out_shardings=of_layer)

    def read(name: str, layer: int | None) -> Array:
        return draws[name, layer is not None](layer or 0)

    return read_canonical(config, read, mesh, form=form)


def _draw(name: str, shape: tuple[int, ...], layer: Array, *, dtype: Dtype, seed: int) -> Array:
    """A field, or one layer of it if `shape` is that of a layer."""
    kind = jnp.dtype(dtype.value)
    if "norm" in name:
        return jnp.ones(shape, kind)
    sizes = dict(zip(reversed(axes_of(name)), reversed(shape), strict=False))
    inputs = _INPUT_AXES.get(name)
    scale = math.prod(sizes[axis] for axis in inputs) ** -0.5 if inputs else _OTHER_SCALE
    bound = scale * math.sqrt(3)  # of a uniform distribution with this standard deviation
    bits = _hash(shape, seed, first=layer)
    return (bits.astype(jnp.float32) * (2 * bound / 2**32) - bound).astype(kind)


def _hash(shape: tuple[int, ...], seed: int, *, first: Array) -> Array:
    """32 bits per element from its place, by MurmurHash3's finalizer; `first` is that on an axis before.

    Good enough for weights, and unlike `jax.random` it costs no second of compilation per array.
    """
    bits = jnp.full(shape, first, jnp.uint32)
    for axis, size in enumerate(shape):
        bits = bits * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    bits += jnp.uint32((seed + 1) * _GOLDEN % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)
