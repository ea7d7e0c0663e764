"""Draws of every route follow the exact distribution, and the test that says so rejects wrong samplers.

The distribution is worked out in float64 from the definition of each parameter, without a line of the
samplers. Draws differ in position and seed, and have the same logits. They are counted by token, and the
counts compared with those expected by Pearson's chi-squared test. Of right samplers it rejects one in a
million, and seeds do not change from run to run; a token that may not be drawn at all fails it at once.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from albireo_jax.core.token_sampling import TokenSampling
from albireo_jax.sampling.candidates import MAX_CANDIDATES
from albireo_jax.sampling.logits import Rules, apply_rules
from albireo_jax.sampling.routes import Route, route_of, sample_by
from tests.labs.sampling_lab import INF, Row, p_value, params_of

RANKS, COLUMNS, VOCAB = 4, 600, 597  # 3 columns only pad the vocabulary
ROWS = 4000
REJECTED_P = 1e-6
FEW, MANY = 20_000, 200_000
LOGITS = np.random.default_rng(7).normal(0, 3, COLUMNS).astype(np.float32)
LOGITS[VOCAB:] = -INF


class Case(NamedTuple):
    """What all draws of a test ask for; the penalties' tokens are likely ones, and some others."""

    row: Row
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0


PLAIN = Case(Row(temperature=1.3))
TOP_K = Case(Row(temperature=1.3, top_k=40))
TOP_P = Case(Row(temperature=1.3, top_p=0.9))
MIN_P = Case(Row(temperature=1.3, min_p=0.02))
FILTERS = Case(Row(temperature=1.6, top_k=60, top_p=0.95, min_p=0.01))
PENALTIES = Case(Row(temperature=0.8), repetition=1.2, presence=0.4, frequency=0.3)
ALL = Case(FILTERS.row, repetition=1.2, presence=0.4, frequency=0.3)
CASES = {
    "temperature": PLAIN,
    "top-k": TOP_K,
    "top-p": TOP_P,
    "min-p": MIN_P,
    "filters": FILTERS,
    "penalties": PENALTIES,
    "all": ALL,
}


def occurrences():
    """How often each token is in the answer, and which ones are in the prompt."""
    likely_first = np.argsort(-LOGITS)
    answer, prompt = np.zeros(COLUMNS, np.int32), np.zeros(COLUMNS, np.bool_)
    answer[likely_first[[0, 2, 5, 6, 11, 300, 500]]] = 1, 2, 3, 1, 5, 2, 1
    prompt[likely_first[[1, 2, 7, 8, 400]]] = True
    return answer, prompt


def distribution(case):
    """The probability of each token, from the definitions of the parameters in their order."""
    answer, prompt = occurrences()
    logits = LOGITS.astype(np.float64)
    seen = (answer > 0) | prompt
    logits[seen & (logits > 0)] /= case.repetition
    logits[seen & (logits < 0)] *= case.repetition
    logits -= case.frequency * answer + case.presence * (answer > 0)
    row = case.row
    probability = np.exp((logits - logits.max()) / row.temperature)
    if row.top_k:
        probability[np.argsort(-probability)[row.top_k :]] = 0
    probability /= probability.sum()
    falling = np.argsort(-probability)
    before = np.cumsum(probability[falling]) - probability[falling]
    assert np.abs(before - row.top_p)[1:20].min() > 1e-4  # so that no rounding moves the nucleus' end
    largest = probability.max()
    probability[falling[before >= row.top_p]] = 0
    probability[probability < row.min_p * largest] = 0
    return probability / probability.sum()


