"""The constraint that a client asks for allows the answers that it describes, and no others."""

import itertools
import json
from functools import cache
from typing import Any

import llguidance
import pytest

from albireo_jax.core.types import StructuredOutput, StructureKind
from albireo_jax.serving.request_body import parse_body
from albireo_jax.serving.schemas.completion_bodies import CompletionBody
from albireo_jax.text.answers.answer_formats import ToolFormat
from albireo_jax.text.grammar.notation import library_grammar
from tests.labs.engine_lab import END
from tests.labs.script_lab import (
    CHAT_TEMPLATE,
    SPECIAL,
    TIME,
    WEATHER,
    asked_for,
    chat_template,
    script_tokenizer,
)


def _allows(structured: StructuredOutput | None, text: str) -> bool:
    """Whether a constraint allows a whole text, spelled in characters and special tokens."""
    assert structured is not None
    grammar = library_grammar(structured)
    assert llguidance.LLMatcher.validate_grammar(grammar, _matching_tokenizer()) == ""
    matcher = llguidance.LLMatcher(_matching_tokenizer(), grammar)
    token_ids = script_tokenizer("").encode(text)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


@cache
def _matching_tokenizer() -> llguidance.LLTokenizer:
    tokenizer = script_tokenizer("")

    class Wrapped:
        eos_token_id = tokenizer.token_id(END)
        bos_token_id = None
        special_token_ids = tuple(tokenizer.token_id(text) for text in SPECIAL)
        tokens = tuple(
            tokenizer.token_bytes(skip_special_tokens=False)[i] for i in range(tokenizer.vocab_size)
        )

        def __call__(self, text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Wrapped()))


CALL_TEXTS = {
    ToolFormat.HERMES: ('<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>', "%s", "\n"),
    ToolFormat.LLAMA3_JSON: ('{"name": "%s", "parameters": %s}', "%s", "; "),
    ToolFormat.MISTRAL: ('{"name": "%s", "arguments": %s}', "[TOOL_CALLS][%s]", ", "),
}


def _text(format: ToolFormat, *calls: tuple[str, str]) -> str:
    call, around, between = CALL_TEXTS[format]
    return around % between.join(call % one for one in calls)


ROME, LATE = ("weather", '{"city": "Rome"}'), ("time", "{}")


@pytest.mark.parametrize("format", CALL_TEXTS)
def test_a_demanded_call_is_all_that_may_be_said(format: ToolFormat) -> None:
    template, tools = chat_template(format), [WEATHER, TIME]
    required = asked_for(template, tools=tools, tool_choice="required")
    one = asked_for(template, tools=tools, tool_choice="required", parallel_tool_calls=False)
    named = asked_for(template, tools=tools, tool_choice={"type": "function", "function": {"name": "time"}})
    for calls, allowed in itertools.product(
        ([ROME], [LATE], [ROME, LATE, ROME], [("weather", "{}")], [("time", '{"x": 1}')], [("f", "{}")]),
        (required, one, named),
    ):
        fits = calls in ([ROME], [LATE], [ROME, LATE, ROME])
        fits = fits and (allowed is required or len(calls) == 1) and (allowed is not named or calls == [LATE])
        assert _allows(allowed.params.structured, _text(format, *calls)) is fits, (calls, allowed.params)
    for text in ("", "Hello", "{}", "[TOOL_CALLS][]"):
        assert not _allows(required.params.structured, text)
    assert asked_for(template, tools=tools).params.structured is None
    assert asked_for(template, tools=tools, tool_choice="none").params.structured is None


def test_mistrals_newer_way() -> None:
    asked = asked_for(CHAT_TEMPLATE % "[TOOL_CALLS][ARGS]", tools=[WEATHER, TIME], tool_choice="required")
    structured = asked.params.structured
    assert _allows(structured, '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]time[ARGS]{}')
    assert not _allows(structured, "[TOOL_CALLS]weather[ARGS]{}")


