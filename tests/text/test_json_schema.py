"""Words of JSON Schema mean what the standard says, or as little more as the module says."""

from typing import Any

import pytest

from albireo_jax.text.grammar.json_schema import MAX_SCHEMA_DEPTH, json_grammar
from tests.labs.schema_lab import accepts, matcher_of


def _with(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


CASES: list[tuple[Any, ...]] = [
    (
        "pn true",
        {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "number"}},
        ['{"a": 1}', "{}"],
        ['{"a":"x"}'],
    ),
    (
        "pn enum",
        {
            "type": "object",
            "propertyNames": {"enum": ["a", "b.c"]},
            "additionalProperties": {"type": "integer"},
        },
        ['{"a": 1}', '{"b.c":1,"a":2}', "{}"],
        ['{"bxc":1}', '{"c":1}', '{"a":"x"}'],
    ),
    (
        "pn ref",
        {
            "$defs": {"C": {"enum": ["a"], "type": "string"}},
            "type": "object",
            "propertyNames": {"$ref": "#/$defs/C"},
            "additionalProperties": {"type": "integer"},
        },
        ['{"a": 1}'],
        ['{"b":1}'],
    ),
    (
        "pn pattern",
        {"type": "object", "propertyNames": {"pattern": "^x_"}, "additionalProperties": {"type": "integer"}},
        ['{"x_1": 1}'],
        ['{"b":1}'],
    ),
    (
        "pn len",
        {"type": "object", "propertyNames": {"minLength": 2, "maxLength": 3}},
        ['{"ab": 1}', '{"abc": []}'],
        ['{"a":1}', '{"abcd":1}'],
    ),
    ("pn false", {"type": "object", "propertyNames": False}, ["{}"], ['{"a":1}']),
    (
        "pn required",
        {
            "type": "object",
            "propertyNames": {"enum": ["a", "b"]},
            "required": ["a"],
            "additionalProperties": {"type": "integer"},
        },
        ['{"a": 1}'],
        ["{}", '{"a":"s"}'],
    ),
    (
        "unique",
        {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True},
        ['["a"]', '["a","b"]', "[]"],
        ['["a","b","a"]'],
    ),
    ("format", {"type": "string", "format": "zzz"}, ['"abc"']),
    (
        "limits of an int64",
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        ["5", "-5"],
        ["1.5"],
    ),
    ("limits of a uint64", {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**64}, ["5"], ["-1"]),
    ("limits of a double", {"type": "number", "minimum": -1.8e308, "maximum": 1.7e308}, ["-1.5"]),
    ("oneOf", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, ["1", "1.5"]),
    (
        "oneOf2",
        {"oneOf": [_with(a={"type": "string"}), _with(b={"type": "string"})]},
        ['{"a":"x"}', '{"b":"x"}'],
        ["{}"],
    ),
    (
        "brackets",
        {
            "$defs": {"Page[int]": {"type": "integer"}, "a/b~c d": {"type": "null"}},
            "anyOf": [
                {"$ref": "#/$defs/Page[int]"},
                {"$ref": "#/$defs/a~1b~0c%20d"},
                {"$ref": "#/$defs/a~1b~0c d"},
            ],
        },
        ["1", "null"],
        ['"x"'],
    ),
    (
        "uneval",
        {"type": "object", "properties": {"a": {"type": "integer"}}, "unevaluatedProperties": False},
        ['{"a": 1}', "{}"],
        ['{"b":1}'],
    ),
    (
        "uneval allOf",
        {
            "type": "object",
            "allOf": [_with(a={"type": "integer"}), {"$ref": "#/$defs/B"}],
            "$defs": {"B": {"properties": {"b": {"type": "null"}}}},
            "unevaluatedProperties": False,
        },
        ['{"a": 1}', '{"a":1,"b":null}'],
        ['{"a":1,"c":1}', '{"a":1,"b":2}'],
    ),
    (
        "if",
        {"if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}, "type": "object"},
        ['{"a":1}'],
    ),
    ("const null", {"const": None}, ["null"], ["1"]),
    ("nullable", {"type": "string", "nullable": True}, ["null", '"x"'], ["1"]),
    (
        "nullable ref",
        {"$ref": "#/$defs/a", "nullable": True, "$defs": {"a": {"type": "integer"}}},
        ["null", "1"],
        ['"x"'],
    ),
    ("nullable enum", {"type": "string", "enum": ["a"], "nullable": True}, ["null", '"a"'], ['"x"']),
    (
        "decimal",
        {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}]},
        ["1.5", '"1.5"', '"-.5"'],
        ['"abc"', '"."', '""'],
    ),
    (
        "decimal2",
        {
            "type": "string",
            "pattern": r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,3}|(?=[\d.]{1,4}0*$)\d{0,3}\.\d{0,2}0*)$",
        },
        ['"1.5"', '"123"'],
        ['"abc"', '"."', '""', '"1234"'],
    ),
    (
        "password",
        {"type": "string", "pattern": r"^(?=.*[A-Z])(?=.*\d)[A-Za-z\d]{4,8}$"},
        ['"Abc1"'],
        ['"abc1"', '"Abcd"', '"A1"'],
    ),
    (
        "dynamic",
        {
            "$dynamicAnchor": "n",
            "type": "object",
            "properties": {"c": {"type": "array", "items": {"$dynamicRef": "#n"}}},
        },
        ['{"c":[{"c":[]}]}'],
        ['{"c":[1]}'],
    ),
    ("anchor", {"$defs": {"x": {"$anchor": "y", "type": "integer"}}, "$ref": "#y"}, ["1"], ['"a"']),
    (
        "root id",
        {"$id": "https://e.com/s", "$defs": {"x": {"type": "integer"}}, "$ref": "https://e.com/s#/$defs/x"},
        ["1"],
        ['"a"'],
    ),
    (
        "rec",
        {
            "type": "object",
            "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
            "required": ["v"],
        },
        ['{"v":1,"next":{"v":2,"next":null}}'],
        ['{"next":null}'],
    ),
    (
        "rec sibling",
        {
            "$defs": {
                "N": {
                    "type": "object",
                    "properties": {"l": {"$ref": "#/$defs/N", "description": "x", "default": None}},
                }
            },
            "$ref": "#/$defs/N",
        },
        ['{"l":{"l":{}}}'],
        ['{"l":1}'],
    ),
    (
        "allOf one",
        {
            "properties": {"l": {"allOf": [{"$ref": "#/$defs/N"}], "title": "x", "default": 3}},
            "$defs": {"N": {"type": "integer"}},
            "type": "object",
        },
        ['{"l":1}'],
        ['{"l":"x"}'],
    ),
    (
        "contains",
        {"type": "array", "contains": {"type": "integer"}, "items": {"type": "integer"}},
        ["[1]"],
        ["[]"],
    ),
    ("minProps", {"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 2}, ['{"a":1,"b":1}']),
    (
        "minProps1",
        {
            "type": "object",
            "properties": {"a": {}, "b": {}},
            "minProperties": 1,
            "additionalProperties": False,
        },
        ['{"a":1,"b":1}'],
        ["{}"],
    ),
    (
        "minProps1 2",
        {
            "type": "object",
            "additionalProperties": {"type": "integer"},
            "minProperties": 2,
            "maxProperties": 3,
        },
        ['{"a":1,"b":1}'],
        ['{"a":1}'],
    ),
    ("maxLength", {"type": "string", "maxLength": 10000000}, ['"a"']),
    ("maxItems", {"type": "array", "items": {"type": "string"}, "maxItems": 100000}, ['["a"]']),
    (
        "float counts",
        {"type": "array", "items": {"type": "string", "minLength": 1.0}, "maxItems": 2.0},
        ['["a"]'],
        ['["a","a","a"]'],
    ),
    (
        "draft4",
        {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "type": "integer",
            "minimum": 1,
            "exclusiveMinimum": True,
        },
        ["2"],
        ["1"],
    ),
    (
        "draft7 items",
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "array",
            "items": [{"type": "integer"}, {"type": "string"}],
            "additionalItems": False,
        },
        ['[1,"a"]'],
        ["[1,2]", '[1,"a",3]'],
    ),
    (
        "deps",
        {
            "type": "object",
            "properties": {"a": {}, "b": {}},
            "dependentRequired": {"a": ["b"]},
            "dependencies": {"a": ["b"]},
        },
        ['{"a":1,"b":2}'],
    ),
    ("number", {"type": "number", "minimum": 0, "exclusiveMaximum": 1}, ["0.5", "0"], ["1", "-0.1"]),
    ("multipleOf", {"type": "number", "multipleOf": 0.01}, ["0.25", "1"], ["0.255"]),
    ("multipleOf3", {"type": "integer", "multipleOf": 3, "minimum": 0, "maximum": 100}, ["9"], ["10"]),
    ("int1.0", {"type": "integer"}, ["1"], ["1.5"]),
    ("const type", {"type": "string", "const": "x"}, ['"x"'], ['"y"']),
    ("enum mixed", {"type": ["string", "null"], "enum": ["a", None]}, ['"a"', "null"], ['"b"']),
    ("unknown", {"type": "string", "x-foo": 3, "order": 1, "errorMessage": "x"}, ['"a"']),
    (
        "x-guidance",
        {"type": "object", "x-guidance": {"whitespace_flexible": False}},
        ['{"a":1}'],
        ['{ "a":1}'],
    ),
    (
        "x-guidance2",
        {"type": "object", "x-guidance": {"whitespace_flexible": True}},
        ['{"a":1}', '{ "a":1}'],
        ["{" + " " * 80 + "}"],
    ),
    ("slash pattern", {"type": "string", "pattern": r"^a\/b\-c$"}, ['"a/b-c"']),
    ("w", {"type": "string", "pattern": r"^\w+$"}, ['"ab_1"'], ['"é"']),
    ("uni", {"type": "string", "pattern": "^\\p{L}+$"}, ['"é"']),
    ("u", {"type": "string", "pattern": "^[\\u0041-\\u0043]+$"}, ['"AB"'], ['"D"']),
]


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_a_schema_allows_its_answers_and_no_others(case: tuple[Any, ...]) -> None:
    _, schema, allowed, *refused = case
    matcher = matcher_of(schema)
    assert [text for text in allowed if not accepts(matcher, text)] == []
    assert [text for text in (refused[0] if refused else ()) if accepts(matcher, text)] == []


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "https://example.com/s"}, "leads out of the schema"),
        ({"$ref": "#/$defs/x"}, "does not exist"),
        ({"$ref": 3}, "a reference is a string, got 3"),
    ],
)
def test_references_that_lead_nowhere_are_refused(schema: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        json_grammar(schema)


def test_a_schema_that_is_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(MAX_SCHEMA_DEPTH + 2):
        schema = {"items": schema}
    with pytest.raises(ValueError, match=f"nested too deeply, the limit is {MAX_SCHEMA_DEPTH}"):
        json_grammar(schema)
