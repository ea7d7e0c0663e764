"""A body may be compressed and in any Unicode encoding, within the limit of what comes out."""

import asyncio
import gzip
import json
import time
import zlib
from typing import Any

import httpx
import pytest

from albireo_jax.serving.app import create_app
from tests.labs.engine_lab import Lab
from tests.labs.http_lab import in_process

TEXT = json.dumps({"prompt": "é" * 40, "max_tokens": 3, "seed": 1}, ensure_ascii=False)
PLAIN = TEXT.encode()
JSON_TYPE = "application/json"


def _raw_deflate(data: bytes) -> bytes:
    return zlib.compress(data)[2:-4]


def _post(engine: Lab, content: bytes, headers: dict[str, str], **options: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        async with in_process(create_app(engine, **options)) as client:
            given = {"content-type": JSON_TYPE, **headers}
            return await client.post("/v1/completions", content=content, headers=given)

    return asyncio.run(main())


def _error(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (PLAIN, "identity"),
        (PLAIN, ""),
        (gzip.compress(PLAIN, mtime=0), "gzip"),
        (gzip.compress(PLAIN, mtime=0), "x-gzip"),
        (gzip.compress(PLAIN, mtime=0), "GZIP"),
        (gzip.compress(PLAIN[:20], mtime=0) + gzip.compress(PLAIN[20:], mtime=0), "gzip"),
        (zlib.compress(PLAIN), "deflate"),
        (_raw_deflate(PLAIN), "deflate"),
        (gzip.compress(zlib.compress(PLAIN), mtime=0), "deflate, gzip"),
        (gzip.compress(TEXT.encode("utf-16"), mtime=0), "gzip"),
    ],
)
def test_a_compressed_body_is_read(engine: Lab, content: bytes, encoding: str) -> None:
    answer = _post(engine, content, {"content-encoding": encoding})
    assert answer.status_code == httpx.codes.OK, answer.text
    assert answer.json()["choices"] == _post(engine, PLAIN, {}).json()["choices"]


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (TEXT.encode("utf-8-sig"), JSON_TYPE),
        (TEXT.encode("utf-16"), JSON_TYPE),
        (TEXT.encode("utf-16-le"), JSON_TYPE),
        (TEXT.encode("utf-16-be"), f"{JSON_TYPE}; charset=utf-16be"),
        (TEXT.encode("utf-32"), f"{JSON_TYPE}; charset=UTF-32"),
        (PLAIN, f'{JSON_TYPE};charset="utf-8"'),
        (TEXT.encode("latin-1"), f"{JSON_TYPE}; charset=ISO-8859-1"),
        (PLAIN, "application/vnd.openai+json"),
        (PLAIN, "application/problem+json; charset=utf-8"),
        (PLAIN, "Application/JSON"),
    ],
)
def test_a_body_in_another_encoding_is_read(engine: Lab, content: bytes, content_type: str) -> None:
    answer = _post(engine, content, {"content-type": content_type})
    assert answer.status_code == httpx.codes.OK, answer.text
    assert answer.json()["choices"] == _post(engine, PLAIN, {}).json()["choices"]


@pytest.mark.parametrize(
    ("content", "headers", "status", "message"),
    [
        (
            gzip.compress(PLAIN, mtime=0)[:-12],
            {"content-encoding": "gzip"},
            400,
            "in the middle of its gzip data",
        ),
        (b"", {"content-encoding": "gzip"}, 400, "in the middle of its gzip data"),
        (PLAIN, {"content-encoding": "gzip"}, 400, "not valid gzip data"),
        (gzip.compress(PLAIN, mtime=0) + b"more", {"content-encoding": "gzip"}, 400, "not valid gzip data"),
        (gzip.compress(b"", mtime=0) * 65, {"content-encoding": "gzip"}, 400, "more than 64 gzip members"),
        (PLAIN, {"content-encoding": "br"}, 415, "must be one of gzip"),
        (PLAIN, {"content-encoding": "gzip, gzip, gzip"}, 415, "the limit is 2"),
        (PLAIN, {"content-type": f"{JSON_TYPE}; charset=koi8-r"}, 415, "the charset must be one of"),
        (PLAIN, {"content-type": f"{JSON_TYPE}; charset=us-ascii"}, 400, "not valid us-ascii"),
        (TEXT.encode("utf-16")[:-1], {}, 400, "not valid utf-16"),
        (PLAIN, {"content-type": "text/plain"}, 415, "must be application/json, got text/plain"),
        (PLAIN, {"content-type": "application/+json"}, 415, "must be application/json"),
        (PLAIN, {"content-type": "application/json-seq"}, 415, "must be application/json"),
    ],
)
def test_a_body_that_is_not_as_its_headers_say_is_refused(
    engine: Lab, content: bytes, headers: dict[str, str], status: int, message: str
) -> None:
    assert message in _error(_post(engine, content, headers), status)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_small_body_that_becomes_large_is_refused_before_it_does(engine: Lab, layers: int) -> None:
    bomb = b'{"prompt": "' + b"x" * (200 * 2**20) + b'"}'
    for _ in range(layers):
        bomb = gzip.compress(bomb, 1, mtime=0)
    began = time.perf_counter()
    answer = _post(engine, bomb, {"content-encoding": ", ".join(["gzip"] * layers)})
    assert "exceeds the limit of 16777216 bytes" in _error(answer, 413)
    assert answer.json()["error"]["code"] == "body_too_large"
    assert time.perf_counter() - began < 5


def test_the_limit_is_of_what_comes_out(engine: Lab) -> None:
    content = gzip.compress(PLAIN, mtime=0)
    fits = _post(engine, content, {"content-encoding": "gzip"}, max_body_bytes=len(PLAIN))
    assert fits.status_code == httpx.codes.OK
    _error(_post(engine, content, {"content-encoding": "gzip"}, max_body_bytes=len(PLAIN) - 1), 413)
