"""Fields of answers that are asked for: usage in every chunk, token ids; and those that clients rely on."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from albireo_jax.serving.app import create_app
from tests.labs.engine_lab import Lab
from tests.labs.http_lab import in_process

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "x", "seed": 3, "max_tokens": 6, "n": 2, "ignore_eos": True},
    CHAT: {
        "messages": [{"role": "user", "content": "hi"}],
        "seed": 3,
        "max_tokens": 6,
        "n": 2,
        "ignore_eos": True,
    },
}
PATHS = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])


def _ask(engine: Lab, path: str, **fields: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        async with in_process(create_app(engine)) as client:
            return await client.post(path, json=BODIES[path] | fields)

    answer = asyncio.run(main())
    assert answer.status_code == httpx.codes.OK, answer.text
    return answer


def _chunks(engine: Lab, path: str, **fields: Any) -> list[dict[str, Any]]:
    *events, done, end = _ask(engine, path, stream=True, **fields).text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


@PATHS
def test_without_options_no_chunk_speaks_of_usage(engine: Lab, path: str) -> None:
    assert all("usage" not in chunk for chunk in _chunks(engine, path))


@PATHS
def test_with_include_usage_the_last_chunk_tells_it_and_the_others_have_null(engine: Lab, path: str) -> None:
    *chunks, last = _chunks(engine, path, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12


@PATHS
@pytest.mark.parametrize("with_last", [False, True])
def test_continuous_usage_counts_up_to_the_whole(engine: Lab, path: str, with_last: bool) -> None:
    options = {"continuous_usage_stats": True, "include_usage": with_last}
    chunks = _chunks(engine, path, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 12
    assert (chunks[-1]["choices"] == []) == with_last
    whole = _ask(engine, path).json()["usage"]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {whole["prompt_tokens"]}


@PATHS
@pytest.mark.parametrize("logprobs", [False, True])
def test_token_ids_are_those_of_the_text(engine: Lab, path: str, logprobs: bool) -> None:
    fields: dict[str, Any] = {"return_token_ids": True}
    if logprobs:
        fields["logprobs"] = 1 if path == COMPLETIONS else True
    answer = _ask(engine, path, **fields).json()
    streamed: dict[int, list[int]] = {0: [], 1: []}
    prompts: list[list[int]] = []
    for chunk in _chunks(engine, path, **fields):
        prompts += [ids for place in (chunk, *chunk["choices"]) if (ids := place.get("prompt_token_ids"))]
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice.get("token_ids", [])
    usage = answer["usage"]
    told = answer if path == CHAT else answer["choices"][0]
    assert len(told["prompt_token_ids"]) == usage["prompt_tokens"]
    assert prompts == [told["prompt_token_ids"]] * 2
    for choice in answer["choices"]:
        assert choice["token_ids"] == streamed[choice["index"]]
        text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
        assert engine.tokenizer.decode(choice["token_ids"]) == text
    plain = _ask(engine, path).json()
    assert "prompt_token_ids" not in plain
    assert "token_ids" not in plain["choices"][0]


def test_a_message_has_a_refusal_which_is_null(engine: Lab) -> None:
    answer = _ask(engine, CHAT).json()
    assert [choice["message"]["refusal"] for choice in answer["choices"]] == [None, None]
    first = _chunks(engine, CHAT)[0]["choices"][0]["delta"]
    assert first == {"role": "assistant", "content": "", "refusal": None}


@PATHS
def test_greedy_by_any_of_its_names(engine: Lab, path: str) -> None:
    greedy = {"temperature": 0, "seed": None}
    answers = [
        _ask(engine, path, **fields).json()["choices"]
        for fields in (greedy, {**greedy, "temperature": 1e-30}, {"top_p": 0, "seed": None})
    ]
    assert answers[0] == answers[1] == answers[2]


@PATHS
def test_no_seed_by_null_or_minus_1(engine: Lab, path: str) -> None:
    for seed in (None, -1, -1.0):
        assert _ask(engine, path, seed=seed, max_tokens=2).status_code == httpx.codes.OK


@PATHS
def test_a_prompt_is_truncated_to_its_last_tokens(engine: Lab, path: str) -> None:
    fields = {"return_token_ids": True, "n": 1}

    def prompt_ids(**given: Any) -> list[int]:
        answer = _ask(engine, path, **fields, **given).json()
        return (answer if path == CHAT else answer["choices"][0])["prompt_token_ids"]

    text = "".join(chr(ord("a") + i % 26) for i in range(3000))
    long = {"prompt": text} if path == COMPLETIONS else {"messages": [{"role": "user", "content": text}]}
    whole = prompt_ids(**long, truncate_prompt_tokens=2000)
    assert len(whole) == 2000
    assert prompt_ids(**long, truncate_prompt_tokens=5.0) == whole[-5:]
    assert prompt_ids(**long, truncate_prompt_tokens=-1)[-2000:] == whole
    assert len(prompt_ids(**long, truncate_prompt_tokens=-1)) == engine.limits.max_sequence_len - 6
    first = prompt_ids(**long, truncate_prompt_tokens=50, truncation_side="right")
    assert len(first) == 50
    assert first != whole[:50]
    short = prompt_ids()
    assert prompt_ids(truncate_prompt_tokens=1000) == short
