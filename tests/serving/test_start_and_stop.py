"""A server takes its port before the model is there, and ends when a signal or its engine's death says so."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from albireo_jax.serving.loading import answers_loading
from albireo_jax.serving.server import address_of, bind

FOREVER = {"prompt": "x", "max_tokens": 1500, "ignore_eos": True, "stream": True}
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def _process() -> Generator[tuple["subprocess.Popen[str]", str], None, None]:
    """The process of `dying_server.py`, and its URL."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.labs.dying_server"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


async def _wait_until(url: str, status: int, *, within_s: float) -> httpx.Response:
    end_s = time.monotonic() + within_s
    async with httpx.AsyncClient(base_url=url) as client:
        while True:
            answer = await client.get("/health")
            if answer.status_code == status:
                return answer
            assert time.monotonic() < end_s, f"/health is still {answer.status_code}"
            await asyncio.sleep(0.02)


def test_a_panic_ends_every_stream_and_then_the_process() -> None:
    async def use(process: "subprocess.Popen[str]", url: str) -> list[str]:
        await _wait_until(url, 200, within_s=60)
        has_begun = [asyncio.Event() for _ in range(3)]

        async def read(begun: asyncio.Event) -> str:
            text = ""
            async with (
                httpx.AsyncClient(base_url=url, timeout=60) as client,
                client.stream("POST", "/v1/completions", json=FOREVER) as answer,
            ):
                async for part in answer.aiter_text():
                    text += part
                    begun.set()
            return text

        streams = [asyncio.create_task(read(begun)) for begun in has_begun]
        await asyncio.gather(*(begun.wait() for begun in has_begun))
        assert process.stdin is not None
        process.stdin.close()
        dead = await _wait_until(url, 503, within_s=1)
        assert dead.json()["error"]["code"] == "engine_dead"
        assert "secret" not in dead.text
        return list(await asyncio.gather(*streams))

    with _process() as (process, url):
        texts = asyncio.run(asyncio.wait_for(use(process, url), 100))
        begin_s = time.monotonic()
        assert process.wait(10) not in (0, None)
        assert time.monotonic() - begin_s < 10
        process.stdin = None
        _, log = process.communicate(timeout=10)
    assert "_Panic: secret of another caller" in log
    for text in texts:
        events = [line.removeprefix("data: ") for line in text.split("\n\n")]
        assert events[-2:] == ["[DONE]", ""]
        errors = [json.loads(event)["error"] for event in events[:-2] if '"error"' in event]
        assert [error["code"] for error in errors] == ["engine_dead"]
        assert "secret" not in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_server_and_a_second_one_kills_it(number: int) -> None:
    with _process() as (process, url):
        asyncio.run(_wait_until(url, 200, within_s=60))
        process.send_signal(number)
        assert process.wait(10) == 0
    with (
        _process() as (process, url),
        httpx.Client(base_url=url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=FOREVER) as answer,
    ):
        parts = answer.iter_text()
        assert next(parts)
        process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(number)
        assert process.wait(2) == -number


def test_a_port_is_taken_and_listened_at_by_one_server() -> None:
    with bind("127.0.0.1", 0) as bound:
        address = bound.getsockname()
        with socket.create_connection(address, timeout=5):
            pass
        with pytest.raises(ValueError, match=f"cannot listen at 127.0.0.1 port {address[1]}"):
            bind(*address)


@pytest.mark.parametrize("host", ["256.256.256.256", "x" * 70, "a..b", "\0"])
def test_a_host_that_is_none_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="cannot listen at"):
        bind(host, 0)


def test_while_the_model_loads_every_request_is_answered_with_503() -> None:
    with (
        bind("127.0.0.1", 0) as bound,
        answers_loading(bound),
        socket.create_connection(bound.getsockname()),  # says nothing, and holds up nobody
        httpx.Client(base_url=address_of(bound), timeout=10) as client,
    ):
        for answer in (
            client.get("/health"),
            client.post("/v1/completions", content=b"x" * 10**6),
            client.delete("/anything"),
        ):
            assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
            assert answer.json()["error"]["code"] == "loading"
            assert answer.headers["retry-after"]
        assert client.head("/health").content == b""


def test_who_connects_as_the_model_is_loaded_waits_for_the_app() -> None:
    with bind("127.0.0.1", 0) as bound:
        with answers_loading(bound):
            pass
        with socket.create_connection(bound.getsockname(), timeout=5) as waiting:
            accepted, _ = bound.accept()
            accepted.sendall(b"hello")
            accepted.close()
            assert waiting.recv(5) == b"hello"
