"""JSON objects from clients: strict about types, and about fields that would change the answer.

Unknown fields are ignored, as OpenAI-compatible servers do, and so are those without an effect on the
answer (`user`, `metadata`, `store`, …). Fields that would change the answer and are not implemented are
refused by name unless they hold a value that asks for nothing. null is as good as an absent field.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

Refused = Mapping[str, tuple[object, ...]]
"""Field -> values that ask for nothing, besides null."""


def one_message(message: str) -> WrapValidator:
    """Replace the errors of a union, one per member, by one that says what is wanted."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise ValueError(message) from error

    return WrapValidator(check)


class Wire(BaseModel):
    """A JSON object from a client: no type is coerced, unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    refused: ClassVar[Refused] = {}

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, value: Any) -> Any:
        """Refuse a field that would change the answer but is not implemented."""
        if not isinstance(value, dict):
            raise ValueError("must be an object")
        for name, neutral in cls.refused.items():
            if name in value and not _asks_for_nothing(value[name], neutral):
                raise ValueError(f"{name} is not supported")
        return value

    @classmethod
    def field_in(cls, message: str) -> str | None:
        """The field, or the place in one, that an error message begins with, if it does."""
        word = message.partition(" ")[0].rstrip(":")
        name = re.split(r"[.\[]", word, maxsplit=1)[0]
        return word if name in cls.model_fields or name in cls.refused else None


def _asks_for_nothing(value: object, neutral: tuple[object, ...]) -> bool:
    if value is None:
        return True
    return any(
        value == nothing and isinstance(value, bool) == isinstance(nothing, bool) for nothing in neutral
    )
