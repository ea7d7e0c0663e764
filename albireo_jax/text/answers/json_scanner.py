"""JSON text checked as it comes: one value, character by character, in time linear in its length."""

import re
from enum import IntEnum, auto

MAX_JSON_DEPTH = 64
"""Objects and arrays inside one another in JSON of a client or a model; deeper ones are refused."""


class State(IntEnum):
    """States of the scanner, by the text that may come next; the last four are no states but events."""

    VALUE = 0
    FIRST_ITEM = auto()
    FIRST_KEY = auto()
    KEY = auto()
    COLON = auto()
    AFTER_ITEM = auto()
    AFTER_MEMBER = auto()
    MINUS = auto()
    ZERO = auto()
    DIGITS = auto()
    POINT = auto()
    FRACTION = auto()
    E = auto()
    E_SIGN = auto()
    EXPONENT = auto()
    T = auto()
    TR = auto()
    TRU = auto()
    F = auto()
    FA = auto()
    FAL = auto()
    FALS = auto()
    N = auto()
    NU = auto()
    NUL = auto()
    STRING = auto()
    ESCAPE = auto()
    U1 = auto()
    U2 = auto()
    U3 = auto()
    U4 = auto()
    KEY_STRING = auto()
    KEY_ESCAPE = auto()
    KEY_U1 = auto()
    KEY_U2 = auto()
    KEY_U3 = auto()
    KEY_U4 = auto()
    OPEN_ARRAY = auto()
    OPEN_OBJECT = auto()
    CLOSE = auto()
    VALUE_END = auto()


_S = State
_Row = dict[str, State]
NUMBER_ENDS = frozenset((_S.ZERO, _S.DIGITS, _S.FRACTION, _S.EXPONENT))
STRINGS = frozenset((_S.STRING, _S.KEY_STRING))
_STRING_RUN = re.compile(r'[^"\\\x00-\x1f]*+')


def _to(characters: str, state: State) -> _Row:
    return dict.fromkeys(characters, state)


def _word(word: str, *states: State) -> dict[State, _Row]:
    """Rows for the rest of `true`, `false` or `null`, whose first character led to the first state."""
    return {
        state: {letter: after}
        for state, letter, after in zip(states, word[1:], (*states[1:], _S.VALUE_END), strict=True)
    }


def _string(body: State, escape: State, hex_digits: tuple[State, ...], end: State) -> dict[State, _Row]:
    rows = {
        body: {'"': end, "\\": escape},
        escape: _to('"\\/bfnrt', body) | {"u": hex_digits[0]},
    }
    after = (*hex_digits[1:], body)
    digits = "0123456789abcdefABCDEF"
    return rows | {state: _to(digits, after[i]) for i, state in enumerate(hex_digits)}


def _rows() -> list[_Row]:
    """Next state by state and character; a character that is missing may not come."""
    digits, nonzero = "0123456789", "123456789"
    value = (
        _to(nonzero, _S.DIGITS)
        | {"{": _S.OPEN_OBJECT, "[": _S.OPEN_ARRAY, '"': _S.STRING, "-": _S.MINUS, "0": _S.ZERO}
        | {"t": _S.T, "f": _S.F, "n": _S.N}
    )
    exponent = _to("eE", _S.E)
    rows = {
        _S.VALUE: value,
        _S.FIRST_ITEM: value | {"]": _S.CLOSE},
        _S.FIRST_KEY: {'"': _S.KEY_STRING, "}": _S.CLOSE},
        _S.KEY: {'"': _S.KEY_STRING},
        _S.COLON: {":": _S.VALUE},
        _S.AFTER_ITEM: {",": _S.VALUE, "]": _S.CLOSE},
        _S.AFTER_MEMBER: {",": _S.KEY, "}": _S.CLOSE},
        _S.MINUS: _to(nonzero, _S.DIGITS) | {"0": _S.ZERO},
        _S.ZERO: {".": _S.POINT} | exponent,
        _S.DIGITS: _to(digits, _S.DIGITS) | {".": _S.POINT} | exponent,
        _S.POINT: _to(digits, _S.FRACTION),
        _S.FRACTION: _to(digits, _S.FRACTION) | exponent,
        _S.E: _to(digits, _S.EXPONENT) | _to("+-", _S.E_SIGN),
        _S.E_SIGN: _to(digits, _S.EXPONENT),
        _S.EXPONENT: _to(digits, _S.EXPONENT),
    }
    for state in list(State)[: _S.MINUS]:  # those between tokens
        rows[state] |= _to(" \t\n\r", state)
    rows |= _word("true", _S.T, _S.TR, _S.TRU)
    rows |= _word("false", _S.F, _S.FA, _S.FAL, _S.FALS)
    rows |= _word("null", _S.N, _S.NU, _S.NUL)
    rows |= _string(_S.STRING, _S.ESCAPE, (_S.U1, _S.U2, _S.U3, _S.U4), _S.VALUE_END)
    keys = (_S.KEY_U1, _S.KEY_U2, _S.KEY_U3, _S.KEY_U4)
    rows |= _string(_S.KEY_STRING, _S.KEY_ESCAPE, keys, _S.COLON)
    return [rows[state] for state in State if state < _S.OPEN_ARRAY]


ROWS = _rows()


class JsonScanner:
    """Reads one JSON value; `done` when it is whole, `failed` when it cannot become one any more.

    What it has read until then is the beginning of a value, or opens one bracket too many.
    """

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._state: State = _S.VALUE
        self._open: list[State] = []  # for each open object or array, the state after a value in it

    def scan(self, text: str, start: int) -> int:
        """Offset of the end of the value, begun earlier or at `start`; the text's end if it goes on."""
        at, end, state, rows = start, len(text), self._state, ROWS
        while at < end:
            if state in STRINGS:
                match = _STRING_RUN.match(text, at)
                assert match is not None
                at = match.end()
                if at == end:
                    break
            after = rows[state].get(text[at])
            if after is None:
                if state not in NUMBER_ENDS:
                    self.failed = True
                    return at
                after = _S.VALUE_END  # a number ends before the character that cannot belong to it
            else:
                at += 1
            if after >= _S.OPEN_ARRAY:
                after = self._turn(after)
                if self.done or self.failed:
                    return at
            state = after
        self._state = state
        return at

    def _turn(self, event: State) -> State:
        """Open or close, and the state after it."""
        if event is _S.OPEN_ARRAY or event is _S.OPEN_OBJECT:
            self.failed = len(self._open) == MAX_JSON_DEPTH
            is_array = event is _S.OPEN_ARRAY
            self._open.append(_S.AFTER_ITEM if is_array else _S.AFTER_MEMBER)
            return _S.FIRST_ITEM if is_array else _S.FIRST_KEY
        if event is _S.CLOSE:
            self._open.pop()
        self.done = not self._open
        return _S.VALUE if self.done else self._open[-1]