def rules_of(case):
    """The rules of one slot."""
    answer, prompt = occurrences()
    penalties = case.repetition, case.presence, case.frequency
    return Rules(
        seen_Zv=jnp.asarray(2 * answer + prompt)[None],
        mask_ZX=jnp.full((1, -(-COLUMNS // 32)), -1, jnp.int32),
        biased_ZB=jnp.full((1, 1), -1, jnp.int32),
        bias_ZB=jnp.zeros((1, 1)),
        bad_word_ZHY=jnp.full((1, 1, 2), -1, jnp.int32),
        recent_ZY=jnp.full((1, 2), -1, jnp.int32),
        penalty_Z3=jnp.asarray([penalties], jnp.float32),
    )


@cache
def program(route):
    """The jitted route over all ranks: (logits_V, rules, params) -> ids, every row with the same logits."""
    mesh = Mesh(np.array(jax.devices()[:RANKS]), ("tp",), axis_types=(AxisType.Auto,))
    everywhere, by_vocab = PartitionSpec(), PartitionSpec(None, "tp")

    def stage(logits_v, rules, params):
        logits_Rv = jnp.broadcast_to(logits_v[None], (ROWS, COLUMNS // RANKS))
        first = lax.axis_index("tp") * (COLUMNS // RANKS)
        ruled_Rv = apply_rules(logits_Rv, rules, jnp.zeros(ROWS, jnp.int32), first=first)
        return sample_by(route, ruled_Rv, params, axis="tp")

    split_rules = Rules(**{**dict.fromkeys(Rules._fields, everywhere), "seen_Zv": by_vocab})
    specs = PartitionSpec("tp"), split_rules, everywhere
    return jax.jit(jax.shard_map(stage, mesh=mesh, in_specs=specs, out_specs=everywhere, check_vma=False))


def draws(route, case, count):
    """Ids, `ROWS` positions for each seed."""
    params = params_of([case.row] * ROWS)._replace(position_R=jnp.arange(ROWS, dtype=jnp.int32))
    draw = partial(program(route), jnp.asarray(LOGITS), rules_of(case))
    seeds = (jnp.full((ROWS, 2), seed, jnp.uint32) for seed in range(count // ROWS))
    return np.concatenate([draw(params._replace(seed_R2=seed_R2)) for seed_R2 in seeds])


def routes_of(case):
    """The routes that serve the case."""
    row = case.row
    sampling = TokenSampling(temperature=row.temperature, top_k=row.top_k, top_p=row.top_p, min_p=row.min_p)
    cheapest = route_of(sampling)
    return [route for route in Route if route >= cheapest]


EACH = [
    pytest.param(case, route, id=f"{name}-{route.name.lower()}")
    for name, case in CASES.items()
    for route in routes_of(case)
]


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("case", "route"), EACH)
def test_draws_follow_the_distribution(case, route, count):
    assert p_value(draws(route, case, count), distribution(case)) > REJECTED_P


def test_a_rank_has_more_tokens_than_it_sends_as_candidates():
    assert COLUMNS // RANKS > MAX_CANDIDATES
    for case in CASES.values():
        allowed = np.flatnonzero(distribution(case))
        assert len(allowed) > 10
        assert len(np.unique(allowed * RANKS // COLUMNS)) == RANKS


@pytest.mark.parametrize(
    ("case", "drawn"),
    [
        (PLAIN, Case(PLAIN.row._replace(temperature=PLAIN.row.temperature * 1.05))),
        (PLAIN, Case(PLAIN.row._replace(temperature=PLAIN.row.temperature / 1.05))),
        (TOP_K, Case(TOP_K.row._replace(top_k=TOP_K.row.top_k + 1))),
        (TOP_K, Case(TOP_K.row._replace(top_k=TOP_K.row.top_k - 1))),
        (TOP_P, Case(TOP_P.row._replace(top_p=0.91))),
        (TOP_P, Case(TOP_P.row._replace(top_p=0.89))),
        (MIN_P, Case(MIN_P.row._replace(min_p=0.019))),
        (MIN_P, Case(MIN_P.row._replace(min_p=0.022))),
        (PENALTIES, PENALTIES._replace(repetition=1.15)),
        (PENALTIES, PENALTIES._replace(presence=0.6)),
        (PENALTIES, PENALTIES._replace(frequency=0.2)),
    ],
)
def test_a_sampler_that_is_a_little_off_is_rejected(case, drawn):
    assert p_value(draws(routes_of(case)[0], drawn, 2 * FEW), distribution(case)) < REJECTED_P


def test_draws_that_depend_on_each_other_are_rejected():
    ids = draws(Route.UNFILTERED, PLAIN, FEW)
    assert p_value(np.repeat(ids[: FEW // 2], 2), distribution(PLAIN)) < REJECTED_P
