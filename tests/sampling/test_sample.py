import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import albireo_jax.sampling.sample as sample_module
from albireo_jax.core.plan import NOT_FINITE
from albireo_jax.core.token_sampling import MAX_SEED
from albireo_jax.sampling.sample import sample
from tests.labs.sampling_lab import INF, Row, allowed, noise_of, oracle, p_value, params_of, random_batch

jitted = jax.jit(sample)
SHORT, WIDE = 97, 313 * 64  # without and with the stage that looks at a short list of blocks
BUCKETS = (1, 64, 512)


def ids(logits, rows, sampler=jitted):
    """The ids of some rows, in a batch filled up with others to one of few sizes."""
    size = min(bucket for bucket in BUCKETS if bucket >= len(rows))
    filled = np.resize(np.asarray(logits, np.float32), (size, np.shape(logits)[1]))
    others = [Row(temperature=1.0, seed=i) for i in range(size - len(rows))]
    return np.asarray(sampler(jnp.asarray(filled), params_of([*rows, *others])))[: len(rows)]


@pytest.mark.parametrize(("vocab", "rows", "batches"), [(SHORT, 512, 8), (WIDE, 64, 4)])
def test_equals_the_sorting_oracle_token_by_token(vocab, rows, batches):
    for batch in range(batches):
        logits, params = random_batch((vocab, batch), rows, vocab)
        want = [oracle(*each) for each in zip(logits, params, noise_of(params, vocab), strict=True)]
        np.testing.assert_array_equal(ids(logits, params), want)


def test_a_token_depends_on_its_row_only():
    rows = 64
    logits, params = random_batch(1, rows, WIDE)
    want = ids(logits, params)
    order = np.random.default_rng(0).permutation(rows)
    np.testing.assert_array_equal(ids(logits[order], [params[i] for i in order]), want[order])
    alone = [ids(logits[i : i + 1], params[i : i + 1])[0] for i in range(rows)]
    np.testing.assert_array_equal(alone, want)
    padded = np.pad(logits, ((0, 0), (0, 333)), constant_values=-INF)
    params = [row._replace(top_k=row.top_k if row.top_k < WIDE else 0) for row in params]
    np.testing.assert_array_equal(ids(padded, params), want)


@pytest.mark.parametrize(("name", "value"), [("_SHORT_LIST_BLOCKS", 10**6), ("_TILE_TOKENS", 2**30)])
def test_a_token_does_not_depend_on_the_stage_or_tile_that_finds_it(monkeypatch, name, value):
    logits, params = random_batch(2, 64, WIDE)
    want = ids(logits, params)
    monkeypatch.setattr(sample_module, name, value)
    np.testing.assert_array_equal(ids(logits, params, jax.jit(partial(sample))), want)


def test_a_nucleus_ends_where_its_mass_reaches_the_share_exactly():
    logits = np.full((512, SHORT), -INF)
    logits[:, [40, 7, 90]] = 0, -np.log(2), -np.log(2)  # masses 1/2, 1/4, 1/4
    for top_p, nucleus in ((0.5, {40}), (np.nextafter(np.float32(0.5), 1), {7, 40, 90})):
        drawn = ids(logits, [Row(top_p=float(top_p), seed=i) for i in range(512)])
        assert set(drawn.tolist()) == nucleus


def test_filters_together_see_the_mass_outside_of_the_short_list():
    logits = np.full(WIDE, -3, np.float32)  # 20,000 tokens of 1/20 each, behind 30 of almost 1
    logits[np.arange(30) * 600] = -0.01 * np.arange(30)
    rows = [Row(top_k=k, top_p=0.02, min_p=0.1, seed=seed) for seed in range(32) for k in (0, WIDE - 1)]
    want = [oracle(logits, *each) for each in zip(rows, noise_of(rows, WIDE), strict=True)]
    assert len(set(want)) > 10
    np.testing.assert_array_equal(ids(np.tile(logits, (64, 1)), rows), want)


