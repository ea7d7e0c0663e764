"""Named tensors in files, read slice by slice: the protocol, and safetensors behind it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from albireo_jax.core.errors import WeightError

_INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor as its file declares it; `is_float` if its values can become weights."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    is_float: bool


@runtime_checkable
class TensorSource(Protocol):
    """Tensors of a model on disk. Nothing is read until `read`, and then only what it asks for."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All tensors by name."""
        ...

    def read(self, name: str, *index: slice) -> NDArray[Any]:
        """The part of a tensor that `index` selects, with a start and a stop for each leading axis given."""
        ...


class SafetensorsSource:
    """A folder with one safetensors file, or with several and an index."""

    def __init__(self, folder: Path) -> None:
        """Open the shards and read their headers.

        Raises WeightError naming a file that is missing, truncated or broken, or that lacks a tensor
        which the index promises.
        """
        self._handles: dict[Path, Any] = {}
        self._tensors: dict[str, StoredTensor] = {}
        for file, promised in _shards(folder).items():
            handle = _open(file)
            self._handles[file] = handle
            names = handle.keys()
            for name in sorted(promised - set(names)):
                raise WeightError(f"{file} has no tensor {name}, which {_INDEX} places there")
            for name in names:
                stored = handle.get_slice(name)
                dtype = str(stored.get_dtype())
                self._tensors[name] = StoredTensor(
                    file=file, shape=tuple(stored.get_shape()), dtype=dtype, is_float=dtype in _FLOATS
                )

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All tensors of all shards by name."""
        return self._tensors

    def read(self, name: str, *index: slice) -> NDArray[Any]:
        """The part of a tensor that `index` selects, in its stored dtype."""
        stored = self._handles[self._tensors[name].file].get_slice(name)
        return np.asarray(stored[index] if index else stored[:])


def _shards(folder: Path) -> dict[Path, set[str]]:
    """File -> tensors that the index places in it (none without an index)."""
    index = folder / _INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards: dict[Path, set[str]] = {}
            for name, file in weight_map.items():
                shards.setdefault(folder / file, set()).add(name)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightError(f"{index} is not an index of safetensors files: {error!r}") from error
        return shards
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return {files[0]: set()}
    found = f"{len(files)} safetensors files but no {_INDEX}" if files else "no safetensors file"
    raise WeightError(f"{folder} has {found}")


def _open(file: Path) -> Any:
    if not file.is_file():
        raise WeightError(f"{file} is missing")
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise WeightError(f"{file} is truncated or not a safetensors file: {error}") from error
