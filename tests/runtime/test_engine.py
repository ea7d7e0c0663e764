"""The real data plane: tokens free of tp, depth, batch and preemption, and steps counted by their routes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from albireo_jax.core.config import SamplingMode
from albireo_jax.core.token_sampling import GREEDY, TokenSampling
from albireo_jax.core.types import Request
from albireo_jax.runtime.executor import Sampling
from albireo_jax.runtime.step import LayerLoop
from albireo_jax.sampling.routes import Route
from benchmarks.lib.hlo import parse
from benchmarks.lib.hlo_collectives import collectives

Build = Callable[..., Any]


def _requests(count: int, sampling: TokenSampling = GREEDY) -> list[Request]:
    draw = np.random.default_rng(7)
    return [
        Request(
            request_id=f"r{index}",
            prompt_token_ids=tuple(int(token) for token in draw.integers(0, 105, draw.integers(1, 60))),
            max_tokens=int(draw.integers(1, 24)),
            sampling=sampling.with_seed(index),
        )
        for index in range(count)
    ]


SAMPLED = _requests(64, TokenSampling(temperature=0.8, top_p=0.9))


@pytest.fixture(scope="module")
def sampled_alone(engine: Build) -> dict[str, list[int]]:
    """Tokens of each sampled request, run in an engine by itself."""
    small = engine(tp=1, depth=1)
    return {
        request.request_id: small.run([request])[request.request_id] for request in SAMPLED[:12]
    } | small.run(SAMPLED[12:])


@pytest.mark.parametrize("tp", [1, 4, 8])
@pytest.mark.parametrize("layers", list(LayerLoop))
def test_greedy_tokens_are_those_of_the_dense_model(engine: Build, tp: int, layers: LayerLoop) -> None:
    small = engine(tp=tp, layers=layers)
    requests = _requests(6)
    for request, tokens in zip(requests, small.run(requests).values(), strict=True):
        prompt = request.prompt_token_ids
        text = np.zeros(192, np.int32)
        text[: len(prompt) + len(tokens)] = [*prompt, *tokens]
        logits_TV = np.asarray(engine(tp=1).model(jnp.asarray(text)))
        expected = logits_TV[len(prompt) - 1 : len(prompt) - 1 + len(tokens)].argmax(axis=1)
        assert tokens == expected.tolist()


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("sampling", list(SamplingMode))
def test_sampled_tokens_do_not_depend_on_how_they_are_computed(
    engine: Build, sampled_alone: dict[str, list[int]], tp: int, depth: int, sampling: SamplingMode
) -> None:
    small = engine(tp=tp, depth=depth, sampling=sampling)
    assert small.run(SAMPLED[:12]) == {name: sampled_alone[name] for name in list(sampled_alone)[:12]}


@pytest.mark.parametrize("tp", [1, 4])
def test_sampled_tokens_in_a_batch_of_64_are_those_alone(
    engine: Build, sampled_alone: dict[str, list[int]], tp: int
) -> None:
    small = engine(tp=tp, max_rows=64, max_step_tokens=256, num_pages=2000)
    assert small.run(SAMPLED) == sampled_alone


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_sampled_tokens_survive_preemption(
    engine: Build, sampled_alone: dict[str, list[int]], depth: int
) -> None:
    small = engine(tp=2, depth=depth, num_pages=32)
    assert small.run(SAMPLED[:24]) == {name: sampled_alone[name] for name in list(sampled_alone)[:24]}
    assert small.loop.scheduler.stats().preemptions > 0


def test_seeds_matter(engine: Build) -> None:
    request = Request(
        request_id="r",
        prompt_token_ids=(1, 2, 3),
        max_tokens=20,
        sampling=TokenSampling(temperature=1.0, seed=1),
    )
    small = engine()
    assert small.run([request]) == small.run([request])
    assert small.run([request]) != small.run([replace(request, sampling=request.sampling.with_seed(2))])


@pytest.mark.parametrize(("tp", "steps"), [(1, 1), (4, 1), (1, 4)])
def test_stop_ids_end_a_request_and_min_tokens_holds_them_back(engine: Build, tp: int, steps: int) -> None:
    request = Request(
        request_id="r",
        prompt_token_ids=(5, 6, 7),
        max_tokens=20,
        sampling=TokenSampling(temperature=1.0, seed=3),
    )
    small = engine(tp=tp, decode_steps=steps)
    free = small.run([request])["r"]
    stop = free[4]
    first = free.index(stop)
    assert small.run([replace(request, stop_ids=(stop,))])["r"] == free[: first + 1]
    held = small.run([replace(request, stop_ids=(stop,), min_tokens=first + 1)])["r"]
    assert held[:first] == free[:first]
    assert stop not in held[: first + 1]
    free_beside = replace(request, request_id="s")
    both = small.run([replace(request, stop_ids=(stop,), min_tokens=first + 1), free_beside])
    assert both == {"r": held, "s": free}


def test_new_weights_serve_without_a_new_engine(engine: Build) -> None:
    small = engine(tp=2)
    request = Request(request_id="r", prompt_token_ids=(9, 8, 7), max_tokens=12)
    weights = small.model.weights()
    before = small.run([request])
    small.executor.replace_weights(weights._replace(final_norm_D=-weights.final_norm_D))
    changed = small.run([request])
    small.executor.replace_weights(weights)
    assert changed != before
    assert small.run([request]) == before


UNFILTERED = TokenSampling(temperature=0.9)
TOP_K, WIDE_TOP_K = TokenSampling(temperature=0.9, top_k=5), TokenSampling(temperature=0.9, top_k=1000)


def steps_by_route(small: Any, *rows: tuple[int, TokenSampling]) -> dict[str, int]:
    """Of an engine's whole life, after requests that begin together, each of so many tokens."""
    requests = [
        Request(
            request_id=f"r{i}", prompt_token_ids=(i, 3), max_tokens=tokens, sampling=sampling.with_seed(i)
        )
        for i, (tokens, sampling) in enumerate(rows)
    ]
    small.run(requests)
    totals = small.loop.timeline.routes()
    assert sum(one.steps for one in totals.values()) == small.loop.scheduler.stats().steps
    return {route: one.steps for route, one in totals.items()}


