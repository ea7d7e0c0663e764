"""The implementations of a step's attention over the paged cache: by operations of XLA, or by CUDA kernels.

Each gives what the decoder computes, and the callback by which its layers attend.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Int32

from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.plan import TOKEN_ON_DEVICE
from albireo_jax.nn.decoder import (
    AddNormFn,
    AttendFn,
    LayerIndex,
    Projected,
    add_norm,
    queries_keys_values,
)
from albireo_jax.ops.attention import PagedAttentionFn
from albireo_jax.ops.attention_cuda import KernelShape, kernel_shape, prepare_attention
from albireo_jax.ops.attention_cuda import attend as attend_by_pieces
from albireo_jax.ops.attention_loop import loop_attention
from albireo_jax.ops.cuda.kernels import LaunchFn
from albireo_jax.ops.kv_cache import KvCache
from albireo_jax.ops.kv_write import token_pages, write_kv
from albireo_jax.ops.kv_write_cuda import HeadParams, rotate_and_write
from albireo_jax.ops.norm_cuda import add_and_normalise, is_possible
from albireo_jax.ops.prepare_cuda import PackedRows, PreparedStep
from albireo_jax.runtime.batch import Bucket, StepInputs
from albireo_jax.runtime.state import CacheState


class LayerCache(NamedTuple):
    """The state that layers hand on: the pages, and the kernels' counts of work that is done."""

    kv: KvCache
    arrived: tuple[Int32[Array, "X N"], ...] = ()


class StepTokens(NamedTuple):
    """The decoder's inputs: T tokens at their positions, the last one of each row, and their attention."""

    token_T: Int32[Array, " T"]
    position_T: Int32[Array, " T"]
    last_R: Int32[Array, " R"]
    attend: AttendFn[LayerCache]
    cache: LayerCache


class _Rows(NamedTuple):
    """Row (R: padding) and position of each packed token, and the first token of each row."""

    row_T: Int32[Array, " T"]
    position_T: Int32[Array, " T"]
    row_start_R1: Int32[Array, " R1"]


def bucket_of(inputs: StepInputs) -> Bucket:
    """The size of a step."""
    return Bucket(len(inputs.token_T), len(inputs.slot_R))


@runtime_checkable
class StepAttention(Protocol):
    """An implementation of attention: it prepares a step's tokens, and with them how layers attend.

    A `StepProgram` holds one; like it, an implementation is hashable.
    """

    @property
    def is_checkable(self) -> bool:
        """Whether `shard_map` can check which of its values vary over the ranks."""
        ...

    @property
    def add_norm(self) -> AddNormFn:
        """The sum and norm of a residual, for layers that add the result of an all-reduce."""
        ...

    def prepare(
        self,
        model: ModelConfig,
        state: CacheState,
        inputs: StepInputs,
        *,
        last_token_Z: Int32[Array, " Z"],
        group: int,
    ) -> StepTokens:
        """A step's tokens; on this rank, `group` query heads share a key/value head."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionByOperations:
    """A step by operations of XLA, for every device and dtype; each layer calls `attend`."""

    attend: PagedAttentionFn = loop_attention

    @property
    def is_checkable(self) -> bool:
        """True: the checker knows all operations of XLA."""
        return True

    @property
    def add_norm(self) -> AddNormFn:
        """Operations that XLA fuses as it can."""
        return add_norm

    def prepare(
        self,
        model: ModelConfig,
        state: CacheState,
        inputs: StepInputs,
        *,
        last_token_Z: Int32[Array, " Z"],
        group: int,
    ) -> StepTokens:
        """A step's tokens; the shapes of queries tell the `group`."""
        del group
        rows, page_size = _rows(inputs), state.kv.k_LPSNK.shape[2]
        page_table_RM = state.page_table_ZM[inputs.slot_R]
        pages = token_pages(page_table_RM, rows.row_T, rows.position_T, page_size=page_size)

        def attend(layer: LayerIndex, projected: Projected, cache: LayerCache) -> tuple[Array, LayerCache]:
            q_TNGK, k_TNK, v_TNK = queries_keys_values(projected)
            kv = write_kv(cache.kv, k_TNK=k_TNK, v_TNK=v_TNK, layer=layer, pages=pages)
            out_TNGK = self.attend(
                q_TNGK,
                kv,
                layer=layer,
                row_start_R1=rows.row_start_R1,
                context_R=inputs.start_R + inputs.count_R,
                page_table_RM=page_table_RM,
                scale=model.head_dim**-0.5,
                sliding_window=model.sliding_window,
            )
            return out_TNGK, LayerCache(kv)

        return StepTokens(
            token_T=_tokens(inputs, last_token_Z, rows),
            position_T=rows.position_T,
            last_R=jnp.maximum(rows.row_start_R1[1:] - 1, 0),
            attend=attend,
            cache=LayerCache(state.kv),
        )


