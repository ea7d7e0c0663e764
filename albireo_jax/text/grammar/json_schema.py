"""A caller's JSON schema, written with the words that the grammar library reads.

The meaning is kept where the library can express it. Words that ask for nothing are left out: annotations,
unknown words, formats that are not known. References of every form (names with brackets or escapes, `$id`,
anchors) are written anew.

An answer may be *looser* than its schema in these words, which are left out or weakened so that every valid
answer can still be written: `oneOf` is read as `anyOf`; `uniqueItems`, `contains` and `maxContains`, beyond
the number of items that they imply; `if`, `then` and `else`; the `dependent…` words; `propertyNames` beside
`patternProperties`, or of another form than names, a pattern or lengths; `unevaluated…` beside parts that it
cannot look into; bounds on the number of properties where some are optional; look-around in a pattern that
is bound to the beginning; bounds on a number from 2^63 - 1 on. `not` is left for the library to refuse
by name.
"""

import json
from typing import Any

from albireo_jax.text.grammar.schema_references import References, Schema
from albireo_jax.text.grammar.schema_words import (
    evaluated_names,
    numbers_as_integers,
    only_names,
    plain_patterns,
    without_far_bounds,
)

MAX_SCHEMA_DEPTH = 128
"""Schemas inside one another, without what references add."""

