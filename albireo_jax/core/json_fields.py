"""Typed reads of a config.json; ModelError names a key that is missing or of a wrong type."""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from albireo_jax.core.errors import ModelError

Json: TypeAlias = Mapping[str, Any]


def integer(config: Json, key: str, default: int | None = None) -> int:
    """The integer under `key`, `default` where it is missing or null."""
    value = _required(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelError(f"config.json: {key} must be an integer, got {value!r}")
    return value


def positive(config: Json, key: str, default: float | None = None) -> float:
    """The positive, finite number under `key`, `default` where it is missing or null."""
    value = _required(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelError(f"config.json: {key} must be a positive number, got {value!r}")
    return float(value)


def truth(config: Json, key: str) -> bool:
    """Whether the value under `key` is true; missing and null are false."""
    value = config.get(key)
    if not isinstance(value, bool | None):
        raise ModelError(f"config.json: {key} must be true or false, got {value!r}")
    return bool(value)


def _required(config: Json, key: str, default: object) -> object:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"config.json has no {key}")
    return value
