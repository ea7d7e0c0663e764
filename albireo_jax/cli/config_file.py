"""Flags from a YAML file."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import typer
import yaml
from typer.core import TyperOption

_NOT_IN_FILE = ("config", "help")


def read_flags(path: Path, known: Collection[str]) -> dict[str, Any]:
    """Values of flags by parameter name, as text that the command line's own parser converts.

    Keys are flags without the leading dashes; `-` and `_` are the same. Raises ValueError for a file
    that is no mapping of `known` keys to single values or lists of them.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got {content!r:.50}")
    names = sorted(name.replace("_", "-") for name in known)
    flags: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ValueError(f"{path} has the unknown key {key!r}; known are {', '.join(names)}")
        if name in flags:
            raise ValueError(f"{path} has the key {key!r} twice")
        flags[name] = _as_text(path, key, value)
    return flags


def use_config_file(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of --config: what the file says stands in for flags that the command line lacks."""
    if path is not None:
        known = {param.name for param in context.command.params if param.name} - {*_NOT_IN_FILE}
        repeatable = {
            param.name
            for param in context.command.params
            if isinstance(param, TyperOption) and param.multiple
        }
        try:
            flags = read_flags(path, known)
            context.default_map = {
                name: [value] if name in repeatable and isinstance(value, str) else value
                for name, value in flags.items()
            }
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    return path


def _as_text(path: Path, key: object, value: object) -> str | list[str]:
    if isinstance(value, list):
        return [_scalar(path, key, item) for item in value]
    return _scalar(path, key, value)


def _scalar(path: Path, key: object, value: object) -> str:
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"{path}: {key} must be a text, a number or true or false, got {value!r:.50}")
