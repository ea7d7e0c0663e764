"""What GPUs run draws the same tokens, without a branch or a loop whose end only the device knows."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from albireo_jax.sampling import branch_free
from albireo_jax.sampling.routes import Route
from albireo_jax.sampling.sample import sample
from tests.labs.route_lab import compiled, lowered, served_by
from tests.labs.sampling_lab import INF, Row, noise_of, oracle, params_of, random_batch

NARROW, WIDE = 97, 313 * 64
ROUTES = (Route.GREEDY, Route.UNFILTERED, Route.ALL_TO_ALL)


@pytest.fixture(autouse=True, scope="module")
def as_on_gpus():
    """Programs are traced anew, and what they do elsewhere than on a CPU is done here."""

    def elsewhere(*operands, cpu, default):
        del cpu
        return default(*operands)

    compiled.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", elsewhere)
        yield
    compiled.cache_clear()


jitted = jax.jit(partial(sample))


def ids(logits, rows, sampler=jitted):
    return np.asarray(sampler(jnp.asarray(logits), params_of(rows)))


def wanted(logits, rows):
    noise = noise_of(rows, logits.shape[1])
    return [oracle(*each) for each in zip(logits, rows, noise, strict=True)]


@pytest.mark.parametrize(("vocab", "rows"), [(NARROW, 512), (WIDE, 64)])
def test_equals_the_sorting_oracle_token_by_token(vocab, rows):
    for batch in range(3):
        logits, params = random_batch((vocab, batch), rows, vocab)
        np.testing.assert_array_equal(ids(logits, params), wanted(logits, params))


def test_filters_that_end_in_ties_zeros_and_infinities_equal_the_oracle():
    kinds = np.zeros((6, NARROW), np.float32)
    kinds[0, ::2] = -0.0
    kinds[1, 5:] = -INF
    kinds[2, :40] = np.float32(2e-38)
    kinds[3] = -3e38
    kinds[4] = 3e38
    kinds[5, 1:] = -np.float32(2e-38)
    filters = (Row(top_k=7), Row(top_p=0.3), Row(top_k=60, top_p=0.5), Row(min_p=1.0), Row(top_k=1))
    logits = np.resize(kinds, (512, NARROW))
    rows = [filters[row // len(kinds) % len(filters)]._replace(seed=row) for row in range(512)]
    np.testing.assert_array_equal(ids(logits, rows), wanted(logits, rows))


@pytest.mark.parametrize(("route", "ranks"), [(Route.UNFILTERED, 1), *((route, 4) for route in ROUTES)])
def test_every_route_of_gpus_draws_the_tokens_of_the_oracle(route, ranks):
    columns = 1016
    logits, params = random_batch(7, 61, columns)
    params = [served_by(route, row) for row in params]
    got = compiled(route, ranks, columns)(jnp.asarray(logits), params_of(params))
    np.testing.assert_array_equal(np.asarray(got), wanted(logits, params))


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("route", ROUTES)
def test_nothing_in_a_route_of_gpus_is_decided_on_the_device(route, ranks):
    text = lowered(route, ranks, 1016).as_text()
    assert not re.findall(r"stablehlo\.(?:while|case|if)\b", text)


def test_masses_are_exact_for_the_largest_vocabulary():
    """Weights add up like integers of any size, in two words or in three, and are rounded once."""
    for blocks in (2**10, 2**14):
        rng = np.random.default_rng(blocks)
        weight_RJW = rng.integers(0, 2**28 - 16, (2, blocks, 64), dtype=np.int32)
        weight_RJW[1] = 2**28 - 16
        weight = branch_free._weight(jnp.asarray(weight_RJW))
        is_in_RJW = rng.random(weight_RJW.shape) < 0.9
        total_R = weight.total(branch_free._sums(weight.words(jnp.asarray(is_in_RJW))))
        exact = np.where(is_in_RJW, weight_RJW, 0).astype(np.int64).sum(axis=(1, 2))
        rounded_R = (exact >> 16).astype(np.float32) * np.float32(2**16) + (exact & 0xFFFF).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(total_R), rounded_R)


@pytest.mark.parametrize(("name", "wrong"), [("_WEIGHT_BITS", 14), ("LEAST", np.int32(-(2**31)))])
def test_a_fault_in_the_search_is_seen(monkeypatch, name, wrong):
    """Weights without their upper half, and numbers below minus infinity that are not taken for it."""
    monkeypatch.setattr(branch_free, name, wrong)
    logits, params = random_batch((NARROW, 0), 64, NARROW)
    assert (ids(logits, params, sample) != wanted(logits, params)).any()
