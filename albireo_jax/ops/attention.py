"""Causal grouped-query attention over a paged cache, for packed decode rows and prompt chunks.

The implementations have one signature: a loop of XLA operations for every device and dtype
(`attention_loop`), CUDA kernels for NVIDIA GPUs (`attention_cuda`), and the oracle of the tests
(`attention_ref`).
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int32

from albireo_jax.ops.kv_cache import KvCache


@runtime_checkable
class PagedAttentionFn(Protocol):
    """Attention of T packed queries over one layer of the paged cache, which holds their own keys too.

    Row r owns queries row_start[r] … row_start[r+1]-1, the last ones of its context[r] tokens, whose
    pages are page_table[r]. The query at position p sees the cache entries c with c <= p, and
    c > p - sliding_window where that is set. Scores and softmax are float32; a score s becomes
    soft_cap * tanh(s / soft_cap) where that is set. Tokens after the last row's are padding and get zeros.
    T == R promises that no row has more than one query.
    """

    def __call__(
        self,
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
        """The weighted values of each query."""
        ...
