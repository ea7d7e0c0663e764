"""Perplexity of a text by a running engine, to tell what the precision of its keys and values costs.

A prompt's log probabilities come from the same steps as any answer: what a token attends to, itself and
earlier tokens of its own step included, is read back from the pages, in their precision.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from albireo_jax.core.types import SamplingParams
from albireo_jax.engine.frontend import Frontend


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowLoss:
    """How badly a window's tokens were predicted: the mean of minus their log probabilities, in nats.

    The window's first token is predicted by nothing and not among the `num_predicted`.
    """

    nats_per_token: float
    num_predicted: int


def cut_windows(token_ids: Sequence[int], *, count: int, length: int) -> list[tuple[int, ...]]:
    """The first `count` windows of `length` tokens, one after the other; ValueError if there are fewer."""
    if len(token_ids) < count * length:
        raise ValueError(f"{count} windows of {length} tokens do not fit in a text of {len(token_ids)}")
    return [tuple(token_ids[start : start + length]) for start in range(0, count * length, length)]


def window_losses(frontend: Frontend, windows: Sequence[Sequence[int]]) -> list[WindowLoss]:
    """The loss of each window, as a prompt of its own."""
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    losses: list[WindowLoss] = []
    for completion in frontend.generate(windows, params):
        logprobs = [entry.logprob for entry in completion.prompt_logprobs if entry is not None]
        losses.append(
            WindowLoss(nats_per_token=-math.fsum(logprobs) / len(logprobs), num_predicted=len(logprobs))
        )
    return losses


def perplexity(losses: Sequence[WindowLoss]) -> float:
    """E to the mean loss of all predicted tokens."""
    total = math.fsum(loss.nats_per_token * loss.num_predicted for loss in losses)
    return math.exp(total / sum(loss.num_predicted for loss in losses))
