"""A wish means the same by whichever path it comes: the same answers, or the same refusal."""

import json
from typing import Any

import jsonschema
import pytest

from albireo_jax.core.types import StructuredOutput, StructureKind
from tests.labs.wish_lab import MAX_MODEL_LEN, Outcome, Paths, Wish

pytestmark = pytest.mark.compiles


def plain(name: str, **fields: Any) -> Wish:
    """A wish that is spelled the same in a body and in Python."""
    return Wish(name=name, bodies=(fields,), params=fields)


def constrained(name: str, kind: StructureKind, value: Any, *spellings: str, **fields: Any) -> Wish:
    """A wish for structured output under each of its names; `a.b` is a field in a field."""
    bodies = []
    for spelling in spellings:
        inner: Any = value
        for part in reversed(spelling.split(".")[1:]):
            inner = {part: inner}
        body = {spelling.split(".")[0]: inner}
        if spelling == "response_format.json_schema.schema":
            body["response_format"] |= {"type": "json_schema"}
            body["response_format"]["json_schema"] |= {"name": "answer"}
        if spelling == "response_format":
            body = {"response_format": {"type": value}}
        bodies.append(body | fields)
    match kind:
        case StructureKind.JSON_OBJECT:
            structured = StructuredOutput(kind=kind)
        case StructureKind.JSON_SCHEMA:
            structured = StructuredOutput(kind=kind, text=json.dumps(value))
        case StructureKind.CHOICE:
            structured = StructuredOutput(kind=kind, choices=tuple(value))
        case _:
            structured = StructuredOutput(kind=kind, text=value)
    return Wish(name=name, bodies=tuple(bodies), params={"structured": structured, **fields})


SCHEMA_NAMES = ("response_format.json_schema.schema", "structured_outputs.json", "guided_json")
REGEX_NAMES = ("structured_outputs.regex", "guided_regex")
CHOICE_NAMES = ("structured_outputs.choice", "guided_choice")
GRAMMAR_NAMES = ("structured_outputs.grammar", "guided_grammar")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PAIR = {"type": "array", "items": {"enum": ["a", "b", 3, None]}, "minItems": 2, "maxItems": 2}

GRANTED = [
    plain("nothing"),
    plain("greedy", temperature=0),
    plain("temperature", temperature=0.3),
    plain("top_k", top_k=3),
    plain("top_k of all", top_k=-1),
    plain("top_p", top_p=0.4),
    plain("min_p", min_p=0.3),
    plain("all filters", temperature=1.5, top_k=20, top_p=0.9, min_p=0.01),
    plain("repetition penalty", repetition_penalty=1.8),
    plain("presence penalty", presence_penalty=2.0),
    plain("frequency penalty", frequency_penalty=2.0),
    plain("negative penalty", frequency_penalty=-2.0),
    Wish(name="logit bias", bodies=({"logit_bias": {"33": 9.0}},), params={"logit_bias": {33: 9.0}}),
    plain("allowed ids", allowed_token_ids=[33, 34, 35]),
    plain("bad words", bad_words=["x", "61"]),
    plain("another seed", seed=123456789),
    plain("the largest seed", seed=2**63 - 1),
    plain("one token", max_tokens=1),
    plain("stop string", stop=["~"]),
    plain("stop strings", stop=["zz", "][", "~"]),
    plain("stop string kept", stop=["~"], include_stop_str_in_output=True),
    plain("stop id", stop_token_ids=[90, 54]),
    plain("end ignored", ignore_eos=True, max_tokens=60),
    plain("least tokens", min_tokens=20, max_tokens=30),
    plain("special tokens shown", skip_special_tokens=False, max_tokens=60),
    plain("three samples", n=3),
    plain("log probabilities", logprobs=0),
    plain("log probabilities of more", logprobs=3, n=2),
    plain("prompt log probabilities", prompt_logprobs=1),
    constrained("any object", StructureKind.JSON_OBJECT, "json_object", "response_format"),
    constrained("a schema", StructureKind.JSON_SCHEMA, PERSON, *SCHEMA_NAMES, max_tokens=80),
    constrained("a schema, cut", StructureKind.JSON_SCHEMA, PERSON, *SCHEMA_NAMES, max_tokens=9),
    constrained("a schema of lists", StructureKind.JSON_SCHEMA, PAIR, *SCHEMA_NAMES, max_tokens=80),
    constrained("an expression", StructureKind.REGEX, r"\d{3}-[a-f]+\w", *REGEX_NAMES),
    constrained("an expression without end", StructureKind.REGEX, r"(ab|c)*", *REGEX_NAMES, ignore_eos=True),
    constrained("a choice", StructureKind.CHOICE, ["north", "south", "so"], *CHOICE_NAMES),
    constrained(
        "a choice with least tokens", StructureKind.CHOICE, ["yes", "no"], *CHOICE_NAMES, min_tokens=9
    ),
    constrained("a choice to the end", StructureKind.CHOICE, ["yes", "no"], *CHOICE_NAMES, ignore_eos=True),
    constrained("a grammar", StructureKind.GRAMMAR, 'start: "go " WAY\nWAY: /[nesw]{1,2}/', *GRAMMAR_NAMES),
    constrained("samples of a choice", StructureKind.CHOICE, ["north", "south"], *CHOICE_NAMES, n=4),
]

