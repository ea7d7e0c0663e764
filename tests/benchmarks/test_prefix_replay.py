"""The ideal of the prefix cache on traces made by hand, and replays that find no more and hardly less."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from albireo_jax.core.config import SchedulerConfig
from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.types import Request
from albireo_jax.sim.cost import linear_cost
from albireo_jax.sim.workload import Arrival, make_requests
from benchmarks.prefix import (
    PrefixHits,
    fit_context,
    ideal_hits,
    replay_simulated,
    replay_waves,
    waves,
)
from tests.labs.engine_lab import lab

COST = linear_cost(step_s=1e-3, token_s=1e-5)


def request(name: str, prompt: Sequence[int], *, arrived_s: float = 0.0, max_tokens: int = 1) -> Request:
    return Request(
        request_id=name, prompt_token_ids=tuple(prompt), max_tokens=max_tokens, arrived_s=arrived_s
    )


def ideal(prompts: Sequence[Sequence[int]], page_size: int = 2) -> int:
    """Tokens found if each prompt comes after the one before."""
    requests = [request(str(nth), prompt) for nth, prompt in enumerate(prompts)]
    hits = ideal_hits(([each] for each in requests), page_size=page_size)
    assert hits.prompt_tokens == sum(map(len, prompts))
    return hits.cached_tokens


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([[1, 2, 3, 4, 5]], 0),
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]], 4),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], 2),  # the last token is computed, and so is all of its page
        ([[1, 2, 3], [1, 2, 3, 4, 5]], 2),  # a page that is not full is not shared
        ([[1, 2, 3, 4, 5], [9, 2, 3, 4, 5]], 0),  # a page behind another prefix is another page
        ([[1, 2, 3, 4, 5], [1, 2, 9, 9, 5], [1, 2, 9, 9, 5]], 2 + 4),
        ([[1], [1], [1, 2], [1, 2]], 0),
        ([[1, 2, 7], [1, 2, 3, 4, 7], [1, 2, 3, 4, 5, 6, 7]], 2 + 4),
    ],
)
def test_ideal_counts_the_full_pages_of_earlier_prompts(prompts: list[list[int]], expected: int) -> None:
    assert ideal(prompts) == expected


def test_a_wave_finds_nothing_of_itself() -> None:
    prompts = [[1, 2, 3, 4, 5]] * 3
    requests = [request(str(nth), prompt, arrived_s=float(nth // 2)) for nth, prompt in enumerate(prompts)]
    assert [len(wave) for wave in waves(requests)] == [2, 1]
    assert ideal_hits(waves(requests), page_size=2) == PrefixHits(prompt_tokens=15, cached_tokens=4)
    assert ideal_hits([requests], page_size=2).cached_tokens == 0
    assert PrefixHits(prompt_tokens=8, cached_tokens=2).rate == 0.25


def test_a_trace_is_cut_to_the_context() -> None:
    arrivals = [
        Arrival(arrived_s=0.0, input_tokens=1000, output_tokens=640, block_size=512, block_ids=(7, 8)),
        Arrival(
            arrived_s=3.0, input_tokens=5000, output_tokens=32, block_size=512, block_ids=tuple(range(10))
        ),
    ]
    short, long = fit_context(arrivals, block_tokens=16, max_model_len=100, max_output=10)
    assert (short.input_tokens, short.output_tokens, short.block_ids) == (31, 10, (7, 8))
    assert (long.input_tokens, long.output_tokens, long.block_ids) == (90, 1, tuple(range(6)))
    assert short.block_size == long.block_size == 16
    with pytest.raises(ValueError, match=r"sizes \[16, 512\]"):
        fit_context([arrivals[0], short], block_tokens=16, max_model_len=100, max_output=10)
    with pytest.raises(ValueError, match="answers of 100 tokens"):
        fit_context(arrivals, block_tokens=16, max_model_len=100, max_output=100)


def conversations(count: int, *, gap_s: float) -> list[Request]:
    """Each third prompt is longer by a block than the one before it, those between are new."""
    arrivals = [
        Arrival(
            arrived_s=nth * gap_s,
            input_tokens=8 * (nth + 1) + 3 if nth % 3 == 0 else 100,
            output_tokens=1 + nth % 5,
            block_size=8,
            block_ids=tuple(range(nth + 1)) if nth % 3 == 0 else tuple(range(1000 * nth, 1000 * nth + 13)),
        )
        for nth in range(count)
    ]
    return make_requests(arrivals, vocab_size=90, seed=4)


def limits(num_pages: int, num_host_pages: int = 0) -> EngineLimits:
    return EngineLimits(
        max_model_len=256, vocab_size=90, num_pages=num_pages, page_size=8, num_host_pages=num_host_pages
    )


def simulated(requests: Sequence[Request], *, num_pages: int, num_host_pages: int = 0) -> PrefixHits:
    stats = replay_simulated(
        requests,
        limits(num_pages, num_host_pages),
        config=SchedulerConfig(max_rows=8, max_step_tokens=64),
        cost=COST,
    )
    return PrefixHits(prompt_tokens=stats.cache.prompt_tokens, cached_tokens=stats.cache.cached_tokens)


def test_requests_one_after_the_other_find_all_that_there_is() -> None:
    requests = conversations(24, gap_s=1.0)
    found = ideal_hits(([each] for each in requests), page_size=8)
    assert found.cached_tokens > 500
    assert simulated(requests, num_pages=1000) == found


def test_less_memory_finds_less_and_the_host_makes_up_for_it() -> None:
    requests = conversations(24, gap_s=1.0)
    ample, little = (simulated(requests, num_pages=pages).cached_tokens for pages in (1000, 34))
    tiered = simulated(requests, num_pages=34, num_host_pages=1000).cached_tokens
    assert little < tiered == ample


def test_requests_that_come_together_find_what_the_first_of_them_computes() -> None:
    twins = [replace(each, request_id=f"twin-{each.request_id}") for each in conversations(24, gap_s=1.0)]
    requests = sorted([*conversations(24, gap_s=1.0), *twins], key=lambda each: each.arrived_s)
    in_order = ideal_hits(([each] for each in requests), page_size=8)
    assert ideal_hits(waves(requests), page_size=8).cached_tokens < in_order.cached_tokens
    assert simulated(requests, num_pages=1000) == in_order


def test_an_engine_finds_what_the_waves_before_had() -> None:
    requests = conversations(18, gap_s=1.0)
    with lab(limits(500), max_rows=8, max_step_tokens=64) as engine:
        found = replay_waves(requests, engine.frontend)
        assert found == replay_waves(requests, engine.frontend, cache_salt="another")
    assert found == ideal_hits(waves(requests), page_size=8)
