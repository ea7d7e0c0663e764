"""How connections behave that no well-kept client library makes, on raw sockets."""

import json
import socket
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from albireo_jax.core.types import FinishReason
from albireo_jax.serving import http_protocol
from albireo_jax.serving.app import create_app
from tests.labs.engine_lab import Lab, lab
from tests.labs.http_lab import served

BODY = json.dumps({"prompt": "hi", "max_tokens": 5, "seed": 3}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
POST = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def shared_engine() -> Iterator[Lab]:
    with lab() as engine:
        yield engine


@pytest.fixture(scope="module")
def shared_url(shared_engine: Lab) -> Iterator[str]:
    with served(create_app(shared_engine, max_body_bytes=2**18)) as address:
        yield address


@contextmanager
def _connected(url: str) -> Generator[socket.socket, None, None]:
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        yield connection


def _read(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    received = bytearray()
    while data := connection.recv(2**16):
        received += data
    return bytes(received)


def _exchange(url: str, *sent: bytes, ends: bool = True) -> bytes:
    """The server's answers to what is sent; `ends` shuts down the sending side."""
    with _connected(url) as connection:
        for data in sent:
            connection.sendall(data)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        return _read(connection)


def _statuses(answers: bytes) -> list[int]:
    return [int(part.split(b" ", 1)[0]) for part in answers.split(b"HTTP/1.1 ")[1:]]


def _error(answer: bytes, status: int) -> str:
    assert _statuses(answer) == [status], answer[:300]
    head, body = answer.split(b"\r\n\r\n", 1)
    assert b"content-type: application/json" in head.lower()
    assert b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert len(body) <= 2048
    return error["message"]


def _text(answer: bytes) -> str:
    return json.loads(answer.split(b"\r\n\r\n", 1)[1])["choices"][0]["text"]


NO_HTTP = [
    b"\r\n\r\nhello\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS
    b"GET /health\r\n\r\n",
    b"GET  /health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /he alth HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /h\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nbad name: y\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
    HEAD + b"Content-Length: -1\r\n\r\n",
    HEAD + b"Content-Length: 5x\r\n\r\n",
    HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
    HEAD + b"Content-Length: " + b"9" * 100 + b"\r\n\r\n",
    HEAD + b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % len(BODY) + BODY,
    HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloworld\r\n",
]


@pytest.mark.parametrize("sent", NO_HTTP)
@pytest.mark.parametrize("ends", [False, True])
def test_no_http_is_told_so_in_json(sent: bytes, ends: bool, shared_url: str) -> None:
    assert _error(_exchange(shared_url, sent, ends=ends), 400)


@pytest.mark.parametrize("version", [b"2.0", b"9.9", b"0.9"])
def test_other_versions_are_not_spoken(version: bytes, shared_url: str) -> None:
    assert "version" in _error(_exchange(shared_url, b"PRI * HTTP/%b\r\nHost: x\r\n\r\n" % version), 505)


def test_a_coding_that_is_not_known_is_told(shared_url: str) -> None:
    answer = _exchange(shared_url, HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n", ends=False)
    assert "chunked" in _error(answer, 501)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 10**6 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 10**4 + b"\r\n",
        b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"x" * 10**6,
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 33_000 + b"\r\n\r\n",
    ],
)
def test_a_head_that_is_too_long_is_refused(head: bytes, shared_url: str) -> None:
    assert "32768 bytes" in _error(_exchange(shared_url, head, ends=False), 431)


def test_a_client_that_sends_nothing_more_gets_its_answers(shared_url: str) -> None:
    assert _text(_exchange(shared_url, POST)) == _text(_exchange(shared_url, POST[:-1], POST[-1:]))
    stream = json.dumps({"prompt": "hi", "max_tokens": 300, "ignore_eos": True, "stream": True}).encode()
    answer = _exchange(shared_url, HEAD + b"Content-Length: %d\r\n\r\n" % len(stream) + stream)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"data: [DONE]" in answer
    assert _statuses(_exchange(shared_url, HEALTH + POST + HEALTH)) == [200, 200, 200]
    long = json.dumps({"prompt": "hi", "max_tokens": 1500, "ignore_eos": True}).encode()
    answer = _exchange(shared_url, HEAD + b"Content-Length: %d\r\n\r\n" % len(long) + long)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["usage"]["completion_tokens"] == 1500
    assert _exchange(shared_url, b"") == b""


@pytest.mark.parametrize(
    "sent",
    [b"GE", b"GET /health HTTP/1.1\r\nHo", POST[:-5], HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"],
)
def test_a_request_that_ends_too_early_is_told(sent: bytes, shared_url: str) -> None:
    assert "ended before" in _error(_exchange(shared_url, sent), 400)


def test_requests_may_be_sent_ahead(shared_url: str) -> None:
    missing = b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n"
    answers = _exchange(shared_url, HEALTH * 50 + POST + missing + HEALTH)
    assert _statuses(answers) == [*[200] * 51, 404, 200]


def test_http_1_0(shared_url: str) -> None:
    old = b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    assert _text(_exchange(shared_url, old % len(BODY) + BODY, ends=False)) == _text(
        _exchange(shared_url, POST)
    )
    stream = json.dumps({"prompt": "hi", "max_tokens": 5, "stream": True}).encode()
    answer = _exchange(shared_url, old % len(stream) + stream, ends=False)
    assert answer.endswith(b"\n\ndata: [DONE]\n\n")
    assert b"chunked" not in answer.lower()


def test_a_client_that_waits_to_be_asked_for_its_body(shared_url: str) -> None:
    with _connected(shared_url) as connection:
        connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY))
        assert connection.recv(2**10).startswith(b"HTTP/1.1 100 ")
        connection.sendall(BODY)
        connection.shutdown(socket.SHUT_WR)
        assert _statuses(_read(connection)) == [200]
    with _connected(shared_url) as connection:  # it is not asked for a body that is too long
        connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % 2**30)
        assert connection.recv(2**10).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_is_too_long_is_answered_before_it_is_sent(shared_url: str) -> None:
    with _connected(shared_url) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n{" % 2**30)
        assert connection.recv(2**10).startswith(b"HTTP/1.1 413 ")
    chunk = b"%x\r\n" % 2**16 + b" " * 2**16 + b"\r\n"
    with _connected(shared_url) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 5)
        assert connection.recv(2**10).startswith(b"HTTP/1.1 413 ")


