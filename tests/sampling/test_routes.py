"""Every route draws the token of the oracle, over every number of ranks, and moves what it says."""

import re
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import pytest

from albireo_jax.core.plan import NOT_FINITE
from albireo_jax.core.token_sampling import TokenSampling
from albireo_jax.sampling.blocks import BLOCK_TOKENS
from albireo_jax.sampling.candidates import MAX_CANDIDATES
from albireo_jax.sampling.routes import Route, route_of, wire_bytes
from benchmarks.lib.hlo import parse
from benchmarks.lib.hlo_collectives import collectives
from tests.labs.route_lab import ROWS, compiled, lowered, served_by
from tests.labs.sampling_lab import INF, Row, noise_of, oracle, params_of, random_batch

SIZES = {"narrow": (1016, 1013), "wide": (40_000, 39_990)}
"""Columns, some of which only pad the vocabulary, and tokens; of the wide one, candidates are a part."""
LAYOUTS = [(1, "narrow"), (2, "narrow"), (4, "narrow"), (8, "narrow"), (8, "wide")]
"""Ranks and sizes; over 8 ranks, the candidates of the narrow one are all of its tokens."""


class Answered(NamedTuple):
    """Rows, and their tokens by the oracle."""

    logits: np.ndarray
    rows: list[Row]
    ids: list[int]


@cache
def answered(route, size, seed):
    """Random rows that the route serves; the dearest routes serve what candidates do."""
    columns, tokens = SIZES[size]
    logits, params = random_batch((size == "wide", seed), ROWS, columns)
    logits[:, tokens:] = -INF
    rows = [served_by(route, row) for row in params]
    ids = [oracle(*each) for each in zip(logits, rows, noise_of(rows, columns), strict=True)]
    return Answered(logits, rows, ids)


@pytest.mark.parametrize(("ranks", "size"), LAYOUTS)
@pytest.mark.parametrize("route", list(Route))
def test_a_route_draws_the_token_of_the_oracle(route, ranks, size):
    program = compiled(route, ranks, SIZES[size][0])
    for seed in range(6):
        batch = answered(min(route, Route.CANDIDATES), size, seed)
        np.testing.assert_array_equal(program(batch.logits, params_of(batch.rows)), batch.ids)


@pytest.mark.parametrize("route", [Route.GREEDY, Route.UNFILTERED, Route.CANDIDATES, Route.ALL_TO_ALL])
def test_ties_go_to_the_lowest_id_on_whichever_rank_it_is(route):
    logits = np.full((ROWS, 1016), -1.0, np.float32)
    draw = np.random.default_rng(0)
    tied = [np.sort(draw.choice(1013, size=5, replace=False)) for _ in range(ROWS)]
    for row, ids in enumerate(tied):
        logits[row, ids] = 3.0
    rows = [Row(temperature=0.0)] * ROWS
    for ranks in (1, 2, 8):
        got = compiled(route, ranks, 1016)(logits, params_of(rows))
        np.testing.assert_array_equal(got, [ids[0] for ids in tied])


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("route", list(Route))
def test_a_row_that_is_not_finite_has_no_token_and_spoils_no_other(route, ranks):
    logits, params = random_batch(3, ROWS, 1016)
    rows = [served_by(route, row) for row in params]
    program = compiled(route, ranks, 1016)
    want = np.asarray(program(logits, params_of(rows)))
    logits[3], logits[4] = np.nan, -INF
    logits[5, 700], logits[6, 1] = np.nan, INF
    got = np.asarray(program(logits, params_of(rows)))
    np.testing.assert_array_equal(got[3:7], NOT_FINITE)
    np.testing.assert_array_equal(np.delete(got, range(3, 7)), np.delete(want, range(3, 7)))


def test_candidates_that_do_not_suffice_are_not_trusted():
    """Flat rows have nuclei far wider than all candidates: the route must notice, for just one such row."""
    logits = np.zeros((ROWS, 40_000), np.float32)
    logits[:, 39_990:] = -INF
    logits[1:, 7] = 40
    rows = [Row(top_p=0.9, seed=seed) for seed in range(ROWS)]
    want = [oracle(*each) for each in zip(logits, rows, noise_of(rows, 40_000), strict=True)]
    assert want[0] != 7
    assert want[1:] == [7] * (ROWS - 1)
    np.testing.assert_array_equal(compiled(Route.CANDIDATES, 8, 40_000)(logits, params_of(rows)), want)


@pytest.mark.parametrize(("ranks", "size"), LAYOUTS[1:])
@pytest.mark.parametrize("route", list(Route))
def test_a_route_moves_the_bytes_that_it_says(route, ranks, size):
    columns, _ = SIZES[size]
    said = partial(wire_bytes, rows=ROWS, columns=columns, ranks=ranks)
    sent = collectives(parse(compiled(route, ranks, columns).as_text()))
    fallback = {one.within for one in sent if one.within and one.kind == "all-to-all"}
    assert len(fallback) == (route is Route.CANDIDATES)
    assert sum(one.result_bytes for one in sent if one.within not in fallback) == said(route)
    in_fallback = sum(one.result_bytes for one in sent if one.within in fallback)
    assert in_fallback == (said(Route.ALL_TO_ALL) if fallback else 0)


@pytest.mark.parametrize("route", [Route.GREEDY, Route.UNFILTERED, Route.ALL_TO_ALL, Route.REPLICATED])
def test_one_rank_moves_nothing(route):
    assert collectives(parse(compiled(route, 1, 1016).as_text())) == ()
    assert wire_bytes(route, rows=ROWS, columns=1016, ranks=1) == 0


def test_the_cheapest_route_is_chosen():
    plain = TokenSampling(temperature=0.7)
    assert route_of(replace(plain, temperature=0.0, top_p=0.5)) is Route.GREEDY
    assert route_of(plain) is Route.UNFILTERED
    assert route_of(plain.with_seed(5)) is Route.UNFILTERED
    assert route_of(replace(plain, top_k=50)) is Route.CANDIDATES
    assert route_of(replace(plain, top_p=0.9)) is Route.CANDIDATES
    assert route_of(replace(plain, min_p=0.1)) is Route.CANDIDATES
    assert route_of(replace(plain, top_k=1000)) is Route.ALL_TO_ALL


def test_no_route_sorts_the_vocabulary():
    for route in Route:
        assert "stablehlo.sort" not in lowered(route, 8, 40_000).as_text()
        sorts = re.findall(r"f32\[\d+,(\d+)\].* sort\(", compiled(route, 8, 40_000).as_text())
        assert all(int(width) <= MAX_CANDIDATES for width in sorts)
    widths = re.findall(
        r"chlo.top_k\(.*tensor<\d+x(\d+)xf32> ->", lowered(Route.CANDIDATES, 8, 40_000).as_text()
    )
    blocks = -(-40_000 // 8 // BLOCK_TOKENS)
    short_list = min(blocks, MAX_CANDIDATES) * BLOCK_TOKENS
    everything = -(-40_000 // BLOCK_TOKENS)  # of the fallback, which looks for the best blocks of whole rows
    assert {int(width) for width in widths} == {blocks, short_list, everything}
