"""Browsers of other origins, probes and careless paths get through; every answer tells its request's id."""

import asyncio
import logging
from typing import Any

import httpx
import pytest

from albireo_jax.serving.app import create_app
from albireo_jax.serving.cors import origins_of
from tests.labs.engine_lab import Lab
from tests.labs.http_lab import in_process

ORIGIN = "http://localhost:3000"
COMPLETION = {"prompt": "x", "max_tokens": 2}
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}
KEY = {"Authorization": "Bearer secret"}
ALLOWED = "access-control-allow-origin"


def _ask(engine: Lab, *asked: tuple[str, str, dict[str, Any]], **options: Any) -> list[httpx.Response]:
    async def main() -> list[httpx.Response]:
        async with in_process(create_app(engine, **options)) as client:
            return [await client.request(method, path, **given) for method, path, given in asked]

    return asyncio.run(main())


@pytest.mark.parametrize("origins", [("*",), (ORIGIN, "https://chat.example")])
def test_a_page_of_an_allowed_origin_may_call_with_the_key(engine: Lab, origins: tuple[str, ...]) -> None:
    from_page = {"Origin": ORIGIN}
    asked = [
        ("OPTIONS", "/v1/chat/completions", {"headers": PREFLIGHT}),
        ("GET", "/v1/models", {"headers": {**from_page, **KEY}}),
        ("GET", "/v1/models", {"headers": from_page}),
        ("POST", "/v1/completions", {"headers": {**from_page, **KEY}, "json": {"prompt": 5}}),
        (
            "POST",
            "/v1/completions",
            {"headers": {**from_page, **KEY}, "json": {**COMPLETION, "stream": True}},
        ),
        ("GET", "/nowhere", {"headers": {**from_page, **KEY}}),
    ]
    answers = _ask(engine, *asked, api_key="secret", allow_origins=origins)
    assert [answer.status_code for answer in answers] == [200, 200, 401, 400, 200, 404]
    assert {answer.headers[ALLOWED] for answer in answers} == {"*" if origins == ("*",) else ORIGIN}
    allowed = answers[0].headers["access-control-allow-headers"].split(",")
    assert {"authorization", "content-type"} <= {*allowed}


@pytest.mark.parametrize("origins", [(), ("https://chat.example",), ("http://localhost:3001",)])
def test_a_page_of_another_origin_is_not_named(engine: Lab, origins: tuple[str, ...]) -> None:
    asked = [
        ("OPTIONS", "/v1/chat/completions", {"headers": PREFLIGHT}),
        ("GET", "/v1/models", {"headers": {"Origin": ORIGIN}}),
    ]
    for answer in _ask(engine, *asked, allow_origins=origins):
        assert ALLOWED not in answer.headers


@pytest.mark.parametrize("origin", ["", "localhost:3000", "http://localhost:3000/", "https://a.example/chat"])
def test_an_origin_that_no_browser_sends_is_refused(engine: Lab, origin: str) -> None:
    with pytest.raises(ValueError, match="allow_origin must be"):
        create_app(engine, allow_origins=[origin])
    with pytest.raises(ValueError, match="allow_origin must be"):
        origins_of([ORIGIN, origin])


def test_the_command_line_names_origins_or_none() -> None:
    assert list(origins_of(None)) == ["*"]
    assert list(origins_of(["none"])) == []
    assert list(origins_of([ORIGIN, "null"])) == [ORIGIN, "null"]


def test_head_is_get_without_the_body(engine: Lab) -> None:
    app = create_app(engine)
    paths = [path for path, item in app.openapi()["paths"].items() if "get" in item and "{" not in path]
    assert {"/health", "/ping", "/load", "/version", "/v1/models", "/metrics"} <= {*paths}
    for path in (*paths, "/v1/models/tiny", "/docs", "/openapi.json", "/nowhere", "/v1/completions"):
        got, head = _ask(engine, ("GET", path, {}), ("HEAD", path, {}))
        assert (head.status_code, head.content) == (got.status_code, b""), path
        assert head.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize("key", [None, "secret"])
