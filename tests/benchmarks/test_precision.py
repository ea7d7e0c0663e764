"""Perplexities are those of the prompts' log probabilities, and weigh all tokens alike."""

import math

import pytest

from albireo_jax.core.types import SamplingParams
from benchmarks.precision import WindowLoss, cut_windows, perplexity, window_losses
from tests.labs.engine_lab import lab


def test_windows_follow_each_other() -> None:
    assert cut_windows(range(10), count=3, length=3) == [(0, 1, 2), (3, 4, 5), (6, 7, 8)]
    with pytest.raises(ValueError, match="4 windows of 3 tokens do not fit in a text of 10"):
        cut_windows(range(10), count=4, length=3)


def test_perplexity_weighs_tokens_alike() -> None:
    losses = [
        WindowLoss(nats_per_token=1.0, num_predicted=3),
        WindowLoss(nats_per_token=3.0, num_predicted=1),
    ]
    assert perplexity(losses) == pytest.approx(math.exp(1.5))


def test_losses_are_the_prompts_log_probabilities() -> None:
    windows = cut_windows([nth * 7 % 90 for nth in range(80)], count=2, length=40)
    with lab() as engine:
        losses = window_losses(engine.frontend, windows)
        (scored,) = engine.frontend.generate([windows[1]], SamplingParams(max_tokens=1, prompt_logprobs=0))
    logprobs = [entry.logprob for entry in scored.prompt_logprobs[1:] if entry is not None]
    assert [loss.num_predicted for loss in losses] == [39, 39]
    assert losses[1].nats_per_token == pytest.approx(-sum(logprobs) / 39)
    assert losses[0] != losses[1]
