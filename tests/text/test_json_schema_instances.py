"""Every instance that a validator accepts can be written, for random schemas."""

import json
from typing import Any

import jsonschema
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.labs.schema_lab import accepts, matcher_of

_LEAVES: st.SearchStrategy[Any] = st.sampled_from(
    [
        {"type": "integer"},
        {"type": "string", "format": "path", "deprecated": True},
        {"type": "boolean", "examples": [3]},
        {"type": "null"},
        {"enum": ["a", "é", 1, None]},
        {"type": "string", "nullable": True},
        {"const": {"k": [1]}},
        {"type": "string", "pattern": "^[ab]{1,3}$"},
    ]
)


def _list(one: Any) -> dict[str, Any]:
    return {"type": "array", "items": one, "maxItems": 2, "uniqueItems": True}


def _map(one: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": one}


def _named(one: Any) -> dict[str, Any]:
    return {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": one}


def _record(one: Any, other: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"a": one, "b": other},
        "required": ["a"],
        "unevaluatedProperties": False,
        "dependentRequired": {"a": ["b"]},
    }


def _one_of(one: Any, other: Any) -> dict[str, Any]:
    return {"oneOf": [one, other]}


def _all_of(one: Any) -> dict[str, Any]:
    return {"allOf": [one], "title": "x", "contentEncoding": "base64"}


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    single = [st.builds(build, inner) for build in (_list, _map, _named, _all_of)]
    return st.one_of(*single, *(st.builds(build, inner, inner) for build in (_record, _one_of)))


def _instance(one: Any, other: Any) -> dict[str, Any]:
    return {"a": one, "b": other}


def _smaller(one: Any) -> dict[str, Any]:
    return {"a": one}


def _holding(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    objects = (st.builds(_instance, inner, inner), st.builds(_smaller, inner))
    return st.one_of(st.lists(inner, max_size=2), *objects)


_SCHEMAS: st.SearchStrategy[Any] = st.recursive(_LEAVES, _nested, max_leaves=4)
_SIMPLE: list[Any] = [0, -7, 12, "a", "é", "ab", "x y", None, True, {"k": [1]}, {}]
_INSTANCES: st.SearchStrategy[Any] = st.recursive(st.sampled_from(_SIMPLE), _holding, max_leaves=4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(schema=_SCHEMAS, instances=st.lists(_INSTANCES, min_size=12, max_size=12))
def test_every_instance_that_a_validator_accepts_can_be_written(
    schema: dict[str, Any], instances: list[Any]
) -> None:
    try:
        matcher = matcher_of(schema)
    except (ValueError, AssertionError) as error:
        raise AssertionError(f"refused: {json.dumps(schema)}: {error}") from error
    validator = jsonschema.Draft202012Validator(_without_nullable(schema))
    for instance in instances:
        text = json.dumps(instance, ensure_ascii=False)
        if validator.is_valid(instance):
            assert accepts(matcher, text), f"{json.dumps(schema)} refuses {text}"


def _without_nullable(schema: Any) -> Any:
    """`nullable` as a validator reads it."""
    if isinstance(schema, list):
        return [_without_nullable(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {name: _without_nullable(value) for name, value in schema.items() if name != "nullable"}
    return {"anyOf": [plain, {"type": "null"}]} if schema.get("nullable") is True else plain
