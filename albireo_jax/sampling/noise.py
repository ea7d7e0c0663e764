"""Random numbers by counter: the noise of a token is a pure function of seed, position and token id.

Nothing is drawn in sequence and no state is kept. So any rank can compute the noise of any slice of the
vocabulary, and what is drawn does not depend on batch, slot, rank, overlap or preemption.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt32

_PARITY = np.uint32(0x1BD11BDA)
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_ROUNDS = 13
_SQRT_HALF_BITS = np.int32(0x3F3504F3)
_ALMOST_ONE = np.float32(1 - 2**-24)


class Words(NamedTuple):
    """64 bits as two words of one shape: a key (in a seed the high word comes first) or a counter."""

    first: UInt32[Array, "..."]
    second: UInt32[Array, "..."]


def threefry2x32(key: Words, counter: Words, *, rounds: int = _ROUNDS) -> Words:
    """Threefry-2x32: a bijection of 64-bit counters for each key, which broadcast against each other.

    From Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011). There 13 rounds are the
    fewest that pass all of BigCrush; `jax.random` uses 20.
    """
    keys = (key.first, key.second, key.first ^ key.second ^ _PARITY)
    x, y = counter.first + keys[0], counter.second + keys[1]
    for turn in range(rounds):
        x = x + y
        y = _rotate(y, _ROTATIONS[turn % 8]) ^ x
        if turn % 4 == 3:
            injection = turn // 4 + 1
            x = x + keys[injection % 3]
            y = y + keys[(injection + 1) % 3] + np.uint32(injection)
    return Words(x, y)


def gumbel(key: Words, counter: Words) -> Float[Array, "..."]:
    """Standard Gumbel noise, always finite, one number for each (key, counter).

    It is -log(-log(1 - u)) with u in (0, 1) in steps of 2^-31. The largest noise then comes from the smallest
    u, where float32 is finest; -log(-log(u)) would take it from the few values of u next to 1.
    """
    bits = (threefry2x32(key, counter).first >> 1).astype(jnp.int32)
    u = jnp.minimum((bits.astype(jnp.float32) + np.float32(0.5)) * np.float32(2**-31), _ALMOST_ONE)
    return -jnp.log(_exponential(u))


def _exponential(u: Float[Array, "..."]) -> Float[Array, "..."]:
    """-log(1 - u) for u in (0, 1), to 3e-7 of its value, in half the time of `jnp.log1p` on a CPU.

    1 - u = 2^e (1 + f) with f between sqrt(1/2) - 1 and sqrt(2) - 1, and log(1 + f) = 2 artanh(f / (2 + f)).
    Where e is 0, f is -u itself: that keeps the digits which 1 - u has lost.
    """
    offset = lax.bitcast_convert_type(1 - u, jnp.int32) - _SQRT_HALF_BITS
    e = offset >> 23
    mantissa = lax.bitcast_convert_type((offset & np.int32(0x7FFFFF)) + _SQRT_HALF_BITS, jnp.float32)
    f = jnp.where(e == 0, -u, mantissa - 1)
    s = f / (2 + f)
    t = s * s
    series = s * (
        2
        + t * (np.float32(2 / 3) + t * (np.float32(2 / 5) + t * (np.float32(2 / 7) + t * np.float32(2 / 9))))
    )
    return -(series + e.astype(jnp.float32) * np.float32(np.log(2)))


def _rotate(word: UInt32[Array, "..."], distance: int) -> UInt32[Array, "..."]:
    return (word << np.uint32(distance)) | (word >> np.uint32(32 - distance))
