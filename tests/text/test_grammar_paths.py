"""A wish for structure means the same plain, after reasoning, beside tools and in a forced call."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from albireo_jax.core.model_files import find_model
from albireo_jax.core.types import StructuredOutput, StructureKind
from albireo_jax.text.answers.answer_formats import AnswerFormat, ToolFormat
from albireo_jax.text.answers.reasoning import Thinking
from albireo_jax.text.grammar.compiler import Grammar, GrammarCompiler
from albireo_jax.text.grammar.tool_grammar import Function, after_reasoning, calls_grammar, either
from albireo_jax.text.tokenizer import Tokenizer

S, K = StructuredOutput, StructureKind
CLOSE_ID = 1  # stands for a token </think>, which this vocabulary lacks

FORMATS = {
    "hermes": (
        AnswerFormat(tools=ToolFormat.HERMES),
        '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>',
    ),
    "llama 3": (AnswerFormat(tools=ToolFormat.LLAMA3_JSON), '{"name": "f", "parameters": %s}'),
    "mistral": (AnswerFormat(tools=ToolFormat.MISTRAL), '[TOOL_CALLS][{"name": "f", "arguments": %s}]'),
    "mistral, names first": (
        AnswerFormat(tools=ToolFormat.MISTRAL, names_first=True),
        "[TOOL_CALLS]f[ARGS]%s",
    ),
}


class Wish(NamedTuple):
    """A structured output, texts that it allows and texts that it does not."""

    structured: StructuredOutput
    allowed: tuple[str, ...]
    refused: tuple[str, ...]


def _schema(schema: object, allowed: tuple[str, ...], refused: tuple[str, ...]) -> Wish:
    return Wish(S(kind=K.JSON_SCHEMA, text=json.dumps(schema)), allowed, refused)


def _regex(text: str, allowed: tuple[str, ...], refused: tuple[str, ...]) -> Wish:
    return Wish(S(kind=K.REGEX, text=text), allowed, refused)


def _lark(text: str, allowed: tuple[str, ...], refused: tuple[str, ...]) -> Wish:
    return Wish(S(kind=K.GRAMMAR, text=text), allowed, refused)


BLANKS = " \n" * 100
A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
OBJECTS = {
    "an integer": _schema(
        A,
        ('{"a": 1}', '{"a":1,"b":[]}', "{" + " " * 64 + '"a" : 1 }'),
        ('{"a": "1"}', "{}", '{"a": 1', "{" + BLANKS + '"a": 1}', '{"a": 1} ', "1"),
    ),
    "digits": _schema(
        {"type": "object", "properties": {"d": {"type": "string", "pattern": r"^\d{2}$"}}, "required": ["d"]},
        ('{"d": "42"}',),
        ('{"d": "٤٢"}', '{"d": "4"}', '{"d": "421"}'),
    ),
    "nothing": _schema(
        {"type": "object", "properties": {}, "additionalProperties": False},
        ("{}", "{ }"),
        ('{"a": 1}', "{" + BLANKS + "}", "[]", "null"),
    ),
    "names": _schema(
        {"type": "object", "propertyNames": {"enum": ["x", "y"]}, "additionalProperties": {"type": "null"}},
        ('{"y": null, "x": null}', "{}"),
        ('{"z": null}', '{"x": 1}'),
    ),
    "a choice of objects": _schema(
        {"oneOf": [A, {"type": "object", "properties": {"k": {"const": "é\n"}}, "required": ["k"]}]},
        ('{"a": 1}', '{"k": "é\\n"}'),
        ('{"k": 1}',),
    ),
    "a tree": _schema(
        {
            "$defs": {"T[int]": {"type": "object", "properties": {"l": {"$ref": "#/$defs/T[int]"}}}},
            "$ref": "#/$defs/T[int]",
            "title": "start",
        },
        ('{"l": {"l": {}}}',),
        ('{"l": 3}',),
    ),
    "compact": _schema(
        A | {"x-guidance": {"whitespace_flexible": False}}, ('{"a":1}',), ('{"a": 1}', '{ "a":1}')
    ),
}
OTHERS = {
    "json_object": Wish(S(kind=K.JSON_OBJECT), ("{}", '{"a": [1, null]}'), ("[]", "{" + BLANKS + "}", "{")),
    "integers": _schema({"type": "integer", "minimum": 5, "maximum": 12}, ("5", "12"), ("4", "13", "1.5")),
    "strings": _schema({"enum": ["a", "</think>", None]}, ('"a"', '"</think>"', "null"), ('"b"', "a")),
    "an array": _schema(
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 2, "uniqueItems": False},
        ("[]", "[true, true]"),
        ("[true,true,true]", "[1]", "[" + BLANKS + "]"),
    ),
    "two digits": _regex(r"\d{2}", ("42",), ("٤٢", "4", "421", "")),
    "letters": _regex(r"\w+", ("aé_1",), ("a b", "")),
    "a slash": _regex("a/[0-9]+\n?", ("a/1", "a/12\n"), ("a1", "a/")),
    "anything but a line": _regex("[^\n]*x", ("x", "<tool>x", "{}x"), ("x\nx", "")),
    "choices": Wish(
        S(kind=K.CHOICE, choices=("yes", "naïve 東京", 'q"\n\\', "<thin", "\x1a0;")),
        ("yes", "naïve 東京", 'q"\n\\', "<thin", "\x1a0;"),
        ("ye", "yess", "", "naive"),
    ),
    "a sum": _lark(
        'start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[1-9][0-9]{0,3}/',
        ("1", "1+(2+3)"),
        ("1+", "0", "1 + 2"),
    ),
    "blanks that are ignored": _lark(
        'start: A B*\nA: "a"\nB: "b"\n%ignore / /', ("a b  b", "ab "), ("b", "aab")
    ),
    "names that we use": _lark(
        'start: call | first\ncall: thoughts\nfirst: "1"\nthoughts: spelled\nspelled: "s"\nsecond: "2"',
        ("1", "s"),
        ("2", ""),
    ),
    "options and schemas of its own": _lark(
        '%llguidance {"no_forcing": false}\nstart: "<" %json {"type": "null"} ">"', ("<null>",), ("<1>", "<>")
    ),
    "braces": _lark('start: "{" start "}" | "}"', ("}", "{}}"), ("{}", "{")),
}
WISHES = OBJECTS | OTHERS


class Route(NamedTuple):
    """A way to ask: what becomes of the wish, and what is written before its text, in text or token ids."""

    composed: Callable[[StructuredOutput], StructuredOutput]
    before: tuple[str | int, ...] = ()


def _thinking(thinking: Thinking, *before: str | int, token: int | None = None) -> Route:
    def composed(structured: StructuredOutput) -> StructuredOutput:
        return after_reasoning(structured, thinking, token_id=lambda _: token)

    return Route(composed, before)


def _calls(name: str) -> StructuredOutput:
    format, _ = FORMATS[name]
    functions = [Function(name="g", parameters="{}"), Function(name="h", parameters=json.dumps(A))]
    return calls_grammar(format, functions, parallel=True, token_id=lambda _: None, marked=True)


def _plain(structured: StructuredOutput) -> StructuredOutput:
    return structured


def _beside(name: str) -> Route:
    def composed(structured: StructuredOutput) -> StructuredOutput:
        return either(_calls(name), structured)

    return Route(composed)


def _beside_after_reasoning(structured: StructuredOutput) -> StructuredOutput:
    both = either(_calls("hermes"), structured)
    return after_reasoning(both, Thinking.POSSIBLE, token_id=lambda _: None)


PATHS = {
    "plain": Route(_plain),
    "reasoning is over": _thinking(Thinking.OVER),
    "reasoning begun": _thinking(Thinking.BEGUN, "hm </thin</think>"),
    "reasoning begun, said again": _thinking(Thinking.BEGUN, "<think>\nhm\n</think>\n\n"),
    "reasoning begun, ended by a token": _thinking(Thinking.BEGUN, "hm", CLOSE_ID, "\n", token=CLOSE_ID),
    "reasoning possible, not used": _thinking(Thinking.POSSIBLE),
    "reasoning possible, used": _thinking(Thinking.POSSIBLE, "<think>{}</think>\n"),
    **{f"beside {name} calls": _beside(name) for name in FORMATS},
    "beside calls, after reasoning": Route(_beside_after_reasoning, ("<think>a</think>",)),
}


class Reader:
    """Spells texts in single bytes, so that only the grammar decides."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.compiler = GrammarCompiler(
            tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=tokenizer.eos_token_ids
        )
        self._eos = tokenizer.eos_token_ids[0]
        pieces = tokenizer.token_bytes()
        self._ids = {pieces[i]: i for i in range(tokenizer.vocab_size) if len(pieces[i]) == 1}

    def accepts(self, grammar: Grammar, *parts: str | int) -> bool:
        constraint = grammar.constraint()
        for token_id in self._spelled(parts):
            mask = constraint.mask()
            if not int(mask[token_id // 32]) >> token_id % 32 & 1:
                return False
            constraint.advance(token_id)
        return bool(int(constraint.mask()[self._eos // 32]) >> self._eos % 32 & 1)

    def _spelled(self, parts: tuple[str | int, ...]) -> Iterator[int]:
        for part in parts:
            if isinstance(part, int):
                yield part
            else:
                yield from (self._ids[bytes([byte])] for byte in part.encode())


@pytest.fixture(scope="module")
def reader(data_dir: Path) -> Reader:
    return Reader(Tokenizer.from_files(find_model(str(data_dir / "models" / "stories260k"))))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", WISHES)
def test_every_wish_means_the_same_on_every_path(reader: Reader, name: str, path: str) -> None:
    wish, way = WISHES[name], PATHS[path]
    grammar = reader.compiler.compile(way.composed(wish.structured))
    assert [text for text in wish.allowed if not reader.accepts(grammar, *way.before, text)] == []
    assert [text for text in wish.refused if reader.accepts(grammar, *way.before, text)] == []


@pytest.mark.parametrize("path", ["plain", "reasoning begun", "beside calls, after reasoning"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", OBJECTS)
def test_every_schema_of_an_object_means_the_same_in_a_forced_call(
    reader: Reader, name: str, format: str, path: str
) -> None:
    wish, way, (answer_format, written) = OBJECTS[name], PATHS[path], FORMATS[format]
    function = Function(name="f", parameters=wish.structured.text)
    call = calls_grammar(answer_format, [function], parallel=False, token_id=lambda _: None)
    grammar = reader.compiler.compile(way.composed(call))
    assert [text for text in wish.allowed if not reader.accepts(grammar, *way.before, written % text)] == []
    refused = [text for text in wish.refused if not text.endswith(" ")]  # a space may come before the brace
    assert [text for text in refused if reader.accepts(grammar, *way.before, written % text)] == []


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("parameters", "allowed", "refused"),
    [
        ("", ("{}",), ('{"a": 1}', "null", "3")),
        ("true", ("{}",), ('{"a": 1}', "null", "3")),
        ("{}", ("{}",), ('{"a": 1}', "null", "3", "[1]", '"noon"')),
        ('{"description": "none needed"}', ("{}",), ('{"a": 1}', "3")),
        ('{"properties": {"zone": {"type": "string"}}}', ("{}", '{"zone": "x"}'), ("3", '{"zone": 3}')),
        ('{"type": "object", "properties": {}}', ("{}", '{"a": 1}'), ("3", "null")),
        ('{"type": ["object", "null"]}', ("{}",), ("null",)),
        ('{"type": "object", "nullable": true}', ("{}",), ("null",)),
        ('{"anyOf": [{"type": "integer"}, {"required": ["a"]}]}', ('{"a": 1}',), ("3", "{}")),
        ('{"$ref": "#/$defs/A", "$defs": {"A": {"required": ["a"]}}}', ('{"a": 1}',), ("3", "{}")),
    ],
)
def test_the_arguments_of_a_forced_call_are_an_object(
    reader: Reader, format: str, parameters: str, allowed: tuple[str, ...], refused: tuple[str, ...]
) -> None:
    answer_format, written = FORMATS[format]
    function = Function(name="f", parameters=parameters)
    call = calls_grammar(answer_format, [function], parallel=False, token_id=lambda _: None)
    grammar = reader.compiler.compile(call)
    assert [text for text in allowed if not reader.accepts(grammar, written % text)] == []
    assert [text for text in refused if reader.accepts(grammar, written % text)] == []


@pytest.mark.parametrize("parameters", ["false", '{"type": "string"}', '{"type": ["array", "null"]}', "3"])
def test_arguments_that_cannot_be_an_object_are_refused(reader: Reader, parameters: str) -> None:
    function = Function(name="f", parameters=parameters)
    call = calls_grammar(FORMATS["hermes"][0], [function], parallel=False, token_id=lambda _: None)
    with pytest.raises(ValueError, match=r"JSON schema of arguments: .*(object|arguments)"):
        reader.compiler.compile(call)


@pytest.mark.parametrize("path", PATHS)
def test_what_is_wrong_is_told_in_the_same_words_on_every_path(reader: Reader, path: str) -> None:
    for structured, message in (
        (S(kind=K.GRAMMAR, text='start: "a"\n  | foo'), r'at 1\(8\): unknown name: "foo"'),
        (S(kind=K.GRAMMAR, text='start: "a" @p1_0'), "unknown grammar @p1_0"),
        (S(kind=K.JSON_SCHEMA, text='{"type": "thing"}'), "Invalid type: thing"),
        (S(kind=K.JSON_SCHEMA, text='{"$ref": "#/$defs/x"}'), r"JSON schema: .*'/\$defs/x' does not exist"),
        (S(kind=K.REGEX, text="(a"), "unclosed group"),
        (S(kind=K.REGEX, text=""), "regular expression: it is empty"),
        (
            S(kind=K.CHOICE, choices=("a" * 70_000, "b" * 70_000)),
            "choices: 140000 bytes, the limit is 131072",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            reader.compiler.compile(PATHS[path].composed(structured))


def test_parts_that_are_too_large_together_are_refused(reader: Reader) -> None:
    functions = [Function(name="f", parameters=json.dumps({"title": "x" * 100_000}))] * 6
    calls = calls_grammar(FORMATS["hermes"][0], functions, parallel=False, token_id=lambda _: None)
    with pytest.raises(ValueError, match=r"grammar: .* bytes with its parts, the limit is 524288"):
        reader.compiler.compile(calls)
