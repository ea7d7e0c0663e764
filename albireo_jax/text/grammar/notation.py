"""The one translation of a structured output into the notation of the grammar library.

Each wish becomes a grammar of its own in the library's list of grammars, in the notation of Lark: its rule
names, its options and what it ignores are its own, wherever it stands. A composed one refers to its parts by
place, `part(0)`; the first grammar of the list is nothing but a reference to the whole. So a schema, an
expression, choices or a caller's grammar mean the same alone, after reasoning, and beside or in tool calls.
"""

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

import llguidance

from albireo_jax.core.types import StructuredOutput, StructureKind
from albireo_jax.text.grammar.json_schema import arguments_schema, json_grammar

MAX_TEXT_BYTES = 2**17
"""Bytes of a schema, an expression, a grammar, or of all choices."""

MAX_COMPOSED_BYTES = 4 * MAX_TEXT_BYTES
"""Bytes of all parts of a composed structured output together, such as the schemas of many tools."""

_NAMES = {
    StructureKind.JSON_OBJECT: "JSON object",
    StructureKind.JSON_SCHEMA: "JSON schema",
    StructureKind.REGEX: "regular expression",
    StructureKind.CHOICE: "choices",
    StructureKind.GRAMMAR: "grammar",
    StructureKind.ARGUMENTS: "JSON schema of arguments",
    StructureKind.COMPOSED: "grammar",
}
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'  # last, so that a caller's lines keep their numbers
_PART = re.compile("\x1a(\\d+);")  # quoted text never holds this character


def part(index: int) -> str:
    """The reference in a composed text to one of its parts, a symbol of a rule."""
    return f"\x1a{index};"


def quoted(text: str) -> str:
    """`text` as a string of a grammar."""
    return json.dumps(text, ensure_ascii=False)


def wish_name(structured: StructuredOutput) -> str:
    """The kind of a structured output in words; of one composed around a single part, that of the part."""
    while structured.kind is StructureKind.COMPOSED and len(structured.parts) == 1:
        structured = structured.parts[0]
    return _NAMES[structured.kind]


def size_of(structured: StructuredOutput) -> int:
    """Bytes of all its texts. Raises ValueError for a wish that exceeds a limit or is not text."""
    name = _NAMES[structured.kind]
    try:
        num_bytes = sum(len(text.encode()) for text in (structured.text, *structured.choices))
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: half a surrogate pair at {error.start}, which is no character") from error
    if num_bytes > MAX_TEXT_BYTES:
        raise ValueError(f"{name}: {num_bytes} bytes, the limit is {MAX_TEXT_BYTES}")
    num_bytes += sum(map(size_of, structured.parts))
    if num_bytes > MAX_COMPOSED_BYTES:
        raise ValueError(f"{name}: {num_bytes} bytes with its parts, the limit is {MAX_COMPOSED_BYTES}")
    return num_bytes


def library_grammar(structured: StructuredOutput) -> str:
    """All grammars of `structured`, as the library takes them. Raises ValueError naming what is wrong.

    Their names hold a digest of the text, so that no caller's grammar can refer to another's.
    """
    prefix = f"p{hashlib.sha256(repr(structured).encode()).hexdigest()[:16]}"
    named: dict[str, str] = {}
    _write(structured, prefix, named)
    grammars = [{"lark_grammar": f"start: @{prefix}{_OPTIONS}"}]
    grammars += [{"name": name, "lark_grammar": lark} for name, lark in named.items()]
    return json.dumps({"grammars": grammars})


def _write(structured: StructuredOutput, name: str, named: dict[str, str]) -> None:
    """Add the grammar of `structured`, under its name, and those of its parts."""
    try:
        lark = _TRANSLATIONS[structured.kind](structured)
    except ValueError as error:
        raise ValueError(f"{_NAMES[structured.kind]}: {error}") from error
    if structured.kind is StructureKind.COMPOSED:
        lark = _PART.sub(lambda match: f"@{name}_{match[1]}", lark)
    named[name] = lark + _OPTIONS
    for index, inner in enumerate(structured.parts):
        _write(inner, f"{name}_{index}", named)


def _json_object(_: StructuredOutput) -> str:
    return f"start: %json {json_grammar({'type': 'object'})}"


def _json_schema(structured: StructuredOutput) -> str:
    return f"start: %json {json_grammar(_schema(structured.text))}"


def _arguments(structured: StructuredOutput) -> str:
    schema = _schema(structured.text) if structured.text else None
    return f"start: %json {json_grammar(arguments_schema(schema))}"


def _schema(text: str) -> dict[str, Any] | bool:
    try:
        schema: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON, or nested too deeply: {error}") from error
    if not isinstance(schema, dict | bool):
        raise ValueError(f"an object is expected, got {text!r:.80}")
    return schema


def _regex(structured: StructuredOutput) -> str:
    """The expression, `\\d` in it being the ten digits of ASCII."""
    if not structured.text:
        raise ValueError("it is empty")
    return f"start: /{llguidance.regex_to_lark(structured.text, 'd')}/"


def _choice(structured: StructuredOutput) -> str:
    if not all(structured.choices) or not structured.choices:
        raise ValueError(f"at least one is needed and none may be empty, got {structured.choices!r:.80}")
    return f"start: CHOICE\nCHOICE: {' | '.join(map(quoted, structured.choices))}"


def _lark(structured: StructuredOutput) -> str:
    if not structured.text.strip():
        raise ValueError("it is empty")
    return structured.text


_TRANSLATIONS: dict[StructureKind, Callable[[StructuredOutput], str]] = {
    StructureKind.JSON_OBJECT: _json_object,
    StructureKind.JSON_SCHEMA: _json_schema,
    StructureKind.REGEX: _regex,
    StructureKind.CHOICE: _choice,
    StructureKind.GRAMMAR: _lark,
    StructureKind.ARGUMENTS: _arguments,
    StructureKind.COMPOSED: _lark,
}
