"""Log probabilities over HTTP: whole and streamed alike, of answers and prompts, and of one mind."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from albireo_jax.serving.app import create_app
from albireo_jax.text.answers.answer_formats import ToolFormat
from tests.labs.engine_lab import END, START, Lab
from tests.labs.http_lab import served
from tests.labs.model_lab import stories

HELLO = [{"role": "user", "content": "Hello?"}]
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture
def client(engine: Lab) -> Iterator[openai.OpenAI]:
    with (
        served(create_app(engine, tool_call_parser=ToolFormat.HERMES)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def stories_client(data_dir: Path) -> Iterator[openai.OpenAI]:
    with (
        stories(data_dir, max_rows=8, max_step_tokens=64) as running,
        served(create_app(running)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def joined(pieces: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Objects of log probabilities, one after the other."""
    return {name: [value for piece in pieces for value in piece[name]] for name in pieces[0]}


@pytest.mark.parametrize("echo", [False, True])
def test_a_streamed_completion_brings_what_a_whole_one_does(client: openai.OpenAI, echo: bool) -> None:
    body = {"model": "tiny", "prompt": ["Once", "upon"], "n": 2, "logprobs": 3, "seed": 4, "echo": echo}
    whole = client.completions.create(**body)
    streamed: list[list[dict[str, Any]]] = [[] for _ in whole.choices]
    texts = [""] * len(streamed)
    for chunk in client.completions.create(stream=True, **body):
        streamed[chunk.choices[0].index].append(chunk.choices[0].logprobs.model_dump())
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    for choice, pieces in zip(whole.choices, streamed, strict=True):
        logprobs = choice.logprobs.model_dump()
        assert joined(pieces) == logprobs
        tokens = logprobs["tokens"]
        for token, offset in zip(tokens, logprobs["text_offset"], strict=True):
            whole_text = token not in (START, END) and "\ufffd" not in token
            assert not whole_text or choice.text[offset:].startswith(token)
        assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
        first = 4 * echo
        assert tokens[:first] == list(("Once", "upon")[choice.index // 2])[:first]
        assert (logprobs["token_logprobs"][0] is None) == echo
        assert (logprobs["top_logprobs"][0] is None) == echo
        for token, logprob, top in list(
            zip(*(logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs")), strict=True)
        )[echo:]:
            assert top[token] == logprob <= 0
            assert 3 <= len(top) <= 4
    assert sum(len(choice.logprobs.tokens) for choice in whole.choices) == (
        whole.usage.completion_tokens + 16 * echo
    )


@pytest.mark.parametrize("tools", [[], [TOOL]])
def test_a_streamed_chat_brings_what_a_whole_one_does(client: openai.OpenAI, tools: list[Any]) -> None:
    """Also where the answer is read for tool calls, and its text waits."""
    body = {
        "model": "tiny",
        "messages": HELLO,
        "logprobs": True,
        "top_logprobs": 2,
        "seed": 3,
        "max_tokens": 30,
    }
    body |= {"tools": tools} if tools else {}
    whole = client.chat.completions.create(**body).choices[0].logprobs.model_dump()["content"]
    streamed = [
        entry
        for chunk in client.chat.completions.create(stream=True, **body)
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.model_dump()["content"]
    ]
    assert streamed == whole
    assert len(whole) == 30
    for entry in whole:
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
        assert len(entry["top_logprobs"]) == 2


def test_a_prompt_alone_is_scored(client: openai.OpenAI) -> None:
    body = {"model": "tiny", "prompt": "Once upon", "echo": True, "max_tokens": 0, "logprobs": 1}
    answer = client.completions.create(**body)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("Once upon", "length")
    assert choice.logprobs.tokens == list("Once upon")
    assert [value is None for value in choice.logprobs.token_logprobs] == [True] + [False] * 8
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 0)
    (chunk,) = client.completions.create(stream=True, **body)
    assert chunk.choices[0].model_dump() == choice.model_dump()
    with_ids = client.completions.create(extra_body={"return_tokens_as_token_ids": True}, **body)
    assert with_ids.choices[0].logprobs.tokens[-1] == "token_id:23"


def test_prompts_are_scored_as_vllm_does(client: openai.OpenAI) -> None:
    wanted = {"prompt_logprobs": 2}
    (choice,) = client.completions.create(model="tiny", prompt="abc", extra_body=wanted).choices
    first, *others = choice.model_extra["prompt_logprobs"]
    assert first is None
    assert [next(iter(entry.values()))["decoded_token"] for entry in others] == ["b", "c"]
    assert all(2 <= len(entry) <= 3 for entry in others)
    chat = client.chat.completions.create(model="tiny", messages=HELLO, extra_body=wanted)
    assert len(chat.model_extra["prompt_logprobs"]) == chat.usage.prompt_tokens


def test_an_echoed_answer_is_scored_as_when_it_was_sampled(stories_client: openai.OpenAI) -> None:
    """On a real model: prompts are scored in chunks by other programs than the tokens of an answer."""
    ask = stories_client.completions.create
    for seed, prompt in enumerate(("Once upon a time", "Lily and Tom went to the park. They")):
        params = {"model": "stories260k", "logprobs": 5}
        said = ask(
            prompt=prompt,
            max_tokens=120,
            temperature=1.0,
            seed=seed,
            extra_body={"return_token_ids": False},
            **params,
        )
        said_logprobs = said.choices[0].logprobs
        again = ask(prompt=prompt + said.choices[0].text, echo=True, max_tokens=0, **params)
        heard = again.choices[0].logprobs
        count = len(said_logprobs.tokens) - (said.choices[0].finish_reason == "stop")
        assert heard.tokens[-count:] == said_logprobs.tokens[:count]
        np.testing.assert_allclose(
            heard.token_logprobs[-count:], said_logprobs.token_logprobs[:count], atol=1e-3
        )
        total = [sum(np.exp(list(top.values()))) for top in heard.top_logprobs[1:]]
        assert max(total) < 1 + 1e-4
        assert np.mean(heard.token_logprobs[-count:]) > -4  # a fluent text


def test_greedy_tokens_are_the_likeliest(stories_client: openai.OpenAI) -> None:
    answer = stories_client.completions.create(
        model="stories260k", prompt="The sun", max_tokens=60, temperature=0, logprobs=1
    )
    logprobs = answer.choices[0].logprobs
    assert [max(top.values()) for top in logprobs.top_logprobs] == logprobs.token_logprobs
    assert {len(top) for top in logprobs.top_logprobs} == {1}
