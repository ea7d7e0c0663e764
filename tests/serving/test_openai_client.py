"""OpenAI's own client chats and completes, streamed and not, and gets what the engine generates."""

import asyncio
from collections.abc import Iterator

import openai
import pytest

from albireo_jax.core.types import SamplingParams
from tests.labs.engine_lab import Lab

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def _expected(engine: Lab, prompt: object, **params: object) -> list[str]:
    done = engine.frontend.generate([prompt], SamplingParams(**params))  # type: ignore[list-item, arg-type]
    return [completion.text for completion in done]


def test_completion(client: openai.OpenAI, engine: Lab) -> None:
    answer = client.completions.create(model="tiny", prompt="Once", max_tokens=40, seed=5, n=2)
    assert [choice.text for choice in answer.choices] == _expected(engine, "Once", max_tokens=40, seed=5, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert {choice.finish_reason for choice in answer.choices} <= {"length", "stop"}
    assert answer.object == "text_completion"
    assert answer.model == "tiny"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 4
    assert answer.usage.total_tokens == 4 + answer.usage.completion_tokens
    assert 2 <= answer.usage.completion_tokens <= 80


def test_completion_defaults_to_16_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="x", extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_streamed_completion_of_several_prompts(client: openai.OpenAI, engine: Lab) -> None:
    prompts = ["first", "second", "x"]
    stream = client.completions.create(
        model="tiny",
        prompt=prompts,
        max_tokens=30,
        seed=9,
        n=2,
        echo=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, ends, usages, ids = dict[int, str](), dict[int, str](), [], set()
    for chunk in stream:
        ids.add(chunk.id)
        if chunk.usage is not None:
            assert chunk.choices == []
            usages.append(chunk.usage)
        for choice in chunk.choices:
            assert choice.index not in ends
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason is not None:
                ends[choice.index] = choice.finish_reason
    assert len(ids) == 1
    expected = [
        prompt + text for prompt in prompts for text in _expected(engine, prompt, max_tokens=30, seed=9, n=2)
    ]
    assert [texts[index] for index in range(6)] == expected
    assert sorted(ends) == list(range(6))
    (usage,) = usages
    assert usage.prompt_tokens == sum(map(len, prompts))


def test_token_ids_are_prompts(client: openai.OpenAI, engine: Lab) -> None:
    ids = [list(engine.frontend.encode(text)) for text in ("ab", "cde")]
    one = client.completions.create(model="tiny", prompt=ids[0], max_tokens=10, seed=1, echo=True)
    many = client.completions.create(model="tiny", prompt=ids, max_tokens=10, seed=1)
    assert one.choices[0].text == "ab" + many.choices[0].text
    assert many.choices[1].text == _expected(engine, "cde", max_tokens=10, seed=1)[0]


def test_chat(client: openai.OpenAI, engine: Lab) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, max_completion_tokens=40, seed=3, n=2, temperature=0.7, top_p=0.9
    )
    expected = _expected(engine, CHAT, max_tokens=40, seed=3, n=2, temperature=0.7, top_p=0.9)
    assert [choice.message.content for choice in answer.choices] == expected
    assert {choice.message.role for choice in answer.choices} == {"assistant"}
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(engine.frontend.encode(CHAT))


def test_a_chat_without_max_tokens_may_fill_the_context(client: openai.OpenAI, engine: Lab) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, seed=3, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == engine.limits.max_sequence_len


def test_streamed_chat(client: openai.OpenAI, engine: Lab) -> None:
    stream = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=40, seed=3, stream=True)
    chunks = [chunk for chunk in stream for _ in chunk.choices]
    first, last = chunks[0].choices[0], chunks[-1].choices[0]
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert [chunk.choices[0].delta.role for chunk in chunks[1:]] == [None] * (len(chunks) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert last.finish_reason in ("length", "stop")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert [text] == _expected(engine, CHAT, max_tokens=40, seed=3)
    assert all(chunk.usage is None for chunk in chunks)


def test_content_parts_and_developer_messages_reach_the_template(client: openai.OpenAI) -> None:
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Hello?"}]},
    ]
    params = {"model": "tiny", "max_tokens": 20, "seed": 1}
    one = client.chat.completions.create(messages=CHAT, **params)
    other = client.chat.completions.create(messages=parts, **params)
    assert one.choices[0].message.content == other.choices[0].message.content
    assert one.usage.completion_tokens == other.usage.completion_tokens
    assert one.usage.prompt_tokens == other.usage.prompt_tokens > 20
    assert other.usage.prompt_tokens_details.cached_tokens == (other.usage.prompt_tokens - 1) // 16 * 16


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(client: openai.OpenAI, engine: Lab, stream: bool) -> None:
    params = {"max_tokens": 200, "seed": 2, "stop": ["a", "Z"]}
    answer = client.completions.create(
        model="tiny", prompt="q", stream=stream, extra_body={"ignore_eos": True}, **params
    )
    if isinstance(answer, openai.Stream):
        choices = [chunk.choices[0] for chunk in answer]
        text, reason = "".join(choice.text for choice in choices), choices[-1].finish_reason
    else:
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
    (whole,) = _expected(engine, "q", max_tokens=200, seed=2, ignore_eos=True)
    end = min(whole.index(stop) for stop in params["stop"] if stop in whole)
    assert (text, reason) == (whole[:end], "stop")


