"""Values kept by key, least recently used first to go, within a count and a number of bytes."""

from collections import OrderedDict
from typing import Generic, TypeVar

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class BoundedCache(Generic[_Key, _Value]):
    """At most `max_count` values whose keys take at most `max_bytes` together; one thread at a time."""

    def __init__(self, max_count: int, *, max_bytes: int) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._values: OrderedDict[_Key, tuple[_Value, int]] = OrderedDict()
        self._num_bytes = 0

    def __len__(self) -> int:
        """Number of values that are kept."""
        return len(self._values)

    def get(self, key: _Key) -> _Value | None:
        """The value of `key`, which was used now; None if there is none."""
        entry = self._values.get(key)
        if entry is None:
            return None
        self._values.move_to_end(key)
        return entry[0]

    def put(self, key: _Key, value: _Value, *, num_bytes: int) -> None:
        """Keep a value under a key of `num_bytes`, at the cost of others."""
        if key in self._values:
            self._num_bytes -= self._values.pop(key)[1]
        self._values[key] = (value, num_bytes)
        self._num_bytes += num_bytes
        while len(self._values) > self._max_count or self._num_bytes > self._max_bytes:
            self._num_bytes -= self._values.popitem(last=False)[1][1]
