"""Frozen dataclasses from the JSON that `dataclasses.asdict` made of them."""

from dataclasses import fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def dataclass_from_json(kind: type[T], content: object) -> T:
    """The `kind` that was written as `content`: dataclasses, tuples and dictionaries of one type, enums,
    numbers, texts, None.

    Raises ValueError if the content has not the form of `kind`.
    """
    return _from_json(kind, content)


def _from_json(kind: Any, content: Any) -> Any:
    if is_dataclass(kind):
        return _dataclass(kind, content)
    origin = get_origin(kind)
    if origin is UnionType:
        if content is None:
            return None
        [one] = [argument for argument in get_args(kind) if argument is not NoneType]
        return _from_json(one, content)
    if origin is tuple and isinstance(content, list):
        return tuple(_from_json(get_args(kind)[0], item) for item in content)
    if origin is dict and isinstance(content, dict):
        return {key: _from_json(get_args(kind)[1], value) for key, value in content.items()}
    if isinstance(kind, type):
        if issubclass(kind, Enum):
            return kind(content)
        if isinstance(content, kind) or (kind is float and isinstance(content, int)):
            return content
    raise ValueError(f"expected {kind}, got {content!r:.80}")


def _dataclass(kind: Any, content: Any) -> Any:
    names = {field.name for field in fields(kind)}
    if not isinstance(content, dict) or set(content) != names:
        raise ValueError(f"expected the fields {sorted(names)} of {kind}, got {content!r:.80}")
    hints = get_type_hints(kind)
    return kind(**{name: _from_json(hints[name], content[name]) for name in names})
