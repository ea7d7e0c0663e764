"""Bounds on the lists of a body, so that one that is wrong costs no more than finding its first fault.

The entries of a list are counted before one of them is validated, and validation ends at the first entry that
is wrong. Every list and every mapping of a schema has its limit in `LIST_LIMITS`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from albireo_jax.core.logit_rules import MAX_BIASED_TOKENS, MAX_WORDS
from albireo_jax.core.types import MAX_STOP_IDS


@dataclass(frozen=True, slots=True)
class ListLimit:
    """The most entries of a list or mapping, and what they are; another limit if they are `numbers`."""

    most: int
    things: str
    numbers: "ListLimit | None" = None

    def check(self, name: str, value: list[Any] | dict[str, Any]) -> None:
        """Raise ValueError if a field has more entries."""
        if self.numbers is not None and isinstance(value, list) and value and isinstance(value[0], int):
            self.numbers.check(name, value)
        elif len(value) > self.most:
            raise ValueError(f"{name} has {len(value)} {self.things}, the limit is {self.most}")


_TOKEN_IDS = ListLimit(2**20, "token ids")

LIST_LIMITS = {
    "allowed_token_ids": ListLimit(2**19, "token ids"),
    "arguments": ListLimit(1024, "entries"),
    "bad_words": ListLimit(MAX_WORDS, "words"),
    "chat_template_kwargs": ListLimit(64, "arguments"),
    "choice": ListLimit(1024, "choices"),
    "content": ListLimit(4096, "parts"),
    "guided_choice": ListLimit(1024, "choices"),
    "logit_bias": ListLimit(MAX_BIASED_TOKENS, "tokens"),
    "messages": ListLimit(4096, "messages"),
    "parameters": ListLimit(1024, "entries"),
    "prompt": ListLimit(1024, "prompts", numbers=_TOKEN_IDS),
    "schema": ListLimit(1024, "entries"),
    "stop": ListLimit(32, "strings"),
    "stop_token_ids": ListLimit(MAX_STOP_IDS, "ids"),
    "tokens": _TOKEN_IDS,
    "tool_calls": ListLimit(128, "calls"),
    "tools": ListLimit(128, "tools"),
}
"""Limits by the names of fields, which mean the same wherever they stand."""


def _fail_fast(schema: Any) -> None:
    """Have every list in a core schema end its validation at the first fault."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        schema = list(schema.values())
    if isinstance(schema, list | tuple):
        for part in schema:
            _fail_fast(part)


def _write_limit(schema: dict[str, Any], limit: ListLimit) -> None:
    """Add a limit to the JSON schema of a field, whichever of its types it is for."""
    for part in (schema, *schema.get("anyOf", ())):
        if part.get("type") == "array":
            is_numbers = limit.numbers is not None and part.get("items", {}).get("type") == "integer"
            part["maxItems"] = limit.numbers.most if is_numbers and limit.numbers else limit.most
        elif part.get("type") == "object":
            part["maxProperties"] = limit.most


class BoundedModel(BaseModel):
    """A model whose lists and mappings keep their limits, and are read to the first fault only."""

    list_limits: ClassVar[dict[str, ListLimit]] = LIST_LIMITS

    @model_validator(mode="before")
    @classmethod
    def refuse_long_lists(cls, value: Any) -> Any:
        """Refuse a list beyond its limit before its entries are looked at."""
        if isinstance(value, dict):
            for name in cls.list_limits.keys() & value.keys():
                if isinstance(value[name], list | dict):
                    cls.list_limits[name].check(name, value[name])
        return value

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        written = handler(schema)
        properties = handler.resolve_ref_schema(written).get("properties", {})
        for name in cls.list_limits.keys() & properties.keys():
            _write_limit(properties[name], cls.list_limits[name])
        return written
