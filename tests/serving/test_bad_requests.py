"""What is wrong is refused with OpenAI's error body, and the engine goes on as if nothing had been."""

import asyncio
import functools
import json
from typing import Any

import httpx
import pytest
from engine_lab import Lab, lab
from http_lab import in_process, served

from albireo_jax.serving.app import create_app

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
CANARY = {"prompt": "canary", "max_tokens": 30, "seed": 7, "n": 2}
DEEP = "[" * 100_000
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
NESTED = functools.reduce(lambda inner, _: {"not": inner}, range(65), {})


def _with(**fields: Any) -> dict[str, Any]:
    return {"prompt": "x", **fields}


def _chat(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, **fields}


BAD_FIELDS: list[tuple[str, dict[str, Any], str | None, str]] = [
    # path, body, param, part of the message
    (COMPLETIONS, {}, "prompt", "required"),
    (COMPLETIONS, {"prompt": None}, "prompt", "must be a string, token ids"),
    (COMPLETIONS, {"prompt": 5}, "prompt", "must be a string, token ids"),
    (COMPLETIONS, {"prompt": {}}, "prompt", "must be a string, token ids"),
    (COMPLETIONS, {"prompt": ["a", 1]}, "prompt", "must be a string, token ids"),
    (COMPLETIONS, {"prompt": [1, True]}, "prompt", "must be a string, token ids"),
    (COMPLETIONS, {"prompt": [1.0]}, "prompt", "must be a string, token ids"),
    (COMPLETIONS, {"prompt": [[1], ["a"]]}, "prompt", "must be a string, token ids"),
    (COMPLETIONS, {"prompt": []}, "prompt", "empty"),
    (COMPLETIONS, {"prompt": ""}, None, "the prompt is empty"),
    (COMPLETIONS, {"prompt": [[]]}, None, "the prompt is empty"),
    (COMPLETIONS, {"prompt": ["fine", ""]}, None, "the prompt is empty"),
    (COMPLETIONS, {"prompt": [101]}, None, "token id 101 is outside the vocabulary of 101"),
    (COMPLETIONS, {"prompt": [-1]}, None, "token id -1 is outside the vocabulary of 101"),
    (COMPLETIONS, {"prompt": [10**30]}, None, "outside the vocabulary"),
    (COMPLETIONS, {"prompt": "x" * 2048}, None, "the prompt has 2048 tokens, the limit is 2047"),
    (COMPLETIONS, {"prompt": ["x"] * 600, "n": 2}, "prompt", "600 prompts with n 2 exceed 1024 choices"),
    (COMPLETIONS, _with(max_tokens=2048), None, "exceed the model's limit of 2048 tokens"),
    (COMPLETIONS, _with(max_tokens="5"), "max_tokens", "valid integer"),
    (COMPLETIONS, _with(max_tokens=5.0), "max_tokens", "valid integer"),
    (COMPLETIONS, _with(max_tokens=True), "max_tokens", "valid integer"),
    (COMPLETIONS, _with(max_tokens=0), "max_tokens", "at least 1, got 0"),
    (CHAT, _chat(logprobs=True, top_logprobs=21), "top_logprobs", "less than or equal to 20"),
    (COMPLETIONS, _with(min_tokens=-1), "min_tokens", "at least 0, got -1"),
    (COMPLETIONS, _with(min_tokens=20, max_tokens=10), "min_tokens", "exceeds max_tokens 10"),
    (COMPLETIONS, _with(temperature="hot"), "temperature", "valid number"),
    (COMPLETIONS, _with(temperature=-0.1), "temperature", "must be in [0, 100], got -0.1"),
    (COMPLETIONS, _with(temperature=101), "temperature", "must be in [0, 100], got 101"),
    (COMPLETIONS, _with(top_p=0), "top_p", "must be in (0, 1], got 0"),
    (COMPLETIONS, _with(top_p=1.1), "top_p", "must be in (0, 1], got 1.1"),
    (COMPLETIONS, _with(top_k=-2), "top_k", "at least 0, got -2"),
    (COMPLETIONS, _with(top_k=1.5), "top_k", "valid integer"),
    (COMPLETIONS, _with(min_p=1.5), "min_p", "must be in [0, 1], got 1.5"),
    (COMPLETIONS, _with(seed=-1), "seed", "must be between 0 and"),
    (COMPLETIONS, _with(seed=2**63), "seed", "must be between 0 and"),
    (COMPLETIONS, _with(seed=1.5), "seed", "valid integer"),
    (COMPLETIONS, _with(n=0), "n", "must be between 1 and 128, got 0"),
    (COMPLETIONS, _with(n=129), "n", "must be between 1 and 128, got 129"),
    (COMPLETIONS, _with(n="2"), "n", "valid integer"),
    (COMPLETIONS, _with(n=2, best_of=3), "best_of", "unless it equals n 2"),
    (COMPLETIONS, _with(stop=5), "stop", "must be a string or a list of strings"),
    (COMPLETIONS, _with(stop=["a", 5]), "stop", "must be a string or a list of strings"),
    (COMPLETIONS, _with(stop=""), "stop", "non-empty"),
    (COMPLETIONS, _with(stop=["a"] * 33), "stop", "has 33 strings, the limit is 32"),
    (COMPLETIONS, _with(stop_token_ids="5"), "stop_token_ids", "valid list"),
    (COMPLETIONS, _with(stop_token_ids=[-1]), "stop_token_ids", "at least 0, got -1"),
    (COMPLETIONS, _with(stop_token_ids=[101]), None, "token id 101 is outside the vocabulary"),
    (COMPLETIONS, _with(stop_token_ids=list(range(33))), "stop_token_ids", "has 33 ids, the limit is 32"),
    (COMPLETIONS, _with(stream="yes"), "stream", "valid boolean"),
    (COMPLETIONS, _with(stream=1), "stream", "valid boolean"),
    (COMPLETIONS, _with(stream_options={"include_usage": True}), "stream_options", "when stream is true"),
    (
        COMPLETIONS,
        _with(stream=True, stream_options={"include_usage": 1}),
        "stream_options.include_usage",
        "bool",
    ),
    (COMPLETIONS, _with(ignore_eos="no"), "ignore_eos", "valid boolean"),
    (COMPLETIONS, _with(echo="no"), "echo", "valid boolean"),
    (COMPLETIONS, _with(model=5), "model", "valid string"),
    (COMPLETIONS, _with(logprobs=21), "logprobs", "between 0 and 20, got 21"),
    (COMPLETIONS, _with(suffix="end"), "suffix", "not supported"),
    (COMPLETIONS, _with(logit_bias={"five": 1}), "logit_bias", "got the key 'five'"),
    (COMPLETIONS, _with(logit_bias={"5": 101}), "logit_bias", "must be in [-100, 100], got 101"),
    (COMPLETIONS, _with(logit_bias={"9999999": 1}), None, "token id 9999999 is outside the vocabulary"),
    (COMPLETIONS, _with(logit_bias={str(i): 1 for i in range(1025)}), "logit_bias", "the limit is 1024"),
    (COMPLETIONS, _with(presence_penalty=2.5), "presence_penalty", "must be in [-2, 2], got 2.5"),
    (COMPLETIONS, _with(frequency_penalty=-3), "frequency_penalty", "must be in [-2, 2], got -3"),
    (COMPLETIONS, _with(frequency_penalty=False), "frequency_penalty", "valid number"),
    (COMPLETIONS, _with(repetition_penalty=0), "repetition_penalty", "must be in (0, 100], got 0"),
    (COMPLETIONS, _with(allowed_token_ids=[]), "allowed_token_ids", "at least 1 token"),
    (COMPLETIONS, _with(bad_words=["  "]), "bad_words", "nothing but spaces"),
    (
        COMPLETIONS,
        _with(bad_words=["no"] * 70 + [f"w{i}" for i in range(70)]),
        "bad_words",
        "the limit is 64",
    ),
    (COMPLETIONS, _with(response_format="json"), "response_format", "object"),
    (COMPLETIONS, _with(response_format={"type": "xml"}), "response_format.type", "'json_schema'"),
    (COMPLETIONS, _with(guided_json=[1]), "guided_json", "must be a JSON schema"),
    (COMPLETIONS, _with(guided_json="{"), "guided_json", "not valid JSON"),
    (COMPLETIONS, _with(guided_json="3"), "guided_json", "must be a JSON schema"),
    (COMPLETIONS, _with(guided_json={"enum": ["x" * 2**16]}), "guided_json", "the limit is 65536"),
    (COMPLETIONS, _with(guided_json=NESTED), "guided_json", "the limit is 64"),
    (COMPLETIONS, _with(guided_regex="é" * 2**15 + "e"), "guided_regex", "65537 bytes, the limit is 65536"),
    (COMPLETIONS, _with(guided_regex=5), "guided_regex", "valid string"),
    (COMPLETIONS, _with(guided_grammar="x" * 2**17), "guided_grammar", "the limit is 65536"),
    (COMPLETIONS, _with(guided_choice=["a"] * 1025), "guided_choice", "1025 choices, the limit is 1024"),
    (COMPLETIONS, _with(guided_choice=["a", ""]), "guided_choice", "non-empty"),
    (COMPLETIONS, _with(guided_choice=["a" * 2**16, "b"]), "guided_choice", "the limit is 65536"),
    (COMPLETIONS, _with(guided_choice="a"), "guided_choice", "valid list"),
    (
        COMPLETIONS,
        _with(guided_choice=["a"], guided_regex="b"),
        "guided_regex",
        "combined with guided_choice",
    ),
    (
        COMPLETIONS,
        _with(structured_outputs={"json": {}, "regex": "a"}),
        "structured_outputs.json",
        "combined with structured_outputs.regex",
    ),
    (COMPLETIONS, _with(structured_outputs={"json": NESTED}), "structured_outputs.json", "the limit is 64"),
    (
        COMPLETIONS,
        _with(structured_outputs={"structural_tag": "x"}),
        "structured_outputs",
        "structural_tag is not supported",
    ),
    (COMPLETIONS, _with(structured_outputs=["json"]), "structured_outputs", "object"),
    (COMPLETIONS, _with(prompt_logprobs=1, stream=True), "prompt_logprobs", "not available when stream"),
    (CHAT, {}, "messages", "required"),
    (CHAT, {"messages": []}, "messages", "at least 1"),
    (CHAT, {"messages": "hi"}, "messages", "valid list"),
    (CHAT, {"messages": ["hi"]}, "messages.0", "object"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0", "content is required"),
    (CHAT, {"messages": [{"role": "assistant", "content": None}]}, "messages.0", "content is required"),
    (CHAT, {"messages": [{"role": "tool", "content": "5"}]}, "messages.0", "tool_call_id is required"),
    (CHAT, {"messages": [{**HELLO[0], "tool_calls": [CALL]}]}, "messages.0", "for the role assistant"),
    (CHAT, {"messages": [{"content": "hi"}]}, "messages.0.role", "required"),
    (CHAT, {"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role", "'user'"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "text parts"),
    (
        CHAT,
        {"messages": [*HELLO, {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.1.content",
        "text parts",
    ),
    (CHAT, {"messages": [{**HELLO[0], "tool_calls": [{}]}]}, "messages.0.tool_calls.0.id", "required"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 3000}]}, None, "the limit is 2047"),
    (CHAT, _chat(max_completion_tokens=0), "max_tokens", "at least 1"),
    (CHAT, _chat(max_completion_tokens="5"), "max_completion_tokens", "valid integer"),
    (CHAT, _chat(logprobs=3), "logprobs", "valid boolean"),
    (CHAT, _chat(top_logprobs=3), "top_logprobs", "only allowed when logprobs is true"),
    (CHAT, _chat(tools=[{"type": "function"}]), "tools.0.function", "required"),
    (CHAT, _chat(tools=[{"type": "web_search"}]), "tools.0.type", "'function'"),
    (CHAT, _chat(tools=[TOOL]), "tools", "how this model writes tool calls is not known"),
    (CHAT, _chat(tools=[TOOL] * 129), "tools", "at most 128"),
    (CHAT, _chat(tool_choice="required"), "tool_choice", "needs tools"),
    (CHAT, _chat(tool_choice="any"), "tool_choice", '"auto", "required"'),
    (CHAT, _chat(tool_choice={"type": "function"}), "tool_choice", '"auto", "required"'),
    (CHAT, _chat(functions=[{"name": "f"}]), "functions", "not supported"),
    (
        CHAT,
        _chat(response_format={"type": "json_schema"}),
        "response_format.json_schema.schema",
        "required for the type json_schema",
    ),
    (CHAT, _chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs", "cannot set messages"),
    (CHAT, _chat(chat_template_kwargs={"self": 1}), "chat_template_kwargs", "cannot set self"),
    (CHAT, _chat(modalities=["text", "audio"]), "modalities", "not supported"),
    (CHAT, _chat(chat_template="{{ 1 }}"), "chat_template", "not supported"),
    ("/tokenize", {}, None, "exactly one of prompt and messages"),
    ("/tokenize", {"prompt": "a", "messages": HELLO}, None, "exactly one of prompt and messages"),
    ("/tokenize", {"prompt": ["a"]}, "prompt", "valid string"),
    ("/detokenize", {"tokens": "a"}, "tokens", "valid list"),
    ("/detokenize", {"tokens": [5, 101]}, "tokens", "id 101 is outside the vocabulary of 101"),
    ("/detokenize", {"tokens": [-1]}, "tokens", "id -1 is outside the vocabulary of 101"),
]

BAD_BODIES: list[tuple[bytes, str]] = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"prompt=x", "not valid JSON"),
    (b'{"prompt": "x", "temperature": NaN}', "not valid JSON"),
    (b'{"prompt": "x", "temperature": Infinity}', "not valid JSON"),
    (b'{"prompt": "x", "ignored": NaN}', "not valid JSON"),
    (b'{"prompt": "x", "temperature": 1e999}', "temperature: Input should be a finite number"),
    (b'{"prompt": "\\ud800"}', "not valid JSON"),
    (b'{"prompt": "\xff"}', "not valid JSON"),
    (DEEP.encode(), "not valid JSON"),
    (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b"[]", "must be a JSON object"),
    (b'"prompt"', "must be a JSON object"),
    (b"null", "must be a JSON object"),
]


def _run(engine: Lab, work: Any, **app_options: Any) -> Any:
    """What `work` gives, called with a client of an app of `engine`."""

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
        answer = await client.post(COMPLETIONS, json=_with(**neutral))
        assert answer.status_code == httpx.codes.OK, answer.text
        chat = {**neutral, "tools": [], "tool_choice": "auto", "modalities": ["text"], "logprobs": False}
        answer = await client.post(CHAT, json=_chat(**{**chat, "max_tokens": 5}))
        assert answer.status_code == httpx.codes.OK, answer.text

    _run(engine, work)


def test_other_statuses_have_openai_bodies_too(engine: Lab) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for path in (COMPLETIONS, CHAT, "/tokenize"):
            body = {"model": "gpt-4", "prompt": "x"} if path != CHAT else _chat(model="gpt-4")
            error = _error(await client.post(path, json=body), 404)
            assert error["message"] == "the model 'gpt-4' does not exist; this server serves 'tiny'"
            assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "GET /nowhere" in _error(await client.get("/nowhere"), 404)["message"]
        wrong_method = await client.get(COMPLETIONS)
        _error(wrong_method, 405)
        assert wrong_method.headers["allow"] == "POST"
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
            _error(await client.post(COMPLETIONS, json=_with(), headers=headers), 401)
        right = {"authorization": "bearer secret"}
        assert (await client.get("/v1/models", headers=right)).status_code == httpx.codes.OK
        assert (await client.post(COMPLETIONS, json=_with(), headers=right)).status_code == httpx.codes.OK
        for path in ("/health", "/metrics"):
            assert (await client.get(path)).status_code == httpx.codes.OK

    _run(engine, work, api_key="secret")


def test_a_dead_engine_answers_503_and_ends_streams_with_an_error() -> None:
    forever = _with(max_tokens=1500, ignore_eos=True)

    async def work(client: httpx.AsyncClient) -> None:
        assert (await client.get("/health")).status_code == httpx.codes.OK
        whole, stream = await asyncio.gather(
            client.post(COMPLETIONS, json=forever), client.post(COMPLETIONS, json={**forever, "stream": True})
        )
        assert "on fire" in _error(whole, 503)["message"]
        assert stream.status_code == httpx.codes.OK
        *_, error, done, end = stream.text.split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert (done, end) == ("data: [DONE]", "")
        for path in ("/health",):
            assert _error(await client.get(path), 503)["code"] == "engine_dead"
        _error(await client.post(CHAT, json=_chat(stream=True)), 503)
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
                return await (client.get(path) if path == "/health" else client.post(path, json=_with()))

        error = _error(asyncio.run(main()), 500)
    assert error["message"] == "internal server error"


def test_a_real_server_refuses_a_long_body_and_goes_on(engine: Lab) -> None:
    with served(create_app(engine, max_body_bytes=1000)) as url, httpx.Client(base_url=url) as client:
        _error(client.post(COMPLETIONS, json=_with(prompt="x" * 10**6)), 413)
        assert client.get("/health").json() == {"status": "ok"}