def test_reasoning_is_free_before_a_constraint() -> None:
    template, call = chat_template(ToolFormat.HERMES, thinks=True), _text(ToolFormat.HERMES, LATE)
    demand = {"tools": [TIME], "tool_choice": "required"}
    possible = asked_for(template, **demand).params.structured
    assert _allows(possible, call)
    assert _allows(possible, f"<think>\nHm {{.\n</think>\n\n{call}")
    assert not _allows(possible, f"Hm</think>{call}")
    begun = asked_for(template, chat_template_kwargs={"opening": "<think>\n"}, **demand).params.structured
    assert _allows(begun, f"Hm</think>{call}")
    assert not _allows(begun, call)
    for fields, answer in (
        ({"response_format": {"type": "json_object"}}, '{"a": 1}'),
        ({"guided_json": {"type": "integer"}}, "12"),
        ({"guided_regex": "a/[0-9]+\n"}, "a/12\n"),
        ({"guided_choice": ['y"es', "no"]}, 'y"es'),
        ({"guided_grammar": 'start: "a" b\nb: "}"'}, "a}"),
    ):
        structured = asked_for(template, **fields).params.structured
        assert _allows(structured, answer)
        assert _allows(structured, f"<think>Hm.</think>\n{answer}")
        assert not _allows(structured, f"<think>Hm.</think>\n{answer}!")


@pytest.mark.parametrize("format", CALL_TEXTS)
def test_content_is_constrained_beside_calls(format: ToolFormat) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "additionalProperties": False}
    wish = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    asked = asked_for(chat_template(format), tools=[TIME], response_format=wish)
    assert _allows(asked.params.structured, '{"x": 1}')
    marker = "<|python_tag|>" if format is ToolFormat.LLAMA3_JSON else ""  # or it would begin as content does
    assert _allows(asked.params.structured, marker + _text(format, LATE))
    assert not _allows(asked.params.structured, "Hello")


S, K = StructuredOutput, StructureKind
SCHEMA = {"type": "object", "properties": {"é": {"type": "integer"}}}
SCHEMA_TEXT = json.dumps(SCHEMA, ensure_ascii=False)


@pytest.mark.parametrize(
    ("fields", "structured"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}, "guided_regex": "", "structured_outputs": {}}, None),
        ({"guided_json": None, "guided_choice": [], "structured_outputs": {"json_object": False}}, None),
        ({"response_format": {"type": "json_object"}}, S(kind=K.JSON_OBJECT)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            S(kind=K.JSON_SCHEMA, text=SCHEMA_TEXT),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, S(kind=K.JSON_SCHEMA, text=SCHEMA_TEXT)),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, S(kind=K.JSON_SCHEMA, text=SCHEMA_TEXT)),
        ({"structured_outputs": {"json_object": True}}, S(kind=K.JSON_OBJECT)),
        ({"structured_outputs": {"regex": "[ab]+"}}, S(kind=K.REGEX, text="[ab]+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, S(kind=K.CHOICE, choices=("a", "b"))),
        ({"structured_outputs": {"grammar": "start: A"}}, S(kind=K.GRAMMAR, text="start: A")),
        ({"guided_json": SCHEMA, "structured_outputs": {}}, S(kind=K.JSON_SCHEMA, text=SCHEMA_TEXT)),
        ({"guided_regex": "[ab]+"}, S(kind=K.REGEX, text="[ab]+")),
        ({"guided_choice": ["a", "b"]}, S(kind=K.CHOICE, choices=("a", "b"))),
        ({"guided_grammar": "start: A"}, S(kind=K.GRAMMAR, text="start: A")),
    ],
)
def test_every_wish_for_structure_is_understood(
    fields: dict[str, Any], structured: StructuredOutput | None
) -> None:
    assert asked_for(chat_template(), **fields).params.structured == structured
    body = parse_body(json.dumps({"prompt": "x", **fields}).encode(), CompletionBody)
    assert body.sampling_params(16).structured == structured
