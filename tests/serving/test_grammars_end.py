"""An answer whose grammar comes to its end keeps its last token; rules that leave no token are refused."""

from typing import Any

import openai
import pytest

from albireo_jax.core.types import FinishReason, SamplingParams, StructuredOutput, StructureKind
from tests.labs.engine_lab import lab, tiny_tokenizer
from tests.labs.script_lab import HELLO, chat_template, script_client

SCHEMA = {
    "type": "object",
    "properties": {"a": {"const": 1}},
    "required": ["a"],
    "additionalProperties": False,
}
WISHES: dict[str, tuple[str, dict[str, Any]]] = {
    "choice": ("yes", {"guided_choice": ["yes", "no"]}),
    "regex": ("1234", {"guided_regex": r"\d{4}"}),
    "schema": (
        '{"a":1}',
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    ),
    "grammar": ("(x)", {"guided_grammar": 'start: "(" start ")" | "x"'}),
}
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"ignore_eos": True},
    {"min_tokens": 20},
    {"ignore_eos": True, "include_stop_str_in_output": True},
    {"ignore_eos": True, "logprobs": True},
)


@pytest.mark.parametrize("wish", WISHES)
def test_the_last_token_of_a_complete_answer_is_text(wish: str) -> None:
    text, fields = WISHES[wish]
    with script_client(chat_template(), text) as client:
        for way in WAYS:
            asked: dict[str, Any] = {"model": "tiny", "seed": 0, "temperature": 0, "max_tokens": 40}
            asked["extra_body"] = fields | way
            whole = client.chat.completions.create(messages=HELLO, **asked).choices[0]
            assert (whole.message.content, whole.finish_reason) == (text, "stop"), way
            chunks = list(client.chat.completions.create(messages=HELLO, stream=True, **asked))
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert (streamed, chunks[-1].choices[0].finish_reason) == (text, "stop"), way
            if "logprobs" not in way:
                plain = client.completions.create(prompt="Weather?", **asked).choices[0]
                assert (plain.text, plain.finish_reason) == (text, "stop"), way


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 9}, {}])
def test_the_frontend_gives_the_whole_answer_too(fields: dict[str, Any]) -> None:
    structured = StructuredOutput(kind=StructureKind.CHOICE, choices=("yes", "no"))
    params = SamplingParams(max_tokens=30, seed=3, structured=structured, n=4, **fields)
    with lab() as engine:
        for done in engine.frontend.generate(["Well?"], params):
            assert done.text in structured.choices
            assert done.finish_reason is FinishReason.STOP


def test_rules_that_leave_no_token_are_refused_at_the_door() -> None:
    end, letter = tiny_tokenizer().eos_token_ids[0], tiny_tokenizer().encode("a")[0]
    only_a = StructuredOutput(kind=StructureKind.CHOICE, choices=("a",))
    nothing = StructuredOutput(kind=StructureKind.REGEX, text="a{0}")
    stops = {"allowed_token_ids": (letter,), "stop_token_ids": (letter,), "min_tokens": 1}
    with lab() as engine:
        for fields, name in (
            ({"allowed_token_ids": (end,), "min_tokens": 1}, "allowed_token_ids"),
            (stops, "allowed_token_ids"),
            ({"allowed_token_ids": (letter,), "bad_words": ("a",)}, "allowed_token_ids"),
            ({"structured": only_a, "bad_words": ("a",)}, "structured output"),
            ({"structured": nothing, "ignore_eos": True}, "structured output"),
            ({"structured": nothing, "min_tokens": 2}, "structured output"),
        ):
            params = SamplingParams(max_tokens=5, **fields)
            with pytest.raises(ValueError, match=f"{name} leaves no token to begin an answer with"):
                engine.frontend.generate(["x"], params)
        for fields in (
            {"allowed_token_ids": (end,)},
            {"allowed_token_ids": (letter, end), "min_tokens": 1},
            {"structured": nothing},
        ):
            assert engine.frontend.generate(["x"], SamplingParams(max_tokens=5, seed=1, **fields))


def test_rules_that_leave_no_token_are_status_400() -> None:
    with script_client(chat_template(), "a") as client:
        for fields in (
            {"guided_choice": ["a"], "bad_words": ["a"]},
            {"guided_regex": "a{0}", "ignore_eos": True},
        ):
            with pytest.raises(openai.BadRequestError, match="leaves no token"):
                client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=3, extra_body=fields)
