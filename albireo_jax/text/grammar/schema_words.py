"""Words of JSON Schema that are said by others: names by patterns, look-ahead by intersection."""

import re
from collections.abc import Callable
from typing import Any

_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_FAR = 2**63 - 1
_APPLICATORS = ("allOf", "anyOf", "oneOf")
_CANNOT_LOOK_INTO = ("patternProperties", "additionalProperties", "unevaluatedProperties", "dependentSchemas")
_MAX_LOOKED_INTO = 100
_LEADING = re.compile(r"\^\(\?([=!])")
_LOOKAROUND = re.compile(r"\(\?<?[=!]")
_NOTHING_BUT = re.compile(r"\^?\[([^\]\\^]+)\]\*\$")
"""That a text is nothing but characters of a class; not so, it has one of another."""

_SPECIAL = re.compile(r"[\\^$.|?*+()\[\]{}/-]")


def numbers_as_integers(words: dict[str, Any]) -> dict[str, Any]:
    """The words with counts such as 1.0, which JSON Schema takes for integers, as integers."""
    for name in _COUNTS:
        value = words.get(name)
        if isinstance(value, float) and value.is_integer():
            words[name] = int(value)
    return words


def without_far_bounds(words: dict[str, Any]) -> dict[str, Any]:
    """The words without bounds on a number from 2^63 - 1 on, which the library cannot count to.

    Schemas made of a type write its own limits; answers are looser by numbers of twenty digits.
    """
    far = [name for name in _BOUNDS if isinstance(words.get(name), int | float) and abs(words[name]) >= _FAR]
    return {name: value for name, value in words.items() if name not in far}


def only_names(names: Any) -> str | None:
    """The pattern of what `propertyNames` allows: "" for no name at all, None if it has no such form."""
    if names is False:
        return ""
    if not isinstance(names, dict):
        return None
    listed = [names["const"]] if "const" in names else names.get("enum")
    if isinstance(listed, list):
        texts = [name for name in listed if isinstance(name, str)]
        return f"^({'|'.join(map(_quoted, texts))})$" if texts else ""
    if isinstance(names.get("pattern"), str):
        return names["pattern"]
    if "minLength" in names or "maxLength" in names:
        sizes = numbers_as_integers({name: names.get(name, "") for name in ("minLength", "maxLength")})
        return f"^[\\s\\S]{{{sizes['minLength'] or 0},{sizes['maxLength']}}}$"
    return None


def evaluated_names(schema: dict[str, Any], follow: Callable[[Any], Any]) -> list[str] | None:
    """Properties that a schema or a part of it speaks of; None if that cannot be told.

    `follow` gives what a reference leads to.
    """
    names: dict[str, None] = {}
    seen: set[int] = set()
    parts: list[Any] = [{k: v for k, v in schema.items() if k != "unevaluatedProperties"}]
    while parts:
        part = follow(parts.pop())
        if not isinstance(part, dict) or id(part) in seen:
            continue
        seen.add(id(part))
        unclear = any(part.get(word, False) is not False for word in _CANNOT_LOOK_INTO)
        if unclear or len(seen) > _MAX_LOOKED_INTO:
            return None
        names |= dict.fromkeys(part["properties"]) if isinstance(part.get("properties"), dict) else {}
        for word in _APPLICATORS:
            parts += part[word] if isinstance(part.get(word), list) else []
        parts += [part[word] for word in ("if", "then", "else") if word in part]
        if "$ref" in part:
            parts.append({"$ref": part["$ref"]})
    return list(names)


def plain_patterns(pattern: str) -> list[str]:
    """Patterns that together say what `pattern` does; the library can read no look-around.

    A look-ahead at the very beginning is a condition on the whole text, a pattern of its own. Others are left
    out, which is looser. A pattern that is not bound to the beginning is left as it is.
    """
    if not pattern.startswith("^") or "(?" not in pattern:
        return [pattern]
    conditions: list[str] = []
    rest = pattern
    while (match := _LEADING.match(rest)) and (end := _end_of_group(rest, 1)) is not None:
        inner = rest[match.end() : end]
        only = _NOTHING_BUT.fullmatch(inner)
        if match[1] == "=":
            conditions.append(f"^(?:{inner.removeprefix('^')})")
        elif only is not None:
            conditions.append(f"[^{only[1]}]")
        rest = f"^{rest[end + 1 :]}"
    rest = _without_lookaround(rest)
    return [*conditions, *([rest] if rest not in ("^", "^.*$") else [])]


def _without_lookaround(pattern: str) -> str:
    """The pattern without the look-arounds inside it."""
    parts: list[str] = []
    position, in_class = 0, False
    while position < len(pattern):
        if not in_class and _LOOKAROUND.match(pattern, position):
            end = _end_of_group(pattern, position)
            if end is None:
                return pattern
            position = end + 1
            continue
        size = 2 if pattern[position] == "\\" else 1
        if size == 1:
            in_class = pattern[position] == "[" if not in_class else pattern[position] != "]"
        parts.append(pattern[position : position + size])
        position += size
    return "".join(parts)


def _end_of_group(pattern: str, start: int) -> int | None:
    """Offset at which the group that opens at `start` closes."""
    depth, in_class, position = 0, False, start
    while position < len(pattern):
        character = pattern[position]
        if character == "\\":
            position += 1
        elif in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
        elif character in "()":
            depth += 1 if character == "(" else -1
            if depth == 0:
                return position
        position += 1
    return None


def _quoted(text: str) -> str:
    """An expression that matches `text`."""
    return _SPECIAL.sub(lambda match: f"\\{match[0]}", text)
