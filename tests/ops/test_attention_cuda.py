"""The CUDA attention kernels, run on the CPU thread by thread, against the oracle of attention."""

import ctypes
from dataclasses import replace
from functools import partial
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from albireo_jax.core.errors import ModelError
from albireo_jax.ops import attention_cuda
from albireo_jax.ops.attention_cuda import check_shape, cuda_attention
from albireo_jax.ops.attention_ref import reference_attention
from albireo_jax.ops.cuda.kernels import Entry, Kernel, Launch
from albireo_jax.ops.kv_cache import FP8_BITS, KvCache, decode, dequantise, new_cache
from tests.labs.attention_lab import Shape, random_batch, random_counts
from tests.labs.cuda_lab import Order, compiled, launch_on_cpu, needs_compiler

SCALE = 0.3
LATE, EARLY = Order(0, is_eager=False), Order(1, is_eager=True)


def attend(shape, *, seed=0, counts=None, window=None, cap=None, launch):
    (q_TNGK, cache), rows = random_batch(seed, shape, counts=counts or random_counts(seed, shape))
    q_TNGK = q_TNGK.astype(jnp.bfloat16)
    options = {"layer": 1, "scale": SCALE, "sliding_window": window, "soft_cap": cap, **rows}
    got = cuda_attention(q_TNGK, cache, **options, launch=launch)
    want = reference_attention(q_TNGK.astype(jnp.float32), dequantise(cache), **options)
    return np.asarray(got, np.float32), np.asarray(want)


def check(shape, *, order=LATE, edits=(), **how):
    got, want = attend(shape, launch=launch_on_cpu(order, edits=edits), **how)
    assert np.isfinite(want).all()
    np.testing.assert_allclose(got, want, atol=2e-2, rtol=2e-2)
    # Weights and results are rounded to 8 bits, and nothing else: far less on average.
    assert np.abs(got - want).mean() < 2e-3 * max(1.0, np.abs(want).mean())


@pytest.fixture
def long_pieces(monkeypatch):
    """One piece a tile, so that the ring goes round many times."""
    monkeypatch.setattr(attention_cuda, "_DECODE_BLOCKS", 1)
    monkeypatch.setattr(attention_cuda, "_CHUNK_BLOCKS", 1)


SMALL = Shape(tokens=75, rows=6, columns=13, page_size=16, group=4, head_dim=64, dtype="bfloat16")


@needs_compiler
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [None, 70])
def test_equals_reference_on_ragged_steps(seed, window):
    check(SMALL, seed=seed, window=window)


