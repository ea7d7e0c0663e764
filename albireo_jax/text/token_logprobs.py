"""Log probabilities as callers read them: of each token, and of the likeliest in its place."""

from collections.abc import Iterable
from typing import NamedTuple

from albireo_jax.core.plan import LogprobArrays


class TokenLogprob(NamedTuple):
    """Log probability of a token and its rank (1: likeliest); the likeliest ids with theirs, in order.

    They are the model's own, before any penalty, bias or temperature.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


def token_logprobs(token_ids: Iterable[int], scores: LogprobArrays, *, num_top: int) -> list[TokenLogprob]:
    """The scores of these tokens, with the `num_top` likeliest of each."""
    columns = zip(
        token_ids,
        scores.logprobs.tolist(),
        scores.ranks.tolist(),
        scores.top_ids[:, :num_top].tolist(),
        scores.top_logprobs[:, :num_top].tolist(),
        strict=True,
    )
    return [
        TokenLogprob(token_id, logprob, rank, tuple(zip(top_ids, top_logprobs, strict=True)))
        for token_id, logprob, rank, top_ids, top_logprobs in columns
    ]