_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"  # a model must not be able to write spaces for ever
_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
_COPIED = (
    *("type", "const", "enum", "required", "minProperties", "maxProperties", "minItems", "maxItems"),
    *("minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("pattern", "format", "not"),
)
_OF_ONE = ("additionalProperties", "additionalItems", "items")
_OF_MANY = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_OF_NAMES = ("properties", "patternProperties")
_WORDS = frozenset((*_COPIED, *_OF_ONE, *_OF_MANY, *_OF_NAMES, "$ref", "$dynamicRef", "$recursiveRef"))
_OPTIONS = ("item_separator", "key_separator", "whitespace_flexible", "whitespace_pattern")


def json_grammar(schema: Schema) -> str:
    """`schema` as JSON that llguidance compiles. Raises ValueError if no grammar can express it."""
    if isinstance(schema, bool):
        return json.dumps(schema)
    return json.dumps({"x-guidance": _options(schema.get("x-guidance"))} | _Writer(schema).write())


def arguments_schema(schema: Schema | None) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object; nothing said means that there are none."""
    if schema is None or schema is True:
        return {"type": "object", "additionalProperties": False}
    if schema is False:
        raise ValueError("the schema of a function's arguments is false, which allows none")
    kinds = schema.get("type", "object")
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise ValueError(f"the arguments of a function are an object, got the type {kinds!r:.80}")
    if "type" not in schema and _WORDS.isdisjoint(schema):
        return {**schema, "type": "object", "additionalProperties": False}
    return {**schema, "type": "object", "nullable": False}


def _options(asked: Any) -> dict[str, Any]:
    """The library's options; a caller may ask for narrower white space, not for endless."""
    options: dict[str, Any] = {"whitespace_pattern": _WHITESPACE, "coerce_one_of": True}
    if isinstance(asked, dict):
        options |= {name: asked[name] for name in _OPTIONS if name in asked}
        if asked.get("whitespace_flexible") is False and "whitespace_pattern" not in asked:
            del options["whitespace_pattern"]
    return options


class _Writer:
    """Writes a schema and all that it refers to, each target of a reference once."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._references = References(root)

    def write(self) -> dict[str, Any]:
        """The schema, its definitions with it."""
        written = self._object(self._root, depth=0)
        definitions: dict[str, Any] = {}
        while (target := self._references.next_unwritten()) is not None:
            definitions[target.name] = self._schema(target.schema, depth=0)
        return written | ({"$defs": definitions} if definitions else {})

    def _schema(self, schema: Any, *, depth: int) -> Any:
        if not isinstance(schema, dict):
            return schema  # true or false; the library refuses the rest by name
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(f"nested too deeply, the limit is {MAX_SCHEMA_DEPTH}")
        return self._object(schema, depth=depth)

    def _object(self, schema: dict[str, Any], *, depth: int) -> dict[str, Any]:
        written: dict[str, Any] = {}
        patterns: list[str] = []
        for word, value in schema.items():  # in their order, which is that of an answer's properties
            if word in _OF_MANY and isinstance(value, list):
                written[word] = [self._schema(part, depth=depth + 1) for part in value]
            elif word == "additionalItems" and not isinstance(schema.get("items"), list):
                continue  # it says nothing without a list
            elif word in _OF_ONE:
                written[word] = self._schema(value, depth=depth + 1)
            elif word in _OF_NAMES and isinstance(value, dict):
                written[word] = {name: self._schema(part, depth=depth + 1) for name, part in value.items()}
            elif word in ("$ref", "$dynamicRef", "$recursiveRef"):
                written["$ref"] = self._references.written(value)
            elif word == "pattern" and isinstance(value, str):
                patterns = plain_patterns(value)
            elif word == "format":
                written |= {word: value} if value in _FORMATS else {}
            elif word in _WORDS:
                written[word] = value
        _restrict_text(written, patterns)
        self._restrict_names(schema, written)
        self._restrict_unevaluated(schema, written, depth=depth)
        _count_items(schema, written, enum=self._enum_of(schema.get("items")))
        return _nullable(schema, _simplified(without_far_bounds(numbers_as_integers(written))))

    def _restrict_names(self, schema: dict[str, Any], written: dict[str, Any]) -> None:
        """Put `propertyNames` into the properties that are not listed."""
        if "propertyNames" not in schema:
            return
        pattern = only_names(self._references.followed(schema["propertyNames"]))
        if pattern is None or "patternProperties" in written:
            return
        others = written.pop("additionalProperties", True)
        if pattern:
            written["patternProperties"] = {pattern: others}
        written["additionalProperties"] = False

    def _restrict_unevaluated(self, schema: dict[str, Any], written: dict[str, Any], *, depth: int) -> None:
        """Say `unevaluated…` as what is said of additional properties and items, where that is the same."""
        rest = schema.get("unevaluatedProperties", True)
        if rest is not True and "additionalProperties" not in written:
            names = evaluated_names(schema, self._references.followed)
            if names is not None:
                own = written.get("properties", {})
                written["properties"] = own | {name: True for name in names if name not in own}
                written["additionalProperties"] = self._schema(rest, depth=depth + 1)
        rest = schema.get("unevaluatedItems", True)
        alone = not any(word in schema for word in ("$ref", "allOf", "anyOf", "oneOf", "if", "contains"))
        if rest is not True and alone and "items" not in written:
            written["items"] = self._schema(rest, depth=depth + 1)

    def _enum_of(self, items: Any) -> list[Any] | None:
        followed = self._references.followed(items)
        enum = followed.get("enum") if isinstance(followed, dict) else None
        return enum if isinstance(enum, list) else None


def _restrict_text(written: dict[str, Any], patterns: list[str]) -> None:
    if len(patterns) == 1:
        written["pattern"] = patterns[0]
    elif patterns:
        parts = written.get("allOf", [])
        written["allOf"] = (
            [*parts, *({"pattern": part} for part in patterns)] if isinstance(parts, list) else parts
        )


def _count_items(schema: dict[str, Any], written: dict[str, Any], *, enum: list[Any] | None) -> None:
    """Keep what words on the items of an array, that cannot be followed, say about their number."""
    if "contains" in schema:
        least = schema.get("minContains", 1)
        if isinstance(least, int | float):
            written["minItems"] = max(written.get("minItems", 0), least)
    if schema.get("uniqueItems") is True and enum is not None and "prefixItems" not in schema:
        written["maxItems"] = min(written.get("maxItems", len(enum)), len(enum))


def _simplified(written: dict[str, Any]) -> dict[str, Any]:
    """The same without what stands in the library's way: bounds on a mix of properties, and lone `allOf`."""
    bounds = [name for name in ("minProperties", "maxProperties") if name in written]
    if bounds and _has_optional_properties(written) and not _are_simple(written):
        for name in bounds:
            del written[name]
    parts = written.get("allOf")
    if isinstance(parts, list) and not parts:
        del written["allOf"]
    elif isinstance(parts, list) and len(parts) == 1 and len(written) == 1 and isinstance(parts[0], dict):
        return parts[0]
    return written


def _has_optional_properties(written: dict[str, Any]) -> bool:
    listed, required = written.get("properties"), written.get("required", [])
    return isinstance(listed, dict) and isinstance(required, list) and any(n not in required for n in listed)


def _are_simple(written: dict[str, Any]) -> bool:
    """Whether bounds on the number of properties are those that the library knows with optional ones."""
    closed = written.get("additionalProperties") is False and "patternProperties" not in written
    return closed and written.get("minProperties", 0) in (0, 1) and written.get("maxProperties", 0) in (0, 1)


def _nullable(schema: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI's way to allow null as well."""
    if schema.get("nullable") is not True:
        return written
    kinds = written.get("type")
    if kinds is None or "enum" in written or "const" in written:
        return {"anyOf": [written, {"type": "null"}]} if written else written
    kinds = kinds if isinstance(kinds, list) else [kinds]
    return {**written, "type": [*kinds, *(["null"] if "null" not in kinds else [])]}
