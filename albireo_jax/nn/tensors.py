"""Named tensors in files, read slice by slice: the protocol, and safetensors behind it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from albireo_jax.core.errors import WeightError

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_NOT_THE_MODEL = ("consolidated", "adapter")
"""Beginnings of names of other weights that checkpoints come with."""

_SHARD = re.compile(r"(?P<name>.+)-\d+-of-(?P<count>\d+)\.safetensors")
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
                if name in self._tensors:
                    other = self._tensors[name].file
                    raise WeightError(f"{file}: tensor {name} is there twice, also in {other}")
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
    """File -> tensors that the index places in it (none without an index).

    An index decides, unless none of its files is there; then a file or a complete set of shards is looked
    for by the names that transformers gives them, beside which others (an adapter, Mistral's own
    `consolidated` files, hidden ones) may lie.
    """
    found = _weight_files(folder)
    names = {file.name for file in found}
    for index in (folder / _INDEX, *_other_indices(folder)):
        if index.is_file():
            shards = _indexed(index)
            if _WHOLE not in names or any(file.is_file() for file in shards):
                return shards
    if _WHOLE in names:
        return {folder / _WHOLE: set()}
    candidates = [file for file in found if not file.name.startswith(_NOT_THE_MODEL)] or found
    if candidates and all(_SHARD.fullmatch(file.name) for file in candidates):
        return {file: set() for file in _complete(candidates)}
    if len(candidates) == 1 and not candidates[0].name.startswith("adapter"):
        return {candidates[0]: set()}
    raise WeightError(f"{folder} has {_seen(folder, candidates)}")


def _weight_files(folder: Path) -> list[Path]:
    """Safetensors files of a folder, links that lead nowhere included, hidden files not."""
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))
    return [file for file in files if file.is_file() or file.is_symlink()]


def _other_indices(folder: Path) -> list[Path]:
    """The index of another name, if there is one alone and it is not Mistral's."""
    others = [
        file
        for file in sorted(folder.glob("*.safetensors.index.json"))
        if file.name != _INDEX and not file.name.startswith((".", *_NOT_THE_MODEL))
    ]
    return others if len(others) == 1 else []


def _indexed(index: Path) -> dict[Path, set[str]]:
    shards: dict[Path, set[str]] = {}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for name, file in weight_map.items():
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise WeightError(f"{index} places tensor {name} in {file}, which is outside the folder")
            shards.setdefault(index.parent / file, set()).add(name)
    except WeightError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightError(f"{index} is not an index of safetensors files: {error!r}") from error
    return shards


def _complete(shards: list[Path]) -> list[Path]:
    """All files of the one set that `shards` are of; WeightError with the names of missing ones."""
    matches = [match for match in map(_SHARD.fullmatch, (file.name for file in shards)) if match]
    sets = {(match["name"], match["count"]) for match in matches}
    folder = shards[0].parent
    if len(sets) > 1:
        raise WeightError(f"{folder} has shards of {len(sets)} sets of files but no {_INDEX}")
    [(name, count)] = sets
    width = len(count)
    files = [folder / f"{name}-{i:0{width}}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
    missing = [file.name for file in files if file not in shards]
    if missing:
        raise WeightError(f"{folder} lacks {', '.join(missing)} of {count} shards, and has no {_INDEX}")
    return files


def _seen(folder: Path, candidates: list[Path]) -> str:
    """Words for an error: the files that a folder has in place of the model's weights."""
    if len(candidates) == 1:
        return f"only {candidates[0].name}, an adapter; merge it into its base model first"
    if candidates:
        return f"{len(candidates)} safetensors files but no {_INDEX}"
    pickled = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    return "no safetensors file" + (f", only {pickled[0]}; convert it to safetensors" if pickled else "")


def _open(file: Path) -> Any:
    if not file.is_file():
        link = f", it is a link to {file.readlink()}" if file.is_symlink() else ""
        raise WeightError(f"{file} is missing{link}")
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise WeightError(f"{file} is truncated or not a safetensors file: {error}") from error
