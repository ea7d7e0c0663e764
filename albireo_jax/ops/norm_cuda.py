"""A residual and its norm by one CUDA kernel (`ops/cuda/add_and_normalise.cu`).

Where an all-reduce gives what is added, XLA would add it once more in every later norm that it fuses it into.
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from albireo_jax.ops.cuda.kernels import Entry, Kernel, Launch, LaunchFn

_CHUNK, _THREAD_CHUNKS = 8, 2
"""Channels that a thread reads at once, and how often: with twice as many its registers do not suffice."""

_MOST_WARPS = 32


class Normalised(NamedTuple):
    """The residual with what was added, and its norm."""

    x_TD: Float[Array, "T D"]
    normed_TD: Float[Array, "T D"]


def is_possible(width: int) -> bool:
    """Whether the kernel takes rows of so many channels."""
    return width % _CHUNK == 0


def norm_kernel(width: int, *, eps: float) -> Kernel:
    """The kernel for rows of `width` channels; `eps` is added to their mean square."""
    warps = min(-(-width // (32 * _CHUNK * _THREAD_CHUNKS)), _MOST_WARPS)
    macros = (("WIDTH", str(width)), ("EPSILON", f"{eps!r}f"), ("WARPS", str(warps)))
    return Kernel(entry=Entry.ADD, macros=macros, warps=warps)


def add_and_normalise(
    x_TD: Float[Array, "T D"],
    added_TD: Float[Array, "T D"],
    weight_D: Float[Array, " D"],
    *,
    eps: float,
    launch: LaunchFn,
) -> Normalised:
    """X + added, rounded to bfloat16 and written where x is, and its norm as `nn.layers.rms_norm` has it."""
    num_tokens, width = x_TD.shape
    like = jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype)
    what = Launch(
        kernel=norm_kernel(width, eps=eps),
        grid=(num_tokens, 1),
        results=(like, like),
        in_place=1,
    )
    return Normalised(*launch(what, [added_TD, weight_D, x_TD]))
