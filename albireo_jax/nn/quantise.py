"""Matrices as codes of one byte and a scale per output channel, made layer by layer as weights arrive.

::

    w[i, o] = code[i, o] * scale[o]      scale[o] = max over i of |w[i, o]| / largest code

A product with such a matrix is a product with its codes, scaled afterwards: the codes are all that a step
reads. A channel's scale is that of the whole matrix, also where ranks share its inputs, so that codes do
not depend on the tensor-parallel degree. Only one layer of one matrix is ever a float on a device.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Real

from albireo_jax.core.config import Quantization
from albireo_jax.core.gpu_options import LayerForm
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.nn.decoder import DecoderWeights, Layered
from albireo_jax.nn.shapes import SCALES, layer_name, weight_names, weight_shapes
from albireo_jax.nn.sharding import TP, named_sharding, placement

CODES: Mapping[Quantization, jnp.dtype] = MappingProxyType(
    {
        Quantization.INT8: jnp.dtype(jnp.int8),
        Quantization.FP8: jnp.dtype(jnp.float8_e4m3fn),
        Quantization.FP8_W8A16: jnp.dtype(jnp.float8_e4m3fn),
    }
)
"""Dtype of the codes of each kind."""

_LARGEST = {Quantization.INT8: 127.0, Quantization.FP8: 448.0, Quantization.FP8_W8A16: 448.0}
_SMALLEST_PEAK = 2.0**-100  # of channels closer to zero, which are zero then: their scale is a normal number


class CodedWeight(NamedTuple):
    """A matrix whose inputs are its first axis, as codes and the scale of each of its other places."""

    code: Real[Array, "D *outputs"]
    scale: Float[Array, "*outputs"]


def weight_dtypes(config: ModelConfig, dtype: jnp.dtype) -> dict[str, jnp.dtype]:
    """Field of `DecoderWeights` -> its dtype, for the fields of a model that computes in `dtype`."""
    dtypes = dict.fromkeys(weight_names(config), dtype)
    if config.quantization is not None:
        dtypes |= dict.fromkeys(SCALES, CODES[config.quantization])
        dtypes |= dict.fromkeys(SCALES.values(), jnp.dtype(jnp.float32))
    return dtypes


def encode(w: Float[Array, "D *outputs"], kind: Quantization) -> CodedWeight:
    """The codes nearest to a matrix.

    A number x becomes x' with |x - x'| <= scale / 2 in int8, and <= |x| / 16 in fp8 unless |x| < scale / 64.
    A channel that is not finite stays so.
    """
    w = w.astype(jnp.float32)
    peak = jnp.maximum(jnp.max(jnp.abs(w), axis=0), _SMALLEST_PEAK)
    scale = peak / _LARGEST[kind]
    quotient = w / scale[None]
    code = jnp.round(quotient) if kind is Quantization.INT8 else quotient
    return CodedWeight(code.astype(CODES[kind]), scale)


def decode(coded: CodedWeight) -> Float[Array, "D *outputs"]:
    """The float32 numbers that codes stand for."""
    return coded.code.astype(jnp.float32) * coded.scale[None]


def quantised(
    config: ModelConfig, name: str, layer: Callable[[int], Array], *, mesh: Mesh, form: LayerForm
) -> dict[str, Layered]:
    """The codes of the matrix called `name`, and their scales, by the names of their fields.

    `layer` gives the floats of one layer on `mesh`, split like the stack.
    """
    if form is LayerForm.STACKED:
        return quantised_stack(config, name, layer, mesh=mesh)
    assert config.quantization is not None, "only a quantised model has codes"
    places = (
        placement(mesh, layer_name(name), CODES[config.quantization]),
        named_sharding(mesh, layer_name(SCALES[name])),
    )
    one = jax.jit(partial(encode, kind=config.quantization), out_shardings=CodedWeight(*places))  # type: ignore[arg-type]
    codes, scales = zip(*(one(layer(number)) for number in range(config.num_layers)), strict=True)
    return {name: codes, SCALES[name]: scales}


def quantised_stack(
    config: ModelConfig, name: str, layer: Callable[[int], Array], *, mesh: Mesh
) -> dict[str, Layered]:
    """The stacked codes of the matrix called `name`, and their scales, by the names of their fields.

    `layer` gives the floats of one layer on `mesh`, split like the stack.
    """
    kind = config.quantization
    assert kind is not None, "only a quantised model has codes"
    shapes = weight_shapes(config, mesh.shape[TP])
    shardings = tuple(named_sharding(mesh, field) for field in (name, SCALES[name]))
    # XLA's CPU compiler writes bytes in place, not float8; so codes are bytes until the last.
    zeros = jax.jit(
        lambda: (jnp.zeros(shapes[name], jnp.int8), jnp.zeros(shapes[SCALES[name]], jnp.float32)),
        out_shardings=shardings,
    )
    put = jax.jit(partial(_put, kind), donate_argnums=(0, 1), out_shardings=shardings)
    codes, scales = zeros()
    for number in range(config.num_layers):
        codes, scales = put(codes, scales, layer(number), number)
    if CODES[kind] != jnp.int8:
        as_floats = partial(jax.lax.bitcast_convert_type, new_dtype=CODES[kind])
        place = placement(mesh, name, CODES[kind])
        codes = jax.jit(as_floats, donate_argnums=0, out_shardings=place)(codes)
    return {name: codes, SCALES[name]: scales}


def dequantise(weights: DecoderWeights) -> DecoderWeights:
    """The whole model in float32 without scales: for tests and tools, as it is a copy."""
    fields: dict[str, Any] = {name: array for name, array in weights._asdict().items() if array is not None}
    for name, scale_name in SCALES.items():
        if scale_name in fields:
            fields[name] = jax.vmap(decode)(CodedWeight(fields[name], fields.pop(scale_name)))
    return DecoderWeights(**{name: array.astype(jnp.float32) for name, array in fields.items()})


def _put(kind: Quantization, codes: Array, scales: Array, matrix: Array, layer: Array) -> tuple[Array, Array]:
    coded = encode(matrix, kind)
    bits = jax.lax.bitcast_convert_type(coded.code, jnp.int8)
    return codes.at[layer].set(bits), scales.at[layer].set(coded.scale)
