"""Token ids as one shared read-only array, made once from what a caller gives."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_INT32 = np.iinfo(np.int32)


def token_array(name: str, token_ids: Iterable[Any]) -> NDArray[np.int32]:
    """A read-only, C-contiguous int32 array [ids] of a sequence, or one-dimensional array, of ints.

    An int32 array that is read-only already is given back as it is, so that many may share it.
    Raises ValueError, which begins with `name`, for anything but integers, and for ids beyond int32.
    """
    if not isinstance(token_ids, np.ndarray):
        array = _from_ints(name, token_ids)
    elif token_ids.ndim != 1:
        raise ValueError(
            f"{name} must be a one-dimensional sequence of token ids, got an array of shape {token_ids.shape}"
        )
    elif token_ids.dtype.kind not in "iu" and token_ids.size:
        raise ValueError(f"{name} must hold integers, got an array of {token_ids.dtype}")
    else:
        array = token_ids
    if array.dtype == np.int32 and array.flags.c_contiguous and not array.flags.writeable:
        return array
    if array.size and not (_INT32.min <= array.min() and array.max() <= _INT32.max):
        outside = next(token_id for token_id in array.tolist() if not _INT32.min <= token_id <= _INT32.max)
        raise _beyond_int32(name, outside)
    array = array.astype(np.int32, order="C")
    array.flags.writeable = False
    return array


def _from_ints(name: str, token_ids: Iterable[Any]) -> NDArray[Any]:
    if isinstance(token_ids, str | bytes | bytearray):
        raise ValueError(f"{name} must be a sequence of token ids, got {token_ids!r:.100}")
    ids = token_ids if isinstance(token_ids, list | tuple) else tuple(token_ids)
    wrong = [kind for kind in set(map(type, ids)) if kind is bool or not issubclass(kind, int | np.integer)]
    if wrong:
        first = next(token_id for token_id in ids if type(token_id) in wrong)
        raise ValueError(f"{name} must hold integers, got {first!r:.100}")
    try:
        return np.array(ids, np.int64)
    except OverflowError:
        outside = next(int(token_id) for token_id in ids if not _INT32.min <= int(token_id) <= _INT32.max)
        raise _beyond_int32(name, outside) from None


def _beyond_int32(name: str, token_id: int) -> ValueError:
    return ValueError(f"{name} must hold ids between {_INT32.min} and {_INT32.max}, got {token_id}")
