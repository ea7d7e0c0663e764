"""Servers and clients for tests: an app on a free port, and clients that behave badly."""

import asyncio
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
from fastapi import FastAPI

from albireo_jax.serving.server import address_of, bind, make_server


@contextmanager
def served(app: FastAPI) -> Generator[str, None, None]:
    """URL of `app`, served by a thread; at the end open connections are waited for."""
    with bind("127.0.0.1", 0) as bound:
        bound.listen()  # so that clients wait in the backlog until the server accepts
        server = make_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            yield address_of(bound)
        finally:
            server.should_exit = True
            thread.join()


def in_process(app: FastAPI) -> httpx.AsyncClient:
    """A client that calls `app` without a socket and sees each answer whole."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def hang_up(url: str, path: str, body: dict[str, object], *, read_bytes: int) -> None:
    """POST `body`, read a little of the answer, and close the connection."""
    address = urlsplit(url)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(content), content))
    await writer.drain()
    if read_bytes:
        await reader.readexactly(read_bytes)
    writer.close()
    await writer.wait_closed()
