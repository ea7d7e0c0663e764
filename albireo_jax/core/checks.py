"""Checks of a caller's values: one in Python's own type comes back, or a ValueError names value and limit.

NumPy scalars, and arrays of any library that have no axes, stand for the Python values that they hold.
"""

import math
from collections.abc import Iterable, Mapping, Set
from enum import StrEnum
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

MAX_INT = 2**31 - 1
"""Largest integer of a field that a device holds in 32 bits."""

_SMALLEST = float(np.finfo(np.float32).tiny)

_Choice = TypeVar("_Choice", bound=StrEnum)


@runtime_checkable
class ArrayLike(Protocol):
    """An array of NumPy, JAX or another library that NumPy can read."""

    @property
    def shape(self) -> Any:
        """Sizes of its axes."""
        ...

    def __array__(self) -> NDArray[Any]:
        """Itself as a NumPy array."""
        ...


def plain(value: object) -> object:
    """The Python value of a NumPy scalar or of an array without axes; anything else as it is."""
    if value is None or type(value) in (int, float, bool, str) or not isinstance(value, ArrayLike):
        return value
    if tuple(value.shape):
        return value
    array = np.asarray(value)
    if array.dtype.kind == "V":  # bfloat16 and other floats that NumPy does not know itself
        array = array.astype(np.float64)
    return array.item()


def integer(name: str, value: object, *, low: int | None, high: int | None = MAX_INT) -> int:
    """`value` as an int within the limits; true and false are none."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"{name} must be an integer, got {value!r:.200}")
    is_low = low is not None and number < low
    if is_low or (high is not None and number > high):
        limit = f"at least {low}" if is_low and high in (None, MAX_INT) else f"between {low} and {high}"
        raise ValueError(f"{name} must be {limit}, got {number}")
    return number


def optional_integer(name: str, value: object, *, low: int) -> int | None:
    """`value` as an int of at least `low`, or None."""
    return None if value is None else integer(name, value, low=low)


def number(name: str, value: object, *, low: float, high: float, open_low: bool = False) -> float:
    """`value` as a finite float within the limits, the lower one left out if `open_low`."""
    given = plain(value)
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise ValueError(f"{name} must be a finite number, got {value!r:.200}")
    if isinstance(given, float) and not math.isfinite(given):
        raise ValueError(f"{name} must be a finite number, got {given}")
    if given < low or given > high or (open_low and given == low):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}]"
        raise ValueError(f"{name} must be in {interval}, got {given}")
    return _for_float32(float(given), keeps=open_low)


def _for_float32(value: float, *, keeps: bool) -> float:
    """`value` unless it is nearer to 0 than a device can tell: then 0, or if it `keeps` off 0 the nearest."""
    if value == 0.0 or abs(value) >= _SMALLEST:
        return value
    return math.copysign(_SMALLEST, value) if keeps else 0.0


def flag(name: str, value: object) -> bool:
    """`value` as a bool; numbers and texts are none."""
    given = plain(value)
    if not isinstance(given, bool):
        raise ValueError(f"{name} must be true or false, got {value!r:.200}")
    return given


def choice(name: str, value: object, kind: type[_Choice], *, also: tuple[str, ...] = ()) -> _Choice:
    """The member of `kind` that `value` is or names; an error lists all of them, after those of `also`."""
    if not isinstance(value, str) or value not in [*kind]:
        raise ValueError(f"{name} must be one of {[*also, *(str(k) for k in kind)]}, got {value!r:.200}")
    return kind(value)


def optional_choice(
    name: str, value: object, kind: type[_Choice], *, none_word: str | None = None
) -> _Choice | None:
    """The member of `kind` that `value` is or names, or None for None and for the word that stands for it."""
    if value is None or (none_word is not None and value == none_word):
        return None
    return choice(name, value, kind, also=() if none_word is None else (none_word,))


def ordered(name: str, values: object, *, of: str) -> list[Any]:
    """The elements of a list, tuple, array or iterator, with NumPy's scalars as they are.

    A text, bytes, mapping or set is refused: it is one thing, or has no order.
    """
    if not is_ordered(values):
        raise ValueError(f"{name} must be a list of {of}, got {values!r:.200}")
    return list(np.asarray(values) if isinstance(values, ArrayLike) else cast("Iterable[Any]", values))


def is_ordered(value: object) -> bool:
    """Whether a value is a list, tuple, iterator or array with axes, not one thing or a set of them."""
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping | Set):
        return False
    return bool(tuple(value.shape)) if isinstance(value, ArrayLike) else isinstance(value, Iterable)


def token_ids(name: str, values: object) -> tuple[int, ...]:
    """Token ids from a list, tuple, array or iterator of integers, none below 0 or beyond 32 bits."""
    elements = ordered(name, values, of="token ids")
    if {*map(type, elements)} <= {int} and (not elements or 0 <= min(elements) <= max(elements) <= MAX_INT):
        return tuple(elements)
    return tuple(integer(name, element, low=0) for element in elements)


def strings(name: str, value: object) -> tuple[str, ...]:
    """Texts that are not empty, from one or from a list of them; None is none."""
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else ordered(name, value, of="texts")
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name} must hold non-empty strings, got {text!r:.200}")
        check_characters(name, text)
    return tuple(str(text) for text in texts)


def check_characters(name: str, text: str) -> None:
    """Raise ValueError for half a surrogate pair, which is no character and has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must consist of characters, got {text!r:.200}") from error
