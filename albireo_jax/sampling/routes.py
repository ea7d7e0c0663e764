"""The routes by which a step's rows are sampled: the cheapest that serves them all.

All ways draw the same token for a row (`sampling.draw`). They differ in what travels between the t ranks,
for R rows of a vocabulary of V tokens:

=============  ====================================  ==========================================
route          rows that it serves                   bytes that a rank receives
=============  ====================================  ==========================================
GREEDY         temperature 0                         a few numbers per row
UNFILTERED     and those without top-k, top-p, min-p  the same
CANDIDATES     and those whose filters leave few      R (2 K + 1) words, or as ALL_TO_ALL if a
                                                      row's candidates turn out not to suffice
ALL_TO_ALL     any                                    R V / t words
REPLICATED     any; the baseline                      R V words, and every rank samples all rows
=============  ====================================  ==========================================

On one device nothing travels, and the last three are one. On GPUs CANDIDATES is not used: its fallback is a
branch that their host would wait for, and their links carry the logits in microseconds. There the last two
have kernels that select the tokens of whole rows.
"""

from enum import IntEnum

from jaxtyping import Array, Float, Int32

from albireo_jax.core.token_sampling import TokenSampling
from albireo_jax.ops.cuda.kernels import LaunchFn
from albireo_jax.sampling.argmax import sample_greedy, sample_unfiltered
from albireo_jax.sampling.blocks import BLOCK_TOKENS
from albireo_jax.sampling.candidates import MAX_CANDIDATES, sample_candidates
from albireo_jax.sampling.filters import SamplerParams
from albireo_jax.sampling.sharded import sample_all_to_all, sample_replicated


class Route(IntEnum):
    """A way to sample, cheapest first: each serves what those before it serve."""

    GREEDY = 0
    UNFILTERED = 1
    CANDIDATES = 2
    ALL_TO_ALL = 3
    REPLICATED = 4


_WORD_BYTES = 4
_BY_SHARE = {
    Route.GREEDY: sample_greedy,
    Route.UNFILTERED: sample_unfiltered,
    Route.CANDIDATES: sample_candidates,
}
_BY_ROW = {Route.ALL_TO_ALL: sample_all_to_all, Route.REPLICATED: sample_replicated}


def route_of(sampling: TokenSampling) -> Route:
    """The cheapest route that serves a row."""
    if sampling.is_greedy:
        return Route.GREEDY
    if not sampling.is_filtered:
        return Route.UNFILTERED
    if sampling.top_k > MAX_CANDIDATES:
        return Route.ALL_TO_ALL
    return Route.CANDIDATES


def wire_bytes(route: Route, *, rows: int, columns: int, ranks: int) -> int:
    """Bytes that a rank receives to sample a step's rows, ids included: the results of its collectives.

    `columns` are those of the logits over all ranks. Of CANDIDATES, the masses that rows with top-p need are
    included, and the fallback is not: only the device knows of it, and it costs as much again as ALL_TO_ALL.
    """
    if ranks == 1:
        return 0
    padded_rows = -(-rows // ranks) * ranks
    own_columns = columns // ranks
    match route:
        case Route.GREEDY:
            words = 2 * rows
        case Route.UNFILTERED:
            words = 3 * rows
        case Route.CANDIDATES:
            sent = min(MAX_CANDIDATES, -(-own_columns // BLOCK_TOKENS) * BLOCK_TOKENS)
            words = 5 * rows + padded_rows * (2 * sent + 1) + padded_rows
        case Route.ALL_TO_ALL:
            words = padded_rows * own_columns + padded_rows
        case Route.REPLICATED:
            words = rows * columns
    return _WORD_BYTES * words


def sample_by(
    route: Route,
    logits_Rv: Float[Array, "R v"],
    params: SamplerParams,
    *,
    axis: str,
    launch: LaunchFn | None = None,
) -> Int32[Array, " R"]:
    """One id per row on every rank, NOT_FINITE for a row without a finite largest logit.

    Inside a `shard_map` over `axis`: logits come split over the vocabulary in rank order. With `launch` the
    routes that see whole rows select their tokens by CUDA kernels.
    """
    if route in _BY_ROW:
        return _BY_ROW[route](logits_Rv, params, axis=axis, launch=launch)
    return _BY_SHARE[route](logits_Rv, params, axis=axis)
