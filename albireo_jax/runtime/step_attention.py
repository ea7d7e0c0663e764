"""Attention over the paged cache as the layer loop calls it: by operations of XLA or by kernels."""

from typing import NamedTuple

from jaxtyping import Array, Int32

from albireo_jax.core.config import ModelConfig
from albireo_jax.nn.decoder import AttendFn, LayerIndex, Projected, queries_keys_values
from albireo_jax.ops.attention import paged_attention
from albireo_jax.ops.cuda.kernels import LaunchFn
from albireo_jax.ops.kv_cache import KvCache
from albireo_jax.ops.kv_write import TokenPages, write_kv
from albireo_jax.ops.kv_write_cuda import HeadParams, rotate_and_write


class StepRows(NamedTuple):
    """Where a step's rows lie: their queries, their contexts and pages, and where each token's keys go."""

    row_start_R1: Int32[Array, " R1"]
    context_R: Int32[Array, " R"]
    page_table_RM: Int32[Array, "R M"]
    pages: TokenPages


def attend_by_operations(model: ModelConfig, rows: StepRows) -> AttendFn[KvCache]:
    """Attention by operations of XLA, for every device and dtype."""

    def attend(layer: LayerIndex, projected: Projected, cache: KvCache) -> tuple[Array, KvCache]:
        q_TNGK, k_TNK, v_TNK = queries_keys_values(projected)
        cache = write_kv(cache, k_TNK=k_TNK, v_TNK=v_TNK, layer=layer, pages=rows.pages)
        return _attend(model, rows, q_TNGK, cache, layer=layer, launch=None), cache

    return attend


def attend_by_kernels(
    model: ModelConfig, rows: StepRows, *, page_size: int, launch: LaunchFn
) -> AttendFn[KvCache]:
    """Attention by the CUDA kernels, which also rotate, normalise and write; `launch` runs them."""
    place_T = rows.pages.page_T * page_size + rows.pages.offset_T

    def attend(layer: LayerIndex, projected: Projected, cache: KvCache) -> tuple[Array, KvCache]:
        rotated = rotate_and_write(
            cache,
            qkv_TNXK=projected.qkv_TNXK,
            params=HeadParams(projected.bias_NXK, projected.q_norm_K, projected.k_norm_K, projected.eps),
            cos_TH=projected.by.cos_TH,
            sin_TH=projected.by.sin_TH,
            place_T=place_T,
            layer=layer,
            launch=launch,
        )
        out_TNGK = _attend(model, rows, rotated.q_TNGK, rotated.cache, layer=layer, launch=launch)
        return out_TNGK, rotated.cache

    return attend


def _attend(
    model: ModelConfig,
    rows: StepRows,
    q_TNGK: Array,
    cache: KvCache,
    *,
    layer: LayerIndex,
    launch: LaunchFn | None,
) -> Array:
    return paged_attention(
        q_TNGK,
        cache,
        layer=layer,
        row_start_R1=rows.row_start_R1,
        context_R=rows.context_R,
        page_table_RM=rows.page_table_RM,
        scale=model.head_dim**-0.5,
        sliding_window=model.sliding_window,
        launch=launch,
    )
