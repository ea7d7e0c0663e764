"""A residual and its norm by one CUDA kernel (`ops/cuda/add_and_normalise.cu`).

Where an all-reduce gives what is added, XLA would add it once more in every later norm that it fuses it into.
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from albireo_jax.ops.cuda.kernels import Entry, Kernel, Launch, LaunchFn

_WARPS = 8
_MULTIPLE = 8


class Normalised(NamedTuple):
    """The residual with what was added, and its norm."""

    x_TD: Float[Array, "T D"]
    normed_TD: Float[Array, "T D"]


def is_possible(width: int) -> bool:
    """Whether the kernel takes rows of so many channels."""
    return width % _MULTIPLE == 0


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
    macros = (("WIDTH", str(width)), ("EPSILON", f"{eps!r}f"), ("WARPS", str(_WARPS)))
    like = jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype)
    what = Launch(
        kernel=Kernel(entry=Entry.ADD, macros=macros, warps=_WARPS),
        grid=(num_tokens, 1),
        results=(like, like),
        in_place=1,
    )
    return Normalised(*launch(what, [added_TD, weight_D, x_TD]))
