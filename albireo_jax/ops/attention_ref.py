"""Paged attention in its simplest form, one token at a time: the oracle of the tests."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def reference_attention(
    q_TNGK: Float[Array, "T N G K"],
    k_LPSNK: Float[Array, "L P S N K"],
    v_LPSNK: Float[Array, "L P S N K"],
    *,
    layer: int,
    row_start_R1: Int32[Array, " R1"],
    context_R: Int32[Array, " R"],
    page_table_RM: Int32[Array, "R M"],
    scale: float,
    sliding_window: int | None,
) -> Float[Array, "T N G K"]:
    """What `paged_attention` must return, token by token over densely gathered contexts."""
    page_size = k_LPSNK.shape[2]
    out = jnp.zeros(q_TNGK.shape, q_TNGK.dtype)
    for row in range(context_R.shape[0]):
        first, end = int(row_start_R1[row]), int(row_start_R1[row + 1])
        if end == first:
            continue
        context = int(context_R[row])
        pages_J = page_table_RM[row, : -(-context // page_size)]
        k_CNK = jnp.concatenate(list(k_LPSNK[layer, pages_J]))[:context].astype(jnp.float32)
        v_CNK = jnp.concatenate(list(v_LPSNK[layer, pages_J]))[:context].astype(jnp.float32)
        for token in range(first, end):
            position = context - (end - token)
            low = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            seen_k, seen_v = k_CNK[low : position + 1], v_CNK[low : position + 1]
            score_NGC = jnp.einsum("NGK,CNK->NGC", q_TNGK[token].astype(jnp.float32), seen_k) * scale
            o_NGK = jnp.einsum("NGC,CNK->NGK", jax.nn.softmax(score_NGC, axis=-1), seen_v)
            out = out.at[token].set(o_NGK.astype(out.dtype))
    return out