def test_extra_fields_of_vllm(client: openai.OpenAI, engine: Lab) -> None:
    (free,) = engine.frontend.generate(["go"], SamplingParams(max_tokens=30, seed=4, ignore_eos=True))
    stop_id = free.token_ids[9]
    extra = {
        "ignore_eos": True,
        "stop_token_ids": [stop_id],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "top_k": 0,
        "min_p": 0.0,
        "min_tokens": 0,
    }
    answer = client.completions.create(model="tiny", prompt="go", max_tokens=30, seed=4, extra_body=extra)
    (choice,) = answer.choices
    token_ids = free.token_ids[: free.token_ids.index(stop_id) + 1]
    assert choice.text == engine.tokenizer.decode(token_ids, skip_special_tokens=False)
    assert choice.finish_reason == "stop"
    assert choice.stop_reason == stop_id  # type: ignore[attr-defined]


def test_unknown_fields_are_ignored(client: openai.OpenAI) -> None:
    extra = {"user": "me", "metadata": {"a": "b"}, "no_such_field": [1], "frequency_penalty": 0.0}
    plain = client.completions.create(model="tiny", prompt="x", seed=1)
    other = client.completions.create(model="tiny", prompt="x", seed=1, extra_body=extra)
    assert plain.choices[0].text == other.choices[0].text


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "albireo_jax")
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="this server serves 'tiny'"):
        client.models.retrieve("gpt-4")


def test_errors_are_openai_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server serves 'tiny'") as missing:
        client.completions.create(model="gpt-4", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="max_tokens") as wrong:
        client.completions.create(model="tiny", prompt="x", max_tokens=-1)
    assert (wrong.value.param, wrong.value.type) == ("max_tokens", "invalid_request_error")


@pytest.mark.parametrize("stream", [False, True])
def test_64_concurrent_clients_get_what_they_get_alone(url: str, engine: Lab, stream: bool) -> None:
    async def ask(client: openai.AsyncOpenAI, i: int) -> str:
        params = {"model": "tiny", "messages": CHAT, "max_tokens": 5 + i % 40, "seed": i}
        if not stream:
            answer = await client.chat.completions.create(**params)
            return answer.choices[0].message.content
        parts = await client.chat.completions.create(stream=True, **params)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in parts])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(64)))

    texts = asyncio.run(main())
    assert texts == [_expected(engine, CHAT, max_tokens=5 + i % 40, seed=i)[0] for i in range(64)]
    assert engine.service.drain(60)
    assert engine.service.stats().pages_in_use == 0
    assert engine.frontend.num_readers == 0