@needs_compiler
@pytest.mark.parametrize(
    ("fields", "how"),
    [
        ({"head_dim": 128, "dtype": "int8", "group": 1, "page_size": 4, "columns": 60}, {}),
        ({"head_dim": 80, "dtype": "uint8", "group": 5, "page_size": 32, "columns": 6}, {"cap": 2.0}),
        ({"head_dim": 8, "dtype": "bfloat16", "group": 3, "page_size": 1, "columns": 150}, {"window": 9}),
        ({"head_dim": 256, "dtype": "bfloat16", "group": 2, "page_size": 8, "heads": 1}, {}),
        ({"head_dim": 256, "dtype": "uint8", "group": 2, "page_size": 16, "heads": 1, "columns": 6}, {}),
        ({"head_dim": 224, "dtype": "int8", "group": 4, "page_size": 16, "heads": 1, "columns": 6}, {}),
        ({"head_dim": 32, "dtype": "int8", "group": 20, "page_size": 16, "columns": 9}, {"window": 33}),
        ({"head_dim": 64, "dtype": "uint8", "group": 12, "page_size": 16, "columns": 9}, {}),
        ({"head_dim": 192, "dtype": "bfloat16", "group": 9, "page_size": 16, "heads": 1, "columns": 9}, {}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if value else "plain",
)
def test_equals_reference_in_other_shapes(fields, how):
    check(Shape(tokens=39, rows=4, **fields), counts=[1, 30, 0, 7], **how)


@needs_compiler
@pytest.mark.usefixtures("long_pieces")
def test_equals_reference_where_a_context_is_one_piece():
    check(SMALL, counts=[1, 60, 1, 5])


@needs_compiler
def test_equals_reference_on_decode_steps():
    shape = Shape(tokens=7, rows=7, columns=20, page_size=16, group=4, head_dim=64, dtype="bfloat16")
    for seed in range(2):
        check(shape, seed=seed, counts=[1, 1, 0, 1, 1])


CONVERTS = (("#define CONVERTS_FP8 0", "#define CONVERTS_FP8 1"),)
CODES = {"int8": ("int8", ()), "fp8": ("uint8", ()), "fp8 by an instruction": ("uint8", CONVERTS)}


@needs_compiler
@pytest.mark.parametrize("kind", CODES)
def test_all_pairs_of_codes_are_widened_exactly(kind):
    dtype, edits = CODES[kind]
    macros = {"KV_KIND": 1 if dtype == "int8" else 2, "HEAD_DIM": 64, "GROUP": 4, "PAGE_SIZE": 16}
    macros |= {"WARPS": 4, "GROUP_WARPS": 4, "HEADS": 1}
    library = compiled("widen_pairs.cpp", tuple((name, str(value)) for name, value in macros.items()), edits)
    found = np.zeros((2, 65536), np.uint32)
    library.widen_pairs(*(each.ctypes.data_as(ctypes.c_void_p) for each in found))
    pairs = np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(-1, 2)
    codes = np.concatenate([pairs, ~pairs], axis=1)  # those of each word
    want = np.asarray(decode(jnp.asarray(codes.view(dtype))), np.float32)
    unit = 256 if kind == "fp8" else 1
    halves = np.ascontiguousarray(found.T).view(np.float16).reshape(-1, 2, 2)
    in_order = halves if edits else halves.transpose(0, 2, 1)
    got = in_order.reshape(-1, 4).astype(np.float32) * unit
    is_number = (codes & 0x7F != 0x7F) | (dtype == "int8")
    np.testing.assert_array_equal(got[is_number], want[is_number])


@needs_compiler
@pytest.mark.parametrize("kind", CODES)
def test_every_code_is_multiplied_exactly(kind):
    """A query that sees one token has its value: with a scale of 1, what the 256 codes stand for."""
    dtype, edits = CODES[kind]
    codes = np.arange(256, dtype=np.uint8).reshape(1, 1, 1, 1, 256)
    codes[codes & 0x7F == 0x7F] = 0  # of an fp8: not a number
    shape = (1, 2, 1, 1, 256)
    pages = jnp.zeros(shape, dtype).at[:, 1].set(jnp.asarray(codes[:, 0].view(dtype)))
    ones = jnp.ones(shape[:-1], jnp.bfloat16)
    cache = KvCache(pages, pages, ones, ones)
    got = cuda_attention(
        jnp.zeros((1, 1, 1, 256), jnp.bfloat16),
        cache,
        layer=0,
        scale=SCALE,
        sliding_window=None,
        soft_cap=None,
        row_start_R1=jnp.array([0, 1], jnp.int32),
        context_R=jnp.array([1], jnp.int32),
        page_table_RM=jnp.array([[1]], jnp.int32),
        launch=launch_on_cpu(LATE, edits=edits),
    )
    np.testing.assert_array_equal(np.asarray(got, np.float32).ravel(), decode(pages[0, 1].ravel()))


@needs_compiler
@pytest.mark.usefixtures("long_pieces")
def test_the_order_of_threads_and_copies_changes_nothing():
    counts = [1, 60, 1, 5]
    late, early = (attend(SMALL, counts=counts, launch=launch_on_cpu(order))[0] for order in (LATE, EARLY))
    np.testing.assert_array_equal(late, early)


FAULTS = {
    "copies that are read too soon": ("cp_async_wait<1>();", "cp_async_wait<2>();", LATE),
    "no barrier before products of keys": (
        "sync_group();  // what has come is there for all, and all are done with the values before it",
        "",
        EARLY,
    ),
    "masked diagonal of chunks": ("8 * n + i > last", "8 * n + i >= last", LATE),
    "masked last token of decode rows": ("token <= last - lane / 4", "token < last - lane / 4", LATE),
    "no zeros past the end": ("TOKEN < left ? 16 : 0", "16", LATE),
    "a page that is longer than it is": ("PAGE_SIZE < TOKENS ? PAGE_SIZE : TOKENS", "TOKENS", LATE),
    "one page for a whole stage": (
        "begin < end ? cached_vector(cache, begin) : cache.head",
        "cached_vector(cache, first)",
        LATE,
    ),
    "sums of chunks that never fade": (
        "any_lane(fade[0] != 1.0f || fade[1] != 1.0f || state.power != power)",
        "false",
        LATE,
    ),
    "sums of decode rows that never fade": ("any_lane(has_faded)", "false", LATE),
    "weights that are not transposed": ("transpose(pack(", "(pack(", LATE),
    "channels of queries in another order": ("lane % 4 * 2);", "lane % 4 / 2 * 4);", LATE),
}
FAULTS_OF_CODES = {
    "no barrier after keys are widened": (
        "sync_group();\n    return ring.spare;",
        "return ring.spare;",
        Order(3, is_eager=False),
    ),
    "no barrier after values are widened": ("sync_group();\n    return wide;", "return wide;", LATE),
    "codes that are widened too soon": ("cp_async_wait<1>();", "cp_async_wait<2>();", LATE),
    "halves of copied chunks in one another's place": (
        "half * CHUNKS) * 16)",
        "(1 - half) * CHUNKS) * 16)",
        LATE,
    ),
    "neighbours that exchange nothing": ("x[0] = lane % 2 ? other : x[0]", "x[0] = x[0]", LATE),
    "scales of the first page for all": ("token < page * PAGE_TOKENS ? vector", "true ? vector", LATE),
    "scales of the first token for all": (
        "cached_vector(cache, stage.first + token)",
        "cached_vector(cache, stage.first)",
        LATE,
    ),
    "scales of values past the end": ("is_cached ? __uint", "true ? __uint", LATE),
    "values of decode rows in the keys' order": (
        "product * 16 + (READ_BYTES == 2 ?",
        "product * 16 + (true ?",
        LATE,
    ),
}
FAULTS_OF_UNITS = {
    "queries as they are": ("const float factor = into_f16(power);", "const float factor = 1.0f;"),
    "products of queries in their unit": ("scales.k[i] *= unit,", ""),
    "weights in the unit of the first stage": ("power = max(power, max_in_warp(largest) & EXPONENT);", ""),
    "sums of chunks in an earlier unit": ("fade[0] *= power_fade", "0.0f * power_fade"),
    "sums of decode rows in an earlier unit": ("* power_faded", ""),
    "values of int8 that are 1152 too large": ("if (KV_KIND == 1) multiply", "if (false) multiply"),
    "keys of decode rows that are too large": ("SHIFTS_KEYS ? queries.shift[tile][i] : 0.0f", "0.0f"),
    "keys of chunks that are too large": ("SHIFTS_KEYS ? queries.shift[i] : 0.0f", "0.0f"),
}
FAULTS_OF_ORDER = {
    "queries of decode rows": ("KEEPS_ORDER ? four.x : low_halves", "false ? four.x : low_halves"),
    "queries of chunks": ("if (!IS_WIDENED || KEEPS_ORDER)", "if (!IS_WIDENED)"),
    "values of decode rows": ("KEEPS_ORDER ? every_other(codes) : codes", "codes"),
    "channels of results of chunks": ("KV_KIND != 0 && !KEEPS_ORDER", "KV_KIND != 0"),
}
"""Of codes that keep their order when they are widened, as by an instruction."""


@needs_compiler
@pytest.mark.usefixtures("long_pieces")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel_is_seen(fault):
    right, wrong, order = FAULTS[fault]
    with pytest.raises(AssertionError):
        check(SMALL, counts=[1, 60, 1, 5], order=order, edits=((right, wrong),))


@needs_compiler
@pytest.mark.usefixtures("long_pieces")
@pytest.mark.parametrize("kind", CODES)
def test_equals_reference_with_pages_of_codes(kind):
    dtype, edits = CODES[kind]
    for order in (LATE, EARLY):
        check(replace(SMALL, dtype=dtype), counts=[1, 60, 1, 5], order=order, edits=edits)


def check_of_any_size(dtype, *, edits=()):
    """Queries and keys far from 1, and values that grow by 2^2 from page to page, over 2^80 in all."""
    (q_TNGK, cache), rows = random_batch(0, replace(SMALL, dtype=dtype, columns=40), counts=[1, 60, 1, 5])
    powers_LPSN = np.zeros(cache.v_scale_LPSN.shape, np.float32)
    for columns in np.asarray(rows["page_table_RM"]):
        powers_LPSN[:, columns] = (2.0 * np.arange(len(columns)) - 40)[:, None, None]
    cache = cache._replace(
        k_scale_LPSN=cache.k_scale_LPSN * jnp.bfloat16(2.0**-80),
        v_scale_LPSN=cache.v_scale_LPSN * jnp.asarray(np.exp2(powers_LPSN), jnp.bfloat16),
    )
    q_TNGK = (q_TNGK * 2.0**80).astype(jnp.bfloat16)
    options = {"layer": 1, "scale": SCALE, "sliding_window": None, "soft_cap": None, **rows}
    got = cuda_attention(q_TNGK, cache, **options, launch=launch_on_cpu(LATE, edits=edits))
    want = np.asarray(reference_attention(q_TNGK.astype(jnp.float32), dequantise(cache), **options))
    size = np.abs(want).max(axis=-1, keepdims=True)
    np.testing.assert_allclose(
        got / np.where(size > 0, size, 1), want / np.where(size > 0, size, 1), atol=1e-2
    )


@needs_compiler
@pytest.mark.usefixtures("long_pieces")
@pytest.mark.parametrize("kind", CODES)
def test_codes_meet_queries_and_scales_of_any_size(kind):
    check_of_any_size(CODES[kind][0], edits=CODES[kind][1])


@needs_compiler
@pytest.mark.usefixtures("long_pieces")
@pytest.mark.parametrize("fault", FAULTS_OF_UNITS)
def test_a_fault_in_the_units_of_products_is_seen(fault):
    with pytest.raises(AssertionError):
        check_of_any_size("int8", edits=(FAULTS_OF_UNITS[fault],))


@needs_compiler
@pytest.mark.usefixtures("long_pieces")
@pytest.mark.parametrize("fault", FAULTS_OF_CODES)
def test_a_fault_in_the_kernel_for_codes_is_seen(fault):
    right, wrong, order = FAULTS_OF_CODES[fault]
    with pytest.raises(AssertionError):
        check(replace(SMALL, dtype="int8"), counts=[1, 60, 1, 5], order=order, edits=((right, wrong),))


@needs_compiler
@pytest.mark.usefixtures("long_pieces")
@pytest.mark.parametrize("fault", FAULTS_OF_ORDER)
def test_a_fault_in_the_order_of_channels_is_seen(fault):
    with pytest.raises(AssertionError):
        check(replace(SMALL, dtype="uint8"), counts=[1, 60, 1, 5], edits=(*CONVERTS, FAULTS_OF_ORDER[fault]))


def test_every_fault_is_in_the_source():
    folder = resources.files("albireo_jax.ops.cuda")
    source = "".join(file.read_text() for file in folder.iterdir() if file.name.endswith((".cu", ".h")))
    assert [
        name
        for name, (right, *_) in (FAULTS | FAULTS_OF_CODES | FAULTS_OF_UNITS | FAULTS_OF_ORDER).items()
        if right not in source
    ] == []


@needs_compiler
@pytest.mark.parametrize("order", [LATE, EARLY])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_cut_contexts_are_merged_by_whichever_block_is_last(dtype, order):
    """Blocks run in an order of their own; every tile here is cut, into up to 64 pieces."""
    shape = Shape(tokens=40, rows=4, columns=70, page_size=16, group=4, head_dim=64, heads=1, dtype=dtype)
    got, _ = attend(shape, counts=[1, 20, 1, 9], launch=launch_on_cpu(order))
    want, _ = attend(shape, counts=[1, 20, 1, 9], launch=launch_on_cpu(Order(7, is_eager=False)))
    np.testing.assert_array_equal(got, want)
    check(shape, counts=[1, 20, 1, 9], order=order)


@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("  fence_device();  // what this thread wrote", "  // what this thread wrote"),
        ("before the block is counted\n  __syncthreads();", "before the block is counted"),
        ("== pieces - 1;", "== pieces - 2;"),
        ("(piece.turn >> 16) * TILE_QUERIES * GROUP", "0"),
        ("blockIdx.x / HEADS - (piece.turn >> 16)", "blockIdx.x / HEADS"),
        ("    clear_padding(out, piece, blockIdx.x % HEADS);", ""),
        ("at / pairs) * HEADS + head", "at / pairs) * HEADS"),
        ("float share = exp2_fast(load_l2(bounds + 2 * at) - peak)", "float share = 1.0f"),
    ],
    ids=lambda text: text.strip()[:40],
)
def test_a_fault_in_the_merge_is_seen(right, wrong):
    shape = Shape(tokens=40, rows=4, columns=70, page_size=16, group=4, head_dim=64, dtype="bfloat16")
    with pytest.raises(AssertionError):
        check(shape, counts=[1, 20, 1, 9], edits=((right, wrong),))


