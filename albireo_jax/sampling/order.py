"""Floats as integers that order like them."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32


def ordered(number: Float[Array, "..."] | np.float32) -> Int32[Array, "..."]:
    """The integer that orders like a float32."""
    bits = lax.bitcast_convert_type(number, jnp.int32)
    return jnp.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def ordered_float(integer: Int32[Array, "..."]) -> Float[Array, "..."]:
    """The float32 whose integer this is."""
    bits = jnp.where(integer < 0, integer ^ np.int32(0x7FFFFFFF), integer)
    return lax.bitcast_convert_type(bits, jnp.float32)


LEAST = np.int32(np.uint32(0xFF800000).view(np.int32) ^ np.int32(0x7FFFFFFF))
"""The integer of minus infinity."""
