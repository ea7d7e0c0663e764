"""Paged attention by CUDA kernels (`ops/cuda/paged_attention.cu`): decode rows, chunks, then the merge.

::

    rows ──▶ pieces of decode rows ──▶ attend (a warp per share of the tokens) ─┐
        └──▶ pieces of chunks ───────▶ attend (a block per tile of queries) ────┴─▶ merge what was cut ──▶ out

The number of blocks launched depends on the bucket alone. The kernels of a model are compiled when its first
program is traced.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from albireo_jax.core.errors import ModelError
from albireo_jax.ops.attention_pieces import PADDING, Cut, Pieces, Rows, cut
from albireo_jax.ops.cuda.kernels import Entry, Kernel, Launch, LaunchFn
from albireo_jax.ops.kv_cache import KV_KINDS, KvCache

_DECODE_VECTORS = 16
"""Query vectors of a decode row at most: those of one matrix product."""

_WIDE = 128
"""Head dimension beyond which shared memory holds no more than the tokens of two warps."""

_DECODE_BLOCKS, _CHUNK_BLOCKS = 396, 264
"""Blocks of threads that an H100's 132 cores hold at once: three and two each, by their registers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What the kernels are compiled for; `group` query heads share each of `heads` key/value heads."""

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

    def kernel(self, entry: Entry, *, is_decode: bool, is_chained: bool) -> Kernel:
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
            "CHAINED": int(is_chained),
            "MERGE": int(entry is Entry.MERGE),
        }
        text = tuple((name, str(value)) for name, value in macros.items())
        return Kernel(entry=entry, macros=text, warps=self.warps)

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
    soft_cap: float | None,
    launch: LaunchFn,
) -> Float[Array, "T N G K"]:
    """`ops.attention.paged_attention` by kernels that `launch` runs; raises ModelError as `check_shape`."""
    num_tokens, heads, group, head_dim = q_TNGK.shape
    check_shape(head_dim=head_dim, group=group, q_dtype=q_TNGK.dtype, kv_dtype=cache.k_LPSNK.dtype)
    shape = _Shape(
        head_dim=head_dim,
        group=group,
        heads=heads,
        page_size=cache.k_LPSNK.shape[2],
        table_width=page_table_RM.shape[1],
        num_pages=cache.k_LPSNK.shape[1],
        kind=KV_KINDS[cache.k_LPSNK.dtype],
        window=sliding_window,
        soft_cap=soft_cap,
        scale=scale,
    )
    cuts = _cuts(shape, num_tokens=num_tokens, num_rows=context_R.shape[0])
    pieces, merge_TF = _pieces(row_start_R1, context_R, cuts, num_tokens=num_tokens)
    operands = [q_TNGK, *(array for array in cache if array is not None), page_table_RM]
    done: list[jax.Array] = []
    for (is_decode, _), piece_XF in zip(cuts, pieces, strict=True):
        attend = Launch(
            kernel=shape.kernel(Entry.ATTEND, is_decode=is_decode, is_chained=bool(done)),
            grid=(heads * piece_XF.shape[0], 1),
            results=_results(q_TNGK, cuts),
            in_place=len(done),
        )
        done = [*launch(attend, [*operands, piece_XF, jnp.asarray(layer, jnp.int32).reshape(1), *done])]
    out_TNGK, part, bounds = done
    merge = Launch(
        kernel=shape.kernel(Entry.MERGE, is_decode=cuts[0][0], is_chained=False),
        grid=(heads * num_tokens, 1),
        results=_results(q_TNGK, cuts)[:1],
        in_place=1,
    )
    return launch(merge, [merge_TF, part, bounds, out_TNGK])[0]


def _results(
    q_TNGK: Float[Array, "T N G K"], cuts: list[tuple[bool, Cut]]
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What the attention kernel gives: outputs, and in slots unfinished ones with their maxima and sums."""
    _, heads, _, head_dim = q_TNGK.shape
    slots = sum(how.num_slots for _, how in cuts)
    return (
        jax.ShapeDtypeStruct(q_TNGK.shape, q_TNGK.dtype),
        jax.ShapeDtypeStruct((slots, heads, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((slots, heads, 2), jnp.float32),
    )


def _cuts(shape: _Shape, *, num_tokens: int, num_rows: int) -> list[tuple[bool, Cut]]:
    """How decode rows and chunks are cut, each with whether it is of decode rows.

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
    return [(True, decode), (False, chunk)] if has_decode else [(False, chunk)]


def _pieces(
    row_start_R1: Int32[Array, " R1"],
    context_R: Int32[Array, " R"],
    cuts: list[tuple[bool, Cut]],
    *,
    num_tokens: int,
) -> tuple[list[Int32[Array, "_ _"]], Int32[Array, "T F"]]:
    """The pieces of each cut, and what each token has to merge."""
    count_R = row_start_R1[1:] - row_start_R1[:-1]
    pieces: list[Pieces] = []
    for is_decode, how in cuts:
        is_cut_R = (count_R == 1) == is_decode if len(cuts) > 1 else count_R > 0
        pieces.append(cut(Rows(row_start_R1, context_R, is_cut_R), how, num_tokens=num_tokens))
    merge_TF = pieces[0].merge_TF
    for more in pieces[1:]:  # each token is of one cut at most
        merge_TF = jnp.where(merge_TF[:, 2:3] == PADDING, more.merge_TF, merge_TF)
    return [each.piece_XF for each in pieces], merge_TF
