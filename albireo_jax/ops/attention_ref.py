"""Paged attention in its simplest form, every token over the whole page table: the oracle of the tests."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from albireo_jax.ops.kv_cache import KvCache, dequantise


def reference_attention(
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
) -> Float[Array, "T N G K"]:
    """A `PagedAttentionFn` that gathers T * M pages and scores all of their entries."""
    num_tokens, num_heads, _, head_dim = q_TNGK.shape
    token_T = jnp.arange(num_tokens, dtype=jnp.int32)
    row_T = jnp.searchsorted(row_start_R1[1:], token_T, side="right")
    end_T = row_start_R1.at[row_T + 1].get(mode="clip")
    position_T = context_R.at[row_T].get(mode="clip") - (end_T - token_T)

    pages_TM = page_table_RM.at[row_T].get(mode="clip")
    k_LPSNK, v_LPSNK, _, _ = dequantise(cache)
    k_TCNK = k_LPSNK[layer, pages_TM].reshape(num_tokens, -1, num_heads, head_dim)
    v_TCNK = v_LPSNK[layer, pages_TM].reshape(num_tokens, -1, num_heads, head_dim)
    entry_1C = jnp.arange(k_TCNK.shape[1])[None, :]
    seen_TC = (entry_1C <= position_T[:, None]) & (token_T < row_start_R1[-1])[:, None]
    if sliding_window is not None:
        seen_TC &= entry_1C > position_T[:, None] - sliding_window
    k_TCNK = jnp.where(seen_TC[:, :, None, None], k_TCNK, 0.0)
    v_TCNK = jnp.where(seen_TC[:, :, None, None], v_TCNK, 0.0)
    score_TNGC = jnp.einsum("TNGK,TCNK->TNGC", q_TNGK.astype(jnp.float32), k_TCNK) * scale
    if soft_cap is not None:
        score_TNGC = soft_cap * jnp.tanh(score_TNGC / soft_cap)
    score_TNGC = jnp.where(seen_TC[:, None, None, :], score_TNGC, -1e30)  # finite: padding sees nothing
    weight_TNGC = jnp.where(seen_TC[:, None, None, :], jax.nn.softmax(score_TNGC, axis=-1), 0.0)
    return jnp.einsum("TNGC,TCNK->TNGK", weight_TNGC, v_TCNK).astype(q_TNGK.dtype)
