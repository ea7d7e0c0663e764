"""The step program: admit, gather inputs, forward, sample, scatter; one `shard_map` over all of it.

::

    buffer ──unpack──▶ page updates, admissions ──▶ state
                       token ids, rows ──▶ forward over all layers ──▶ last hidden of each row
    state.last_token ──(TOKEN_ON_DEVICE)──┘                                  │
          ▲                                                                  ▼
          └──────────── ids ◀── sample (rows split over ranks) ◀── logits (vocabulary split)

Only `last_token` depends on the previous step's sampling. The stages are composed here and nowhere
else: a model knows no schedule, cache size or sampler, and the sampler knows no model.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int32

from albireo_jax.core.config import ModelConfig, SamplingMode
from albireo_jax.core.plan import TOKEN_ON_DEVICE
from albireo_jax.nn.decoder import DecoderWeights, LayerIndex, forward, logits, unstack, weight_specs
from albireo_jax.ops.attention import paged_attention
from albireo_jax.ops.kv_write import token_pages, write_kv
from albireo_jax.runtime.batch import Bucket, BufferLayout, StepInputs, slot_fields, unpack
from albireo_jax.runtime.state import DeviceState, state_specs
from albireo_jax.sampling.sample import SamplerParams, sample
from albireo_jax.sampling.sharded import sample_replicated, sample_sharded


class StepOutput(NamedTuple):
    """The state after a step, and one sampled id per row."""

    state: DeviceState
    id_R: Int32[Array, " R"]


class LayerLoop(StrEnum):
    """Form of the loop over layers; all give the same tokens.

    SCANNED compiles one layer, in a second at any depth, but copies each layer's weights out of the
    stack. UNROLLED compiles every layer and, on a GPU, reads the stack in place. UNSTACKED also gives each
    layer arrays of its own, which a CPU needs to read them in place; it costs a second copy of the weights.
    """

    SCANNED = "scanned"
    UNROLLED = "unrolled"
    UNSTACKED = "unstacked"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProgram:
    """What is fixed in an engine's step, whatever the bucket; hashable, so that jit can key on it.

    `axis` is the mesh axis of tensor parallelism.
    """

    model: ModelConfig
    mesh: Mesh
    axis: str
    page_size: int
    sampling: SamplingMode
    layers: LayerLoop

    def layer_loop(self, bucket: Bucket) -> LayerLoop:
        """Form of the layer loop in the steps of a bucket.

        UNSTACKED is for decode steps. One with prompts is bound by arithmetic, not by reading weights, and
        compiles several times faster scanned.
        """
        if self.layers is LayerLoop.UNSTACKED and not bucket.is_decode:
            return LayerLoop.SCANNED
        return self.layers

    def arrange(self, weights: DecoderWeights, bucket: Bucket) -> DecoderWeights:
        """Stacked weights in the form that the steps of a bucket read."""
        return unstack(weights) if self.layer_loop(bucket) is LayerLoop.UNSTACKED else weights

    @property
    def collective_axis(self) -> str | None:
        """The axis to communicate over, None on one device."""
        return self.axis if self.mesh.size > 1 else None


class _Cache(NamedTuple):
    """What the layer loop carries through attention."""

    k_LPSNK: Float[Array, "L P S N K"]
    v_LPSNK: Float[Array, "L P S N K"]


class _Rows(NamedTuple):
    """Row (R: padding) and position of each packed token, and the first token of each row."""

    row_T: Int32[Array, " T"]
    position_T: Int32[Array, " T"]
    row_start_R1: Int32[Array, " R1"]


def jit_step(program: StepProgram, layout: BufferLayout, weights: DecoderWeights) -> jax.stages.Wrapped:
    """The jitted step of one bucket: (weights, state, buffer) -> StepOutput; donates the state.

    `weights` only tells which fields there are.
    """
    specs = state_specs(program.axis)
    body = jax.shard_map(
        partial(_step, program, layout),
        mesh=program.mesh,
        in_specs=(weight_specs(weights), specs, PartitionSpec()),
        out_specs=StepOutput(specs, PartitionSpec()),  # type: ignore[arg-type]
        check_vma=False,  # ids are equal on all ranks by the final gather, which the checker cannot see
    )
    return jax.jit(body, donate_argnums=(1,))


def sample_rows(
    program: StepProgram, logits_Rv: Float[Array, "R v"], params: SamplerParams
) -> Int32[Array, " R"]:
    """The sampling stage, inside the step's `shard_map`: vocabulary-sharded logits to one id per row."""
    axis = program.collective_axis
    if axis is None:
        return sample(logits_Rv, params)
    route = {SamplingMode.SHARDED: sample_sharded, SamplingMode.REPLICATED: sample_replicated}
    return route[program.sampling](logits_Rv, params, axis=axis)


