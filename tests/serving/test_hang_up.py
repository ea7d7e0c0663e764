"""A client that leaves frees its pages and disturbs nobody."""

import asyncio
import random

import httpx
import pytest

from albireo_jax.core.limits import EngineLimits
from albireo_jax.core.types import FinishReason, SamplingParams
from albireo_jax.serving.app import create_app
from tests.labs.engine_lab import LIMITS, Lab, lab
from tests.labs.http_lab import hang_up, served

FOREVER = {"max_tokens": 1500, "ignore_eos": True, "seed": 1}
STAYERS = range(20)


def _assert_nothing_left(engine: Lab) -> None:
    assert engine.service.drain(60)
    stats = engine.service.stats()
    assert (stats.pages_in_use, stats.waiting, stats.running) == (0, 0, 0)
    assert engine.frontend.num_readers == 0


def _leaver(rng: random.Random, url: str) -> tuple[str, dict[str, object], int]:
    """Path, body and bytes to read of a client that asks for much and leaves soon."""
    stream = rng.random() < 0.7
    read_bytes = rng.choice((0, 10, 3000)) if stream else 0
    body = {**FOREVER, "n": rng.choice((1, 2)), "stream": stream}
    if rng.random() < 0.5:
        messages = [{"role": "user", "content": "x" * rng.randrange(1, 200)}]
        return "/v1/chat/completions", {**body, "messages": messages}, read_bytes
    return "/v1/completions", {**body, "prompt": ["leave", "go"]}, read_bytes


async def _stay(url: str, seed: int) -> str:
    async with httpx.AsyncClient(timeout=60) as client:
        body = {"prompt": "stay", "max_tokens": 20, "seed": seed}
        answer = await client.post(f"{url}/v1/completions", json=body)
        return answer.json()["choices"][0]["text"]


def test_200_clients_that_hang_up_at_random_leave_no_page_in_use() -> None:
    rng = random.Random(3)
    limits = EngineLimits(max_model_len=2048, vocab_size=LIMITS.vocab_size, num_pages=200, page_size=16)

    async def main(url: str) -> list[str]:
        leavers = []
        for _ in range(200):
            path, body, read_bytes = _leaver(rng, url)
            leavers.append(hang_up(url, path, body, read_bytes=read_bytes))
        texts, _ = await asyncio.gather(
            asyncio.gather(*(_stay(url, seed) for seed in STAYERS)), asyncio.gather(*leavers)
        )
        return texts

    with lab(limits, max_rows=32) as engine:
        with served(create_app(engine)) as url:
            texts = asyncio.run(main(url))
            later = asyncio.run(_stay(url, 0))
        _assert_nothing_left(engine)
        finished = engine.frontend.metrics.snapshot().finished
        assert finished[FinishReason.LENGTH] + finished[FinishReason.STOP] == len(STAYERS) + 1
        assert finished[FinishReason.ABORT] > 100
        expected = [
            engine.frontend.generate(["stay"], SamplingParams(max_tokens=20, seed=seed))[0].text
            for seed in STAYERS
        ]
        assert (texts, later) == (expected, expected[0])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_the_engine_is_busy_is_noticed_at_once(stream: bool) -> None:
    body = {**FOREVER, "prompt": "go", "stream": stream}

    async def main(url: str) -> None:
        await hang_up(url, "/v1/completions", body, read_bytes=300 if stream else 0)

    with lab() as engine:
        with served(create_app(engine)) as url:
            asyncio.run(main(url))
            with httpx.Client() as client:  # the server goes on
                assert client.get(f"{url}/health").status_code == httpx.codes.OK
        _assert_nothing_left(engine)
        finished = engine.frontend.metrics.snapshot().finished
        assert finished[FinishReason.LENGTH] == 0
