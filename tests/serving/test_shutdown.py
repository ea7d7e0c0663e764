"""A server that is told to stop lets answers end, and tells those who wait longer why theirs do not."""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
SERVER = """
import sys, time
from tests.labs.engine_lab import lab
from albireo_jax.serving import server
from albireo_jax.serving.app import create_app

class Slow:
    def __init__(self, inner):
        self.inner = inner
    def dispatch(self, plan):
        time.sleep(0.01)
        return self.inner.dispatch(plan)

server._GRACE_S = 0.7
with server.bind("127.0.0.1", 0) as bound, lab(wrap=Slow) as engine:
    print(server.address_of(bound), flush=True)
    server.serve(create_app(engine), bound)
print("open:", len(engine.service._open), "pages:", engine.service.stats().pages_in_use, flush=True)
"""
ENDLESS = {"max_tokens": 1900, "ignore_eos": True, "prompt": "go"}


@contextmanager
def _server() -> Generator[tuple[subprocess.Popen[str], str], None, None]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def _stream(client: httpx.Client, body: dict[str, Any], begun: threading.Semaphore) -> list[str]:
    lines: list[str] = []
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line:
                lines.append(line.removeprefix("data: "))
            if len(lines) == 1 and line:
                begun.release()
    return lines


def test_a_signal_ends_streams_with_an_error_and_leaves_no_traceback() -> None:
    answers: dict[str, Any] = {}
    begun = threading.Semaphore(0)
    with _server() as (process, url), httpx.Client(base_url=url, timeout=30) as client:

        def ask(name: str, body: dict[str, Any]) -> None:
            stream = body.get("stream", True)
            answers[name] = (
                _stream(client, body, begun) if stream else client.post("/v1/completions", json=body)
            )

        bodies: dict[str, dict[str, Any]] = {
            "long": ENDLESS,
            "several": {**ENDLESS, "n": 3},
            "short": {**ENDLESS, "max_tokens": 12},
            "whole": {**ENDLESS, "stream": False},
        }
        threads = [threading.Thread(target=ask, args=item) for item in bodies.items()]
        address = (httpx.URL(url).host, httpx.URL(url).port)
        with socket.create_connection(address) as half, socket.create_connection(address) as idle:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            half.sendall(b"Content-Length: 100\r\n\r\n{")
            for thread in threads:
                thread.start()
            for _ in range(3):
                assert begun.acquire(timeout=20)
            process.send_signal(signal.SIGTERM)
            for thread in threads:
                thread.join(20)
            half.settimeout(20)
            idle.settimeout(20)
            assert half.recv(2**12).startswith(b"HTTP/1.1 503 ")
            assert idle.recv(1) == b""
        output, log = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in log
    assert output == "open: 0 pages: 0\n"
    for name in ("long", "several"):
        *chunks, error, done = answers[name]
        assert done == "[DONE]"
        assert json.loads(error)["error"]["code"] == "shutting_down"
        assert all("choices" in json.loads(chunk) for chunk in chunks)
    *_, last, done = answers["short"]
    assert (json.loads(last)["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
    assert answers["whole"].status_code == 503
    assert answers["whole"].json()["error"]["code"] == "shutting_down"
