"""The forward program: page updates, gather inputs, forward, logits; one `shard_map` over all of it.

::

    begin_with_pages (only for slots whose first pages are computed already) ──▶ page table
    buffer ──unpack──▶ page updates ──▶ cache
                       token ids, rows ──▶ forward over all layers ──▶ last hidden of each row ──▶ logits
    sampler.last_token ──(TOKEN_ON_DEVICE)──┘

Only `last_token` depends on the previous step's sampling. A model knows no schedule, cache size or sampler.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

from albireo_jax.core.config import Quantization, SamplingMode
from albireo_jax.core.gpu_options import ProductLibrary
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.nn.decoder import (
    DecoderWeights,
    add_norm,
    forward,
    head,
    logits,
    unstack,
    weight_specs,
)
from albireo_jax.nn.fp8 import ProductRows
from albireo_jax.ops.cuda.kernels import LaunchFn
from albireo_jax.runtime.batch import Bucket, BufferLayout, StepInputs, unpack
from albireo_jax.runtime.state import CacheState, cache_specs
from albireo_jax.runtime.step_attention import (
    BY_OPERATIONS,
    StepAttention,
    bucket_of,
)

_GRAPH_COMMANDS = (  # WHILE, and all of XLA's default that a program on one GPU can have
    "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
)

_FIRST_WITH_FP8 = (8, 9)  # compute capability of the first GPUs that multiply fp8


class ForwardOutput(NamedTuple):
    """The cache after a step, hidden states of all its tokens, and the logits of each row's last token.

    The logits are split over the vocabulary; hidden states are those before the final norm.
    """

    cache: CacheState
    hidden_TD: Float[Array, "T D"]
    logits_RV: Float[Array, "R V"]


class LayerLoop(StrEnum):
    """Form of the loop over layers; all give the same tokens.

    SCANNED compiles one layer, in a second at any depth, but copies each layer's weights out of the
    stack. UNROLLED compiles every layer and, on a GPU, reads the stack in place; but the place is part of
    each product, so that XLA tunes every layer's apart. UNSTACKED reads arrays of each layer's own: weights
    that are held so, or a second copy. UNSTACKED_DECODE is that for decode steps, and SCANNED for steps with
    prompts: these are bound by arithmetic, not by reading weights, and compile several times faster so.
    """

    SCANNED = "scanned"
    UNROLLED = "unrolled"
    UNSTACKED = "unstacked"
    UNSTACKED_DECODE = "unstacked decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProgram:
    """The parts of an engine's step that no bucket changes; hashable, so that jit can key on it.

    `axis` is the mesh axis of tensor parallelism. All layers attend by `attention`. `sample_launch` runs the
    CUDA kernels of sampling, which without it is made of operations of XLA. `products` makes a GPU's matrix
    products. With `graph_collectives`, CUDA graphs hold the collectives of several GPUs too.
    """

    model: ModelConfig
    mesh: Mesh
    axis: str
    page_size: int
    sampling: SamplingMode
    layers: LayerLoop
    attention: StepAttention = BY_OPERATIONS
    sample_launch: LaunchFn | None = None
    products: ProductLibrary = ProductLibrary.TRITON
    graph_collectives: bool = False

    def layer_loop(self, bucket: Bucket) -> LayerLoop:
        """Form of the layer loop in the steps of a bucket: any but UNSTACKED_DECODE."""
        if self.layers is not LayerLoop.UNSTACKED_DECODE:
            return self.layers
        return LayerLoop.UNSTACKED if bucket.is_decode else LayerLoop.SCANNED

    def arrange(self, weights: DecoderWeights, bucket: Bucket) -> DecoderWeights:
        """The weights in the form that the steps of a bucket read; fields that have it stay as they are."""
        return unstack(weights) if self.layer_loop(bucket) is LayerLoop.UNSTACKED else weights

    def ints(self, *shape: int) -> jax.ShapeDtypeStruct:
        """The int32 arrays of this shape that every rank has whole."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=everywhere)

    def logits(self, rows: int) -> jax.ShapeDtypeStruct:
        """The float32 logits of so many rows, split over the padded vocabulary."""
        split = NamedSharding(self.mesh, PartitionSpec(None, self.axis))
        vocab = self.model.padded_vocab_size(self.mesh.size)
        return jax.ShapeDtypeStruct((rows, vocab), jnp.float32, sharding=split)

    @property
    def group(self) -> int:
        """Query heads that share a key/value head on each rank."""
        return self.model.num_heads // self.model.kv_heads_at(self.mesh.size)

    @property
    def collective_axis(self) -> str | None:
        """The axis to communicate over, None on one device."""
        return self.axis if self.mesh.size > 1 else None

    @property
    def compiler_options(self) -> dict[str, str]:
        """Options of XLA for programs that read the weights.

        Where all layers widen their slices of a stack of codes, its slice sinker would widen the whole stack
        once and keep it, twice as large; without it each product widens the codes as it reads them. Where
        cuBLASLt makes a GPU's products, XLA has none to tune.
        """
        options: dict[str, str] = {}
        if self.model.quantization is not None:
            options["xla_disable_hlo_passes"] = "slice-sinker"
        if self.is_on_gpus and self.products is ProductLibrary.CUBLASLT:
            options["xla_gpu_enable_triton_gemm"] = "False"
        return options | self.graph_options

    @property
    def graph_options(self) -> dict[str, str]:
        """Options of XLA for programs with collectives; by default it keeps these out of graphs."""
        if not (self.graph_collectives and self.mesh.size > 1 and self.is_on_gpus):
            return {}
        return {"xla_gpu_enable_command_buffer": f"{_GRAPH_COMMANDS},COLLECTIVES"}

    @property
    def loop_options(self) -> dict[str, str]:
        """Options of XLA for programs with loops whose end only the device knows.

        A GPU runs them by itself as parts of one CUDA graph. By default XLA keeps loops out of graphs: the
        host reads each condition, and so a dispatch waits for all that is queued before it. Over several GPUs
        loops stay outside of graphs with the collectives in them, unless `graph_collectives` is set.
        """
        on_one_gpu = self.mesh.size == 1 and self.is_on_gpus
        return {"xla_gpu_enable_command_buffer": _GRAPH_COMMANDS} if on_one_gpu else self.graph_options

    @property
    def fp8_rows(self) -> ProductRows:
        """The form in which rows enter products with fp8 codes, where the model rounds them."""
        is_native = self.products is ProductLibrary.CUBLASLT and multiplies_fp8(self.mesh)
        return ProductRows.CODES if is_native else ProductRows.ROUNDED

    @property
    def is_on_gpus(self) -> bool:
        """Whether the mesh is of GPUs."""
        return self.mesh.devices.flat[0].platform == "gpu"


