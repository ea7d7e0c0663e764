"""JSON as models write it, mended as it comes: what goes out is strict JSON.

Strict JSON goes out unchanged. Mended are: control characters inside strings, backslashes that begin no
escape, strings in single quotes, Python's `True`, `False` and `None`, and a comma before a closing bracket.
"""

import json
import re
from typing import Any

from albireo_jax.text.answers.json_scanner import NUMBER_ENDS, ROWS, STRINGS, JsonScanner, State

_ESCAPE = r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})'
_RUNS = {
    '"': re.compile(rf'(?:[^"\\\x00-\x1f]++|{_ESCAPE})*+'),
    "'": re.compile(rf"(?:[^'\"\\\x00-\x1f]++|{_ESCAPE})*+"),
}
"""Characters of a string that need no mending, by its quotation mark."""

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*+')
_UNFINISHED_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_SPACES = " \t\n\r"
_RUN_OF_SPACES = re.compile(rf"[{_SPACES}]*+")
_TOKENS = re.compile(r'\\.|["{}\[\],]', re.DOTALL)
_WORDS = {"T": ("True", "true"), "F": ("False", "false"), "N": ("None", "null")}
_VALUES = frozenset((State.VALUE, State.FIRST_ITEM))
_STARTS_OF_STRINGS = _VALUES | {State.FIRST_KEY, State.KEY}


class JsonRepair(JsonScanner):
    """Reads one JSON value; `done` when it is whole, `failed` when it cannot be mended."""

    def __init__(self) -> None:
        super().__init__()
        self._quote = '"'
        self._comma: list[str] = []  # a comma and spaces after it, whose fate the next character decides
        self._written: list[str] = []

    def take(self) -> str:
        """Strict JSON that was written since the last call."""
        written = "".join(self._written)
        self._written.clear()
        return written

    def mend(self, text: str, start: int) -> int:
        """Mend `text` from `start`; the offset up to which it was read may be short of the end."""
        at = as_is = start  # what lies between them needs no mending
        while at < len(text) and not (self.done or self.failed):
            end = self._read_strict(text, at)
            if end > at or self.done or self.failed:
                at = end
                continue
            self._written.append(text[as_is:at])
            as_is = at
            is_comma_held = bool(self._comma)
            at = self._read_oddity(text, at)
            if at == as_is and bool(self._comma) == is_comma_held:
                break
            as_is = at
        self._written.append(text[as_is:at])
        return at

    def _read_strict(self, text: str, at: int) -> int:
        """Read what needs no mending; nothing if the next character does."""
        state, rows, end = self._state, ROWS, len(text)
        plain, run = _PLAIN.match, _RUNS['"'].match
        if self._comma or self._quote == "'":
            return at
        comma_at = end
        while at < end:
            if state in STRINGS:
                at = plain(text, at).end()  # type: ignore[union-attr]  # a run may be empty
                if at < end and text[at] == "\\":
                    at = run(text, at).end()  # type: ignore[union-attr]
                if at == end or text[at] != '"':
                    break
            character = text[at]
            after = rows[state].get(character)
            if after is None:
                if state not in NUMBER_ENDS:
                    break
                after = State.VALUE_END  # a number ends before the character that cannot belong to it
            else:
                if character == ",":
                    comma_at = at
                at += 1
            if after >= State.OPEN_ARRAY:
                after = self._turn(after)
                if self.done or self.failed:
                    return at
            state = after
        if (
            comma_at < at
            and text[at : at + 1] in ("", "]", "}")
            and not text[comma_at + 1 : at].strip(_SPACES)
        ):
            at, state = comma_at, self._open[-1]  # what comes decides whether the comma may stay
        self._state = state
        return at

    def _read_oddity(self, text: str, at: int) -> int:
        """Read and mend what `text` has at `at`; nothing if more is needed, or if it cannot be mended."""
        state, character = self._state, text[at]
        if self._comma or (character == "," and state in (State.AFTER_ITEM, State.AFTER_MEMBER)):
            return self._read_comma(text, at)
        if state in STRINGS:
            return self._read_in_string(text, at)
        if character == "'" and state in _STARTS_OF_STRINGS:
            self._quote = "'"
            return self._write('"', at + 1)
        if character in _WORDS and state in _VALUES:
            pythons, strict = _WORDS[character]
            if text.startswith(pythons, at):
                return self._write(strict, at + len(pythons))
            self.failed = not pythons.startswith(text[at:])
            return at
        self.failed = not self.done
        return at

    def _read_comma(self, text: str, at: int) -> int:
        """Hold a comma and the spaces after it; then drop the comma before a closing bracket."""
        spaces = _RUN_OF_SPACES.match(text, at if self._comma else at + 1)
        assert spaces is not None, "it may be empty"
        end = spaces.end()
        self._comma.append(text[at:end])
        if end < len(text):
            comma = "".join(self._comma)
            self._comma.clear()
            self._write(comma[1:] if text[end] in "]}" else comma, end)
        return end

    def _read_in_string(self, text: str, at: int) -> int:
        run = _RUNS[self._quote].match(text, at)
        assert run is not None, "a run may be empty"
        if run.end() > at:
            self._written.append(run.group())
            return run.end()
        character = text[at]
        if character == self._quote:
            self._quote = '"'
            return self._write('"', at + 1)
        if character != "\\":  # a control character, or a double quote between single ones
            self._written.append(json.dumps(character)[1:-1])
            return at + 1
        if _UNFINISHED_ESCAPE.match(text, at):
            return at
        if text[at + 1] == "'":
            self._written.append("'")
            return at + 2
        self._written.append("\\\\")
        return at + 1

    def _write(self, strict: str, end: int) -> int:
        """Write and take in some strict JSON in the place of what was read up to `end`."""
        self._written.append(strict)
        super().scan(strict, 0)
        return end


def repaired_object(text: str) -> dict[str, Any] | None:
    """The object that `text` is or begins to be, mended, and closed where it breaks off; else None."""
    if not text.startswith("{"):
        return None
    mender = JsonRepair()
    mender.mend(text, 0)
    written = mender.take()
    for candidate in (written, *_completed(written)):
        try:
            return json.loads(candidate)
        except (ValueError, RecursionError):
            continue
    return None


def _completed(text: str) -> tuple[str, str]:
    """The beginning of a JSON value with what it opened closed: all of it, and up to its last whole value."""
    closers: list[str] = []
    in_string = False
    whole, whole_closers = 0, ""
    for token in _TOKENS.finditer(text):
        character = token.group()
        if character == '"':
            in_string = not in_string
        if in_string or len(character) > 1:
            continue
        if character in "{[":
            closers.append("}" if character == "{" else "]")
        elif character in "}]":
            closers.pop()
        if character != '"':
            whole = token.start() if character == "," else token.end()
            whole_closers = "".join(reversed(closers))
    ends = "".join(reversed(closers))
    return text + ('"' if in_string else "") + ends, text[:whole] + whole_closers
