"""Scores of tokens are those of a softmax written out, whatever ranks the vocabulary is split over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from albireo_jax.sampling.blocks import largest_logits
from albireo_jax.sampling.logprobs import RowScores, score_rows

ROWS, TOKENS, COLUMNS, TOP = 7, 90, 96, 20


def scores(logits_RV: np.ndarray, ids: np.ndarray, *, ranks: int, num_top: int) -> RowScores:
    mesh = Mesh(np.array(jax.devices()[:ranks]), ("tp",), axis_types=(AxisType.Auto,))

    def local(logits_Rv, id_R):
        return score_rows(logits_Rv, id_R, num_top=num_top, axis="tp" if ranks > 1 else None)

    whole = PartitionSpec()
    body = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(None, "tp"), whole), out_specs=whole, check_vma=False
    )
    return jax.tree.map(np.asarray, jax.jit(body)(jnp.asarray(logits_RV), jnp.asarray(ids)))


def batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits with ties, of which the last columns only pad the vocabulary, and an id of each row."""
    draw = np.random.default_rng(seed)
    logits = np.round(draw.normal(size=(ROWS, COLUMNS)) * 6, 1).astype(np.float32)
    logits[:, TOKENS:] = -np.inf
    ids = draw.integers(0, TOKENS, ROWS).astype(np.int32)
    ids[:2] = logits[:2].argmax(axis=1)
    return logits, ids


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("num_top", [1, TOP])
def test_scores_are_those_of_a_softmax(ranks: int, num_top: int) -> None:
    for seed in range(5):
        logits, ids = batch(seed)
        given = scores(logits, ids, ranks=ranks, num_top=num_top)
        exact = logits.astype(np.float64)
        logprobs = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
        at = np.arange(ROWS), ids
        np.testing.assert_allclose(given.logprob_R, logprobs[at], rtol=1e-5, atol=1e-5)
        assert given.rank_R.tolist() == (1 + (logits > logits[at][:, None]).sum(axis=1)).tolist()
        order = np.argsort(-logits, axis=1, kind="stable")[:, :num_top]
        assert given.top_id_RB.tolist() == order.tolist()
        top = np.take_along_axis(logprobs, order, axis=1)
        np.testing.assert_allclose(given.top_logprob_RB, top, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [5, 64, 70, 1_000, 5_003])
@pytest.mark.parametrize("values", [3, 50, 10_000])
def test_the_largest_are_those_of_a_stable_sort(tokens: int, values: int) -> None:
    draw = np.random.default_rng(tokens * values)
    logits = draw.integers(0, values, (ROWS, tokens)).astype(np.float32)
    logits[logits == 0] = -np.inf
    logits[0] = -np.inf
    for count in (1, min(TOP, tokens)):
        got = largest_logits(jnp.asarray(logits), count)
        order = np.argsort(-logits, axis=1, kind="stable")[:, :count]
        np.testing.assert_array_equal(got.column_RB, order)
        np.testing.assert_array_equal(got.logit_RB, np.take_along_axis(logits, order, axis=1))


def test_huge_logits_do_not_overflow() -> None:
    logits, ids = batch(9)
    shifted = scores(logits + np.float32(2**14), ids, ranks=4, num_top=3)
    same = scores(logits, ids, ranks=4, num_top=3)
    assert np.isfinite(shifted.logprob_R).all()
    np.testing.assert_allclose(shifted.logprob_R, same.logprob_R, atol=5e-3)  # 2**14 + 0.1 is rounded