def default_products(model: ModelConfig, mesh: Mesh) -> ProductLibrary:
    """cuBLASLt, but for codes that must be widened, which only XLA's own kernels do as they read them.

    Where a model rounds rows to fp8 too and GPUs multiply fp8, none is widened.
    """
    is_native = model.quantization is Quantization.FP8 and multiplies_fp8(mesh)
    return ProductLibrary.CUBLASLT if model.quantization is None or is_native else ProductLibrary.TRITON


def multiplies_fp8(mesh: Mesh) -> bool:
    """Whether the mesh is of GPUs that multiply fp8 numbers: sm_89 and later."""
    device = mesh.devices.flat[0]
    if device.platform != "gpu":
        return False
    major, minor = map(int, device.compute_capability.split("."))
    return (major, minor) >= _FIRST_WITH_FP8


def jit_forward(program: StepProgram, layout: BufferLayout, weights: DecoderWeights) -> jax.stages.Wrapped:
    """The jitted forward pass of a bucket: (weights, cache, last_token_Z, buffer) -> ForwardOutput.

    Donates the cache. `weights` only tells which fields there are.
    """
    specs = cache_specs(program.axis)
    body = jax.shard_map(
        partial(_forward_step, program, layout),
        mesh=program.mesh,
        in_specs=(weight_specs(weights), specs, PartitionSpec(), PartitionSpec()),
        out_specs=ForwardOutput(specs, PartitionSpec(), PartitionSpec(None, program.axis)),  # type: ignore[arg-type]
        # One rank alone sums nothing, and would seem to vary.
        check_vma=program.collective_axis is not None and program.attention.is_checkable,
    )
    return jax.jit(body, donate_argnums=(1,), compiler_options=program.compiler_options)


@partial(jax.jit, donate_argnums=(0,))
def begin_with_pages(page_table_ZM: Int32[Array, "Z M"], row_AX: Int32[Array, "A X"]) -> Int32[Array, "Z M"]:
    """The page table with whole rows of new slots, as `batch.pack_pages` wrote them; donates the table."""
    return page_table_ZM.at[row_AX[:, 0]].set(row_AX[:, 1:])


def update_pages(cache: CacheState, inputs: StepInputs) -> CacheState:
    """The cache with the page table that a step's rows read."""
    table_ZM = cache.page_table_ZM.at[inputs.update_slot_U, inputs.update_column_U].set(inputs.update_page_U)
    return cache._replace(page_table_ZM=table_ZM)


def forward_rows(
    program: StepProgram,
    weights: DecoderWeights,
    cache: CacheState,
    *,
    inputs: StepInputs,
    last_token_Z: Int32[Array, " Z"],
) -> ForwardOutput:
    """The forward pass on one rank, inside the `shard_map`; the page updates are in the cache already."""
    with jax.named_scope("inputs"):
        tokens = program.attention.prepare(
            program.model, cache, inputs, last_token_Z=last_token_Z, group=program.group
        )
    hidden_TD, layers = forward(
        program.model,
        weights,
        tokens.token_T,
        position_T=tokens.position_T,
        cache=tokens.cache,
        attend=tokens.attend,
        # On one rank the products add the residual themselves.
        add_norm=add_norm if program.collective_axis is None else program.attention.add_norm,
        axis=program.collective_axis,
        unroll=program.layer_loop(bucket_of(inputs)) is not LayerLoop.SCANNED,
        fp8_rows=program.fp8_rows,
    )
    with jax.named_scope("logits"):
        hidden_RD = hidden_TD[tokens.last_R]
        logits_Rv = logits(program.model, head(weights), hidden_RD, axis=program.collective_axis)
        return ForwardOutput(cache._replace(kv=layers.kv), hidden_TD, logits_Rv)


def _forward_step(
    program: StepProgram,
    layout: BufferLayout,
    weights: DecoderWeights,
    cache: CacheState,
    last_token_Z: Int32[Array, " Z"],
    buffer_W: Array,
) -> ForwardOutput:
    with jax.named_scope("inputs"):
        inputs = unpack(buffer_W, layout)
        cache = update_pages(cache, inputs)
    return forward_rows(program, weights, cache, inputs=inputs, last_token_Z=last_token_Z)
