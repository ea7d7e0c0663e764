"""Header of a GGUF file: its metadata, and where its tensors are; read in milliseconds.

`gguf.GGUFReader` makes several NumPy views of every string, seconds for a vocabulary of 49,152 tokens
and its merges; here the header is walked once. Layout: the GGUF specification of ggml, versions 2 and 3.
"""

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from albireo_jax.core.errors import ModelError

Scalar = bool | int | float | str
MetadataValue = Scalar | list[bool] | list[int] | list[float] | list[str] | list[Any]
"""A value; lists of lists where the file nests them, and lone surrogates for bytes that are no UTF-8."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBER_CODES = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""GGUF value type -> struct (and NumPy) code of a number."""

_STRING = 8
_ARRAY = 9
_DEFAULT_ALIGNMENT = 32
_MAX_AXES = 4
_MAX_NESTING = 8
_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """A tensor `offset` bytes into the file, with ggml's number of its `type`; contiguous axis last."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """All that a GGUF file says about itself before its data."""

    metadata: Mapping[str, MetadataValue]
    tensors: tuple[GgufTensor, ...]


def read_gguf_header(path: Path) -> GgufHeader:
    """Metadata and the table of tensors; raises like `read_gguf_metadata`."""
    return _read(path, with_tensors=True)


def read_gguf_metadata(path: Path) -> dict[str, MetadataValue]:
    """Every key of the file's header and its value, arrays as lists.

    Raises ModelError if the file is not GGUF, is cut short, or holds a value of an unknown kind.
    """
    return dict(_read(path, with_tensors=False).metadata)


def split_parts(path: Path) -> tuple[Path, ...]:
    """All files of the model that `path` is or is a part of, in order; just itself if it is whole.

    Parts are named NAME-00001-of-00003.gguf, as llama.cpp writes and reads them. Raises ModelError if `path`
    is a part under another name, and for parts that are missing or do not belong together.
    """
    metadata = read_gguf_metadata(path)
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or count < 2:
        return (path,)
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        number = metadata.get("split.no", 0)
        raise ModelError(
            f"{path} is part {number + 1 if isinstance(number, int) else '?'} of a model in {count} parts, "
            f"which must be named NAME-00001-of-{count:05}.gguf and so on"
        )
    parts = tuple(path.with_name(f"{match['name']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1))
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ModelError(f"{path} is one of {count} parts, of which {', '.join(missing)} are missing")
    for number, part in enumerate(parts):
        metadata = read_gguf_metadata(part)
        if (metadata.get("split.no"), metadata.get("split.count")) != (number, count):
            raise ModelError(
                f"{part} says that it is part {metadata.get('split.no')} (from 0) of "
                f"{metadata.get('split.count')}, expected {number} of {count}"
            )
    return parts


def whole_name(path: Path) -> str:
    """Name of the model that a GGUF file is, or is a part of."""
    match = _PART.fullmatch(path.name)
    return path.stem if match is None else match["name"]


def _read(path: Path, *, with_tensors: bool) -> GgufHeader:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Header(data)
            metadata = header.metadata()
            return GgufHeader(metadata=metadata, tensors=header.tensors(metadata) if with_tensors else ())
    except (ValueError, struct.error) as error:  # an empty file, a length beyond the end, bad UTF-8
        raise ModelError(f"{path} is not a readable GGUF file: {error}") from error


class _Header:
    """A cursor over the header: each method reads one thing and moves past it."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._offset = len(_MAGIC)
        if data[: len(_MAGIC)] != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        # The version's low half is zero when the file has the other byte order.
        self._order = "<" if struct.unpack_from("<H", data, self._offset)[0] else ">"
        version = self._number("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version} is not one of {list(_VERSIONS)}")

    def metadata(self) -> dict[str, MetadataValue]:
        """All keys and values."""
        self._num_tensors = int(self._number("Q"))
        num_keys = int(self._number("Q"))
        metadata: dict[str, MetadataValue] = {}
        for _ in range(num_keys):
            [key] = self._strings(1)
            try:
                metadata[key] = self._value(int(self._number("I")))
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
        return metadata

    def tensors(self, metadata: Mapping[str, MetadataValue]) -> tuple[GgufTensor, ...]:
        """The table that follows the metadata; its offsets count from the aligned end of the table."""
        if self._order == ">":
            raise ValueError("tensors in big-endian byte order are not supported")
        rows = [self._tensor() for _ in range(self._num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment {alignment!r} is not a number of bytes")
        data = -(-self._offset // alignment) * alignment
        return tuple(replace(row, offset=data + row.offset) for row in rows)

    def _tensor(self) -> GgufTensor:
        [name] = self._strings(1)
        num_axes = int(self._number("I"))
        if num_axes > _MAX_AXES:
            raise ValueError(f"tensor {name} has {num_axes} axes")
        shape = tuple(int(self._number("Q")) for _ in range(num_axes))[::-1]
        return GgufTensor(name=name, shape=shape, type=int(self._number("I")), offset=int(self._number("Q")))

    def _value(self, kind: int) -> MetadataValue:
        if kind == _STRING:
            return self._strings(1)[0]
        return self._array(0) if kind == _ARRAY else self._numbers(kind, 1)[0]

    def _array(self, depth: int) -> list[Any]:
        item_kind, count = int(self._number("I")), int(self._number("Q"))
        if item_kind == _STRING:
            return self._strings(count)
        if item_kind != _ARRAY:
            return self._numbers(item_kind, count)
        if depth == _MAX_NESTING:
            raise ValueError(f"arrays are nested more than {_MAX_NESTING} deep")
        return [self._array(depth + 1) for _ in range(count)]

    def _number(self, code: str) -> int | float:
        (number,) = struct.unpack_from(self._order + code, self._data, self._offset)
        self._offset += struct.calcsize(code)
        return number

    def _numbers(self, kind: int, count: int) -> list[int] | list[float] | list[bool]:
        if kind not in _NUMBER_CODES:
            raise ValueError(f"value type {kind} is unknown")
        dtype = np.dtype(self._order + _NUMBER_CODES[kind])
        if count * dtype.itemsize > len(self._data) - self._offset:
            raise ValueError(f"an array of {count} numbers runs past the end")
        numbers = np.frombuffer(self._data, dtype, count, self._offset).tolist()
        self._offset += count * dtype.itemsize
        return numbers

    def _strings(self, count: int) -> list[str]:
        data, offset = self._data, self._offset
        read_length = struct.Struct(self._order + "Q").unpack_from
        strings: list[str] = []
        for _ in range(count):
            (length,) = read_length(data, offset)
            end = offset + 8 + length
            if end > len(data):
                raise ValueError(f"a string of {length} bytes runs past the end")
            strings.append(data[offset + 8 : end].decode(errors="surrogateescape"))
            offset = end
        self._offset = offset
        return strings
