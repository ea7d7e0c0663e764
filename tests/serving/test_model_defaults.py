"""The model's own sampling parameters stand in for those that a body leaves out; the body's win."""

import asyncio
from typing import Any

import pytest

from albireo_jax.core.sampling_defaults import NO_DEFAULTS, SamplingDefaults
from albireo_jax.serving.app import create_app
from tests.labs.engine_lab import lab
from tests.labs.http_lab import in_process

COMPLETION: tuple[str, dict[str, Any]] = ("/v1/completions", {"prompt": "x", "max_tokens": 12})
CHAT: tuple[str, dict[str, Any]] = (
    "/v1/chat/completions",
    {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 12},
)
DEFAULTS = SamplingDefaults({"temperature": 0.7, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.1})
GIVEN = {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.1}


def _answers(defaults: SamplingDefaults, *asked: tuple[str, dict[str, Any]]) -> list[Any]:
    with lab(defaults=defaults) as engine:

        async def main() -> list[Any]:
            async with in_process(create_app(engine)) as client:
                fixed = {"seed": 4, "ignore_eos": True}
                return [(await client.post(path, json=fixed | body)).json() for path, body in asked]

        return asyncio.run(main())


def _choices(defaults: SamplingDefaults, asked: tuple[str, dict[str, Any]], **fields: Any) -> Any:
    path, body = asked
    return _answers(defaults, (path, body | fields))[0]["choices"]


@pytest.mark.parametrize("asked", [COMPLETION, CHAT])
def test_what_a_body_leaves_out_is_the_models(asked: tuple[str, dict[str, Any]]) -> None:
    assert _choices(DEFAULTS, asked) == _choices(NO_DEFAULTS, asked, **GIVEN)
    nulls = dict.fromkeys(GIVEN)
    assert _choices(DEFAULTS, asked, **nulls) == _choices(NO_DEFAULTS, asked, **GIVEN)


@pytest.mark.parametrize("asked", [COMPLETION, CHAT])
def test_what_a_body_says_wins(asked: tuple[str, dict[str, Any]]) -> None:
    ours = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    assert _choices(DEFAULTS, asked, **ours) == _choices(NO_DEFAULTS, asked)
    assert _choices(DEFAULTS, asked, temperature=0) == _choices(
        NO_DEFAULTS, asked, **GIVEN | {"temperature": 0}
    )


def test_the_models_longest_answer_ends_a_chat_that_names_none_and_never_refuses_one() -> None:
    path, body = CHAT
    unlimited = {name: value for name, value in body.items() if name != "max_tokens"}
    long = {**unlimited, "messages": [{"role": "user", "content": "x" * 1900}]}
    defaults = SamplingDefaults({"max_tokens": 200})
    short, full, least, named = _answers(
        defaults, (path, unlimited), (path, long), (path, {**unlimited, "min_tokens": 300}), CHAT
    )
    assert short["usage"]["completion_tokens"] == 200
    assert full["usage"]["total_tokens"] == 2048
    assert least["usage"]["completion_tokens"] == 300
    assert named["usage"]["completion_tokens"] == 12


def test_completions_keep_openais_16_tokens() -> None:
    (answer,) = _answers(SamplingDefaults({"max_tokens": 200}), ("/v1/completions", {"prompt": "x"}))
    assert answer["usage"]["completion_tokens"] == 16
