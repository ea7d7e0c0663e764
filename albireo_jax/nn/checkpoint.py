"""A sharded checkpoint of a decoder through orbax: saved at one tensor-parallel degree, restored at any.

A checkpoint is a folder: `config.json` as Hugging Face writes it, `weights/` with the arrays in canonical
form, stacked or one for each layer, what else the caller puts beside them (a tokenizer), and last
`albireo.json`, whose presence says that the rest is complete, and which lists the bytes of each file of
`weights/`. Each device writes and reads its own slices.
"""

import json
import shutil
from collections.abc import Generator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jaxtyping import Array

from albireo_jax.core.config import Dtype
from albireo_jax.core.errors import WeightError
from albireo_jax.core.gpu_options import LayerForm
from albireo_jax.core.hf_config import model_config_to_hf, read_hf_config
from albireo_jax.core.model_config import ModelConfig
from albireo_jax.core.model_files import CHECKPOINT_MARK
from albireo_jax.nn.canonical import (
    CanonicalRead,
    by_layers,
    canonical_shapes,
    canonical_sharding,
    layer_sharding,
    read_canonical,
    to_canonical,
)
from albireo_jax.nn.decoder import DecoderWeights, Layered
from albireo_jax.nn.module import Decoder

_WEIGHTS = "weights"
_FORMAT = 1


def save(model: Decoder, path: Path, *, extra_files: Sequence[Path] = ()) -> None:
    """Write `model` to the folder `path`, with copies of `extra_files` in it.

    Layers that have arrays of their own are saved as they are, so that none is copied to be stacked.
    Raises ValueError if the folder exists and is not empty, or the model is quantised.
    """
    path = path.resolve()
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} exists and is not empty")
    fields = to_canonical(model.config, model.weights(), model.mesh)
    arrays = {name: _by_number(field) for name, field in fields.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / _WEIGHTS, arrays)
    if jax.process_index() == 0:
        for file in extra_files:
            shutil.copyfile(file, path / file.name)
        (path / "config.json").write_text(json.dumps(model_config_to_hf(model.config), indent=2))
        mark = {
            "format": _FORMAT,
            "dtype": model.weights().embed_VD.dtype.name,
            "weight_bytes": _file_bytes(path / _WEIGHTS),
        }
        (path / CHECKPOINT_MARK).write_text(json.dumps(mark))


def restore(
    path: Path, mesh: Mesh, *, dtype: Dtype | None = None, form: LayerForm = LayerForm.STACKED
) -> Decoder:
    """The decoder saved in the folder `path`, on `mesh`, in `dtype` or the dtype it was saved in.

    Whichever form it was saved in, its layers get the one that is asked for.
    Raises ModelError or its WeightError naming what is missing or broken.
    """
    config = read_hf_config(path)
    return Decoder(config, restore_weights(path, config=config, mesh=mesh, dtype=dtype, form=form), mesh)