REFUSED = [
    plain("temperature below", temperature=-0.1),
    plain("temperature above", temperature=101.0),
    plain("top_k below", top_k=-2),
    plain("top_k above", top_k=3_000_000_000),
    plain("top_p above", top_p=1.5),
    plain("top_p below", top_p=-0.5),
    plain("min_p above", min_p=1.5),
    plain("repetition penalty of nothing", repetition_penalty=0.0),
    plain("presence penalty above", presence_penalty=2.5),
    plain("frequency penalty below", frequency_penalty=-2.5),
    plain("no samples", n=0),
    plain("too many samples", n=129),
    plain("more than fits", max_tokens=MAX_MODEL_LEN),
    plain("least above most", min_tokens=30, max_tokens=20),
    plain("seed above", seed=2**63),
    plain("too many log probabilities", logprobs=1000),
    plain("stop ids without end", stop_token_ids=list(range(33))),
    plain("an id beyond the vocabulary", allowed_token_ids=[5000]),
    plain("a stop id beyond the vocabulary", stop_token_ids=[5000]),
    plain("nothing allowed", allowed_token_ids=[]),
    plain("an empty bad word", bad_words=[""]),
    plain("bad words of spaces", bad_words=["  "]),
    plain("too many bad words", bad_words=[f"word{i}" for i in range(1000)]),
    Wish(name="bias above", bodies=({"logit_bias": {"33": 101.0}},), params={"logit_bias": {33: 101.0}}),
    Wish(
        name="bias of no token", bodies=({"logit_bias": {"5000": 1.0}},), params={"logit_bias": {5000: 1.0}}
    ),
    constrained("a broken expression", StructureKind.REGEX, "(a", *REGEX_NAMES),
    constrained("a broken grammar", StructureKind.GRAMMAR, "start: :", *GRAMMAR_NAMES),
    constrained("an impossible schema", StructureKind.JSON_SCHEMA, {"type": "strange"}, *SCHEMA_NAMES),
]


def outcomes(wish: Wish, paths: Paths) -> dict[str, Outcome]:
    """The outcome of a wish by path and spelling."""
    asked = {
        f"{path}, {' '.join(body)}": ask(body) for path, ask in paths.http.items() for body in wish.bodies
    }
    return asked | {path: ask(wish.params) for path, ask in paths.python.items()}


@pytest.mark.parametrize("wish", GRANTED, ids=lambda wish: wish.name)
def test_a_wish_is_granted_alike_by_every_path(wish: Wish, paths: Paths) -> None:
    seen = outcomes(wish, paths)
    first = next(iter(seen.values()))
    assert first.choices
    assert {path: outcome for path, outcome in seen.items() if outcome != first} == {}


@pytest.mark.parametrize("wish", REFUSED, ids=lambda wish: wish.name)
def test_a_wish_is_refused_alike_by_every_path(wish: Wish, paths: Paths) -> None:
    seen = outcomes(wish, paths)
    assert {path: outcome for path, outcome in seen.items() if not outcome.refusal} == {}
    messages = {outcome.refusal.replace("top_logprobs", "logprobs") for outcome in seen.values()}
    assert len(messages) == 1, seen


def test_wishes_differ(paths: Paths) -> None:
    """Were a field dropped by every path alike, its answer would be that of no wish at all."""
    ask = paths.python["generate"]
    nothing = ask({})
    dull = {"nothing", "top_k of all", "log probabilities", "prompt log probabilities"}
    same = [wish.name for wish in GRANTED if ask(wish.params) == nothing and wish.name not in dull]
    assert same == []


@pytest.mark.parametrize(
    "schema",
    [
        PERSON,
        {"type": "object", "properties": {"pair": PAIR}, "required": ["pair"], "additionalProperties": False},
    ],
)
def test_a_forced_call_keeps_to_its_schema(schema: dict[str, Any], paths: Paths) -> None:
    jsonschema.validate(json.loads(paths.forced_call(schema)), schema)