def test_greedy_takes_the_lowest_id_on_ties():
    logits = np.zeros((4, SHORT), np.float32)
    logits[0, [70, 13, 90]] = 5
    logits[1, 96] = 1e-6
    logits[2, 40:] = -0.0
    logits[3] = -INF
    logits[3, [64, 65]] = -3e38
    np.testing.assert_array_equal(ids(logits, [Row(temperature=0.0)] * 4), [13, 96, 0, 64])


def test_the_smallest_temperatures_are_greedy_without_overflow():
    logits = np.random.default_rng(0).normal(size=(5, SHORT)).astype(np.float32) * 1e30
    rows = [Row(temperature=t, seed=i) for i, t in enumerate((1e-5, 1e-20, 1e-38, 1e-42, 1e-45))]
    np.testing.assert_array_equal(ids(logits, rows), logits.argmax(axis=1))


def test_the_smallest_filters_leave_the_largest_logit():
    logits = np.random.default_rng(1).normal(size=(4, SHORT)).astype(np.float32)
    rows = [Row(top_p=1e-9), Row(top_p=1e-50), Row(top_k=1), Row(min_p=1.0)]
    np.testing.assert_array_equal(ids(logits, rows), logits.argmax(axis=1))


def test_a_row_without_finite_logits_has_no_token_and_spoils_no_other():
    logits, params = random_batch(3, 64, WIDE)
    want = ids(logits, params)
    broken = {0: np.nan, 20: -INF, 40: INF}
    for row, value in broken.items():
        logits[row] = value
    logits[5, 777] = np.nan
    got = ids(logits, params)
    np.testing.assert_array_equal(got[[*broken, 5]], NOT_FINITE)
    others = [i for i in range(64) if i not in (*broken, 5)]
    np.testing.assert_array_equal(got[others], want[others])


def test_seeds_and_positions_that_differ_in_any_word_draw_differently():
    seeds = [0, 1, 1 << 32, 1 << 62, MAX_SEED, MAX_SEED - (1 << 32)]
    draws = {}
    for seed in seeds:
        for start in (0, 2**30):
            rows = [Row(seed=seed, position=start + i) for i in range(512)]
            draws[seed, start] = ids(np.zeros((512, SHORT), np.float32), rows)
    for a, one in draws.items():
        for b, other in draws.items():
            same = (one == other).mean()
            assert same == 1 if a == b else same < 0.05, (a, b)


def test_draws_from_a_short_list_follow_the_distribution():
    row = Row(temperature=0.9, top_p=0.9)
    logits = (-1.5 * np.log(1 + np.random.default_rng(5).permutation(WIDE))).astype(np.float32)
    drawn = [
        ids(np.tile(logits, (64, 1)), [row._replace(seed=seed, position=i) for i in range(64)])
        for seed in range(100)
    ]
    scaled, keep = allowed(logits, row)
    assert 10 < keep.sum() < 64  # so that 64 blocks of the vocabulary hold them all
    probability = np.where(keep, np.exp(scaled.astype(np.float64)), 0)
    assert p_value(np.concatenate(drawn), probability / probability.sum()) > 1e-3


def test_the_logits_are_not_copied():
    rows, vocab = 64, 2**17
    compiled = jax.jit(sample).lower(jnp.zeros((rows, vocab)), params_of([Row()] * rows)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * vocab * 4 / 4


def test_a_vocabulary_beyond_the_limit_is_refused():
    too_many = jax.ShapeDtypeStruct((1, 2**20 + 1), jnp.float32)
    with pytest.raises(ValueError, match="1048577"):
        jax.eval_shape(sample, too_many, params_of([Row()]))


def test_no_program_sorts_the_vocabulary_and_none_of_gpus_branches():
    arguments = jax.ShapeDtypeStruct((64, WIDE), jnp.float32), params_of([Row()] * 64)
    for platform, top_k in (("cpu", [str(WIDE // 64)]), ("cuda", [])):
        program = jax.jit(sample).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.sort" not in program
        assert re.findall(r"chlo.top_k\(.*tensor<\d+x(\d+)xf32> ->", program) == top_k
        if platform == "cuda":
            choices_of_platform = 2  # by a constant
            assert "stablehlo.while" not in program
            assert program.count("stablehlo.case") == choices_of_platform
