"""Paged attention by CUDA kernels (`ops/cuda/paged_attention.cu`): decode rows, then chunks.

::

    rows ──▶ pieces of decode rows ──▶ attend (a warp per share of the tokens) ─┐
        └──▶ pieces of chunks ───────▶ attend (a block per tile of queries) ────┴──▶ out

The last block of a tile merges what was cut.

The number of blocks launched depends on the bucket alone. The kernels of a model are compiled when its first
program is traced.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from albireo_jax.core.errors import ModelError
from albireo_jax.ops.cuda.kernels import Entry, Kernel, Launch, LaunchFn
from albireo_jax.ops.kv_cache import KV_KINDS, KvCache
from albireo_jax.ops.prepare_cuda import AttentionWork, Cut, PackedRows, PreparedStep, prepare_step

_DECODE_VECTORS = 16
"""Query vectors of a decode row at most: those of one matrix product."""

_WIDE = 128
"""Head dimension beyond which shared memory holds no more than the tokens of two warps."""

_DECODE_BLOCKS, _CHUNK_BLOCKS = 396, 264
"""Blocks of threads that an H100's 132 cores hold at once: three and two each, by their registers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelShape:
    """The shape that kernels are compiled for; `group` query heads share each of `heads` key/value heads."""

    head_dim: int
    group: int
    heads: int
    page_size: int
    table_width: int
    num_pages: int
    kind: int
    window: int | None
    soft_cap: float | None
    scale: float

    @property
    def warps(self) -> int:
        """Warps of a block; each has 16 tokens of every stage."""
        return 2 if self.head_dim > _WIDE else 4

    def kernel(self, *, is_decode: bool, is_chained: bool) -> Kernel:
        """A kernel for decode rows or chunks; a chained one adds to results that are there."""
        macros = {
            "HEAD_DIM": self.head_dim,
            "GROUP": self.group,
            "HEADS": self.heads,
            "PAGE_SIZE": self.page_size,
            "TABLE_WIDTH": self.table_width,
            "NUM_PAGES": self.num_pages,
            "KV_KIND": self.kind,
            "WINDOW": self.window or 0,
            "SOFT_CAP": f"{self.soft_cap or 0.0!r}f",
            "SCALE": f"{self.scale!r}f",
            "WARPS": self.warps,
            "GROUP_WARPS": 1 if is_decode else self.warps,
            "TILE_QUERIES": 1 if is_decode else self.chunk_queries(),
            "CHAINED": int(is_chained),
        }
        text = tuple((name, str(value)) for name, value in macros.items())
        return Kernel(entry=Entry.ATTEND, macros=text, warps=self.warps)

    def chunk_queries(self) -> int:
        """Queries of a chunk's tile: as many as have room for all heads of the group."""
        return max(1, 16 * self.warps // self.group)


def check_shape(*, head_dim: int, group: int, q_dtype: jnp.dtype, kv_dtype: jnp.dtype) -> None:
    """Raises ModelError with the reason if the kernels cannot do a model's attention."""
    kv_bytes = kv_dtype.itemsize
    if q_dtype != jnp.bfloat16 or kv_dtype not in KV_KINDS:
        raise ModelError(
            f"the CUDA attention kernels take bfloat16 models with bfloat16, int8 or fp8 caches, "
            f"not {q_dtype} with {kv_dtype}"
        )
    if head_dim * kv_bytes % 16 or head_dim > 256:
        raise ModelError(
            f"the CUDA attention kernels copy 16 bytes at a time: head_dim {head_dim} must be a multiple of "
            f"{16 // kv_bytes} up to 256 with a {kv_dtype} cache"
        )
    limit = 16 * (2 if head_dim > _WIDE else 4)
    if group > limit:
        raise ModelError(f"{group} query heads per key/value head, more than the kernels' {limit}")


def kernel_shape(
    cache: KvCache,
    *,
    group: int,
    table_width: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None = None,
) -> KernelShape:
    """The kernels for a bfloat16 model with such a cache; raises ModelError as `check_shape`."""
    _, num_pages, page_size, heads, head_dim = cache.k_LPSNK.shape
    kv_dtype = cache.k_LPSNK.dtype
    check_shape(head_dim=head_dim, group=group, q_dtype=jnp.dtype(jnp.bfloat16), kv_dtype=kv_dtype)
    return KernelShape(
        head_dim=head_dim,
        group=group,
        heads=heads,
        page_size=page_size,
        table_width=table_width,
        num_pages=num_pages,
        kind=KV_KINDS[kv_dtype],
        window=sliding_window,
        soft_cap=soft_cap,
        scale=scale,
    )


def prepare_attention(rows: PackedRows, shape: KernelShape, *, launch: LaunchFn) -> PreparedStep:
    """A step's rows as its layers need them, cut into work for `attend`."""
    cuts = [how for _, how in _cuts(shape, num_tokens=rows.num_tokens, num_rows=rows.num_rows)]
    return prepare_step(rows, cuts, page_size=shape.page_size, heads=shape.heads, launch=launch)


class Attended(NamedTuple):
    """Results of attention, and the counts of pieces that are done, which are 0 again."""

    out_TNGK: Float[Array, "T N G K"]
    arrived: tuple[Int32[Array, "X N"], ...]


def attend(
    q_TNGK: Float[Array, "T N G K"],
    cache: KvCache,
    *,
    shape: KernelShape,
    works: tuple[AttentionWork, ...],
    num_rows: int,
    page_table_ZM: Int32[Array, "Z M"],
    layer: int | Int32[Array, ""],
    launch: LaunchFn,
) -> Attended:
    """Attention of one layer by kernels that `launch` runs; the first layer takes `works` as prepared."""
    num_tokens, heads, _, _ = q_TNGK.shape
    kinds = _cuts(shape, num_tokens=num_tokens, num_rows=num_rows)
    layer_1 = jnp.asarray(layer, jnp.int32).reshape(1)
    operands = [q_TNGK, *(array for array in cache if array is not None), page_table_ZM]
    done: list[jax.Array] = []
    arrived: list[jax.Array] = []
    for (is_decode, _), work in zip(kinds, works, strict=True):
        count_XN = jax.ShapeDtypeStruct(work.arrived_XN.shape, jnp.int32)
        what = Launch(
            kernel=shape.kernel(is_decode=is_decode, is_chained=bool(done)),
            grid=(heads * work.piece_XF.shape[0], 1),
            results=(count_XN, *_results(q_TNGK, [how for _, how in kinds])),
            in_place=1 + len(done),
        )
        counted, *done = launch(what, [*operands, work.piece_XF, layer_1, work.arrived_XN, *done])
        arrived.append(counted)
    return Attended(done[0], tuple(arrived))


def cuda_attention(
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
    launch: LaunchFn,
) -> Float[Array, "T N G K"]:
    """A `PagedAttentionFn` by kernels that `launch` runs; raises ModelError as `check_shape`.

    The weights of the softmax are rounded to bfloat16.
    """
    num_tokens, _, group, head_dim = q_TNGK.shape
    kv_dtype = cache.k_LPSNK.dtype
    check_shape(head_dim=head_dim, group=group, q_dtype=q_TNGK.dtype, kv_dtype=kv_dtype)
    shape = kernel_shape(
        cache,
        group=group,
        table_width=page_table_RM.shape[1],
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
    count_R, slot_R = row_start_R1[1:] - row_start_R1[:-1], jnp.arange(len(context_R), dtype=jnp.int32)
    ids_T = jnp.zeros(num_tokens, jnp.int32)
    words_W = jnp.concatenate([ids_T, slot_R, context_R - count_R, count_R])
    rows = PackedRows(words_W, page_table_RM, slot_R, num_tokens, len(context_R))
    works = prepare_attention(rows, shape, launch=launch).works
    return attend(
        q_TNGK,
        cache,
        shape=shape,
        works=works,
        num_rows=len(context_R),
        page_table_ZM=page_table_RM,
        layer=layer,
        launch=launch,
    ).out_TNGK


def _results(q_TNGK: Float[Array, "T N G K"], cuts: list[Cut]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Results of the attention kernel: outputs, and in slots unfinished ones with their maxima and sums."""
    _, heads, _, head_dim = q_TNGK.shape
    slots = sum(how.num_slots for how in cuts)
    return (
        jax.ShapeDtypeStruct(q_TNGK.shape, q_TNGK.dtype),
        jax.ShapeDtypeStruct((slots, heads, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((slots, heads, 2), jnp.float32),
    )


def _cuts(shape: KernelShape, *, num_tokens: int, num_rows: int) -> list[tuple[bool, Cut]]:
    """The cuts of decode rows and of chunks, each with whether it is of decode rows.

    Only decode rows where no row has more than one query; only chunks where a group has too many heads for
    the decode kernel.
    """
    block_tokens, window = 16 * shape.warps, shape.window
    decode = Cut(
        queries=1,
        group=shape.group,
        block_tokens=block_tokens,
        num_tiles=num_rows,
        num_pieces=-(-_DECODE_BLOCKS // shape.heads),
        first_slot=0,
        window=window,
    )
    has_decode = shape.group <= _DECODE_VECTORS
    if has_decode and num_tokens == num_rows:
        return [(True, decode)]
    queries = shape.chunk_queries()
    # Rows that are decode rows take no tiles here, unless chunks are all there is.
    rows = min(num_rows, num_tokens // 2) if has_decode else num_rows
    chunk = Cut(
        queries=queries,
        group=shape.group,
        block_tokens=block_tokens,
        num_tiles=num_tokens // queries + rows,
        num_pieces=-(-_CHUNK_BLOCKS // shape.heads),
        first_slot=decode.num_slots if has_decode else 0,
        window=window,
    )
    if not has_decode:
        return [(False, chunk)]
    return [(True, decode._replace(most=1)), (False, chunk._replace(fewest=2))]
