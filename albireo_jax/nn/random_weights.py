"""Random weights, drawn on the devices that hold them: models of any size for benchmarks, without files."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from albireo_jax.core.config import Dtype, ModelConfig
from albireo_jax.nn.axes import axes_of
from albireo_jax.nn.canonical import canonical_shapes, canonical_sharding, from_canonical
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


def random_weights(config: ModelConfig, *, dtype: Dtype, mesh: Mesh, seed: int) -> DecoderWeights:
    """Uniform weights that keep the scale of activations, norms of ones; the same model at any degree.

    They are drawn in canonical form on the devices, each its share; none ever exists on the host.
    """
    canonical: dict[str, Array] = {}
    for number, (name, shape) in enumerate(canonical_shapes(config).items()):
        key = jax.random.fold_in(jax.random.key(seed), number)
        draw = partial(_draw, name, shape=shape, dtype=dtype)
        canonical[name] = jax.jit(draw, out_shardings=canonical_sharding(config, name, mesh))(key)
    return from_canonical(config, canonical, mesh)


def _draw(name: str, key: Array, *, shape: tuple[int, ...], dtype: Dtype) -> Array:
    kind = jnp.dtype(dtype.value)
    if "norm" in name:
        return jnp.ones(shape, kind)
    sizes = dict(zip(axes_of(name), shape, strict=True))
    inputs = _INPUT_AXES.get(name)
    scale = math.prod(sizes[axis] for axis in inputs) ** -0.5 if inputs else _OTHER_SCALE
    bound = scale * math.sqrt(3)  # of a uniform distribution with this standard deviation
    return jax.random.uniform(key, shape, kind, -bound, bound)
