"""No JSON body, however odd, makes the server fail."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from albireo_jax.core.limits import EngineLimits
from albireo_jax.serving.app import create_app
from albireo_jax.serving.schemas.chat_bodies import ChatBody, TokenizeBody
from albireo_jax.serving.schemas.completion_bodies import CompletionBody, DetokenizeBody
from albireo_jax.serving.schemas.strict_model import StrictModel
from albireo_jax.text.answers.answer_formats import ReasoningFormat, ToolFormat
from tests.labs.engine_lab import Lab, lab
from tests.labs.http_lab import in_process

SCHEMAS: dict[str, type[StrictModel]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 60)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["", "a", "user", "tiny", "text", "<|im_end|>", "é\u2028😀", "x" * 5000])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "a"]), inner, max_size=4)
    ),
    max_leaves=8,
)
PLAUSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(max_size=20)
    | st.lists(st.integers(-1, 110), max_size=5)
    | st.lists(st.text(max_size=3)),
    "messages": st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "tool"]), "content": VALUES}),
        max_size=3,
    ),
    "max_tokens": st.integers(-1, 30),
    "max_completion_tokens": st.integers(-1, 30),
    "n": st.integers(0, 4),
    "model": st.sampled_from(["tiny", "other"]),
    "stream": st.booleans(),
    "tokens": st.lists(st.integers(-1, 110), max_size=5),
    "tools": st.lists(
        st.fixed_dictionaries(
            {
                "type": st.just("function"),
                "function": st.fixed_dictionaries({"name": st.sampled_from("abé ")}),
            }
        ),
        max_size=2,
    ),
    "tool_choice": st.sampled_from(
        ["none", "auto", "required", {"type": "function", "function": {"name": "a"}}]
    ),
    "response_format": st.sampled_from([{"type": "json_object"}, {"type": "json_schema"}]),
    "chat_template_kwargs": st.dictionaries(st.sampled_from(["self", "tools", "loop", "x y"]), VALUES),
    "stop": st.lists(st.text(max_size=2), max_size=4),
}


@pytest.fixture(scope="module")
def shared_engine() -> Iterator[Lab]:
    limits = EngineLimits(max_model_len=128, vocab_size=101, num_pages=64, page_size=8)
    with lab(limits) as running:
        yield running


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, Any]:
    """A route and a body for it: some fields plausible, others anything."""
    path = draw(st.sampled_from(sorted(SCHEMAS)))
    names = sorted({*SCHEMAS[path].model_fields, *SCHEMAS[path].refused})
    body: dict[str, Any] = {}
    for name in draw(st.lists(st.sampled_from(names), max_size=8, unique=True)):
        plausible = name in PLAUSIBLE and draw(st.integers(0, 3)) > 0
        body[name] = draw(PLAUSIBLE[name] if plausible else VALUES)
    return path, body if draw(st.integers(0, 9)) else draw(VALUES)


@given(st.lists(bodies(), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_makes_a_500(shared_engine: Lab, requests: list[tuple[str, Any]]) -> None:
    async def main() -> list[httpx.Response]:
        parsers = {"tool_call_parser": ToolFormat.HERMES, "reasoning_parser": ReasoningFormat.QWEN3}
        async with in_process(create_app(shared_engine, **parsers)) as client:
            posts = (
                client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
                for path, body in requests
            )
            return await asyncio.gather(*posts)

    for answer in asyncio.run(main()):
        assert answer.status_code in (200, 400, 404), answer.text
        if answer.status_code != httpx.codes.OK:
            assert list(answer.json()["error"]) == ["message", "type", "param", "code"]
    assert shared_engine.service.drain(60)
    assert shared_engine.service.stats().pages_in_use == 0
    assert shared_engine.frontend.num_readers == 0


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_bytes_make_a_500(shared_engine: Lab, content: bytes) -> None:
    async def main() -> httpx.Response:
        async with in_process(create_app(shared_engine)) as client:
            headers = {"content-type": "application/json"}
            return await client.post("/v1/completions", content=content, headers=headers)

    assert asyncio.run(main()).status_code == httpx.codes.BAD_REQUEST
