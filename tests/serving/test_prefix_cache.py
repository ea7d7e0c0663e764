"""What of a prompt was cached is told in its usage, and one client's prompts are no other's hits."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from albireo_jax.serving.app import create_app
from tests.labs.engine_lab import Lab, lab
from tests.labs.http_lab import in_process

STORY = "It was the best of times, it was the worst of times; " * 2
PAGE_SIZE = 16
COMPLETION = ("/v1/completions", {"prompt": STORY, "max_tokens": 4})
CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": STORY}], "max_tokens": 4})
USAGE = {"stream": True, "stream_options": {"include_usage": True}}

Ask = tuple[str, dict[str, Any], str | None]
"""Path, body and API key of a request."""


def _asked(engine: Lab, *asks: Ask) -> list[httpx.Response]:
    """The answers to requests that are sent one after the other."""

    async def main() -> list[httpx.Response]:
        async with in_process(create_app(engine)) as client:
            return [
                await client.post(path, json=body, headers={"Authorization": f"Bearer {key}"} if key else {})
                for path, body, key in asks
            ]

    return asyncio.run(main())


def _usage(answer: httpx.Response) -> dict[str, Any]:
    """The usage of an answer, streamed or not."""
    assert answer.status_code == httpx.codes.OK, answer.text
    if answer.headers["content-type"].startswith("application/json"):
        return answer.json()["usage"]
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    return json.loads(events[-2])["usage"]


def _hits(answer: httpx.Response) -> int:
    return _usage(answer)["prompt_tokens_details"]["cached_tokens"]


def _full_pages(num_prompt_tokens: int) -> int:
    """Tokens of a prompt that can be found: its full pages, but always one token less than all."""
    return (num_prompt_tokens - 1) // PAGE_SIZE * PAGE_SIZE


@pytest.mark.parametrize(("path", "body"), [COMPLETION, CHAT])
def test_a_prompt_that_comes_again_is_cached(engine: Lab, path: str, body: dict[str, Any]) -> None:
    first, again, streamed = map(
        _usage, _asked(engine, (path, body, None), (path, body, None), (path, body | USAGE, None))
    )
    found = _full_pages(first["prompt_tokens"])
    assert found > 0
    hits = [usage.pop("prompt_tokens_details") for usage in (first, again, streamed)]
    assert hits == [{"cached_tokens": 0}, {"cached_tokens": found}, {"cached_tokens": found}]
    for usage in (first, again, streamed):
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_usage_is_the_same_streamed_and_not(engine: Lab) -> None:
    body = {"prompt": [STORY, "x" * 40, "short"], "n": 2, "max_tokens": 5, "seed": 1}
    _, whole, streamed = map(
        _usage, _asked(engine, *[("/v1/completions", body | more, None) for more in ({}, {}, USAGE)])
    )
    assert whole == streamed
    assert whole["prompt_tokens_details"]["cached_tokens"] == _full_pages(len(STORY)) + 32


def test_a_client_finds_only_what_its_own_key_and_salt_computed(engine: Lab) -> None:
    """Another's hits would tell by their speed what it asked."""
    path, body = COMPLETION
    found = _full_pages(len(STORY))
    expected: list[tuple[str | None, str | None, int]] = [
        (None, None, 0),
        ("alice", None, 0),
        ("bob", None, 0),
        ("alice", None, found),
        (None, None, found),
        ("alice", "a", 0),
        ("bob", "a", 0),
        (None, "a", 0),
        ("alice", "a", found),
        ("alice", "b", 0),
        ("alice", None, found),
        ("bob", "a", found),
        (None, "a", found),
    ]
    asks = [(path, body | ({"cache_salt": salt} if salt else {}), key) for key, salt, _ in expected]
    assert [_hits(answer) for answer in _asked(engine, *asks)] == [hits for _, _, hits in expected]


def test_a_chat_finds_what_a_completion_of_the_same_tokens_computed(engine: Lab) -> None:
    path, body = CHAT
    prompt = list(engine.tokenizer.encode_chat(body["messages"]))
    completion: Ask = (COMPLETION[0], {"prompt": prompt, "cache_salt": "s"}, "key")
    answers = _asked(engine, completion, (path, body | {"cache_salt": "s"}, "key"), (path, body, "key"))
    assert [_hits(answer) for answer in answers] == [0, _full_pages(len(prompt)), 0]


@pytest.mark.parametrize(
    "scored",
    [{"prompt_logprobs": 1}, {"echo": True, "logprobs": 0}, {"echo": True, "logprobs": 0, "max_tokens": 0}],
)
def test_a_prompt_that_is_scored_is_computed_whole(engine: Lab, scored: dict[str, Any]) -> None:
    path, body = COMPLETION
    _, answer, unscored = _asked(engine, (path, body, None), (path, body | scored, None), (path, body, None))
    assert [_hits(answer), _hits(unscored)] == [0, _full_pages(len(STORY))]


def test_a_salt_changes_no_token(engine: Lab) -> None:
    path, body = COMPLETION[0], COMPLETION[1] | {"max_tokens": 60, "seed": 3}
    salts: list[dict[str, Any]] = [{}, {}, {"cache_salt": None}, {"cache_salt": "é" * 256}]
    answers = _asked(engine, *[(path, body | salt, None) for salt in salts])
    assert [_hits(answer) for answer in answers] == [0, *[_full_pages(len(STORY))] * 2, 0]
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1


@pytest.mark.parametrize(("path", "body"), [COMPLETION, CHAT])
@pytest.mark.parametrize("salt", ["", "x" * 257, 5, ["a"], True])
def test_a_bad_salt_is_refused(engine: Lab, path: str, body: dict[str, Any], salt: object) -> None:
    (answer,) = _asked(engine, (path, body | {"cache_salt": salt}, None))
    assert answer.status_code == httpx.codes.BAD_REQUEST
    assert answer.json()["error"]["param"] == "cache_salt"
    assert engine.service.stats().steps == 0


def test_without_sharing_nothing_is_found() -> None:
    path, body = COMPLETION
    with lab(shares_prefixes=False) as engine:
        answers = _asked(engine, *[(path, body, None)] * 3)
    assert [_hits(answer) for answer in answers] == [0, 0, 0]