def restore_weights(
    path: Path,
    *,
    config: ModelConfig,
    mesh: Mesh,
    dtype: Dtype | None = None,
    form: LayerForm = LayerForm.STACKED,
) -> DecoderWeights:
    """The weights alone, for a configuration already read, quantised if that says so; raises like `restore`.

    Fields are restored one by one, and those that become codes are let go as floats before the next. A
    stacked field whose layers get arrays of their own is read into the host's memory first: the devices may
    have no room for both.
    """
    mark = _read_mark(path)
    folder = path.resolve() / _WEIGHTS
    _check_files(folder, mark.weight_bytes)
    kind = jnp.dtype(dtype.value if dtype is not None else mark.dtype)
    with _broken_if_it_fails(folder), ocp.StandardCheckpointer() as checkpointer:
        metadata: dict[str, Any] = dict(checkpointer.metadata(folder).item_metadata or {})
        _check_shapes(folder, metadata, canonical_shapes(config))
    unstacked = {name for name, entry in metadata.items() if isinstance(entry, Mapping)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        saved = _SavedFields(folder, checkpointer, config=config, mesh=mesh, dtype=kind, unstacked=unstacked)
        return read_canonical(config, saved.reader(form), mesh, form=form)


class _SavedFields:
    """The fields of an open checkpoint, those called `unstacked` as one array per layer."""

    def __init__(
        self,
        folder: Path,
        checkpointer: ocp.Checkpointer,
        *,
        config: ModelConfig,
        mesh: Mesh,
        dtype: jnp.dtype,
        unstacked: Set[str],
    ) -> None:
        self._folder = folder
        self._checkpointer = checkpointer
        self._config = config
        self._mesh = mesh
        self._dtype = dtype
        self._unstacked = unstacked
        self._shapes = canonical_shapes(config)

    def reader(self, form: LayerForm) -> CanonicalRead:
        """Reads fields, and layers of fields, for weights of this form."""
        if form is LayerForm.UNSTACKED:
            layer_of = by_layers(self._config, self._on_host, place=self._place_layer)
        else:
            layer_of = by_layers(self._config, self._field)

        def read(name: str, layer: int | None) -> Array:
            if layer is None:
                return self._stack(name) if name in self._unstacked else self._field(name)
            return self._layer(name, layer) if name in self._unstacked else layer_of(name, layer)

        return read

    def _field(self, name: str) -> Array:
        sharding = canonical_sharding(self._config, name, self._mesh)
        wanted = jax.ShapeDtypeStruct(self._shapes[name], self._dtype, sharding=sharding)
        return self._restore({name: wanted})[name]

    def _on_host(self, name: str) -> Any:
        """The whole of a field as a NumPy array."""
        wanted = {name: jax.ShapeDtypeStruct(self._shapes[name], self._dtype)}
        how = {name: ocp.RestoreArgs(restore_type=np.ndarray, dtype=self._dtype)}
        return self._restore(wanted, how)[name]

    def _place_layer(self, name: str, array: Any) -> Array:
        return jax.device_put(array, layer_sharding(self._config, name, self._mesh))

    def _layer(self, name: str, layer: int) -> Array:
        sharding = layer_sharding(self._config, name, self._mesh)
        wanted = jax.ShapeDtypeStruct(self._shapes[name][1:], self._dtype, sharding=sharding)
        return self._restore({name: {str(layer): wanted}})[name][str(layer)]

    def _stack(self, name: str) -> Array:
        sharding = canonical_sharding(self._config, name, self._mesh)
        layers = [self._layer(name, number) for number in range(self._config.num_layers)]
        return jax.jit(jnp.stack, out_shardings=sharding)(layers)

    def _restore(self, wanted: Any, how: Any = None) -> Any:
        """Some of the arrays; `how` tells it of those that do not go to devices."""
        asked = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=how or ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        with _broken_if_it_fails(self._folder):
            return self._checkpointer.restore(self._folder, args=asked)


def _by_number(field: Layered) -> Any:
    """A field as a checkpoint has it: the layers of a tuple by their numbers."""
    if not isinstance(field, tuple):
        return field
    return {str(number): layer for number, layer in enumerate(field)}


@contextmanager
def _broken_if_it_fails(folder: Path) -> Generator[None, None, None]:
    try:
        yield
    except WeightError:
        raise
    except Exception as error:  # what orbax raises for a damaged file is no narrower
        raise WeightError(f"{folder} is missing or broken: {error}") from error


@dataclass(frozen=True, slots=True)
class _Mark:
    dtype: str
    weight_bytes: dict[str, int]


def _read_mark(path: Path) -> _Mark:
    file = path / CHECKPOINT_MARK
    try:
        content = json.loads(file.read_text())
        return _Mark(str(content["dtype"]), dict(content["weight_bytes"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightError(f"{file} is missing or broken: {error}") from error


def _file_bytes(folder: Path) -> dict[str, int]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _check_files(folder: Path, weight_bytes: dict[str, int]) -> None:
    """Refuse a half-copied checkpoint before orbax starts reads that it abandons at the first loss."""
    found = _file_bytes(folder)
    for name, size in weight_bytes.items():
        if found.get(name) != size:
            raise WeightError(f"{folder / name} has {found.get(name, 'no')} bytes, expected {size}")


def _stored_shape(entry: Any) -> tuple[int, ...]:
    """The shape of a stored field, that of its stack if it has an array per layer; () if these differ."""
    if not isinstance(entry, Mapping):
        return tuple(entry.shape)
    layers = {tuple(layer.shape) for layer in entry.values()}  # type: ignore[reportUnknownVariableType,reportUnknownArgumentType]
    return (len(entry), *layers.pop()) if len(layers) == 1 else ()  # type: ignore[reportUnknownArgumentType]


def _check_shapes(folder: Path, metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    stored = {name: _stored_shape(entry) for name, entry in metadata.items()}
    if not stored:
        raise WeightError(f"{folder} is missing or broken: it describes no arrays")
    if stored != shapes:
        wrong = sorted(name for name in {*stored, *shapes} if stored.get(name) != shapes.get(name))[0]
        raise WeightError(
            f"{folder}: {wrong} has shape {stored.get(wrong, 'none')}, expected {shapes.get(wrong, 'none')}"
        )
