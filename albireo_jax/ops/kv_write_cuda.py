"""Queries rotated, keys and values written into pages, by one CUDA kernel (`ops/cuda/rotate_and_write.cu`).

It takes a layer's queries, keys and values as the product with the layer's weights gives them, and does what
otherwise takes operations of XLA: biases and norms where the model has them, rotation, and the write.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from albireo_jax.ops.cuda.kernels import Entry, Kernel, Launch, LaunchFn
from albireo_jax.ops.kv_cache import KV_KINDS, KvCache

_MOST_WARPS = 16
"""Warps of a block at most: more vectors of a head than this take turns."""


class HeadParams(NamedTuple):
    """A layer's parameters between the product and attention; None where the model has none.

    `eps` is added to the mean square of a vector that is normalised.
    """

    bias_NXK: Float[Array, "N X K"] | None
    q_norm_K: Float[Array, " K"] | None
    k_norm_K: Float[Array, " K"] | None
    eps: float


class Rotated(NamedTuple):
    """Queries at their positions, and the cache with the step's keys and values."""

    q_TNGK: Float[Array, "T N G K"]
    cache: KvCache


def rotate_and_write(
    cache: KvCache,
    *,
    qkv_TNXK: Float[Array, "T N X K"],
    params: HeadParams,
    cos_TH: Float[Array, "T H"],
    sin_TH: Float[Array, "T H"],
    place_T: Int32[Array, " T"],
    layer: int | Int32[Array, ""],
    launch: LaunchFn,
) -> Rotated:
    """The inputs of attention, out of G query heads, their key head and their value head (X) of each token.

    `place_T` is page * page_size + offset of each token. Models and caches are those that
    `attention_cuda.check_shape` admits. The pages are written in place, as `kv_write.write_kv` writes them.
    """
    num_tokens, heads, vectors, head_dim = qkv_TNXK.shape
    _, num_pages, page_size, _, _ = cache.k_LPSNK.shape
    has_norms = params.q_norm_K is not None and params.k_norm_K is not None
    macros = {
        "HEAD_DIM": head_dim,
        "GROUP": vectors - 2,
        "HEADS": heads,
        "PAGE_SIZE": page_size,
        "NUM_PAGES": num_pages,
        "KV_KIND": KV_KINDS[cache.k_LPSNK.dtype],
        "HAS_BIAS": int(params.bias_NXK is not None),
        "HAS_NORMS": int(has_norms),
        "EPSILON": f"{params.eps!r}f",
        "WARPS": min(vectors, _MOST_WARPS),
    }
    kernel = Kernel(
        entry=Entry.ROTATE,
        macros=tuple((name, str(value)) for name, value in macros.items()),
        warps=min(vectors, _MOST_WARPS),
    )
    pages = [array for array in cache if array is not None]
    queries = jax.ShapeDtypeStruct((num_tokens, heads, vectors - 2, head_dim), qkv_TNXK.dtype)
    what = Launch(
        kernel=kernel,
        grid=(num_tokens * heads, 1),
        results=(*(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in pages), queries),
        in_place=len(pages),
    )
    given = [params.bias_NXK, *((params.q_norm_K, params.k_norm_K) if has_norms else ())]
    operands = [qkv_TNXK, *(array for array in given if array is not None), cos_TH, sin_TH, place_T]
    *written, q_TNGK = launch(what, [*operands, jnp.asarray(layer, jnp.int32).reshape(1), *pages])
    return Rotated(q_TNGK, KvCache(*written))