BY_OPERATIONS = AttentionByOperations()
"""The attention of every device that has no kernels of its own."""


@dataclass(frozen=True, slots=True)
class AttentionByKernels:
    """A step by CUDA kernels that `launch` runs, for the models that `attention_cuda.check_shape` admits."""

    launch: LaunchFn

    @property
    def is_checkable(self) -> bool:
        """False: of kernels the checker knows nothing."""
        return False

    @property
    def add_norm(self) -> AddNormFn:
        """A kernel that does both."""
        return add_norm_by_kernel(self.launch)

    def prepare(
        self,
        model: ModelConfig,
        state: CacheState,
        inputs: StepInputs,
        *,
        last_token_Z: Int32[Array, " Z"],
        group: int,
    ) -> StepTokens:
        """A step's tokens, and the work on their rows cut into pieces for the kernels."""
        tokens, rows = bucket_of(inputs)
        words_W = jnp.concatenate([inputs.token_T, inputs.slot_R, inputs.start_R, inputs.count_R])
        shape = kernel_shape(
            state.kv,
            group=group,
            table_width=state.page_table_ZM.shape[1],
            scale=model.head_dim**-0.5,
            sliding_window=model.sliding_window,
        )
        packed = PackedRows(words_W, state.page_table_ZM, last_token_Z, tokens, rows)
        prepared = prepare_attention(packed, shape, launch=self.launch)
        return StepTokens(
            prepared.token_T,
            prepared.position_T,
            prepared.last_R,
            partial(_attend_by_kernels, launch=self.launch, shape=shape, prepared=prepared, packed=packed),
            LayerCache(state.kv, tuple(work.arrived_XN for work in prepared.works)),
        )


def _attend_by_kernels(
    layer: LayerIndex,
    projected: Projected,
    cache: LayerCache,
    *,
    launch: LaunchFn,
    shape: KernelShape,
    prepared: PreparedStep,
    packed: PackedRows,
) -> tuple[Array, LayerCache]:
    """One layer: rotate and write, then attend; `prepared` is the work on the `packed` rows."""
    rotated = rotate_and_write(
        cache.kv,
        qkv_TNXK=projected.qkv_TNXK,
        params=HeadParams(projected.bias_NXK, projected.q_norm_K, projected.k_norm_K, projected.eps),
        cos_TH=projected.by.cos_TH,
        sin_TH=projected.by.sin_TH,
        place_T=prepared.place_T,
        layer=layer,
        launch=launch,
    )
    counted = zip(prepared.works, cache.arrived, strict=True)
    attended = attend_by_pieces(
        rotated.q_TNGK,
        rotated.cache,
        shape=shape,
        works=tuple(work._replace(arrived_XN=arrived_XN) for work, arrived_XN in counted),
        num_rows=packed.num_rows,
        page_table_ZM=packed.page_table_ZM,
        layer=layer,
        launch=launch,
    )
    return attended.out_TNGK, LayerCache(rotated.cache, attended.arrived)


def add_norm_by_kernel(launch: LaunchFn) -> AddNormFn:
    """Residuals and norms by a CUDA kernel, where something is added."""

    def by_kernel(x_TD: Array, added_TD: Array | None, weight_D: Array, *, eps: float) -> tuple[Array, Array]:
        if added_TD is None or not is_possible(x_TD.shape[1]):
            return add_norm(x_TD, added_TD, weight_D, eps=eps)
        return add_and_normalise(x_TD, added_TD, weight_D, eps=eps, launch=launch)

    return by_kernel


def _rows(inputs: StepInputs) -> _Rows:
    bucket = bucket_of(inputs)
    ends_R = jnp.cumsum(inputs.count_R, dtype=jnp.int32)
    row_start_R1 = jnp.concatenate([jnp.zeros(1, jnp.int32), ends_R])
    index_T = jnp.arange(bucket.tokens, dtype=jnp.int32)
    if bucket.is_decode:
        return _Rows(index_T, inputs.start_R, row_start_R1)
    # Comparing with all rows is one small fused loop; padding tokens fall on row R, which is none.
    row_T = jnp.sum(index_T[:, None] >= ends_R[None, :], axis=1, dtype=jnp.int32)
    offset_R = inputs.start_R - row_start_R1[:-1]
    return _Rows(row_T, index_T + offset_R.at[row_T].get(mode="clip"), row_start_R1)


def _tokens(inputs: StepInputs, last_token_Z: Int32[Array, " Z"], rows: _Rows) -> Int32[Array, " T"]:
    """Input ids; an id that the host has not seen yet is taken from the slot's last sample."""
    last_T = last_token_Z[inputs.slot_R.at[rows.row_T].get(mode="clip")]
    return jnp.where(inputs.token_T == TOKEN_ON_DEVICE, last_T, inputs.token_T)
