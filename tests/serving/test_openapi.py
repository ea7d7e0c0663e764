"""The OpenAPI document resolves and tells the truth, and the page made of it needs no other server."""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from albireo_jax.serving.app import create_app
from albireo_jax.serving.auth import OPEN_PATHS
from albireo_jax.text.answers.answer_formats import ReasoningFormat, ToolFormat
from tests.labs.engine_lab import Lab
from tests.labs.http_lab import in_process

HELLO = [{"role": "user", "content": "hi"}]
ASKED: list[tuple[str, str, dict[str, Any] | None]] = [
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/tiny", None),
    ("GET", "/v1/models/other", None),
    ("GET", "/version", None),
    ("GET", "/load", None),
    ("GET", "/health", None),
    ("GET", "/ping", None),
    ("GET", "/metrics", None),
    ("POST", "/tokenize", {"prompt": "hi", "return_token_strs": True}),
    ("POST", "/tokenize", {"messages": HELLO}),
    ("POST", "/tokenize", {}),
    ("POST", "/detokenize", {"tokens": [1, 2]}),
    ("POST", "/detokenize", {"tokens": [1000]}),
    ("POST", "/v1/completions", {"prompt": "hi", "n": 2}),
    ("POST", "/v1/completions", {"prompt": "hi", "logprobs": 2, "echo": True, "prompt_logprobs": 1}),
    ("POST", "/v1/completions", {"prompt": "hi", "stream": True, "stream_options": {"include_usage": True}}),
    ("POST", "/v1/completions", {"prompt": "hi", "stream": True, "logprobs": 1}),
    ("POST", "/v1/completions", {"prompt": "hi", "model": "other"}),
    ("POST", "/v1/completions", {"prompt": "x" * 5000}),
    (
        "POST",
        "/v1/chat/completions",
        {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": 9},
    ),
    ("POST", "/v1/chat/completions", {"messages": HELLO, "max_tokens": 9, "prompt_logprobs": 0}),
    ("POST", "/v1/chat/completions", {"messages": HELLO, "max_tokens": 9, "stream": True, "logprobs": True}),
    ("POST", "/v1/chat/completions", {"messages": []}),
]


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for inner in node.values():
            yield from _references(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from _references(inner)


def _validator(document: dict[str, Any], schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({**schema, "components": document["components"]})


@pytest.mark.parametrize("key", [None, "secret"])
def test_every_reference_resolves_and_every_answer_is_described(key: str | None, engine: Lab) -> None:
    document = json.loads(json.dumps(create_app(engine, api_key=key).openapi()))
    names = document["components"]["schemas"]
    for reference in _references(document):
        root, _, name = reference.rpartition("/")
        assert root == "#/components/schemas"
        assert name in names
    assert not any("__" in name for name in names)  # what two objects of one name become
    assert not any("$defs" in schema for schema in names.values())
    for schema in names.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert ("securitySchemes" in document["components"]) is (key is not None)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            statuses = {*operation["responses"]}
            assert "422" not in statuses
            asks_for_key = key is not None and path not in OPEN_PATHS
            assert ("401" in statuses) is asks_for_key
            assert ("security" in operation) is asks_for_key
            if "requestBody" in operation:
                assert {"200", "400", "404", "413", "415", "429", "500", "503"} <= statuses
            for status, answer in operation["responses"].items():
                assert answer["description"]
                for kind, content in answer["content"].items():
                    assert content["itemSchema" if kind == "text/event-stream" else "schema"], (path, status)
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert "text/event-stream" in document["paths"][path]["post"]["responses"]["200"]["content"]


@pytest.mark.parametrize("parses", [False, True])
def test_answers_are_as_they_are_described(parses: bool, engine: Lab) -> None:
    parsers = {"tool_call_parser": ToolFormat.HERMES, "reasoning_parser": ReasoningFormat.QWEN3}
    app = create_app(engine, **(parsers if parses else {}))
    document = json.loads(json.dumps(app.openapi()))

    async def main() -> list[httpx.Response]:
        async with in_process(app) as client:
            return [await client.request(method, path, json=body) for method, path, body in ASKED]

    for (method, path, body), answer in zip(ASKED, asyncio.run(main()), strict=True):
        route = "/v1/models/{model}" if path.startswith("/v1/models/") else path
        operation = document["paths"][route][method.lower()]
        described = operation["responses"][str(answer.status_code)]["content"]
        kind = answer.headers["content-type"].partition(";")[0]
        assert kind in described, (path, kind)
        if kind == "application/json":
            _validator(document, described[kind]["schema"]).validate(answer.json())
        elif kind == "text/event-stream":
            schema = described[kind]["itemSchema"]["properties"]["data"]["anyOf"][1]["contentSchema"]
            *chunks, done, end = answer.text.split("\n\n")
            assert (done, end) == ("data: [DONE]", "")
            for chunk in chunks:
                _validator(document, schema).validate(json.loads(chunk.removeprefix("data: ")))
        if body is not None and answer.status_code == httpx.codes.OK:
            _validator(document, operation["requestBody"]["content"]["application/json"]["schema"]).validate(
                body
            )


def test_the_page_loads_nothing_and_names_every_route(engine: Lab) -> None:
    app = create_app(engine)

    async def get() -> httpx.Response:
        async with in_process(app) as client:
            return await client.get("/docs")

    answer = asyncio.run(get())
    assert answer.headers["content-type"].startswith("text/html")
    page = answer.text
    assert "<script" not in page
    assert not re.search(r"(src|href)=['\"]?(https?:)?//", page)
    for path, operations in app.openapi()["paths"].items():
        for method in operations:
            assert f"<code>{method.upper()} {path}</code>" in page
    for target in re.findall(r"href='#([^']+)'", page):
        assert f"<h3 id={target}>" in page


def test_names_of_a_document_cannot_break_the_page(engine: Lab) -> None:
    app = create_app(engine)
    app.title = "<script>alert(1)</script>"

    async def get() -> httpx.Response:
        async with in_process(app) as client:
            return await client.get("/docs", headers={"host": "x/<script>"})

    assert "<script" not in asyncio.run(get()).text
