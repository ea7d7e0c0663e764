"""A body that is wrong costs what finding its first fault costs, and its error quotes little of it."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any, get_args

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from albireo_jax.serving.api_errors import ApiError, bad_request, shorten
from albireo_jax.serving.app import create_app
from albireo_jax.serving.json_size import check_json_size
from albireo_jax.serving.request_body import parse_body
from albireo_jax.serving.schemas import structured_output  # noqa: F401 (its classes are among those below)
from albireo_jax.serving.schemas.chat_bodies import ChatBody, TokenizeBody
from albireo_jax.serving.schemas.completion_bodies import (
    CompletionBody,
    DetokenizeBody,
)
from albireo_jax.serving.schemas.list_limits import LIST_LIMITS
from albireo_jax.serving.schemas.strict_model import StrictModel
from tests.labs.engine_lab import Lab
from tests.labs.http_lab import in_process

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = {"role": "user", "content": "hi"}
SCHEMAS: dict[str, type[StrictModel]] = {
    COMPLETIONS: CompletionBody,
    CHAT: ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
MAX_ANSWER_BYTES = 2048

LONG: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": [1] * 500_000}, "messages has 500000 messages, the limit is 4096"),
    (CHAT, {"messages": [HI] * 5000}, "messages has 5000 messages, the limit is 4096"),
    (CHAT, {"messages": [HI] * 300_000}, "300002 JSON objects and lists, the limit is 32768"),
    (CHAT, {"messages": [{**HI, "content": [1] * 9999}]}, "content has 9999 parts, the limit is 4096"),
    (CHAT, {"messages": [HI], "tools": ["x"] * 129}, "tools has 129 tools, the limit is 128"),
    (CHAT, {"messages": [{**HI, "tool_calls": [0] * 129}]}, "tool_calls has 129 calls, the limit is 128"),
    (
        CHAT,
        {"messages": [HI], "chat_template_kwargs": dict.fromkeys(map(str, range(65)), 1)},
        "the limit is 64",
    ),
    (CHAT, {"messages": [HI], "x": dict.fromkeys(map(str, range(270_000)), 1)}, "JSON members, the limit is"),
    ("/tokenize", {"messages": [HI] * 5000}, "messages has 5000 messages, the limit is 4096"),
    ("/detokenize", {"tokens": [1] * 1_050_000}, "JSON values, the limit is 1048576"),
    (COMPLETIONS, {"prompt": ["x"] * 1025}, "prompt has 1025 prompts, the limit is 1024"),
    (COMPLETIONS, {"prompt": [[1]] * 1025}, "prompt has 1025 prompts, the limit is 1024"),
    (COMPLETIONS, {"bad_words": ["w"] * 100_000}, "bad_words has 100000 words, the limit is"),
    (COMPLETIONS, {"bad_words": [1] * 100_000}, "bad_words has 100000 words, the limit is"),
    (COMPLETIONS, {"stop": ["s"] * 33}, "stop has 33 strings, the limit is 32"),
    (COMPLETIONS, {"stop_token_ids": [1] * 500}, "stop_token_ids has 500 ids, the limit is 32"),
    (
        COMPLETIONS,
        {"allowed_token_ids": [1] * 600_000},
        "allowed_token_ids has 600000 token ids, the limit is",
    ),
    (
        COMPLETIONS,
        {"logit_bias": dict.fromkeys(map(str, range(2000)), 1)},
        "logit_bias has 2000 tokens, the lim",
    ),
    (COMPLETIONS, {"guided_choice": ["a"] * 2000}, "guided_choice has 2000 choices, the limit is 1024"),
    (
        COMPLETIONS,
        {"structured_outputs": {"choice": [1] * 2000}},
        "choice has 2000 choices, the limit is 1024",
    ),
]
FAULTY: list[tuple[str, dict[str, Any]]] = [  # as many faults as a list may have entries
    (CHAT, {"messages": [1] * 4096}),
    (CHAT, {"messages": [{}] * 4096}),
    (CHAT, {"messages": [{**HI, "content": [1] * 4096}] * 10}),
    (CHAT, {"messages": [HI], "tools": [1] * 128}),
    (COMPLETIONS, {"prompt": [1] * 100_000 + ["a"]}),
    (COMPLETIONS, {"prompt": [None] * 1000}),
    (COMPLETIONS, {"prompt": [["a"] * 1000] * 100}),
    (COMPLETIONS, {"prompt": "x", "stop": [1] * 32}),
    (COMPLETIONS, {"prompt": "x", "allowed_token_ids": ["a"] * 100_000}),
    (COMPLETIONS, {"prompt": "x", "guided_choice": [1] * 1024}),
    ("/detokenize", {"tokens": ["a"] * 100_000}),
]


def _parse(path: str, body: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as refusal:
        parse_body(json.dumps(body).encode(), SCHEMAS[path])
    return refusal.value


@pytest.mark.parametrize(("path", "body", "message"), LONG, ids=[message for *_, message in LONG])
@pytest.mark.usefixtures("no_collector")
def test_a_list_beyond_its_limit_is_refused_unread(path: str, body: dict[str, Any], message: str) -> None:
    if path == COMPLETIONS and "prompt" not in body:
        body = {"prompt": "x", **body}
    began_s = time.thread_time()
    error = _parse(path, body)
    took_s = time.thread_time() - began_s
    assert error.status == 400
    assert message in error.message
    assert took_s < 2  # the slowest takes 0.2 s, most of it to write the body


@pytest.mark.parametrize(("path", "body"), FAULTY)
def test_only_the_first_fault_is_told_and_made(path: str, body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as faults:
        SCHEMAS[path].model_validate(body)
    assert faults.value.error_count() <= 4  # the first message has that many fields
    assert _parse(path, body).status == 400


def _fields(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from _fields(inner)


def _all_schemas(schema: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for inner in schema.__subclasses__():
        yield inner
        yield from _all_schemas(inner)


def test_every_list_and_mapping_of_a_body_has_a_limit() -> None:
    unbounded = set[str]()
    for schema in _all_schemas(StrictModel):
        for name, field in schema.model_fields.items():
            kinds = {getattr(kind, "__origin__", None) for kind in _fields(field.annotation)}
            if kinds & {list, dict, set, tuple} and (field.alias or name) not in LIST_LIMITS:
                unbounded.add(f"{schema.__name__}.{name}")
    assert unbounded == set()


@pytest.mark.parametrize(
    ("text", "is_fine"),
    [
        (b'{"a": "' + b"[{:,\\\\" * 2**19 + b'"}', True),
        (b'{"a": "' + b'\\",[' * 2**19 + b'"}', True),
        (b'{"a": "\\\\", "b": [' + b"[]," * 2**18 + b"1]}", False),
        (b'{"a": "' + b"x" * (2**20 - 8) + b'\\\\", "b": [' + b"1," * 2**20 + b"1]}", False),
        (b"[" * 2**18, False),
        (b"{}" * 2**15, True),
        (b"1," * 2**20 + b"1", False),
        (b'"":' * 2**18 + b":", False),
        (b"", True),
    ],
)
def test_marks_inside_strings_do_not_count(text: bytes, is_fine: bool) -> None:
    if is_fine:
        check_json_size(text)
    else:
        with pytest.raises(ValueError, match=r"^the body holds \d+ JSON .+, the limit is \d+$"):
            check_json_size(text)


ECHOES: list[tuple[str, dict[str, Any]]] = [
    *((path, {"prompt": "x", "messages": [HI], "tokens": [1], "model": "m" * 10**6}) for path in SCHEMAS),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"k" * 10**6: 1}}),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"\u0000😀\u2028" * 10**5: "a"}}),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"5": 10**4000}}),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 10**4000}),
    (COMPLETIONS, {"prompt": "x", "bad_words": [" " * 10**6]}),
    (COMPLETIONS, {"prompt": "x", "guided_json": ["s" * 10**6]}),
    (COMPLETIONS, {"prompt": "x", "guided_json": "\\" * 10**6}),
    (COMPLETIONS, {"prompt": "x", "response_format": {"type": "t" * 10**6}}),
    (COMPLETIONS, {"prompt": "x", "response_format": {"r" * 10**6: 1}}),
    (CHAT, {"messages": [{"role": "\u0001" * 10**6, "content": "hi"}]}),
    (CHAT, {"messages": [HI], "tool_choice": "é" * 10**6}),
    (CHAT, {"messages": [HI], "chat_template_kwargs": {"self": "x" * 10**6}}),
    (
        CHAT,
        {
            "messages": [HI],
            "chat_template_kwargs": {"😀" * 10**5: {"a": []}},
            "model": "\u0007" * 999,
        },
    ),
]


@pytest.mark.parametrize(("path", "body"), ECHOES)
def test_an_error_quotes_at_most_two_kilobytes(path: str, body: dict[str, Any], engine: Lab) -> None:
    async def post() -> httpx.Response:
        async with in_process(create_app(engine)) as client:
            return await client.post(path, json=body)

    answer = asyncio.run(post())
    assert 400 <= answer.status_code < 500, answer.text[:500]
    assert len(answer.content) <= MAX_ANSWER_BYTES
    assert json.loads(answer.content.decode())["error"]["message"]


def test_other_parts_of_a_request_are_not_quoted_at_length_either(engine: Lab) -> None:
    async def main() -> list[httpx.Response]:
        async with in_process(create_app(engine)) as client:
            long, headers = "x" * 10**4, {"content-type": "application/json"}
            return [
                await client.get(f"/{long}"),
                await client.get(f"/v1/models/{long}"),
                await client.get("/v1/models/%ff%fe%00%ED%A0%80"),
                await client.request("M" * 10**4, "/health"),
                await client.post(COMPLETIONS, content=b"{}", headers={"content-type": f"text/{long}"}),
                await client.post(COMPLETIONS, content=b'{"' + long.encode() + b'": \xff}', headers=headers),
                await client.post(COMPLETIONS, content=json.dumps(long).encode(), headers=headers),
                await client.post(COMPLETIONS, content=json.dumps([long]).encode(), headers=headers),
                await client.post(COMPLETIONS, content=b'{"prompt": "\\ud800"}', headers=headers),
            ]

    for answer in asyncio.run(main()):
        assert 400 <= answer.status_code < 500
        assert len(answer.content) <= MAX_ANSWER_BYTES
        assert json.loads(answer.content.decode())["error"]["message"]


@pytest.mark.parametrize(
    "text", ["", "short", "x" * 10**6, "\ud800" * 5000, "😀\n" * 5000, '"\\' * 800, "é" * 1500]
)
def test_what_is_shortened_keeps_its_ends(text: str) -> None:
    short = shorten(text, 1500)
    assert len(json.dumps(short)) <= 1502
    assert short == text or (short[:50] == text[:50] and short[-20:] == text[-20:])
    answer = bad_request(text, param=text).response()
    assert len(answer.body) <= MAX_ANSWER_BYTES
    json.loads(answer.body)


def test_a_body_whose_length_is_too_great_is_refused_before_it_is_read(engine: Lab) -> None:
    async def never() -> Any:
        yield b"{"
        raise AssertionError("the body is read")

    async def post() -> httpx.Response:
        async with in_process(create_app(engine, max_body_bytes=1000)) as client:
            headers = {"content-type": "application/json", "content-length": "1001"}
            return await client.post(COMPLETIONS, content=never(), headers=headers)

    answer = asyncio.run(post())
    assert answer.status_code == 413
    assert "1000 bytes" in answer.json()["error"]["message"]


def test_long_bodies_beyond_the_queue_are_refused_and_may_come_again(engine: Lab) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 1, "user": "u" * 10**5}).encode()

    async def main() -> list[httpx.Response]:
        async with in_process(create_app(engine)) as client:
            headers = {"content-type": "application/json"}
            posts = (client.post(COMPLETIONS, content=body, headers=headers) for _ in range(100))
            first = await asyncio.gather(*posts)
            return [*first, await client.post(COMPLETIONS, content=body, headers=headers)]

    *first, last = asyncio.run(main())
    assert last.status_code == 200
    refused = [answer for answer in first if answer.status_code != 200]
    for answer in refused:
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    assert len(refused) < 100
