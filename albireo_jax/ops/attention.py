"""Causal grouped-query attention over a paged cache, for packed decode rows and prompt chunks.

Two implementations stand behind one signature: a loop of XLA operations for every device and dtype
(`attention_loop`), and CUDA kernels for NVIDIA GPUs (`attention_cuda`). Their oracle is `attention_ref`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from albireo_jax.ops.attention_cuda import cuda_attention
from albireo_jax.ops.attention_loop import loop_attention
from albireo_jax.ops.cuda.kernels import LaunchFn
from albireo_jax.ops.kv_cache import KvCache


def paged_attention(
    q_TNGK: Float[Array, "T N G K"],
    cache: KvCache,
    *,
    layer: int | Int32[Array, ""],
    row_start_R1: Int32[Array, " R1"],
    context_R: Int32[Array, " R"],
    page_table_RM: Int32[Array, "R M"],
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None = None,
    launch: LaunchFn | None = None,
) -> Float[Array, "T N G K"]:
    """Attention of T packed queries over one layer of the paged cache, which holds their own keys too.

    Row r owns queries row_start[r] … row_start[r+1]-1, the last ones of its context[r] tokens, whose
    pages are page_table[r]. The query at position p sees the cache entries c with c <= p, and
    c > p - sliding_window where that is set. Scores and softmax are float32; a score s becomes
    soft_cap * tanh(s / soft_cap) where that is set. Tokens after the last row's are padding and get zeros.
    T == R promises that no row has more than one query.

    With `launch` the CUDA kernels do it: weights of the softmax are then rounded to bfloat16, and a shape
    that they cannot do is a ModelError (`attention_cuda.check_shape`).
    """
    if launch is not None:
        return cuda_attention(
            q_TNGK,
            cache,
            layer=jnp.asarray(layer, jnp.int32),
            row_start_R1=row_start_R1,
            context_R=context_R,
            page_table_RM=page_table_RM,
            scale=scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            launch=launch,
        )
    return loop_attention(
        q_TNGK,
        cache,
        layer=layer,
        row_start_R1=row_start_R1,
        context_R=context_R,
        page_table_RM=page_table_RM,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