@pytest.mark.parametrize("depth", [1, 2])
def test_steps_count_under_the_route_that_their_rows_need(engine: Build, depth: int) -> None:
    def steps(*rows: tuple[int, TokenSampling]) -> dict[str, int]:
        return steps_by_route(engine(tp=4, depth=depth), *rows)

    assert steps((7, GREEDY), (4, GREEDY)) == {"greedy": 7}
    assert steps((7, GREEDY), (4, UNFILTERED)) == {"unfiltered": 4, "greedy": 3}
    assert steps((7, GREEDY), (4, TOP_K)) == {"candidates": 4, "greedy": 3}
    assert steps((7, GREEDY), (4, TOP_K), (2, WIDE_TOP_K), (6, UNFILTERED)) == {
        "all_to_all": 2,
        "candidates": 2,
        "unfiltered": 2,
        "greedy": 1,
    }


@pytest.mark.parametrize(
    ("tp", "sampling", "route"),
    [
        (1, SamplingMode.SHARDED, Route.ALL_TO_ALL),
        (4, SamplingMode.SHARDED, Route.CANDIDATES),
        (4, SamplingMode.SHARDED, Route.GREEDY),
        (4, SamplingMode.REPLICATED, Route.REPLICATED),
    ],
)
def test_bytes_are_those_of_the_compiled_program(
    engine: Build, tp: int, sampling: SamplingMode, route: Route
) -> None:
    small = engine(tp=tp, sampling=sampling)
    assert steps_by_route(small, (6, GREEDY if route is Route.GREEDY else TOP_K)) == {route.name.lower(): 6}
    sent = collectives(parse(small.executor.compiled(Sampling(8, route)).as_text()))
    fallback = {one.within for one in sent if one.within and one.kind == "all-to-all"}
    moved = sum(one.result_bytes for one in sent if one.within not in fallback)
    assert small.loop.timeline.routes()[route.name.lower()].wire_bytes == 6 * moved
    assert (moved > 0) == (tp > 1)
