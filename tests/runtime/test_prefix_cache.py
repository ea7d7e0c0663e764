"""Prefixes through the whole engine, read from either tier: the tokens are those without them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from albireo_jax.core.logit_rules import LogitRules
from albireo_jax.core.token_sampling import TokenSampling
from albireo_jax.core.types import Request

Build = Callable[..., Any]
VOCAB = 105


def conversations() -> list[list[Request]]:
    """Rounds of requests: each conversation goes on with its own beginning, which some have in common."""
    draw = np.random.default_rng(12)
    system = draw.integers(0, VOCAB, 22).tolist()
    rounds: list[list[Request]] = [[], [], []]
    for talk in range(9):
        text = [*system[: 22 if talk % 3 else 6], *draw.integers(0, VOCAB, 8).tolist()]
        for turn, requests in enumerate(rounds):
            text += draw.integers(0, VOCAB, int(draw.integers(5, 25))).tolist()
            requests.append(
                Request(
                    request_id=f"r{talk}.{turn}",
                    prompt_token_ids=tuple(text),
                    max_tokens=int(draw.integers(4, 20)),
                    sampling=TokenSampling(temperature=0.8 * (talk % 2), seed=talk),
                    rules=LogitRules(frequency_penalty=0.7) if talk % 4 == 3 else None,
                )
            )
    return rounds


ROUNDS = conversations()


@pytest.fixture(scope="module")
def computed(engine: Build) -> list[dict[str, list[int]]]:
    """The tokens of each round where every request computes all of its own."""
    return [
        {request.request_id: engine(tp=1).run([request])[request.request_id] for request in requests}
        for requests in ROUNDS
    ]


@pytest.mark.parametrize("shape", [{"tp": 1, "depth": 1}, {"tp": 4, "depth": 3}])
def test_tokens_do_not_depend_on_what_was_cached(
    engine: Build, computed: list[dict[str, list[int]]], shape: dict[str, int]
) -> None:
    small = engine(**shape)
    assert [small.run(requests) for requests in ROUNDS] == computed
    stats = small.loop.scheduler.stats()
    assert stats.cache.cached_tokens > stats.cache.prompt_tokens / 3
    assert stats.tiers.copied_out == 0


@pytest.mark.parametrize(("shape", "host_pages"), [({"tp": 1, "depth": 3}, 200), ({"tp": 4}, 30)])
def test_tokens_do_not_depend_on_what_was_swapped(
    engine: Build, computed: list[dict[str, list[int]]], shape: dict[str, int], host_pages: int
) -> None:
    """In a third of the pages, with a host that holds the rest, or half of it."""
    small = engine(num_pages=48, num_host_pages=host_pages, **shape)
    assert [small.run(requests) for requests in ROUNDS] == computed
    small.loop.scheduler.check_invariants()
    stats = small.loop.scheduler.stats()
    assert stats.tiers.copied_out > 50
    assert stats.tiers.copied_in > 10
    assert (stats.tiers.lost == 0) == (host_pages == 200)


def test_copies_are_measured_before_the_first_step_and_timed_in_the_others(
    engine: Build, computed: list[dict[str, list[int]]]
) -> None:
    small = engine(num_pages=48, num_host_pages=200)
    costs = small.executor.measure_copies()
    assert min(costs.page_s, costs.token_s, costs.wait_s) > 0
    assert small.executor.copied.to_host == 0
    assert [small.run(requests) for requests in ROUNDS] == computed
    copies, busy_s = small.loop.timeline.table().copies, small.loop.timeline.table().device_busy_s
    assert small.loop.scheduler.stats().tiers.copied_in * costs.page_s < copies.total_s
    assert 0 < copies.exposed_s <= min(copies.total_s, busy_s)
