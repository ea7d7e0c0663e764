"""/tokenize and /detokenize are each other's inverse, and agree with what completions count."""

import asyncio
from typing import Any

import httpx

from albireo_jax.serving.app import create_app
from tests.labs.engine_lab import Lab
from tests.labs.http_lab import in_process

CHAT = [{"role": "user", "content": "hi"}]


def _post(engine: Lab, path: str, body: dict[str, Any]) -> Any:
    async def main() -> httpx.Response:
        async with in_process(create_app(engine)) as client:
            return await client.post(path, json=body)

    answer = asyncio.run(main())
    assert answer.status_code == httpx.codes.OK, answer.text
    return answer.json()


def test_there_and_back(engine: Lab) -> None:
    text = "Hello, é!<|im_end|>" + "long " * 2000
    answer = _post(engine, "/tokenize", {"model": "tiny", "prompt": text})
    assert answer["count"] == len(answer["tokens"])
    assert answer["tokens"] == list(engine.frontend.encode(text))
    assert answer["max_model_len"] == 2048
    assert answer["token_strs"] is None
    assert _post(engine, "/detokenize", {"tokens": answer["tokens"]}) == {"prompt": text}


def test_the_tokens_of_a_chat_are_those_that_a_completion_counts(engine: Lab) -> None:
    answer = _post(engine, "/tokenize", {"messages": CHAT})
    completion = _post(engine, "/v1/chat/completions", {"messages": CHAT, "max_tokens": 1})
    assert answer["count"] == completion["usage"]["prompt_tokens"]
    assert _post(engine, "/detokenize", {"tokens": answer["tokens"]})["prompt"].endswith("assistant\n")


def test_token_texts_are_the_vocabularys_own(engine: Lab) -> None:
    answer = _post(engine, "/tokenize", {"prompt": "a b", "return_token_strs": True})
    assert answer["token_strs"] == ["a", "Ġ", "b"]


def test_empty_texts(engine: Lab) -> None:
    assert _post(engine, "/tokenize", {"prompt": ""})["tokens"] == []
    assert _post(engine, "/detokenize", {"tokens": []}) == {"prompt": ""}