def _step(
    program: StepProgram, layout: BufferLayout, weights: DecoderWeights, state: DeviceState, buffer_W: Array
) -> StepOutput:
    inputs = unpack(buffer_W, layout)
    state = _admit(state, inputs)
    rows = _rows(inputs, layout)
    token_T = _tokens(inputs, state, rows)
    hidden_RD, state = _forward(program, weights, state, inputs, rows, token_T)
    logits_Rv = logits(program.model, weights, hidden_RD, axis=program.collective_axis)
    id_R = sample_rows(program, logits_Rv, _sampler_params(state, inputs))
    padding_slot = state.last_token_Z.shape[0] - 1
    slot_R = jnp.where(inputs.samples_R, inputs.slot_R, padding_slot)
    return StepOutput(state._replace(last_token_Z=state.last_token_Z.at[slot_R].set(id_R)), id_R)


def _admit(state: DeviceState, inputs: StepInputs) -> DeviceState:
    """Write new page-table entries and the parameters of new slots."""
    table_ZM = state.page_table_ZM.at[inputs.update_slot_U, inputs.update_column_U].set(inputs.update_page_U)
    params_ZF = state.params_ZF
    if inputs.new_slot_A.shape[0]:
        params_ZF = params_ZF.at[inputs.new_slot_A].set(inputs.new_params_AF)
    return state._replace(page_table_ZM=table_ZM, params_ZF=params_ZF)


def _rows(inputs: StepInputs, layout: BufferLayout) -> _Rows:
    tokens = layout.bucket.tokens
    ends_R = jnp.cumsum(inputs.count_R, dtype=jnp.int32)
    row_start_R1 = jnp.concatenate([jnp.zeros(1, jnp.int32), ends_R])
    index_T = jnp.arange(tokens, dtype=jnp.int32)
    if layout.bucket.is_decode:
        return _Rows(index_T, inputs.start_R, row_start_R1)
    # Comparing with all rows is one small fused loop; padding tokens fall on row R, which is none.
    row_T = jnp.sum(index_T[:, None] >= ends_R[None, :], axis=1, dtype=jnp.int32)
    offset_R = inputs.start_R - row_start_R1[:-1]
    return _Rows(row_T, index_T + offset_R.at[row_T].get(mode="clip"), row_start_R1)


def _tokens(inputs: StepInputs, state: DeviceState, rows: _Rows) -> Int32[Array, " T"]:
    """Input ids, those that the host has not seen yet taken from the slots' last samples."""
    last_T = state.last_token_Z[inputs.slot_R.at[rows.row_T].get(mode="clip")]
    return jnp.where(inputs.token_T == TOKEN_ON_DEVICE, last_T, inputs.token_T)


def _forward(
    program: StepProgram,
    weights: DecoderWeights,
    state: DeviceState,
    inputs: StepInputs,
    rows: _Rows,
    token_T: Int32[Array, " T"],
) -> tuple[Float[Array, "R D"], DeviceState]:
    """Last hidden vector of each row, and the state with the step's keys and values in it."""
    model = program.model
    page_table_RM = state.page_table_ZM[inputs.slot_R]
    pages = token_pages(page_table_RM, rows.row_T, rows.position_T, page_size=program.page_size)

    def attend(
        layer: LayerIndex, q_TNGK: Array, k_TNK: Array, v_TNK: Array, cache: _Cache
    ) -> tuple[Array, _Cache]:
        cache = _Cache(
            *write_kv(cache.k_LPSNK, cache.v_LPSNK, k_TNK=k_TNK, v_TNK=v_TNK, layer=layer, pages=pages)
        )
        out_TNGK = paged_attention(
            q_TNGK,
            cache.k_LPSNK,
            cache.v_LPSNK,
            layer=layer,
            row_start_R1=rows.row_start_R1,
            context_R=inputs.start_R + inputs.count_R,
            page_table_RM=page_table_RM,
            scale=model.head_dim**-0.5,
            sliding_window=model.sliding_window,
        )
        return out_TNGK, cache

    loop = program.layer_loop(Bucket(token_T.shape[0], inputs.slot_R.shape[0]))
    cache = _Cache(state.k_LPSNK, state.v_LPSNK)
    hidden_TD, cache = forward(
        model,
        weights,
        token_T,
        position_T=rows.position_T,
        cache=cache,
        attend=attend,
        axis=program.collective_axis,
        unroll=loop is not LayerLoop.SCANNED,
    )
    last_R = jnp.maximum(rows.row_start_R1[1:] - 1, 0)
    return hidden_TD[last_R], state._replace(k_LPSNK=cache.k_LPSNK, v_LPSNK=cache.v_LPSNK)


def _sampler_params(state: DeviceState, inputs: StepInputs) -> SamplerParams:
    fields = slot_fields(state.params_ZF[inputs.slot_R])
    return SamplerParams(
        temperature_R=fields.temperature_R,
        top_k_R=fields.top_k_R,
        top_p_R=fields.top_p_R,
        min_p_R=fields.min_p_R,
        seed_R2=fields.seed_R2,
        position_R=inputs.start_R + inputs.count_R,
        banned_until_R=fields.banned_until_R,
        stop_id_RB=fields.stop_id_RB,
    )
