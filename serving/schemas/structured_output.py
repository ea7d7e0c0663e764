"""Constraints on an answer, in all the notations that clients use.

OpenAI's `response_format`, vLLM's `structured_outputs`, and the older `guided_*` fields of vLLM all become
one `StructuredOutput`; a body may use one of them.
"""

import json
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field
from pydantic_core import from_json

from albireo_jax.core.types import StructuredOutput, StructureKind
from albireo_jax.serving.schemas.strict_model import StrictModel
from albireo_jax.text.answers.json_scanner import MAX_JSON_DEPTH

MAX_STRUCTURE_BYTES = 64 * 2**10
"""Of a schema, an expression, a grammar, or all choices together."""

MAX_STRUCTURE_CHOICES = 1024


class JsonSchemaFormat(StrictModel):
    """OpenAI's wrapping of a schema; with or without `strict` the answer follows it."""

    closed = True
    harmless = frozenset(("description",))

    name: str | None = None
    strict: bool | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(StrictModel):
    """OpenAI's way."""

    closed = True
    refused = {"schema": ()}  # noqa: RUF012
    instead = {"schema": "the type json_schema with json_schema.schema"}  # noqa: RUF012

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def structured(self) -> StructuredOutput | None:
        """The constraint that is asked for; None for text. Raises ValueError."""
        if self.type != "json_schema" and self.json_schema is not None:
            raise ValueError(f"response_format.json_schema needs the type json_schema, not {self.type}")
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutput(kind=StructureKind.JSON_OBJECT)
        if self.json_schema is None or self.json_schema.json_schema is None:
            raise ValueError("response_format.json_schema.schema is required for the type json_schema")
        return json_schema("response_format.json_schema.schema", self.json_schema.json_schema)


class StructuredOutputs(StrictModel):
    """vLLM's way; one of the fields."""

    closed = True
    harmless = frozenset(("backend", "disable_fallback"))
    refused = {  # noqa: RUF012
        "structural_tag": (),
        "whitespace_pattern": ("",),
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
    }

    json_schema: Any = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StructuredBody(StrictModel):
    """The fields of a body that say what its answer must look like."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def structured(self) -> StructuredOutput | None:
        """The constraint on the answer, if any; raises ValueError if the body has more than one."""
        wishes: dict[str, tuple[Callable[[str, Any], StructuredOutput], Any]] = {
            "guided_json": (json_schema, self.guided_json),
            "guided_regex": (_regex, self.guided_regex),
            "guided_choice": (_choice, self.guided_choice),
            "guided_grammar": (_grammar, self.guided_grammar),
        }
        outputs = self.structured_outputs
        if outputs is not None:
            wishes |= {
                "structured_outputs.json": (json_schema, outputs.json_schema),
                "structured_outputs.regex": (_regex, outputs.regex),
                "structured_outputs.choice": (_choice, outputs.choice),
                "structured_outputs.grammar": (_grammar, outputs.grammar),
                "structured_outputs.json_object": (_json_object, outputs.json_object or None),
            }
        asked = {
            name: (read, value) for name, (read, value) in wishes.items() if not _is_nothing(name, value)
        }
        answer_format = self.response_format.structured() if self.response_format is not None else None
        names = [*asked, *(["response_format"] if answer_format is not None else [])]
        if len(names) > 1:
            raise ValueError(f"{names[0]} cannot be combined with {names[1]}")
        for name, (read, value) in asked.items():
            return read(name, value)
        return answer_format


def json_schema(where: str, value: Any) -> StructuredOutput:
    """A schema, as an object or as JSON text; raises ValueError for what is neither, or too large."""
    if isinstance(value, str):
        _check_size(where, value)
        try:
            value = from_json(value, allow_inf_nan=False)
        except ValueError as error:
            raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a JSON schema, an object, got {value!r:.50}")
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise ValueError(f"{where} is nested too deep, the limit is {MAX_JSON_DEPTH}")
    text = json.dumps(value, ensure_ascii=False)
    _check_size(where, text)
    return StructuredOutput(kind=StructureKind.JSON_SCHEMA, text=text)


def _regex(where: str, value: str) -> StructuredOutput:
    _check_size(where, value)
    return StructuredOutput(kind=StructureKind.REGEX, text=value)


def _is_nothing(name: str, value: object) -> bool:
    """Whether a field asks for nothing; an empty grammar is none, and is refused instead."""
    return value is None or (value in ("", []) and not name.endswith("grammar"))


def _grammar(where: str, value: str) -> StructuredOutput:
    if not value.strip():
        raise ValueError(f"{where} is empty, a grammar has a start rule")
    _check_size(where, value)
    return StructuredOutput(kind=StructureKind.GRAMMAR, text=value)


def _choice(where: str, value: list[str]) -> StructuredOutput:
    if len(value) > MAX_STRUCTURE_CHOICES:
        raise ValueError(f"{where} has {len(value)} choices, the limit is {MAX_STRUCTURE_CHOICES}")
    if not all(value):
        raise ValueError(f"{where} must hold non-empty strings")
    _check_size(where, "".join(value))
    return StructuredOutput(kind=StructureKind.CHOICE, choices=tuple(value))


def _json_object(where: str, value: bool) -> StructuredOutput:
    del where, value
    return StructuredOutput(kind=StructureKind.JSON_OBJECT)


def _check_size(where: str, text: str) -> None:
    size = len(text.encode())
    if size > MAX_STRUCTURE_BYTES:
        raise ValueError(f"{where} has {size} bytes, the limit is {MAX_STRUCTURE_BYTES}")


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether objects and lists are nested deeper than `limit`, level by level."""
    level = [value]
    for _ in range(limit + 1):
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        ]
        if not level:
            return False
    return True
