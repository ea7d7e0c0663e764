"""JSON objects from clients: strict about types, and about fields that would change the answer.

Unknown fields are ignored, as OpenAI-compatible servers do, and so are those without an effect on the
answer (`user`, `metadata`, `store`, …). Fields that would change the answer and are not implemented are
refused by name unless they hold a value that asks for nothing. null is as good as an absent field. Small
objects that only say how to answer are `closed`: they refuse every name that they do not know.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from albireo_jax.serving.schemas.list_limits import BoundedModel

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


def _whole(value: Any) -> Any:
    """An integer that was written as a float, as JavaScript and YAML do; everything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _all_whole(values: Any) -> Any:
    return list(map(_whole, values)) if isinstance(values, list) else values


Whole = Annotated[int, BeforeValidator(_whole)]
"""An integer; 5.0 is one."""

WholeNumbers = Annotated[list[int], BeforeValidator(_all_whole)]
"""A list of integers."""


class StrictModel(BoundedModel):
    """A JSON object from a client: no type is coerced, unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    refused: ClassVar[Refused] = {}
    instead: ClassVar[Mapping[str, str]] = {}
    """Refused field -> what to use in its place."""

    closed: ClassVar[bool] = False
    harmless: ClassVar[frozenset[str]] = frozenset()
    """Further names that a closed object may have."""

    @model_validator(mode="before")
    @classmethod
    def refuse_unsupported(cls, value: Any) -> Any:
        """Refuse a field that would change the answer but is not implemented."""
        if not isinstance(value, dict):
            raise ValueError("must be an object")
        for name, given in value.items():
            if name in cls.refused and not _asks_for_nothing(given, cls.refused[name]):
                instead = f"; use {cls.instead[name]}" if name in cls.instead else ""
                raise ValueError(f"{name} is not supported{instead}")
        if cls.closed:
            cls._refuse_unknown(value)
        return value

    @classmethod
    def _refuse_unknown(cls, value: dict[str, Any]) -> None:
        known = {field.alias or name for name, field in cls.model_fields.items()}
        allowed = known | cls.harmless | {*cls.refused}
        for name, given in value.items():
            if given is not None and name not in allowed:
                raise ValueError(f"{name!r:.80} is not a field here; known are {', '.join(sorted(known))}")

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
