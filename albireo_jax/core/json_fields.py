"""Reads of a model's JSON files, and of typed fields of config.json; ModelError names the file or the key."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from albireo_jax.core.errors import ModelError

Json: TypeAlias = Mapping[str, Any]


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises ModelError if the file cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error


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