def test_a_slash_at_the_end_changes_nothing(engine: Lab, key: str | None) -> None:
    headers = KEY if key else {}
    for path in ("/v1/models", "/v1/models/tiny", "/health", "/version"):
        plain, slash, slashes = _ask(
            engine, *(("GET", path + end, {"headers": headers}) for end in ("", "/", "//")), api_key=key
        )
        assert (slash.status_code, slash.text) == (plain.status_code, plain.text) == (200, slashes.text)
    (posted,) = _ask(
        engine, ("POST", "/v1/completions/", {"headers": headers, "json": COMPLETION}), api_key=key
    )
    assert posted.status_code == httpx.codes.OK
    (root,) = _ask(engine, ("GET", "/", {"headers": headers}), api_key=key)
    assert root.status_code == httpx.codes.NOT_FOUND


def test_probes_need_no_key(engine: Lab) -> None:
    asked = [("GET", "/ping"), ("POST", "/ping"), ("HEAD", "/health"), ("GET", "/health/"), ("GET", "/load")]
    answers = _ask(engine, *((method, path, {}) for method, path in asked), api_key="secret")
    assert {answer.status_code for answer in answers} == {200}
    assert answers[-1].json() == {"server_load": 0}
    (told,) = _ask(engine, ("GET", "/version", {}))
    assert told.json()["version"]


def test_every_answer_tells_the_id_of_its_request(engine: Lab) -> None:
    named = {"X-Request-Id": "my-id.1"}
    asked = [
        ("POST", "/v1/completions", {"json": COMPLETION, "headers": named}),
        ("POST", "/v1/completions", {"json": {"prompt": 5}, "headers": named}),
        ("GET", "/v1/models", {"headers": named}),
        ("POST", "/v1/completions", {"json": {**COMPLETION, "request_id": "other"}, "headers": named}),
    ]
    answers = _ask(engine, *asked, api_key=None)
    assert {answer.headers["x-request-id"] for answer in answers} == {"my-id.1"}
    assert answers[0].json()["id"] == answers[3].json()["id"] == "cmpl-my-id.1"
    (refused,) = _ask(engine, ("GET", "/v1/models", {"headers": named}), api_key="secret")
    assert refused.headers["x-request-id"] == "my-id.1"


def test_an_id_in_the_body_or_made_here_names_the_answer(engine: Lab) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    asked = [
        ("POST", "/v1/chat/completions", {"json": {**chat, "request_id": "mine"}}),
        ("POST", "/v1/chat/completions", {"json": chat}),
        ("POST", "/v1/chat/completions", {"json": chat, "headers": {"X-Request-Id": "x" * 129}}),
        ("POST", "/v1/chat/completions", {"json": chat, "headers": {"X-Request-Id": "a b"}}),
    ]
    answers = _ask(engine, *asked)
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert [answer.json()["id"] for answer in answers] == [f"chatcmpl-{id}" for id in ids]
    assert ids[0] == "mine"
    assert len({*ids}) == len(ids)
    assert all(len(id) == 32 for id in ids[1:])


def test_an_unforeseen_error_tells_its_id_to_the_client_and_to_the_log(
    engine: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(engine)
    app.state.engine = None  # nothing works any more

    async def main() -> httpx.Response:
        async with in_process(app) as client:
            headers = {"X-Request-Id": "find-me", "Origin": ORIGIN}
            return await client.get("/v1/models", headers=headers)

    with caplog.at_level(logging.ERROR):
        answer = asyncio.run(main())
    assert answer.status_code == httpx.codes.INTERNAL_SERVER_ERROR
    assert answer.json()["error"]["message"] == "internal server error"
    assert answer.headers["x-request-id"] == "find-me"
    assert ALLOWED in answer.headers
    assert "request find-me" in caplog.text
