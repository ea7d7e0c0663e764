"""Wrong requests are refused with OpenAI's error body, and the engine goes on as before."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from albireo_jax.serving.app import create_app
from tests.labs.bad_bodies import BAD_BODIES, BAD_FIELDS, CHAT, COMPLETIONS, with_hello, with_prompt
from tests.labs.engine_lab import Lab, lab
from tests.labs.http_lab import in_process, served

CANARY = {"prompt": "canary", "max_tokens": 30, "seed": 7, "n": 2}


def _run(engine: Lab, work: Any, **app_options: Any) -> Any:
    """Call `work` with a client of an app of `engine`; returns its result."""

    async def main() -> Any:
        async with in_process(create_app(engine, **app_options)) as client:
            return await work(client)

    return asyncio.run(main())


def _error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    error = answer.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["message"]
    return error


async def _canary(client: httpx.AsyncClient) -> list[str]:
    answer = await client.post(COMPLETIONS, json=CANARY)
    assert answer.status_code == httpx.codes.OK
    return [choice["text"] for choice in answer.json()["choices"]]


def test_wrong_fields_are_named_and_the_canary_sings_on(engine: Lab) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        song = await _canary(client)
        for path, body, param, message in BAD_FIELDS:
            for stream in (False, True):
                sent = body if {"stream", "stream_options"} & {*body} else {**body, "stream": stream}
                error = _error(await client.post(path, json=sent), 400)
                assert message in error["message"], (body, error)
                assert error["param"] == param, (body, error)
                too_long = "maximum context length is 2048 tokens" in error["message"]
                code = "context_length_exceeded" if too_long else None
                assert (error["type"], error["code"]) == ("invalid_request_error", code)
            assert await _canary(client) == song, body

    _run(engine, work)
    assert engine.service.drain(60)
    assert engine.service.stats().pages_in_use == 0


def test_bodies_that_are_no_json_objects(engine: Lab) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        song = await _canary(client)
        for body, message in BAD_BODIES:
            answer = await client.post(
                COMPLETIONS, content=body, headers={"content-type": "application/json"}
            )
            assert message in _error(answer, 400)["message"]
        assert await _canary(client) == song

    _run(engine, work)


def test_values_that_ask_for_nothing_are_accepted(engine: Lab) -> None:
    neutral = {
        "logit_bias": {},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "response_format": {"type": "text"},
        "guided_json": None,
        "logprobs": None,
        "best_of": 1,
        "stop": None,
        "stream": None,
    }

    async def work(client: httpx.AsyncClient) -> None:
        answer = await client.post(COMPLETIONS, json=with_prompt(**neutral))
        assert answer.status_code == httpx.codes.OK, answer.text
        chat = {**neutral, "tools": [], "tool_choice": "auto", "modalities": ["text"], "logprobs": False}
        answer = await client.post(CHAT, json=with_hello(**{**chat, "max_tokens": 5}))
        assert answer.status_code == httpx.codes.OK, answer.text

    _run(engine, work)


def test_other_statuses_have_openai_bodies_too(engine: Lab) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for path in (COMPLETIONS, CHAT, "/tokenize"):
            body = {"model": "gpt-4", "prompt": "x"} if path != CHAT else with_hello(model="gpt-4")
            error = _error(await client.post(path, json=body), 404)
            assert error["message"] == "the model 'gpt-4' does not exist; this server serves 'tiny'"
            assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "GET /nowhere" in _error(await client.get("/nowhere"), 404)["message"]
        wrong_method = await client.get(COMPLETIONS)
        _error(wrong_method, 405)
        assert wrong_method.headers["allow"] == "POST"
        assert (await client.delete("/ping")).headers["allow"] == "GET, POST"  # routes of their own
        for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/jsonp"}):
            answer = await client.post(COMPLETIONS, content=b'{"prompt": "x"}', headers=headers)
            assert "application/json" in _error(answer, 415)["message"]
        charset = {"content-type": "Application/JSON; charset=utf-8"}
        answer = await client.post(COMPLETIONS, content=b'{"prompt": "x"}', headers=charset)
        assert answer.status_code == httpx.codes.OK

    _run(engine, work)


def test_a_body_beyond_the_limit_is_refused_whether_its_length_is_told_or_not(engine: Lab) -> None:
    body = json.dumps({"prompt": "x" * 1000}).encode()

    async def chunks() -> Any:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    async def work(client: httpx.AsyncClient) -> None:
        headers = {"content-type": "application/json"}
        for content in (body, chunks()):
            error = _error(await client.post(COMPLETIONS, content=content, headers=headers), 413)
            assert "500 bytes" in error["message"]
        answer = await client.post(COMPLETIONS, json={"prompt": "x"})
        assert answer.status_code == httpx.codes.OK

    _run(engine, work, max_body_bytes=500)


def test_the_api_key_guards_all_but_health_and_metrics(engine: Lab) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        wrong = [
            "",
            "Bearer",
            "Bearer ",
            "Bearer wrong",
            "Basic secret",
            "secret",
            "Bearer secre",
            "Bearer sécret",
        ]
        for authorization in wrong:
            headers = {"authorization": authorization.encode()}
            for path in ("/v1/models", "/docs", "/openapi.json", "/nowhere"):
                answer = await client.get(path, headers=headers)
                assert _error(answer, 401)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
            _error(await client.post(COMPLETIONS, json=with_prompt(), headers=headers), 401)
        right = {"authorization": "bearer secret"}
        assert (await client.get("/v1/models", headers=right)).status_code == httpx.codes.OK
        assert (
            await client.post(COMPLETIONS, json=with_prompt(), headers=right)
        ).status_code == httpx.codes.OK
        for path in ("/health", "/metrics"):
            assert (await client.get(path)).status_code == httpx.codes.OK

    _run(engine, work, api_key="secret")


def test_a_dead_engine_answers_503_and_ends_streams_with_an_error() -> None:
    forever = with_prompt(max_tokens=1500, ignore_eos=True)

    async def work(client: httpx.AsyncClient) -> None:
        assert (await client.get("/health")).status_code == httpx.codes.OK
        whole, stream = await asyncio.gather(
            client.post(COMPLETIONS, json=forever), client.post(COMPLETIONS, json={**forever, "stream": True})
        )
        assert _error(whole, 503)["message"] == "the engine stopped on an internal error"
        assert stream.status_code == httpx.codes.OK
        *_, error, done, end = stream.text.split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert (done, end) == ("data: [DONE]", "")
        for path in ("/health",):
            assert _error(await client.get(path), 503)["code"] == "engine_dead"
        _error(await client.post(CHAT, json=with_hello(stream=True)), 503)
        assert (await client.get("/metrics")).status_code == httpx.codes.OK

    with lab(fail_at=50) as engine:
        _run(engine, work)


@pytest.mark.parametrize("path", ["/v1/completions", "/health"])
def test_a_bug_is_a_500_without_its_traceback(path: str) -> None:
    with lab() as engine:
        app = create_app(engine)
        app.state.engine = None  # nothing works any more

        async def main() -> httpx.Response:
            async with in_process(app) as client:
                return await (
                    client.get(path) if path == "/health" else client.post(path, json=with_prompt())
                )

        error = _error(asyncio.run(main()), 500)
    assert error["message"] == "internal server error"


def test_a_real_server_refuses_a_long_body_and_goes_on(engine: Lab) -> None:
    with served(create_app(engine, max_body_bytes=1000)) as url, httpx.Client(base_url=url) as client:
        _error(client.post(COMPLETIONS, json=with_prompt(prompt="x" * 10**6)), 413)
        assert client.get("/health").json() == {"status": "ok"}