def test_an_upgrade_is_not_taken(shared_url: str) -> None:
    for protocol_name in (b"h2c", b"websocket"):
        asked = (
            b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: %b\r\n\r\n" % protocol_name
        )
        assert _statuses(_exchange(shared_url, asked)) == [200]


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", None),
        (b"GET /health HT", 408),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n", 408),
        (POST[:-1], 408),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", 408),
        (HEALTH, 200),
        (HEALTH + b"GET /", 200),
        (HEAD + b"Content-Length: %d\r\n\r\n{" % 2**30, 413),
    ],
)
def test_who_sends_no_whole_request_is_not_waited_for(
    sent: bytes, status: int | None, shared_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "_IDLE_S", 0.1)
    monkeypatch.setattr(http_protocol, "KEEP_ALIVE_S", 0.1)
    began_s = time.monotonic()
    answer = _exchange(shared_url, sent, ends=False)
    assert time.monotonic() - began_s < 4
    assert _statuses(answer)[:1] == ([] if status is None else [status])
    if status == 408:
        assert "not complete in time" in _error(answer, 408)


@pytest.mark.parametrize("begin", [b"", HEAD + b"Content-Length: 1000\r\n\r\n"])
def test_who_sends_a_byte_now_and_then_is_not_waited_for_either(
    begin: bytes, shared_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "_REQUEST_S", 0.3)
    with _connected(shared_url) as connection:
        connection.sendall(begin)
        connection.settimeout(0.02)
        answer = b""
        for _ in range(200):
            connection.sendall(b"G")
            try:
                answer = connection.recv(2**10)
            except TimeoutError:
                continue
            break
        assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_client_that_goes_after_it_stopped_sending_frees_its_pages() -> None:
    body = json.dumps({"prompt": "hi", "max_tokens": 2000, "ignore_eos": True, "n": 8}).encode()
    with lab() as engine:
        with served(create_app(engine)) as url:
            for _ in range(3):
                with _connected(url) as connection:
                    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                    give_up_s = time.monotonic() + 10
                    while not engine.service.stats().pages_in_use and time.monotonic() < give_up_s:
                        time.sleep(0.001)
                    connection.shutdown(socket.SHUT_WR)
            assert _statuses(_exchange(url, HEALTH)) == [200]
        assert engine.service.drain(60)
        assert engine.service.stats().pages_in_use == 0
        assert engine.frontend.metrics.snapshot().finished[FinishReason.LENGTH] == 0
