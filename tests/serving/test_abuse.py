"""After whatever anybody sends, the next client gets the same tokens and no page is in use."""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from albireo_jax.serving.app import create_app
from tests.labs import abuse_cases as cases
from tests.labs.engine_lab import Lab, lab
from tests.labs.http_lab import in_process, served

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CANARY = {"prompt": "canary", "max_tokens": 8, "seed": 7, "ignore_eos": True, "n": 2}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def engine() -> Iterator[Lab]:
    with lab() as running:
        yield running


@pytest.fixture(scope="module")
def url(engine: Lab) -> Iterator[str]:
    with served(create_app(engine)) as address:
        yield address


class Watched:
    """A client; `check` asks whether everything is still as it was."""

    def __init__(self, client: httpx.AsyncClient, engine: Lab) -> None:
        self._client, self._engine = client, engine
        self._song: list[str] | None = None

    async def send(self, path: str, content: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
        encoded = {name: value.encode("latin-1") for name, value in {**JSON, **(headers or {})}.items()}
        return await self._client.post(path, content=content, headers=encoded)

    async def ask(self, method: str, path: str) -> httpx.Response:
        return await self._client.request(method, httpx.URL(path))

    async def check(self, what: object, *answers: httpx.Response) -> None:
        for answer in answers:
            assert answer.status_code < 500, (what, answer.status_code, answer.text[:300])
            if answer.status_code >= 400 and answer.headers.get("content-length") != "0":
                assert len(answer.content) <= 2048, what
                assert answer.request.method == "HEAD" or list(answer.json()["error"]), what
        answer = await self._client.post(COMPLETIONS, json=CANARY)
        assert answer.status_code == httpx.codes.OK, (what, answer.text[:300])
        song = [choice["text"] for choice in answer.json()["choices"]]
        self._song = self._song or song
        assert song == self._song, what
        await asyncio.to_thread(self._engine.service.drain, 30)
        stats = self._engine.service.stats()
        assert (stats.pages_in_use, stats.running, stats.waiting) == (0, 0, 0), what


@asynccontextmanager
async def _watched(engine: Lab) -> AsyncGenerator[Watched, None]:
    async with in_process(create_app(engine)) as client:
        yield Watched(client, engine)


def _run(engine: Lab, work: Callable[[Watched], Awaitable[None]]) -> None:
    async def main() -> None:
        async with _watched(engine) as watched:
            await work(watched)

    asyncio.run(main())


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_wrong_values_of_every_field(engine: Lab) -> None:
    async def work(watched: Watched) -> None:
        for place, (path, name) in enumerate(cases.FIELDS):
            values = cases.WRONG[place % 5 :: 5]  # others for the next field, which is often of the same type
            bodies = [{**cases.LEAST[path], name: value} for value in values]
            answers = [await watched.send(path, _json(body)) for body in bodies]
            await watched.check((path, name), *answers)

    assert len(cases.FIELDS) > 120
    _run(engine, work)


def test_odd_bodies(engine: Lab) -> None:
    async def work(watched: Watched) -> None:
        for path, body in cases.BODIES:
            await watched.check(str(body)[:200], await watched.send(path, _json(body)))

    assert len(cases.BODIES) > 120
    _run(engine, work)


def test_bytes_that_are_no_bodies_and_odd_headers(engine: Lab) -> None:
    async def work(watched: Watched) -> None:
        for content in cases.RAW_BODIES:
            answers = [await watched.send(path, content) for path in cases.LEAST]
            await watched.check(content[:100], *answers)
        body = _json(cases.LEAST[COMPLETIONS])
        for headers in cases.HEADERS:
            await watched.check(headers, await watched.send(COMPLETIONS, body, headers))
        for method, path in cases.PATHS:
            await watched.check((method, path[:80]), await watched.ask(method, path))

    _run(engine, work)


def test_everything_at_once(engine: Lab) -> None:
    async def work(watched: Watched) -> None:
        for offset in range(4):
            bodies = cases.BODIES[offset::4]
            posts = (watched.send(path, _json(body)) for path, body in bodies)
            answers = await asyncio.gather(*posts)
            await watched.check(offset, *answers)
        same = _json({**CANARY, "request_id": "the same"})
        await watched.check(
            "the same", *await asyncio.gather(*(watched.send(COMPLETIONS, same) for _ in range(40)))
        )

    _run(engine, work)


def _connect(url: str) -> socket.socket:
    address = urlsplit(url)
    return socket.create_connection((address.hostname, address.port), timeout=30)


@pytest.mark.parametrize("resets", [False, True])
def test_clients_that_leave(resets: bool, engine: Lab, url: str) -> None:
    async def work(watched: Watched) -> None:
        for sent, read_bytes in cases.HANG_UPS:
            with _connect(url) as connection:
                connection.sendall(sent)
                while read_bytes > 0:
                    data = connection.recv(read_bytes)
                    read_bytes -= len(data) or read_bytes
                if resets:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await watched.check(sent[:200])

    _run(engine, work)


def test_bytes_that_are_no_requests(engine: Lab, url: str) -> None:
    async def work(watched: Watched) -> None:
        for sent in cases.RAW:
            with _connect(url) as connection:
                answer = b""
                try:
                    connection.sendall(sent)
                    connection.shutdown(socket.SHUT_WR)
                    while data := connection.recv(2**16):
                        answer += data
                except (BrokenPipeError, ConnectionResetError):
                    assert len(sent) > 2**15  # it was refused before all of it was sent
            assert b"HTTP/1.1 5" not in answer.replace(b"HTTP/1.1 501", b""), (sent[:100], answer[:300])
            await watched.check(sent[:200])

    _run(engine, work)


def test_many_at_once_on_sockets(engine: Lab, url: str) -> None:
    async def work(watched: Watched) -> None:
        with ExitStack() as connections:
            for place in range(60):
                connection = connections.enter_context(_connect(url))
                connection.sendall(cases.HANG_UPS[place % len(cases.HANG_UPS)][0])
            assert (await watched.ask("GET", "/health")).status_code == httpx.codes.OK
        await watched.check("all have left")

    _run(engine, work)
