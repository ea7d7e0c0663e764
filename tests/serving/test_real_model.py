"""The laws of the simulated server, on a real model: a 260,032-parameter Llama."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from albireo_jax.cli import main
from albireo_jax.core.types import FinishReason, SamplingParams
from albireo_jax.launch import Engine
from albireo_jax.serving.app import create_app
from tests.labs.http_lab import hang_up, served
from tests.labs.model_lab import stories

PROMPTS = ("Once upon a time", "One day, a cat", "Tom and Anna", "The sun")


@pytest.fixture(scope="module")
def engine(data_dir: Path) -> Iterator[Engine]:
    with stories(data_dir, max_rows=8, max_step_tokens=32) as running:
        yield running


def _params(i: int) -> SamplingParams:
    return SamplingParams(max_tokens=10 + i % 30, temperature=(0.0, 0.9)[i % 2], top_p=0.95, seed=i)


async def _ask(client: openai.AsyncOpenAI, i: int) -> str:
    params = _params(i)
    body = {
        "model": "stories260k",
        "prompt": PROMPTS[i % len(PROMPTS)],
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "seed": params.seed,
    }
    if i % 3:
        stream = await client.completions.create(stream=True, **body)
        return "".join([chunk.choices[0].text async for chunk in stream])
    answer = await client.completions.create(**body)
    return answer.choices[0].text


def test_64_concurrent_clients_get_what_they_get_alone(engine: Engine) -> None:
    async def ask_all(url: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(_ask(client, i) for i in range(64)))

    with served(create_app(engine)) as url:
        texts = asyncio.run(ask_all(url))
    alone = [engine.frontend.generate([PROMPTS[i % len(PROMPTS)]], _params(i))[0].text for i in range(64)]
    assert texts == alone
    assert engine.service.drain(60)
    assert engine.service.stats().pages_in_use == 0


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_answers_behind_cached_pages_are_the_same(engine: Engine, temperature: float) -> None:
    text = f"Lily had {temperature} apples. She went to the big park with her mom and her dog."
    body = {"model": "stories260k", "prompt": text, "max_tokens": 60, "temperature": temperature, "seed": 3}
    with served(create_app(engine)) as url:
        answers = []
        for key in ("one", "one", "other"):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
                answers.append(client.completions.create(**body))
    found = (answers[0].usage.prompt_tokens - 1) // 16 * 16
    assert found > 0
    assert [answer.usage.prompt_tokens_details.cached_tokens for answer in answers] == [0, found, 0]
    texts = [answer.choices[0].text for answer in answers]
    assert len(texts[0]) > 100
    assert texts[0] == texts[1] == texts[2]


def test_200_clients_that_hang_up_at_random_leave_no_page_in_use(engine: Engine) -> None:
    rng = random.Random(5)
    before = engine.frontend.metrics.snapshot().finished

    async def leave_all(url: str) -> None:
        leavers = []
        for i in range(200):
            stream = rng.random() < 0.7
            body = {"prompt": PROMPTS[i % 4], "max_tokens": 400, "ignore_eos": True, "stream": stream}
            read_bytes = rng.choice((0, 10, 1000)) if stream else 0
            leavers.append(hang_up(url, "/v1/completions", body, read_bytes=read_bytes))
        await asyncio.gather(*leavers)

    with served(create_app(engine)) as url:
        asyncio.run(leave_all(url))
    assert engine.service.drain(60)
    stats = engine.service.stats()
    assert (stats.pages_in_use, stats.waiting, stats.running) == (0, 0, 0)
    assert engine.frontend.num_readers == 0
    after = engine.frontend.metrics.snapshot().finished
    assert after[FinishReason.ABORT] - before[FinishReason.ABORT] > 100


def _command(capfd: pytest.CaptureFixture[str], command: str, data_dir: Path, *flags: str) -> str:
    """What `albireo COMMAND` prints, on an engine of the sizes above."""
    model = str(data_dir / "models" / "stories260k")
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), model, "--max-rows", "8", "--max-step-tokens", "32", *flags])
    assert ended.value.code == 0
    return capfd.readouterr().out


def test_generate_writes_the_answer(
    engine: Engine, data_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--prompt", PROMPTS[0], "--max-tokens", "30", "--temperature", "0", "--stop", "Lily")
    out = _command(capfd, "generate", data_dir, *flags)
    params = SamplingParams(max_tokens=30, temperature=0, stop=("Lily",))
    assert out == engine.frontend.generate([PROMPTS[0]], params)[0].text + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["throughput", "latency"])
def test_bench_prints_figures_and_the_task_table(
    data_dir: Path, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    flags = ("--requests", "4", "--input-len", "8", "--output-len", "8", "--repeats", "2")
    out = _command(capfd, f"bench {what}", data_dir, *flags)
    for word in ("4 requests", "tokens", "T1 schedule", "T5 process outputs", "exposed"):
        assert word in out
