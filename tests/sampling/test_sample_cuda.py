"""The CUDA kernels of sampling, run on the CPU thread by thread, draw the tokens of every other route."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from albireo_jax.core.plan import NOT_FINITE
from albireo_jax.ops.cuda.kernels import Entry
from albireo_jax.sampling.routes import Route, sample_by
from albireo_jax.sampling.sample import sample
from albireo_jax.sampling.sample_cuda import DRAW_READS, draw_operands, sampling_kernel
from tests.labs.cuda_lab import Order, launch_on_cpu, needs_compiler, run, take_bytes_read
from tests.labs.sampling_lab import INF, Row, noise_of, oracle, params_of, random_batch

pytestmark = needs_compiler
LATE, OTHER = Order(0, is_eager=False), Order(1, is_eager=True)
NARROW = 97
TIGHT = {"warps": 2, "list_tokens": 16}
"""A list with room for few tokens: many rows are read again, as rows with thousands of ties are."""

by_operations = jax.jit(sample)
operands_of = jax.jit(draw_operands)


def kernels_of(vocab, *, order=LATE, faults=None, warps=2, list_tokens=2944):
    """Runs a kernel on rows of so many logits.

    Its blocks have so many warps, and lists for so many tokens. `faults` are texts of each kernel and what
    stands for them.
    """
    faults = faults or {}

    def run_kernel(entry, *arrays):
        kernel = sampling_kernel(entry, vocab, warps=warps, list_tokens=list_tokens)
        run(kernel, (len(arrays[0]), 1), arrays, order, faults.get(entry, ()))

    return run_kernel


def ids(logits, rows, *, change=lambda operands: operands, **how):
    """Tokens by kernels, the numbers that they select by changed first."""
    run_kernel = kernels_of(logits.shape[1], **how)
    max_R, greedy_R = np.full(len(rows), np.nan, np.float32), np.full(len(rows), -9, np.int32)
    run_kernel(Entry.PEAKS, logits, max_R, greedy_R)
    operands = change(operands_of(logits, params_of(rows), max_R))
    token_R = np.full(len(rows), -9, np.int32)
    run_kernel(Entry.DRAW, logits, *map(np.asarray, operands), max_R, greedy_R, token_R)
    return token_R


def wanted(logits, rows):
    """The tokens of the route that has no kernels."""
    return np.asarray(by_operations(jnp.asarray(logits), params_of(rows)))


def check(seed, rows, vocab, **how):
    logits, params = random_batch(seed, rows, vocab)
    np.testing.assert_array_equal(ids(logits, params, **how), wanted(logits, params))


@pytest.mark.parametrize("how", [{}, TIGHT], ids=["lists", "rows read again"])
def test_tokens_are_those_of_operations_row_by_row(how):
    for batch in range(3):
        check((NARROW, batch), 512, NARROW, **how)


@pytest.mark.parametrize("vocab", [1, 1016, 5_003])
def test_tokens_are_those_of_operations_in_vocabularies_of_any_size(vocab):
    logits, params = random_batch((vocab, 1), 24, max(vocab, 9))
    logits = logits[:, :vocab]
    logits[:, 0] = np.where(np.isfinite(logits[:, 0]), logits[:, 0], 0)
    np.testing.assert_array_equal(ids(logits, params, **TIGHT), wanted(logits, params))


def test_tokens_of_a_models_vocabulary_by_whole_blocks_of_threads():
    check((32, 0), 8, 128_256, warps=32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "vocab", "how"),
    [
        (40_000, NARROW, {}),
        (30_000, NARROW, TIGHT),
        (20_000, 256, {"warps": 4, "list_tokens": 64}),
        (9_500, 1016, {"warps": 8}),
        (500, 32_000, {"warps": 32}),
        (100, 128_256, {"warps": 32}),
    ],
)
def test_tokens_of_a_hundred_thousand_rows_are_those_of_operations(rows, vocab, how):
    at_once = min(rows, 500 if vocab < 10_000 else 50)
    for batch in range(rows // at_once):
        check((rows, vocab, batch), at_once, vocab, **how)


def hard_rows():
    """Rows whose filters end in ties, zeros of both signs and infinities, or that have no token."""
    kinds = np.zeros((11, NARROW), np.float32)
    kinds[0, ::2] = -0.0
    kinds[1, 5:] = -INF
    kinds[2, :40] = np.float32(2e-38)
    kinds[3] = -3e38
    kinds[4] = 3e38
    kinds[5, 1:] = -np.float32(2e-38)
    kinds[6, 2:], kinds[6, 1] = -INF, -1e-9  # two tokens of one weight, of which half the mass keeps one
    kinds[7, 3:] = -10 - np.float32(2**-19) * np.arange(NARROW - 3)  # many in one bin
    kinds[7, 50:] -= np.float32(0.05)
    kinds[-3, 41] = INF
    kinds[-2, 96] = -np.float32(np.nan)
    kinds[-1] = -INF
    filters = (
        *(Row(top_k=7), Row(top_p=0.3), Row(top_k=60, top_p=0.5), Row(min_p=1.0), Row(top_k=1)),
        *(Row(top_k=96, top_p=1e-9), Row(top_k=NARROW, top_p=0.999999), Row(0.0), Row(), Row(top_p=0.5)),
        *(Row(100.0, top_k=80), Row(100.0, top_p=0.55), Row(100.0, top_k=90, top_p=0.45)),
    )
    rows = [row._replace(seed=seed) for seed in range(4) for row in filters for _ in kinds]
    return np.resize(kinds, (len(rows), NARROW)), rows


@pytest.mark.parametrize("how", [{}, TIGHT], ids=["lists", "rows read again"])
def test_filters_that_end_in_ties_zeros_and_infinities_and_rows_without_a_token(how):
    logits, rows = hard_rows()
    got = ids(logits, rows, **how)
    np.testing.assert_array_equal(got, wanted(logits, rows))
    has_token = np.isfinite(logits.max(axis=1))
    assert 0 < (~has_token).sum() < len(rows) / 3
    np.testing.assert_array_equal(got == NOT_FINITE, ~has_token)


def test_the_order_of_threads_changes_nothing():
    logits, rows = random_batch(5, 256, NARROW)
    for how in ({}, TIGHT):
        np.testing.assert_array_equal(ids(logits, rows, **how), ids(logits, rows, order=OTHER, **how))


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("route", [Route.ALL_TO_ALL, Route.REPLICATED])
def test_each_rank_draws_its_own_rows_by_kernels(route, ranks):
    columns = 1016
    logits, params = random_batch(7, 61, columns)
    mesh = Mesh(np.array(jax.devices()[:ranks]), ("tp",), axis_types=(AxisType.Auto,))
    split, everywhere = PartitionSpec(None, "tp"), PartitionSpec()
    stage = jax.shard_map(
        partial(sample_by, route, axis="tp", launch=launch_on_cpu(LATE)),
        mesh=mesh,
        in_specs=(split, everywhere),
        out_specs=everywhere,
        check_vma=False,
    )
    noise = noise_of(params, columns)
    expected = [oracle(*each) for each in zip(logits, params, noise, strict=True)]
    np.testing.assert_array_equal(jax.jit(stage)(jnp.asarray(logits), params_of(params)), expected)


def bytes_read(logits, rows):
    """Bytes that the kernel reads to draw, in passes over the logits."""
    how = {"warps": 8, "list_tokens": 2944}
    kernel = sampling_kernel(Entry.DRAW, logits.shape[1], **how)
    take_bytes_read(kernel)
    ids(logits, rows, **how)
    return take_bytes_read(kernel) / logits.nbytes


@pytest.mark.parametrize(
    "row", [Row(0.8, top_p=0.9), Row(0.8, top_k=50), Row(1.2, 200, 0.99, 0.01), Row(1.0)]
)
def test_rows_are_read_as_often_as_is_said(row):
    vocab = 20_000
    logits = 4 * np.random.default_rng(0).standard_normal((8, vocab)).astype(np.float32)
    passes = bytes_read(logits, [row._replace(seed=seed) for seed in range(8)])
    assert passes < sum(DRAW_READS.values()) - 0.9  # scores of a few tokens only


def test_a_greedy_row_beside_one_that_draws_reads_nothing():
    logits = 4 * np.random.default_rng(0).standard_normal((8, 20_000)).astype(np.float32)
    assert bytes_read(logits, [Row(0.8, top_p=0.9), *[Row(0.0)] * 7]) < sum(DRAW_READS.values()) / 8


@pytest.mark.parametrize("is_faulty", [False, True])
def test_the_first_of_equal_scores_is_drawn(is_faulty):
    """As scores are all zero, the first token that is kept: not the last, by a kernel that orders them so."""
    logits = np.round(random_batch(1, 32, NARROW)[0])
    edits = (("<< 32 | (u32)~column", "<< 32 | (u32)column"), ("(int)~(u32)", "(int)(u32)"))
    got = ids(
        logits,
        [Row(top_k=5)] * 32,
        change=lambda operands: operands._replace(score_RV=np.zeros_like(logits)),
        faults={Entry.DRAW: edits} if is_faulty else {},
    )
    kept = logits >= np.sort(logits, axis=1)[:, -5:-4]
    assert (got == np.argmax(kept, axis=1)).all() != is_faulty


def clustered_rows(rows):
    """Rows whose tokens lie close together in few places, so that all digits of a logit tell."""
    rng = np.random.default_rng(4)
    place = rng.integers(0, 3, (rows, NARROW)) * np.float32(0.03)
    logits = -10 - place - np.float32(2**-20) * rng.integers(0, 300, (rows, NARROW)).astype(np.float32)
    logits[:, :3] = 0
    filters = zip(rng.integers(0, NARROW, rows), rng.choice([1.0, 0.3, 0.6, 0.9], rows), strict=True)
    chosen = [Row(100.0, top_k=int(k), top_p=float(p), seed=seed) for seed, (k, p) in enumerate(filters)]
    return logits.astype(np.float32), chosen


@cache
def telling_batch():
    """Rows of every kind, and a greedy one whose logits are all equal."""
    batches = random_batch((NARROW, 9), 256, NARROW), hard_rows(), clustered_rows(600)
    equal = np.zeros((1, NARROW), np.float32), [Row(0.0)]
    logits, rows = zip(*batches, equal, strict=True)
    return np.concatenate(logits), [one for some in rows for one in some]


@cache
def told():
    return wanted(*telling_batch())


@pytest.mark.parametrize("how", [{}, TIGHT], ids=["lists", "rows read again"])
def test_all_digits_of_a_logit_tell(how):
    np.testing.assert_array_equal(ids(*telling_batch(), **how), told())


@pytest.mark.parametrize(
    ("edits", "how"),
    [
        ((("amount.count >= count", "amount.count > count"),), {}),
        ((("if (key < floor)", "if (key <= floor)"),), {}),
        ((("rounded(amount.weight) >= weight", "rounded(amount.weight) > weight"),), {}),
        ((("atomic_add(bins.high + bin, 1)", "0"),), {}),
        ((("__float_as_uint(x + 0.0f)", "__float_as_uint(x)"),), {}),
        ((("range.above = range.above + amount", "range.above = amount"),), {}),
        ((("nucleus(row, top.through));", "nucleus(row, top.above));"),), {}),
        (
            (
                (
                    "void accumulate(Histogram &bins) {\n  __syncthreads();",
                    "void accumulate(Histogram &bins) {",
                ),
            ),
            {},
        ),
        ((("range.largest - width;", "range.largest - width + 1;"),), TIGHT),
    ],
    ids=[
        "one token too many of top-k",
        "no ties with the last token",
        "a nucleus that goes on where its share is reached",
        "lost carries of weights",
        "two zeros",
        "only the last digit's amount",
        "no room for the nucleus in the bin of top-k",
        "no barrier before amounts are added up",
        "a digit without its least number",
    ],
)
def test_a_fault_in_the_kernels_is_seen(edits, how):
    assert (ids(*telling_batch(), faults={Entry.DRAW: edits}, **how) != told()).any()


def test_a_peak_that_passes_over_what_is_no_number_is_seen():
    edits = (("logit == logit ? logit : __uint_as_float(PLUS_INFINITY)", "logit"),)
    assert (ids(*telling_batch(), faults={Entry.PEAKS: edits}) != told()).any()
