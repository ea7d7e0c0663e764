"""An answer that the engine cannot complete is an error, whole or streamed, and never a finish reason."""

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from albireo_jax.core.plan import NOT_FINITE, Executor, SampledTokens, StepHandle, StepPlan
from albireo_jax.serving.app import create_app
from tests.labs.engine_lab import Lab, lab
from tests.labs.http_lab import in_process

ENDLESS = {"max_tokens": 1500, "ignore_eos": True}
HELLO = [{"role": "user", "content": "hi"}]
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "go"}),
    ("/v1/completions", {"prompt": "go", "echo": True}),
    ("/v1/completions", {"prompt": "go", "logprobs": 2}),
    ("/v1/completions", {"prompt": ["go", "on"], "n": 3}),
    ("/v1/chat/completions", {"messages": HELLO}),
    ("/v1/chat/completions", {"messages": HELLO, "n": 4}),
    ("/v1/chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 1}),
]
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


class Hooked:
    """Runs plans on another executor; `hook` may change what the step of `at` sampled."""

    def __init__(self, inner: Executor, hook: Callable[[SampledTokens], SampledTokens], *, at: int) -> None:
        self._inner, self._hook, self._at = inner, hook, at

    def dispatch(self, plan: StepPlan) -> StepHandle:
        handle = self._inner.dispatch(plan)
        return HookedHandle(handle, self._hook) if plan.step == self._at else handle


class HookedHandle:
    """The handle of such a step."""

    def __init__(self, inner: StepHandle, hook: Callable[[SampledTokens], SampledTokens]) -> None:
        self._inner, self._hook = inner, hook

    def wait(self) -> SampledTokens:
        return self._hook(self._inner.wait())


def _not_finite(sampled: SampledTokens) -> SampledTokens:
    ids = sampled.ids.copy()
    ids[0] = NOT_FINITE
    return replace(sampled, ids=ids)


async def _post(engine: Lab, path: str, body: dict[str, Any]) -> httpx.Response:
    async with in_process(create_app(engine)) as client:
        answer = await client.post(path, json=body)
        canary = await client.post("/v1/completions", json={"prompt": "canary", "max_tokens": 3})
        assert canary.status_code in (200, 503)
        return answer


def _events(answer: httpx.Response) -> list[str]:
    assert answer.status_code == httpx.codes.OK
    *events, end = answer.text.split("\n\n")
    assert end == ""
    return [event.removeprefix("data: ") for event in events]


def _assert_ends_with(answer: httpx.Response, code: str) -> None:
    *chunks, error, done = _events(answer)
    assert done == "[DONE]"
    error = json.loads(error)
    assert list(error) == ["error"]
    assert error["error"]["code"] == code
    assert chunks  # a stream is cut, not refused
    for chunk in map(json.loads, chunks):
        assert all(choice["finish_reason"] not in ("error", "abort") for choice in chunk["choices"])


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_a_choice_that_fails_ends_its_request_and_no_other(path: str, body: dict[str, Any]) -> None:
    for stream in ({}, USAGE):
        with lab(wrap=lambda inner: Hooked(inner, _not_finite, at=8)) as engine:
            answer = asyncio.run(_post(engine, path, {**body, **ENDLESS, **stream}))
            if stream:
                _assert_ends_with(answer, "answer_failed")
            else:
                assert answer.status_code == httpx.codes.INTERNAL_SERVER_ERROR
                error = answer.json()["error"]
                assert (error["type"], error["code"]) == ("server_error", "answer_failed")
            assert engine.service.drain(60)
            assert engine.service.stats().pages_in_use == 0
            assert engine.frontend.num_readers == 0


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_an_answer_that_is_cut_because_the_engine_stops(path: str, body: dict[str, Any]) -> None:
    for stream in ({}, USAGE):
        stops: list[Callable[[], None]] = []

        def stop(sampled: SampledTokens, stops: list[Callable[[], None]] = stops) -> SampledTokens:
            threading.Thread(target=stops[0]).start()
            return sampled

        with lab(wrap=lambda inner, stop=stop: Hooked(inner, stop, at=20)) as engine:
            stops.append(engine.service.stop)
            answer = asyncio.run(_post(engine, path, {**body, **ENDLESS, **stream}))
        if stream:
            _assert_ends_with(answer, "shutting_down")
        else:
            assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE
            assert answer.json()["error"]["code"] == "shutting_down"
            assert answer.headers["retry-after"]


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_a_stream_that_cannot_be_written_leaves_nothing_open(
    path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch, engine: Lab
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no writer today")

    for place in ("completions._ChoiceWriter.events", "chat_completions._choice_events"):
        monkeypatch.setattr(f"albireo_jax.serving.routes.{place}", fail)
    answer = asyncio.run(_post(engine, path, {**body, **ENDLESS, "stream": True}))
    assert answer.status_code == httpx.codes.INTERNAL_SERVER_ERROR
    assert "writer" not in answer.text
    assert engine.service.drain(60)
    assert engine.service.stats().pages_in_use == 0


@pytest.mark.parametrize(
    "name", ["the text", 'a "the text" b', "\\", '"', "", "é\u2028", "x" * 300, '{"text":']
)
def test_streams_carry_any_model_name(engine: Lab, name: str) -> None:
    app_engine = replace(engine, served_name=name)
    for path, body in BODIES:
        answer = asyncio.run(_post(app_engine, path, {**body, "max_tokens": 4, "stream": True, "seed": 1}))
        *chunks, done = _events(answer)
        assert done == "[DONE]"
        assert {json.loads(chunk)["model"] for chunk in chunks} == {name}
        whole = asyncio.run(_post(app_engine, path, {**body, "max_tokens": 4, "seed": 1})).json()
        said = [""] * len(whole["choices"])
        for chunk in map(json.loads, chunks):
            for choice in chunk["choices"]:
                said[choice["index"]] += (
                    choice["text"] if "text" in choice else choice["delta"].get("content", "")
                )
        expected = [c["text"] if "text" in c else c["message"]["content"] for c in whole["choices"]]
        assert said == expected
