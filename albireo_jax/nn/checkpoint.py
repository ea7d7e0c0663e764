"""A sharded checkpoint of a decoder through orbax: saved at one tensor-parallel degree, restored at any.

A checkpoint is a folder: `config.json` as Hugging Face writes it, `weights/` with the arrays in
canonical form, what else the caller puts beside them (a tokenizer), and last `albireo.json`, whose
presence says that the rest is complete, and which lists the bytes of each file of `weights/`. Each device
writes and reads its own slices.
"""

import json
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jaxtyping import Array

from albireo_jax.core.config import Dtype, ModelConfig
from albireo_jax.core.errors import WeightError
from albireo_jax.core.hf_config import model_config_to_hf, read_hf_config
from albireo_jax.core.model_files import CHECKPOINT_MARK
from albireo_jax.nn.canonical import (
    by_layers,
    canonical_shapes,
    canonical_sharding,
    read_canonical,
    to_canonical,
)
from albireo_jax.nn.decoder import DecoderWeights
from albireo_jax.nn.module import Decoder

_WEIGHTS = "weights"
_FORMAT = 1


def save(model: Decoder, path: Path, *, extra_files: Sequence[Path] = ()) -> None:
    """Write `model` to the folder `path`, with copies of `extra_files` in it.

    Raises ValueError if the folder exists and is not empty, or the model is quantised.
    """
    path = path.resolve()
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} exists and is not empty")
    arrays = to_canonical(model.config, model.weights(), model.mesh)
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


def restore(path: Path, mesh: Mesh, *, dtype: Dtype | None = None) -> Decoder:
    """The decoder saved in the folder `path`, on `mesh`, in `dtype` or the dtype it was saved in.

    Raises ModelError or its WeightError naming what is missing or broken.
    """
    config = read_hf_config(path)
    return Decoder(config, restore_weights(path, config=config, mesh=mesh, dtype=dtype), mesh)


def restore_weights(
    path: Path, *, config: ModelConfig, mesh: Mesh, dtype: Dtype | None = None
) -> DecoderWeights:
    """The weights alone, for a configuration already read, quantised if that says so; raises like `restore`.

    Fields are restored one by one, and those that become codes are let go as floats before the next.
    """
    mark = _read_mark(path)
    _check_files(path.resolve() / _WEIGHTS, mark.weight_bytes)
    kind = jnp.dtype(dtype.value if dtype is not None else mark.dtype)
    shapes = canonical_shapes(config)
    wanted = {
        name: jax.ShapeDtypeStruct(shape, kind, sharding=canonical_sharding(config, name, mesh))
        for name, shape in shapes.items()
    }
    folder = path.resolve() / _WEIGHTS
    with _broken_if_it_fails(folder), ocp.StandardCheckpointer() as checkpointer:
        _check_shapes(folder, checkpointer.metadata(folder), shapes)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:

        def field(name: str) -> Array:
            only = {name: wanted[name]}
            asked = ocp.args.PyTreeRestore(
                item=only,
                restore_args=ocp.checkpoint_utils.construct_restore_args(only),
                partial_restore=True,
            )
            with _broken_if_it_fails(folder):
                return checkpointer.restore(folder, args=asked)[name]

        return read_canonical(config, by_layers(config, field), mesh)


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


def _check_shapes(folder: Path, metadata: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    stored = {name: tuple(entry.shape) for name, entry in dict(metadata.item_metadata or {}).items()}
    if not stored:
        raise WeightError(f"{folder} is missing or broken: it describes no arrays")
    if stored != shapes:
        wrong = sorted(name for name in {*stored, *shapes} if stored.get(name) != shapes.get(name))[0]
        raise WeightError(
            f"{folder}: {wrong} has shape {stored.get(wrong, 'none')}, expected {shapes.get(wrong, 'none')}"
        )
