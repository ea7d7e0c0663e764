"""What the routes cost each of 8 ranks, from their compiled programs, at 128 rows of 151,936 tokens.

Bytes are the results of the collectives on one rank. Operations are elementary ones on elements, of each
instruction as XLA compiled it, times its runs in a trace: so loops count as often as they turned, and only
branches that were taken. Not counted are TopK calls and what only moves data. Candidates fall back to
an all-to-all of the logits for rows that are not sure; those here are, and the fallback counts apart.
"""

from functools import cache

import pytest

from albireo_jax.sampling.candidates import MAX_CANDIDATES
from albireo_jax.sampling.routes import Route
from benchmarks.route_costs import compile_route, peaked_batch, ranks_mesh, route_cost

ROWS, VOCAB, RANKS = 128, 151_936, 8
WORD = 4
TEMPERATURE = {Route.GREEDY: 0.0}
TOP_P = {Route.GREEDY: 1.0, Route.UNFILTERED: 1.0}


@cache
def cost(route):
    mesh = ranks_mesh(RANKS)
    batch = peaked_batch(
        mesh, rows=ROWS, vocab=VOCAB, temperature=TEMPERATURE.get(route, 0.8), top_p=TOP_P.get(route, 0.9)
    )
    return route_cost(compile_route(route, batch, mesh), batch)


def test_all_to_all_moves_and_computes_a_rank_th_of_replicated():
    shared, replicated = cost(Route.ALL_TO_ALL), cost(Route.REPLICATED)
    assert replicated.operations > ROWS * VOCAB
    assert shared.operations <= 1.1 / RANKS * replicated.operations
    ids = ROWS * WORD
    assert replicated.moved_bytes == ROWS * VOCAB * WORD
    assert shared.moved_bytes == ROWS * VOCAB * WORD / RANKS + ids
    assert shared.unmoved_bytes == replicated.unmoved_bytes == 0


@pytest.mark.parametrize("route", [Route.GREEDY, Route.UNFILTERED])
def test_an_argmax_moves_a_thousandth_of_all_to_all(route):
    assert 0 < cost(route).moved_bytes <= 0.001 * cost(Route.ALL_TO_ALL).moved_bytes
    assert cost(route).unmoved_bytes == 0


def test_candidates_move_three_hundredths_of_all_to_all_unless_they_fall_back():
    candidates, everything = cost(Route.CANDIDATES), cost(Route.ALL_TO_ALL)
    assert candidates.moved_bytes >= ROWS * (2 * MAX_CANDIDATES + 1) * WORD
    assert candidates.moved_bytes <= 0.03 * everything.moved_bytes
    assert candidates.unmoved_bytes == everything.moved_bytes