def test_what_the_kernels_cannot_do_is_refused_by_name():
    bfloat16 = jnp.dtype(jnp.bfloat16)
    good = {"head_dim": 128, "group": 8, "q_dtype": bfloat16, "kv_dtype": bfloat16}
    check_shape(**good)
    check_shape(**(good | {"kv_dtype": FP8_BITS}))
    for wrong, said in (
        ({"q_dtype": jnp.dtype(jnp.float32)}, "not float32 with bfloat16"),
        ({"kv_dtype": jnp.dtype(jnp.float32)}, "not bfloat16 with float32"),
        ({"head_dim": 100}, "head_dim 100 must be a multiple of 8"),
        ({"head_dim": 72, "kv_dtype": FP8_BITS}, "head_dim 72 must be a multiple of 16"),
        ({"head_dim": 512}, "up to 256"),
        ({"group": 65}, "65 query heads per key/value head, more than the kernels' 64"),
        ({"group": 33, "head_dim": 256}, "more than the kernels' 32"),
    ):
        with pytest.raises(ModelError, match=said):
            check_shape(**(good | wrong))


def test_a_grid_that_no_gpu_launches_is_refused():
    kernel = Kernel(entry=Entry.ATTEND, macros=(), warps=4)
    Launch(kernel=kernel, grid=(8 * 65536, 1), results=())
    for grid, said in (
        ((8, 65536), "65536 blocks along y: GPUs launch up to 65535"),
        ((2**31, 1), "along x"),
    ):
        with pytest.raises(ValueError, match=said):
            Launch(kernel=kernel, grid=grid, results=())


def test_the_tokens_of_a_step_are_not_limited_by_the_grid():
    """A step of more than 65,535 tokens takes kernels of one axis."""
    seen = []

    def note(what, _):
        seen.append(what.grid)
        return [jnp.zeros(result.shape, result.dtype) for result in what.results]

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    pages = jax.eval_shape(partial(new_cache, (1, 9, 16, 2, 64), jnp.dtype(jnp.bfloat16)))
    jax.eval_shape(
        partial(cuda_attention, layer=0, scale=1.0, sliding_window=None, launch=note),
        jax.ShapeDtypeStruct((70_000, 2, 4, 64), jnp.bfloat16),
        pages,
        row_start_R1=ints(3),
        context_R=ints(2),
        page_table_RM=ints(2, 4),
    )
    assert all(y == 1 for _, y in seen)
    assert seen[-1] == (2 * (70_000 // 16 + 2 + 132), 1)  # tiles and pieces of two heads
